"""Assets that people rank or compare, and pairs of every stage's latents.

A folder of sampled assets (sampled_assets.py) has, per condition and seed, a file to look at and one of the
latents that it came from, as the flows see them; and ranking.jsonl, a line per asset, whose rank is left to
fill in, 1 for the best, unless pairs are judged: then of several judgements of two assets the majority
decides. Equal ranks are not paired.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from eg3d_rlhf.models.sparse import Latent, latents_of, parts_of, to_cpu
from eg3d_rlhf.tuning.flow.base.conditioning import CONDITIONS, Conditions, write_conditions
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, by_condition, write_pairs
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION, Pipeline, stage_of
from training.storage import read_tensors, write_tensors

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


# votes of people on two assets: for the first, and for the second
Votes = Callable[[Candidate, Candidate], tuple[int, int]]


def pair_up(candidates: Sequence[Candidate], judged: Votes | None = None) -> dict[str, list[PreferencePair]]:
    """Pairs of candidates of one condition with unequal ranks, by stage; the stages that all candidates have.

    Args: judged: in place of ranks; pairs without a majority are left out.
    Raises: ValueError where no pair is left.
    """
    named = dict.fromkeys(stage for c in candidates for stage in c.latents)
    stages = [stage for stage in named if all(stage in c.latents for c in candidates)]
    pairs: dict[str, list[PreferencePair]] = {stage: [] for stage in stages}
    for condition, group in by_condition(candidates).items():
        chosen = _ranked(group) if judged is None else _voted(group, judged)
        for better, worse, why in chosen:
            for stage in stages:
                pairs[stage].append(
                    PreferencePair(
                        id=f"{condition}/{better.name}>{worse.name}",
                        condition=condition,
                        stage=stage,
                        preferred=better.latents[stage],
                        rejected=worse.latents[stage],
                        provenance=why,
                    )
                )
    if not any(pairs.values()):
        what, which = (
            ("of unequal rank", "ranks") if judged is None else ("with a majority of votes", "judgements")
        )
        raise ValueError(
            f"pairs: expected assets {what} under one condition, got none among {len(candidates)}. Check the"
            f" {which}."
        )
    return pairs


Chosen = list[tuple[Candidate, Candidate, dict]]  # the better one, the worse one, provenance


def _ranked(group: Sequence[Candidate]) -> Chosen:
    return [
        (a, b, {"ranks": [high, low]})
        for high, low in combinations(sorted({c.rank for c in group}), 2)
        for a in group
        if a.rank == high
        for b in group
        if b.rank == low
    ]


def _voted(group: Sequence[Candidate], judged: Votes) -> Chosen:
    chosen: Chosen = []
    for a, b in combinations(group, 2):
        first, second = judged(a, b)
        if first != second:
            chosen.append(
                (a, b, {"votes": [first, second]}) if first > second else (b, a, {"votes": [second, first]})
            )
    return chosen


def write_latents(path: Path, latents: Mapping[str, Latent]) -> None:
    stages = list(latents)
    tensors = {
        f"{i}.{part}": x
        for i, stage in enumerate(stages)
        for part, x in parts_of(to_cpu(latents[stage])).items()
    }
    write_tensors(path, KIND, tensors, {"stages": stages})


def read_latents(path: Path) -> dict[str, Latent]:
    """Inverse of write_latents. Raises: FileNotFoundError, ValueError for a damaged or foreign file."""
    tensors, meta = read_tensors(path, KIND)
    latents = latents_of(tensors)
    return {stage: latents[str(i)] for i, stage in enumerate(meta["stages"])}


def rank_of(record: Mapping, ranked: bool) -> float:
    """The rank in a line of a list; nan where it is not asked for. Raises: ValueError for none."""
    rank = record.get("rank")
    if not ranked:
        return math.nan
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
        raise ValueError(f"expected a rank, got {rank!r}. Write 1 for the best asset of a condition.")
    return float(rank)


def file_of(record: Mapping, folder: Path) -> Path | None:
    """What people look at, of a line of a list."""
    name = record.get("look_at", record.get("asset"))
    return folder / name if isinstance(name, str) else None


# (line, name, the list's folder, pipeline, whether it must have a rank)
Candidates = Callable[[dict, str, Path, Any, bool], Candidate]


def _named(record: Any, *keys: str) -> list[str]:
    """Texts of a line. Raises: ValueError naming those that are missing."""
    values = {
        key: value
        for key in keys
        if isinstance(record, dict) and isinstance(value := record.get(key), str) and value
    }
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(
            f"expected {' and '.join(keys)}, got no {' and no '.join(missing)} in {record!r:.120}. Add it, or"
            " draw anew."
        )
    return [*values.values()]


def sampled_candidate(record: dict, name: str, folder: Path, pipeline: Pipeline, ranked: bool) -> Candidate:
    """Read a line whose latents are a file of `write_latents`.

    Raises: ValueError, OSError for what does not fit.
    """
    condition, file = _named(record, "condition", "latents")
    rank = rank_of(record, ranked)
    latents = read_latents(folder / file)
    for stage, latent in latents.items():
        stage_of(pipeline, stage).check(file, latent)
    return Candidate(name=name, condition=condition, rank=rank, latents=latents, file=file_of(record, folder))


def asset_candidate(read: Callable[[Path], Any]) -> Candidates:
    """Make a reader of lines that may name an `asset` of the user's own in place of latents; the pipeline
    encodes what `read` reads.
    """

    def candidate(record: dict, name: str, folder: Path, pipeline: Any, ranked: bool) -> Candidate:
        if not isinstance(record, dict) or "latents" in record or not isinstance(record.get("asset"), str):
            return sampled_candidate(record, name, folder, pipeline, ranked)
        condition, file = _named(record, "condition", "asset")
        (latents,) = pipeline.encode([read(folder / file)])
        for stage, latent in latents.items():
            stage_of(pipeline, stage).check(file, latent)
        return Candidate(
            name=name,
            condition=condition,
            rank=rank_of(record, ranked),
            latents=latents,
            file=file_of(record, folder),
        )

    return candidate


@dataclass(frozen=True, kw_only=True)
class Imported:
    pairs: Mapping[str, Sequence[PreferencePair]]  # by stage
    conditions: Conditions | None = None  # embeddings, where they came along
    report: Mapping = field(default_factory=dict)  # JSON: counts of what was read and left out


def read_candidates(
    path: Path,
    pipeline: Any,
    ranked: bool,
    on_asset: Callable[[], None] | None = None,
    candidate: Candidates = sampled_candidate,
) -> list[Candidate]:
    """The assets of a list, with the latents of the same stages.

    Args: ranked: whether each line must have a rank; on_asset: called after each; candidate: reads a line.
    Raises: FileNotFoundError or ValueError with the line that is at fault.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"ranking: expected a list of ranked assets, got none at {path}. Check the path."
        )
    candidates: list[Candidate] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                candidates.append(candidate(json.loads(line), f"{number:06d}", path.parent, pipeline, ranked))
            except (ValueError, OSError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if on_asset:
                on_asset()
    stages = dict.fromkeys(stage for c in candidates for stage in c.latents)
    partial = [stage for stage in stages if not all(stage in c.latents for c in candidates)]
    if partial:
        raise ValueError(
            f"{path}: expected latents of stage {partial[0]!r} for all assets or none, got some. Complete it."
        )
    return candidates


def read_ranking(
    path: Path,
    pipeline: Any,
    on_asset: Callable[[], None] | None = None,
    candidate: Candidates = sampled_candidate,
) -> Imported:
    """Pairs of a ranked list.

    Args: on_asset: called after each; candidate: reads a line.
    Raises: FileNotFoundError or ValueError with the line that is at fault.
    """
    candidates = read_candidates(path, pipeline, True, on_asset, candidate)
    pairs = pair_up(candidates)
    counts = {stage: len(of_stage) for stage, of_stage in pairs.items()}
    return Imported(pairs=pairs, report={"assets": len(candidates), "pairs": counts})


def write_import(folder: Path, imported: Imported, meta: Callable[[str], Mapping]) -> dict[str, str]:
    """Write pairs by stage, and embeddings where there are any, as train.py reads them; returns the hash of
    each stage's pairs.

    Args: meta: of a stage, JSON that its pairs' description has besides the convention.
    """
    described = {stage: {"convention": CONVENTION, **meta(stage)} for stage in imported.pairs}
    hashes = {
        stage: write_pairs(folder / stage, pairs, described[stage]) for stage, pairs in imported.pairs.items()
    }
    if imported.conditions is not None:
        write_conditions(folder / CONDITIONS, imported.conditions)
    return hashes
