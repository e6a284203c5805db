"""Assets that people rank or compare, and pairs of every stage's latents.

A folder of sampled assets (sampled_assets.py) holds, per prompt and seed, a file to look at and a file of the
latents that the asset was decoded from. Its list ranking.jsonl has a line per asset. People write a rank into
each line, 1 for the best; assets of equal rank are not paired. Where people compared pairs instead, the
majority of the judgements of two assets decides.
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
    """One asset of a prompt."""

    name: str  # unique within its prompt
    condition: str
    rank: float  # smaller is better; nan where people compared pairs
    latents: Mapping[str, Latent]  # by stage
    file: Path | None = None  # file that people look at


# votes of people on two assets: for the first, and for the second
Votes = Callable[[Candidate, Candidate], tuple[int, int]]


def pair_up(candidates: Sequence[Candidate], judged: Votes | None = None) -> dict[str, list[PreferencePair]]:
    """Pair the candidates of each prompt, by stage, for the stages of which all candidates have latents.

    Args: judged: votes on two candidates, used in place of ranks. Pairs of equal rank, or without a majority
        of votes, are left out.
    Raises: ValueError where no pair is left.
    """
    # a dictionary in place of a set, which keeps the order of the stages
    named = dict.fromkeys(stage for c in candidates for stage in c.latents)
    stages = [stage for stage in named if all(stage in c.latents for c in candidates)]
    pairs: dict[str, list[PreferencePair]] = {stage: [] for stage in stages}
    for condition, group in by_condition(candidates).items():
        # only assets of one prompt are compared: ranks of different prompts have no common scale
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
    # also the case of ties only, or of a single asset per prompt
    if not any(pairs.values()):
        if judged is None:
            needed = "of unequal rank"
            to_check = "ranks"
        else:
            needed = "with a majority of votes"
            to_check = "judgements"
        raise ValueError(
            f"pairs: expected two assets {needed} for one prompt, got none of {len(candidates)} assets."
            f" Check the {to_check}."
        )
    return pairs


Chosen = list[tuple[Candidate, Candidate, dict]]  # (better candidate, worse candidate, provenance)


def _ranked(group: Sequence[Candidate]) -> Chosen:
    """Pair every two candidates of unequal rank, the better one first."""
    return [
        (a, b, {"ranks": [high, low]})
        for high, low in combinations(sorted({c.rank for c in group}), 2)
        for a in group
        if a.rank == high
        for b in group
        if b.rank == low
    ]


def _voted(group: Sequence[Candidate], judged: Votes) -> Chosen:
    """Pair the candidates that have a majority of votes, the better one first."""
    chosen: Chosen = []
    for a, b in combinations(group, 2):
        first, second = judged(a, b)
        if first != second:
            chosen.append(
                (a, b, {"votes": [first, second]}) if first > second else (b, a, {"votes": [second, first]})
            )
    return chosen


def write_latents(path: Path, latents: Mapping[str, Latent]) -> None:
    """Write the latents of one asset, by stage, to a file."""
    stages = list(latents)
    # keys number the stages; the metadata holds their names in the same order
    tensors = {
        f"{i}.{part}": x
        for i, stage in enumerate(stages)
        for part, x in parts_of(to_cpu(latents[stage])).items()
    }
    write_tensors(path, KIND, tensors, {"stages": stages})


def read_latents(path: Path) -> dict[str, Latent]:
    """Read a file of write_latents. Raises: FileNotFoundError, ValueError for a damaged or foreign file."""
    tensors, meta = read_tensors(path, KIND)
    latents = latents_of(tensors)
    return {stage: latents[str(i)] for i, stage in enumerate(meta["stages"])}


def rank_of(record: Mapping, ranked: bool) -> float:
    """Return the rank in a line of a list, or nan unless `ranked`. Raises: ValueError for a missing rank."""
    rank = record.get("rank")
    if not ranked:
        return math.nan
    # bool is a subclass of int in Python, but true is no rank
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
        raise ValueError(f"expected a rank, got {rank!r}. Write 1 for the best asset of a condition.")
    return float(rank)


def file_of(record: Mapping, folder: Path) -> Path | None:
    """Return the file that people look at, from a line of a list; None: the line names none."""
    # an asset of the user's own, in place of latents, is shown itself
    name = record.get("look_at", record.get("asset"))
    return folder / name if isinstance(name, str) else None


# (line, name, the list's folder, pipeline, whether it must have a rank)
Candidates = Callable[[dict, str, Path, Any, bool], Candidate]


def _named(record: Any, *keys: str) -> list[str]:
    """Return the texts of a line under `keys`. Raises: ValueError naming those that are missing."""
    values = {
        key: value
        for key in keys
        if isinstance(record, dict) and isinstance(value := record.get(key), str) and value
    }
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(
            f"expected {' and '.join(keys)}, got no {' and no '.join(missing)} in {record!r:.120}. Add it, or"
            " sample the assets again with eg3d-rlhf flow sample."
        )
    return [*values.values()]


def sampled_candidate(record: dict, name: str, folder: Path, pipeline: Pipeline, ranked: bool) -> Candidate:
    """Read a line whose latents are in a file of `write_latents`, and check their shapes.

    Raises: ValueError or OSError for a line or a file that does not fit the pipeline.
    """
    condition, file = _named(record, "condition", "latents")
    rank = rank_of(record, ranked)
    latents = read_latents(folder / file)
    for stage, latent in latents.items():
        stage_of(pipeline, stage).check(file, latent)
    return Candidate(name=name, condition=condition, rank=rank, latents=latents, file=file_of(record, folder))


def asset_candidate(read: Callable[[Path], Any]) -> Candidates:
    """Make a reader of lines that may name a file of the user's own asset in place of latents.

    The pipeline encodes what `read` returns for that file.
    """

    def candidate(record: dict, name: str, folder: Path, pipeline: Any, ranked: bool) -> Candidate:
        # latents come first, since they need no encoding
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
    """Pairs read from a list or from another project's samples."""

    pairs: Mapping[str, Sequence[PreferencePair]]  # by stage
    conditions: Conditions | None = None  # embeddings of the prompts, if the source has them
    report: Mapping = field(default_factory=dict)  # JSON: counts of what was read and left out


def read_candidates(
    path: Path,
    pipeline: Any,
    ranked: bool,
    on_asset: Callable[[], None] | None = None,
    candidate: Candidates = sampled_candidate,
) -> list[Candidate]:
    """Read the assets of a list. All must have latents of the same stages.

    Args: ranked: each line must have a rank; on_asset: called after each asset; candidate: reads a line.
    Raises: FileNotFoundError, or ValueError that names the faulty line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"ranking: expected a list of ranked assets, got none at {path}. Check the path."
        )
    candidates: list[Candidate] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        # people edit this list, so empty lines are allowed
        if line.strip():
            try:
                candidates.append(candidate(json.loads(line), f"{number:06d}", path.parent, pipeline, ranked))
            except (ValueError, OSError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if on_asset:
                on_asset()
    stages = dict.fromkeys(stage for c in candidates for stage in c.latents)
    # pairs of a stage need its latents of every asset
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
    """Read a ranked list, and pair its assets.

    Args: on_asset: called after each asset; candidate: reads a line.
    Raises: FileNotFoundError, or ValueError that names the faulty line.
    """
    candidates = read_candidates(path, pipeline, True, on_asset, candidate)
    pairs = pair_up(candidates)
    counts = {stage: len(of_stage) for stage, of_stage in pairs.items()}
    return Imported(pairs=pairs, report={"assets": len(candidates), "pairs": counts})


def write_import(folder: Path, imported: Imported, meta: Callable[[str], Mapping]) -> dict[str, str]:
    """Write pairs by stage, and the embeddings if there are any, in the layout that training reads.

    Returns the hash of each stage's pairs.
    Args: meta: returns, for a stage, JSON that describes its pairs besides the time convention.
    """
    described = {stage: {"convention": CONVENTION, **meta(stage)} for stage in imported.pairs}
    hashes = {
        stage: write_pairs(folder / stage, pairs, described[stage]) for stage, pairs in imported.pairs.items()
    }
    if imported.conditions is not None:
        write_conditions(folder / CONDITIONS, imported.conditions)
    return hashes
