"""Settings of the source of a tuning problem, and of the evaluation of its samples.

This file does not import torch, so that `--help` is fast.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from training.config import Knobs, knob

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.base.sampling import HeldOut, Models
    from training.distributed import Ranks

TABLE = "Evaluation and ablation"  # title of this group of flags in the help
EVALUATORS = ("final", "chooser", "reward")  # fields of `Problem` with rewards that score assets


@dataclass(frozen=True, kw_only=True)
class Choosing(Knobs):
    """Settings of the samples whose win rate chooses checkpoints and stops training early."""

    per_condition: int = knob(
        4,
        "Number of assets of each held-out prompt whose win rate chooses the checkpoint. More assets make"
        " the win rate less noisy, and an evaluation takes longer.",
        TABLE,
        name="choose_noises",
        low=1,
    )
    batch: int = knob(
        64,
        "Number of assets that an evaluation generates together. A smaller number needs less memory.",
        TABLE,
        name="evaluation_batch",
        low=1,
        rare=True,
    )
    seed: int = 0  # seed of the noise of these assets, which differs from that of the table

    def held_out(
        self,
        problem: "Problem",
        stage: str,
        other_models: "Models",
        baseline_models: "Models",
        ranks: "Ranks | None" = None,
    ) -> "HeldOut | None":
        """Return the function that measures the win rate of a stage's network while it is trained.

        Args:
            problem: tuning problem.
            stage: name of the stage.
            other_models: name of another stage -> network to use for it. Stages that are not named use the
                networks of the pipeline.
            baseline_models: name of a stage -> network of the baseline generator. Stages that are not named
                use the networks of the pipeline.
            ranks: distributed ranks; None for a single process.
        Returns: the function, or None if the problem has no reward that chooses checkpoints.
        """
        from eg3d_rlhf.tuning.flow.base.sampling import HeldOut, crossed
        from training.distributed import SINGLE

        if problem.chooser is None:
            return None
        prompts, seeds = crossed(problem.choosing, self.per_condition, self.seed)
        return HeldOut(
            pipeline=problem.pipeline,
            stage=stage,
            reward=problem.chooser,
            prompts=prompts,
            seeds=seeds,
            other_models=other_models,
            baseline_models=baseline_models,
            batch=self.batch,
            ranks=ranks or SINGLE,
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation(Knobs):
    """Settings of the samples of the results table.

    All generators have the same prompts and noises, so that their assets can be compared in pairs.
    """

    per_condition: int = knob(
        8,
        "Number of assets of each held-out prompt that the results table evaluates, for each trained"
        " generator.",
        TABLE,
        name="table_noises",
        low=2,
    )
    batch: int = knob(
        64,
        "Number of assets that an evaluation generates together. A smaller number needs less memory.",
        TABLE,
        name="evaluation_batch",
        low=1,
        shown="the default of the generator's family",
        rare=True,
    )
    seed: int = 0  # seed of the noise of these assets, which differs from that of training and of choosing

    def crossed(self, problem: "Problem") -> tuple[list[str], list[int]]:
        """Return the prompts and the noise seeds of the table's assets.

        There are C held-out prompts with S = `per_condition` assets each.

        Returns: C S prompts and C S noise seeds; the assets of a prompt are adjacent.
        """
        from training.phases import derive_seed

        prompts = []
        seeds = []
        for prompt in problem.held_out_prompts:
            for asset_number in range(self.per_condition):
                prompts.append(prompt)
                seeds.append(derive_seed("table", self.seed, prompt, asset_number) % 2**31)
        return prompts, seeds


_source_knob = functools.partial(knob, group="What is trained")
_rare_source_knob = functools.partial(_source_knob, rare=True)
PRECISIONS = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class EncodingSource:
    """Settings of the encoding of TRELLIS's assets as latents."""

    voxel_share: float = _rare_source_knob(
        0.25,
        "TRELLIS: share of the mean opacity above which a voxel of a decoded asset counts as filled when the"
        " asset is encoded again.",
        above=0,
    )
    views: int = _rare_source_knob(
        150, "TRELLIS: number of rendered images over which the features of an asset are averaged.", low=1
    )


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Settings of the weights of a generator in memory."""

    dtype: str = knob(
        "float32",
        "Data type of the networks' weights: float32, or float16 or bfloat16 for half the memory.",
        "Training",
        metavar="TYPE",
        choices=("float32", "float16", "bfloat16"),
    )


@dataclass(frozen=True, kw_only=True)
class ProblemSource(EncodingSource, WeightsSource, Knobs):
    """Settings of the source of a tuning problem: a generator, preference pairs, and their conditioning."""

    pipeline: str = _source_knob(
        "toy",
        "Generator to tune: toy for the bundled toy generator, or a folder with the networks of a supported"
        " generator (docs/reference/families.md).",
        metavar="toy|DIR",
    )
    pairs: str | None = _source_knob(
        None,
        "Folder with the preference pairs of people, in one folder for each stage. eg3d-rlhf flow tune"
        " --pairs-only makes such a folder.",
        metavar="DIR",
        shown="the simulated pairs of the toy",
    )
    labelled: str = _rare_source_knob(
        "others",
        "Toy: assets that the simulated annotators label. own: samples of the generator that is tuned;"
        " others: samples of a generator with twice the rate of defects.",
        choices=("own", "others"),
    )
    # Seed of the toy's simulated annotators, or of the split into training and held-out prompts.
    seed: int = 0
    conditions: str | None = _source_knob(
        None,
        "File or folder with the embeddings of the prompts.",
        metavar="FILE|DIR",
        shown="the file beside the pairs",
        name="conditioning",  # the field has another name, since runs of version 0.1 recorded it
    )
    precision: str = _rare_source_knob(
        "auto",
        "Data type of the flow networks' forward and backward passes in training and sampling. Adapters, sums"
        " and the optimiser use float32 in any case. auto: bfloat16 on CUDA, float32 on a CPU.",
        choices=PRECISIONS,
    )
    held_out: float = _rare_source_knob(
        0.2, "Share of the prompts that are held out: no network is trained on them.", above=0, below=1
    )
    # Prompts of the training, the choosing and the held-out split; None: the prompts are split by a hash.
    splits: tuple[tuple[str, ...], ...] | None = None
    parts: str = _rare_source_knob(
        "all",
        "SAM 3D: tensors that the loss of the first stage contains. all: shape and pose with equal weights;"
        " shape: the shape only; file: shape and pose with the weights in the model's file. The published"
        " file gives the shape the weight 0.",
        choices=("all", "shape", "file"),
    )
    needs_pairs: ClassVar[bool] = True  # False in subclasses whose problems need no pairs
    # False in subclasses whose flow networks have no weights at first, and are loaded one at a time
    loads_networks: ClassVar[bool] = True

    def stagewise(self) -> Self:
        """Return the same source for a problem whose flow networks have no weights at first.

        Its stages are trained one after the other, each with its own network alone.
        """
        # A subclass without further fields, since the recorded settings of a run must stay the same.
        stagewise_class = type(f"Stagewise{type(self).__name__}", (type(self),), {"loads_networks": False})
        stagewise_source: Self = stagewise_class(**vars(self))
        return stagewise_source
