"""Assets that people rank or compare, and pairs of every stage's latents.

A folder of drawn assets (drawing.py) has, per condition and seed, a file to look at and one of the latents that it came from, as the flows
see them; and ranking.jsonl, a line per asset, whose rank is left to fill in, 1 for the best, unless pairs are judged. Equal ranks are not
paired.

Judgements, as the labelling tool exports them, are JSON lines with paths relative to the file: {"preferred": "a.ply", "rejected": "b.ply"},
with "tie": true where neither was; other fields are passed over. Several judgements of two assets are counted, and the majority decides.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import click
import torch

from eg3d_rlhf.core.cli import option
from eg3d_rlhf.models.sparse import Latent, latent_of, parts_of, to_cpu
from eg3d_rlhf.preferences.labels import jsonl_records
from eg3d_rlhf.tuning.flow.conditions import CONDITIONS, Conditions, write_conditions
from eg3d_rlhf.tuning.flow.pairs import PreferencePair, write_pairs
from eg3d_rlhf.tuning.flow.stage import CONVENTION, Pipeline, stage_of
from training.storage import read_tensors, write_tensors

# Judgements of pairs of assets, as the labelling tool exports them: which of two files people preferred.


EXAMPLE = '{"preferred": "a.ply", "rejected": "b.ply"}'
judged_option = option("--judged", metavar="FILE", type=click.Path(path_type=Path), default=None, show_default="the list's ranks",
                       help="Judgements of pairs, such as `label.py export --kind=asset-pairs` writes, in place of ranks.")


class Votes(Protocol):
    """What people said of pairs of assets."""

    def votes(self, a: Path, b: Path) -> tuple[int, int]:
        """For the first, and for the second."""


class Judged:
    """Votes on pairs of assets."""

    def __init__(self, path: Path):
        """Raises: FileNotFoundError; ValueError naming the line."""
        if not path.is_file():
            raise FileNotFoundError(f"--judged: expected a .jsonl file of judgements, got nothing at {path}. Check the path.")
        self.wins: Counter[tuple[Path, Path]] = Counter()  # how often the first was preferred to the second
        for line, record in jsonl_records(path, EXAMPLE):
            better, worse = (str(record.get(key) or "") for key in ("preferred", "rejected"))
            if not better or not worse or better == worse:
                raise ValueError(f"--judged: {path.name}, line {line}: expected two assets, got {record!r:.120}. Write {EXAMPLE}.")
            if not record.get("tie", False):
                self.wins[_place(path.parent, better), _place(path.parent, worse)] += 1

    def votes(self, a: Path, b: Path) -> tuple[int, int]:
        return self.wins[a.resolve(), b.resolve()], self.wins[b.resolve(), a.resolve()]


def _place(folder: Path, name: str) -> Path:
    return (folder / name).resolve()


RANKING = "ranking.jsonl"
KIND = "latents"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One asset of a condition."""

    name: str  # unique within its condition
    condition: str
    rank: float  # smaller is better; nan where pairs are judged
    latents: Mapping[str, Latent]  # by stage
    file: Path | None = None  # what people look at


def pair_up(candidates: Sequence[Candidate], judged: "Votes | None" = None) -> dict[str, list[PreferencePair]]:
    """Pairs of candidates of one condition with unequal ranks, by stage; the stages that all candidates have.

    Args: judged: in place of ranks; pairs without a majority are left out.
    Raises: ValueError where no pair is left.
    """
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.condition, []).append(candidate)
    named = dict.fromkeys(stage for c in candidates for stage in c.latents)
    stages = [stage for stage in named if all(stage in c.latents for c in candidates)]
    pairs: dict[str, list[PreferencePair]] = {stage: [] for stage in stages}
    for condition, group in groups.items():
        chosen = _ranked(group) if judged is None else _voted(group, judged)
        for better, worse, why in chosen:
            for stage in stages:
                pairs[stage].append(PreferencePair(
                    id=f"{condition}/{better.name}>{worse.name}", condition=condition, stage=stage, preferred=better.latents[stage],
                    rejected=worse.latents[stage], provenance=why,
                ))
    if not any(pairs.values()):
        what, which = ("of unequal rank", "ranks") if judged is None else ("with a majority of votes", "judgements")
        raise ValueError(f"pairs: expected assets {what} under one condition, got none among {len(candidates)}. Check the {which}.")
    return pairs


Chosen = list[tuple[Candidate, Candidate, dict]]  # the better one, the worse one, provenance


def _ranked(group: Sequence[Candidate]) -> Chosen:
    return [
        (a, b, {"ranks": [high, low]}) for high, low in combinations(sorted({c.rank for c in group}), 2)
        for a in group if a.rank == high for b in group if b.rank == low
    ]  # fmt: skip


def _voted(group: Sequence[Candidate], judged: "Votes") -> Chosen:
    chosen: Chosen = []
    for a, b in combinations([c for c in group if c.file is not None], 2):
        assert a.file is not None and b.file is not None
        first, second = judged.votes(a.file, b.file)
        if first != second:
            chosen.append((a, b, {"votes": [first, second]}) if first > second else (b, a, {"votes": [second, first]}))
    return chosen


def write_latents(path: Path, latents: Mapping[str, Latent]) -> None:
    stages = list(latents)
    tensors = {f"{i}.{part}": x for i, stage in enumerate(stages) for part, x in parts_of(to_cpu(latents[stage])).items()}
    write_tensors(path, KIND, tensors, {"stages": stages})


def read_latents(path: Path) -> dict[str, Latent]:
    """Inverse of write_latents. Raises: FileNotFoundError, ValueError for a damaged or foreign file."""
    tensors, meta = read_tensors(path, KIND)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, part = name.partition(".")
        parts.setdefault(number, {})[part] = tensor
    return {stage: latent_of(parts[str(i)]) for i, stage in enumerate(meta["stages"])}


def rank_of(record: Mapping, ranked: bool) -> float:
    """The rank in a line of a list; nan where it is not asked for. Raises: ValueError for none."""
    rank = record.get("rank")
    if not ranked:
        return math.nan
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
        raise ValueError(f"expected a rank, got {rank!r}. Write 1 for the best asset of a condition, or give --judged.")
    return float(rank)


def file_of(record: Mapping, folder: Path) -> Path | None:
    """What people look at, of a line of a list."""
    name = record.get("look_at", record.get("asset"))
    return folder / name if isinstance(name, str) else None


Candidates = Callable[[dict, str, Path, Any, bool], Candidate]  # (line, name, the list's folder, pipeline, whether it must have a rank)


def drawn_candidate(record: dict, name: str, folder: Path, pipeline: Pipeline, ranked: bool) -> Candidate:
    """A line whose latents are a file of `write_latents`. Raises: ValueError, OSError for what does not fit."""
    try:
        condition, file = record["condition"], record["latents"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected a condition, a rank and latents, got {error} wrong.") from error
    if not (isinstance(condition, str) and condition and isinstance(file, str)):
        raise ValueError(f"expected a condition and latents, got {record!r:.120}. Write them.")
    rank, latents = rank_of(record, ranked), read_latents(folder / file)
    for stage, latent in latents.items():
        stage_of(pipeline, stage).check(file, latent)
    return Candidate(name=name, condition=condition, rank=rank, latents=latents, file=file_of(record, folder))


def asset_candidate(read: Callable[[Path], Any]) -> Candidates:
    """For families whose pipelines encode assets: a line may name an `asset` of one's own, which `read` reads, in place of latents."""

    def candidate(record: dict, name: str, folder: Path, pipeline: Any, ranked: bool) -> Candidate:
        if not isinstance(record, dict) or "latents" in record or not isinstance(record.get("asset"), str):
            return drawn_candidate(record, name, folder, pipeline, ranked)
        condition = record.get("condition")
        if not isinstance(condition, str) or not condition:
            raise ValueError(f"expected a condition and an asset, got {record!r:.120}. Write them.")
        (latents,) = pipeline.encode([read(folder / record["asset"])])
        for stage, latent in latents.items():
            stage_of(pipeline, stage).check(record["asset"], latent)
        return Candidate(name=name, condition=condition, rank=rank_of(record, ranked), latents=latents, file=file_of(record, folder))

    return candidate


@dataclass(frozen=True, kw_only=True)
class Imported:
    pairs: Mapping[str, Sequence[PreferencePair]]  # by stage
    conditions: Conditions | None = None  # embeddings, where they came along
    report: Mapping = field(default_factory=dict)  # JSON: counts of what was read and left out


def read_candidates(
    path: Path, pipeline: Any, ranked: bool, on_asset: Callable[[], None] | None = None, candidate: Candidates = drawn_candidate
) -> list[Candidate]:
    """The assets of a list, with the latents of the same stages.

    Args: ranked: whether each line must have a rank; on_asset: called after each; candidate: reads a line.
    Raises: FileNotFoundError or ValueError with the line that is at fault.
    """
    if not path.is_file():
        raise FileNotFoundError(f"ranking: expected a list of ranked assets, got none at {path}. Check the path.")
    candidates: list[Candidate] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                candidates.append(candidate(json.loads(line), f"{number:06d}", path.parent, pipeline, ranked))
            except (ValueError, OSError) as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
            if on_asset:
                on_asset()
    stages = dict.fromkeys(stage for c in candidates for stage in c.latents)
    partial = [stage for stage in stages if not all(stage in c.latents for c in candidates)]
    if partial:
        raise ValueError(f"{path.name}: expected latents of stage {partial[0]!r} for all assets or none, got some. Complete it.")
    return candidates


def read_ranking(
    path: Path, pipeline: Any, on_asset: Callable[[], None] | None = None, judged: Judged | None = None,
    candidate: Candidates = drawn_candidate,
) -> Imported:
    """Pairs of a ranked list, or of a list whose pairs are judged.

    Args: on_asset: called after each; candidate: reads a line.
    Raises: FileNotFoundError or ValueError with the line that is at fault.
    """
    candidates = read_candidates(path, pipeline, judged is None, on_asset, candidate)
    pairs = pair_up(candidates, judged)
    counts = {stage: len(of_stage) for stage, of_stage in pairs.items()}
    return Imported(pairs=pairs, report={"assets": len(candidates), "scheme": "judged" if judged else "all", "pairs": counts})


def write_import(folder: Path, imported: Imported, meta: Callable[[str], Mapping]) -> dict[str, str]:
    """Write pairs by stage, and embeddings where there are any, as train.py reads them; returns the hash of each stage's pairs.

    Args: meta: of a stage, JSON that its pairs' description has besides the convention.
    """
    described = {stage: {"convention": CONVENTION, **meta(stage)} for stage in imported.pairs}
    hashes = {stage: write_pairs(folder / stage, pairs, described[stage]) for stage, pairs in imported.pairs.items()}
    if imported.conditions is not None:
        write_conditions(folder / CONDITIONS, imported.conditions)
    return hashes
