"""What a Circular-DPO run works on: the bundled toy, or a folder of a generator's networks with people's pairs."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import torch

from eg3d_rlhf.tuning.flow.pairs import PreferencePair, pairs_hash, read_pairs
from eg3d_rlhf.tuning.flow.stage import AssetReward, Pipeline, stage_of
from training.config import check_knobs, knob


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A pipeline, the people's pairs, and the three judges: one labels or learns, one chooses, one is kept for the final table."""

    pipeline: Pipeline
    human_pairs: Callable[[str], list[PreferencePair]]  # by stage name; the same assets at every stage
    reward: AssetReward | None  # scores the loop's assets for w1 and w2; None: no loop, only stages by themselves
    chooser: AssetReward | None  # held-out win rate and early stop; None: neither
    final: AssetReward | None  # the table alone
    train_conditions: Sequence[str]
    held_out_conditions: Sequence[str]  # never trained on; the table's
    choosing_conditions: Sequence[str] = ()  # never trained on either: checkpoints are chosen on these; none: on the table's own
    identity: Mapping = field(default_factory=dict)  # JSON: hashes of all files that it came from, for the names of artefacts
    parts: Callable[[Sequence, Sequence[str]], Mapping[str, torch.Tensor]] | None = None  # sub-scores [N] of (assets, conditions), likewise

    def __post_init__(self):
        names = [stage.name for stage in self.pipeline.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Problem.pipeline: expected stages of different names, got {names}. Give all stages, in order.")
        parts = [set(self.train_conditions), set(self.held_out_conditions), set(self.choosing_conditions)]
        both = sorted(name for a, b in combinations(parts, 2) for name in a & b)
        if both:
            raise ValueError(f"Problem: expected held-out conditions apart from the trained, got {both[:5]} in both. Divide them.")
        if not self.train_conditions:
            raise ValueError("Problem.train_conditions: expected one condition or more, got none. Name them.")
        if self.final is not None and any(self.final is other for other in (self.reward, self.chooser)):
            raise ValueError("Problem.final: expected a judge of its own, got one that also weighs or chooses. The table would flatter.")

    @property
    def choosing(self) -> Sequence[str]:
        """What checkpoints are chosen on."""
        return self.choosing_conditions or self.held_out_conditions


TOY = "toy"
_what = functools.partial(knob, group="What is trained")


@dataclass(frozen=True, kw_only=True)
class ProblemSource:
    """What a problem is read from."""

    pipeline: str = _what(TOY, "The bundled toy, or a folder of a generator's networks (docs/flow-families.md).", metavar="toy|DIR")
    pairs: str | None = _what(None, "People's pairs: a folder with one for each stage in it, as tools/trellis_files.py imports.",
                              metavar="DIR", shown="the toy's own")
    labelled: str = _what("others", "Toy: who made the assets that people judged: the generator's own, or others', with twice the defects.",
                          choices=("own", "others"))
    seed: int = 0  # of the toy's people, or of the division into trained and held-out conditions
    conditions: str | None = _what(None, "Embeddings of the conditions.", metavar="FILE|DIR", shown="beside the pairs")
    also: tuple[str, ...] = ()  # further folders to look for TRELLIS's models in
    dtype: str = _what("float32", "In which the flows are held.", choices=("float32", "float16", "bfloat16"))
    held_out: float = _what(0.2, "Share of the conditions that is never trained on.", above=0, below=1)
    flow_weights: tuple[str, ...] = ()  # STAGE=FILE: other weights of TRELLIS's flows, training checkpoints among them
    voxel_share: float = _what(0.25, "TRELLIS: a decoded asset's voxel is filled above this share of the mean opacity.", above=0)
    needs_pairs: ClassVar[bool] = True
    views: int = _what(150, "TRELLIS: pictures behind the features of a decoded asset.", low=1)

    def __post_init__(self):
        if self.pipeline == TOY:
            others = [f for f in fields(self) if f.name not in ("pipeline", "pairs", "labelled", "seed")]
            extra = [f"--{f.name.replace('_', '-')}" for f in others if getattr(self, f.name) != f.default]
            if extra:
                raise ValueError(f"{', '.join(extra)}: belongs to --pipeline=DIR, and would have no effect on the toy. Leave it out.")
        elif self.labelled != type(self).labelled:
            raise ValueError("--labelled: belongs to the toy, and would have no effect on --pipeline=DIR. Leave it out.")
        elif self.pairs is None and self.needs_pairs:
            raise ValueError("--pairs: expected a folder of people's pairs beside --pipeline=DIR, got none. The toy alone brings its own.")
        odd = [text for text in self.flow_weights if not all(text.partition("="))]
        if odd:
            raise ValueError(f"--flow-weights: expected STAGE=FILE such as structure=denoiser.pt, got {odd[0]!r}. Name the stage.")
        check_knobs(self)


def open_problem(source: ProblemSource, device: str | torch.device = "cpu") -> Problem:
    """Read networks and pairs; pairs of a stage are made or read once.

    Raises: ValueError or OSError for what is missing or does not fit.
    """
    if source.pipeline == TOY:
        from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem

        problem = toy_problem(source.seed, device, labelled=source.labelled)
        problem = problem if source.pairs is None else with_pairs(problem, Path(source.pairs))
    else:
        from eg3d_rlhf.tuning.flow.families import open_source

        problem = open_source(source, device)
    return replace(problem, human_pairs=functools.cache(problem.human_pairs))


def with_pairs(problem: Problem, folder: Path) -> Problem:
    """The same problem with people's pairs from a folder, which has one for each stage in it; their hashes are part of its identity.

    Raises: FileNotFoundError for a folder without any, ValueError for stages whose pairs are not of the same assets, and for pairs of
        held-out conditions, which the table would call unseen.
    """
    names = [stage.name for stage in problem.pipeline.stages if (folder / stage.name).is_dir()]
    if not names:
        expected = ", ".join(stage.name for stage in problem.pipeline.stages)
        raise FileNotFoundError(f"--pairs: expected a folder for each stage ({expected}) in {folder}, got none. Check the path.")
    human_pairs = read_stages({name: folder / name for name in names}, problem.pipeline)
    unseen = {*problem.held_out_conditions, *problem.choosing_conditions}
    seen = sorted({pair.condition for pair in human_pairs(names[0])} & unseen)
    if seen:
        raise ValueError(
            f"--pairs: expected pairs of conditions that are not held out, got those of {len(seen)} that are, {seen[0]!r} first. Leave "
            "them out, or take --pairs away to train on the toy's own."
        )
    hashes = {name: pairs_hash(folder / name) for name in names}
    return replace(problem, human_pairs=human_pairs, identity={**problem.identity, "pairs": hashes})


def read_stages(
    folders: Mapping[str, Path], pipeline: Pipeline, check: Callable[[Path, str, Mapping], None] = lambda folder, stage, meta: None
) -> Callable[[str], list[PreferencePair]]:
    """People's pairs from a folder for each stage; the result gives those of a stage by its name.

    Args: check: refuses what is of another pipeline, from the folder, the stage and what the writer had to say.
    Raises: ValueError where the pairs are not of the same assets: the loop samples on what a stage's preferred one leaves to the next.
    """
    read: dict[str, list[PreferencePair]] = {}
    for stage, folder in folders.items():
        read[stage], meta = read_pairs(folder, stage_of(pipeline, stage))
        check(folder, stage, meta)
    (first, pairs), *others = read.items()
    expected = {(pair.id, pair.condition) for pair in pairs}
    for stage, own in others:
        odd = sorted({(pair.id, pair.condition) for pair in own} ^ expected)
        if odd:
            raise ValueError(
                f"pairs: expected the same pairs at stages {first!r} and {stage!r}, got {len(odd)} that one of them lacks, "
                f"{odd[0][0]!r} first. Make both from the same assets."
            )

    def of_stage(stage: str) -> list[PreferencePair]:
        stage_of(pipeline, stage)
        if stage not in read:
            raise ValueError(f"pairs: expected pairs of stage {stage!r}, got those of {', '.join(read)} alone. Add them.")
        return read[stage]

    return of_stage
