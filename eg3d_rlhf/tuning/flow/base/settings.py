"""Settings of the source of a tuning problem, and of the evaluation of its samples.

This file imports no torch, so that `--help` is quick.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from training.config import Knobs, knob

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.problem import Problem
    from eg3d_rlhf.tuning.flow.base.sampling import HeldOut, Models
    from training.distributed import Ranks

TABLE = "Evaluation and ablation"  # title of this group of flags in the help
EVALUATORS = ("final", "chooser", "reward")


@dataclass(frozen=True, kw_only=True)
class Choosing(Knobs):
    """Samples for the win rate that chooses checkpoints and stops training early."""

    per_condition: int = knob(4, "Noises for each held-out condition.", TABLE, name="choose_noises", low=1)
    batch: int = knob(64, "Assets at once; bounds memory.", TABLE, name="evaluation_batch", low=1, rare=True)
    seed: int = 0  # of the noises, which are not those of the table

    def held_out(
        self,
        problem: "Problem",
        stage: str,
        others: "Models",
        against: "Models",
        ranks: "Ranks | None" = None,
    ) -> "HeldOut | None":
        """Make the win-rate evaluator for a stage's training; None for a problem without a `chooser` reward.

        Args: others, against, ranks: see HeldOut.
        """
        from eg3d_rlhf.tuning.flow.base.sampling import HeldOut, crossed
        from training.distributed import SINGLE

        if problem.chooser is None:
            return None
        conditions, seeds = crossed(problem.choosing, self.per_condition, self.seed)
        return HeldOut(
            pipeline=problem.pipeline,
            stage=stage,
            reward=problem.chooser,
            conditions=conditions,
            seeds=seeds,
            others=others,
            against=against,
            batch=self.batch,
            ranks=ranks or SINGLE,
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation(Knobs):
    """Samples of the table: the same noises for every generator, so that generators are compared pair by
    pair.
    """

    per_condition: int = knob(
        8, "Assets per held-out condition and training behind the table.", TABLE, name="table_noises", low=2
    )
    batch: int = knob(
        64,
        "Assets at once; bounds memory.",
        TABLE,
        name="evaluation_batch",
        low=1,
        shown="the problem's own",
        rare=True,
    )
    seed: int = 0  # of the noises, apart from those that are trained or chosen on

    def crossed(self, problem: "Problem") -> tuple[list[str], list[int]]:
        """Return (prompts, seeds), [C S] each: every held-out prompt with S noise seeds in a row."""
        from training.phases import derive_seed

        pairs = [(name, k) for name in problem.held_out_conditions for k in range(self.per_condition)]
        return [name for name, _ in pairs], [
            derive_seed("table", self.seed, name, k) % 2**31 for name, k in pairs
        ]


_what = functools.partial(knob, group="What is trained")
_rare_what = functools.partial(_what, rare=True)
PRECISIONS = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class EncodingSource:
    """Settings of the encoding of TRELLIS's assets as latents."""

    voxel_share: float = _rare_what(
        0.25, "TRELLIS: a decoded asset's voxel is filled above this share of the mean opacity.", above=0
    )
    views: int = _rare_what(
        150, "TRELLIS: number of rendered images from which an asset's features are averaged.", low=1
    )


@dataclass(frozen=True, kw_only=True)
class ProblemSource(EncodingSource, Knobs):
    """Source of a tuning problem: a generator, preference pairs, and their conditioning."""

    pipeline: str = _what(
        "toy",
        "The bundled toy, or a folder of a generator's networks (docs/reference/families.md).",
        metavar="toy|DIR",
    )
    pairs: str | None = _what(
        None,
        "Preference pairs of people: a folder that holds one folder per stage, as made by eg3d-rlhf flow tune"
        " --pairs-only.",
        metavar="DIR",
        shown="the toy's own",
    )
    labelled: str = _rare_what(
        "others",
        "Toy: source of the labelled assets: the generator's own samples, or those of others with twice the"
        " defect rate.",
        choices=("own", "others"),
    )
    seed: int = 0  # of the toy's simulated annotators, or of the split into training and held-out prompts
    conditions: str | None = _what(
        None,
        "Embeddings of the conditioning inputs.",
        metavar="FILE|DIR",
        shown="beside the pairs",
        name="conditioning",  # the field is part of what 0.1 recorded
    )
    dtype: str = _rare_what(
        "float32", "Type of the flows' weights in memory.", choices=("float32", "float16", "bfloat16")
    )
    precision: str = _rare_what(
        "auto",
        "Precision of the flows' forward and backward passes, in training, win rates and sampling. Adapters,"
        " sums and the optimiser stay float32. auto: bfloat16 on CUDA, float32 on a CPU.",
        choices=PRECISIONS,
    )
    held_out: float = _rare_what(0.2, "Share of the prompts that is never trained on.", above=0, below=1)
    # prompts to train on, to choose on and to hold out; None: split by a hash
    splits: tuple[tuple[str, ...], ...] | None = None
    parts: str = _rare_what(
        "all",
        "SAM 3D: parts of the first stage's loss: shape and pose with equal weights, the shape alone, or both"
        " with the weights of the model's file.",
        choices=("all", "shape", "file"),
    )
    needs_pairs: ClassVar[bool] = True
