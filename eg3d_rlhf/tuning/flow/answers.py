"""People's answers in WORK as pairs of every stage's latents, and the problem that they make.

    WORK/pairs/STAGE        pairs of a stage; made anew from the answers whenever they are read

Of the conditions to choose on, a third chooses networks while they train; the rest tells whether anything was learnt. Test conditions take
no part.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.preferences.goodness import read_goodness
from eg3d_rlhf.tuning.flow.conditions import CONDITIONS
from eg3d_rlhf.tuning.flow.families import FlowFamily, open_folder, open_problem
from eg3d_rlhf.tuning.flow.offline.singles import known_of
from eg3d_rlhf.tuning.flow.problem import Problem, ProblemSource, chosen_precision, divided
from eg3d_rlhf.tuning.flow.ranking import RANKING, Imported, pair_up, read_candidates, write_import
from eg3d_rlhf.tuning.flow.work import CHOOSE, TRAIN, Work

PAIRS = "pairs"
DSO = "trellis"  # the family whose first stage DSO's samples are of
CHOOSING = 1 / 3  # of the conditions to choose on


def imported_of(work: Work, family: FlowFamily, labels: Path | None = None) -> Imported:
    """Pairs of WORK's assets, of every stage, by people's answers; or by a file of labels of these assets; or a folder of DSO's samples.

    Args: labels: thumbs, scores, ranks or pairs (preferences/goodness.py), in place of people's answers.
    Raises: FileNotFoundError or ValueError for no answers or assets yet, or labels of other assets.
    """
    root = Path(work.pipeline)
    if labels is not None and labels.is_dir():
        return _dso(family, root, labels)
    said = None if labels is not None else work.labels()
    work.lines()  # raises where nothing is drawn
    pipeline = _reader(family, root)
    candidates = read_candidates(work.drawn() / RANKING, pipeline, False, candidate=family.candidate)
    if labels is None:
        assert said is not None
        same, asked = said.repeats
        facts = {"answers": len(said.answers), "pairs": said.pairs, "ties": said.ties, "repeats_answered_alike": f"{same} of {asked}"}
        return Imported(pairs=pair_up(candidates, said), report=facts)
    goodness = read_goodness(labels, known_of(candidates))
    judged = [replace(c, rank=-goodness[c.name]) for c in candidates if c.name in goodness]
    return Imported(pairs=pair_up(judged), report={"labels": labels.name, "assets": len(judged)})


def _reader(family: FlowFamily, root: Path) -> Any:
    """A pipeline that knows the forms of latents, without weights of the flows where the family can do so."""
    if family.encoder is None:
        return family.load(root, None, dtype=torch.float32, device="cpu")
    encoding = {"share": ProblemSource.voxel_share, "views": ProblemSource.views} if "views" in family.options else {}
    return family.encoder(root, device="cpu", **encoding)


def _dso(family: FlowFamily, root: Path, samples: Path) -> Imported:
    if family.name != DSO:
        raise ValueError(f"--labels: expected a file of labels, got the folder {samples}. DSO's samples are of TRELLIS's first stage.")
    from eg3d_rlhf.tuning.flow.families.trellis.pair_import import read_dso  # the family's own

    return read_dso(samples, _reader(family, root))


def splits_of(work: Work, conditions: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Of conditions that have pairs: those to train on, to choose on, to tell by; of foreign ones by a hash of their names.

    Raises: ValueError where there is none to train on.
    """
    known = set(work.names())
    if not known & set(conditions):
        return tuple(map(tuple, divided(sorted(conditions), work.seed, 0.4)))
    train = tuple(name for name in work.names(TRAIN) if name in set(conditions))
    if not train:
        raise ValueError(f"labels: expected answers on conditions to train on, got those of {len(conditions)} to choose on. Label more.")
    held = [name for name in work.names(CHOOSE) if name in set(conditions)]
    held.sort(key=lambda name: hashlib.sha256(f"tell {work.seed} {name}".encode()).digest())
    count = max(round(CHOOSING * len(held)), 1)
    return train, tuple(held[:count]), tuple(held[count:])


def problem_of(work: Work, family: FlowFamily, imported: Imported, device: torch.device, write: bool = True) -> Problem:
    """What stages are tuned on. Args: write: False on ranks whose first writes the pairs.

    Raises: see `open_problem`.
    """
    place = work.folder / PAIRS
    if write:
        report = dict(imported.report)
        meta = family.pair_meta or (lambda pipeline, stage, report: {"family": family.name})
        pipeline = _reader(family, Path(work.pipeline))
        write_import(place, imported, lambda stage: meta(pipeline, stage, report))
    named = sorted({pair.condition for pairs in imported.pairs.values() for pair in pairs})
    beside = work.conditions_file if imported.conditions is None else place / CONDITIONS
    source = ProblemSource(
        pipeline=work.pipeline, pairs=str(place), conditions=str(beside), seed=work.seed, precision=work.precision,
        splits=splits_of(work, named),
    )  # fmt: skip
    if not family.bundled:
        return open_problem(source, device)
    problem, own = open_folder(family, source, device), family.open(ProblemSource(), device) if family.open else None
    for stage in problem.pipeline.stages:
        stage.precision = chosen_precision(work.precision, device)
    return problem if own is None else replace(problem, reward=own.reward, fitted_to=own.fitted_to)
