"""Assets that people rank or compare, and their conversion to pairs of latents of every stage.

A folder of sampled assets (workspace/sampled_assets.py) contains for each asset a file to look at, and a file
of the latents from which the asset was decoded. Its list ranking.jsonl has one line for each asset. People
write a rank into each line, 1 for the best asset of a prompt. Assets of equal rank are not paired. If people
compared pairs of assets, the majority of their votes on a pair determines the preferred asset.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from eg3d_rlhf.models.sparse import Latent, latents_of, parts_of, to_cpu
from eg3d_rlhf.preferences.labels import jsonl_records
from eg3d_rlhf.tuning.flow.base.conditioning import CONDITIONING_FILE, Conditioning, write_conditioning
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, by_condition, write_pairs
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION, Pipeline, stage_of
from training.storage import read_tensors, write_tensors

RANKING = "ranking.jsonl"  # name of the list of assets
KIND = "latents"  # kind of a file of latents, which its header states


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An asset of a prompt, which can be paired with other assets of the prompt."""

    name: str  # name that is unique within the prompt
    condition: str  # prompt
    rank: float  # rank of the asset, where smaller is better; nan if people compared pairs
    latents: Mapping[str, Latent]  # name of a stage -> latent
    file: Path | None = None  # file that people look at, or None


# Function from two assets to the number of votes for the first and for the second asset.
Votes = Callable[[Candidate, Candidate], tuple[int, int]]


def pair_up(
    candidates: Sequence[Candidate], count_votes: Votes | Mapping[str, Votes] | None = None
) -> dict[str, list[PreferencePair]]:
    """Make preference pairs from the assets of each prompt.

    Pairs of equal rank, or without a majority of votes, are left out.

    Args:
        candidates: assets of all prompts.
        count_votes: function that counts the votes for the first and for the second of two assets; or name of
            a stage -> such a function, if stages learn from different questions; None to use the ranks of the
            assets.
    Returns: name of a stage -> its pairs, for the stages of which all assets have latents. Stages without a
        pair are left out.
    Raises: ValueError if no stage has a pair.
    """
    # dict.fromkeys removes repeated names and keeps the order of the stages.
    all_stages = dict.fromkeys(stage for asset in candidates for stage in asset.latents)
    stages = [stage for stage in all_stages if all(stage in asset.latents for asset in candidates)]
    votes_by_stage = count_votes if isinstance(count_votes, Mapping) else dict.fromkeys(stages, count_votes)
    pairs: dict[str, list[PreferencePair]] = {}
    for stage in (stage for stage in stages if stage in votes_by_stage):
        votes = votes_by_stage[stage]
        for condition, prompt_assets in by_condition(candidates).items():
            # Only assets of one prompt are paired, since ranks of different prompts cannot be compared.
            asset_pairs = (
                _pair_by_rank(prompt_assets) if votes is None else _pair_by_votes(prompt_assets, votes)
            )
            for better_asset, worse_asset, provenance in asset_pairs:
                pairs.setdefault(stage, []).append(
                    PreferencePair(
                        id=f"{condition}/{better_asset.name}>{worse_asset.name}",
                        condition=condition,
                        stage=stage,
                        preferred=better_asset.latents[stage],
                        rejected=worse_asset.latents[stage],
                        provenance=provenance,
                    )
                )
    if not pairs:
        if count_votes is None:
            raise ValueError(
                f"pairs: no prompt has two assets of unequal rank among the {len(candidates)} assets. Rank at"
                " least two assets of a prompt, 1 for the best."
            )
        raise ValueError(
            f"pairs: no two of the {len(candidates)} assets have a majority of votes for one of them. Label"
            " more pairs."
        )
    return pairs


AssetPairs = list[tuple[Candidate, Candidate, dict]]  # (better asset, worse asset, provenance)


def _pair_by_rank(candidates: Sequence[Candidate]) -> AssetPairs:
    """Pair every two assets of a prompt that have unequal ranks. The better asset of a pair is first."""
    asset_pairs: AssetPairs = []
    ranks = sorted({candidate.rank for candidate in candidates})
    for better_rank, worse_rank in combinations(ranks, 2):
        better_assets = [candidate for candidate in candidates if candidate.rank == better_rank]
        worse_assets = [candidate for candidate in candidates if candidate.rank == worse_rank]
        for better_asset in better_assets:
            for worse_asset in worse_assets:
                asset_pairs.append((better_asset, worse_asset, {"ranks": [better_rank, worse_rank]}))
    return asset_pairs


def _pair_by_votes(candidates: Sequence[Candidate], count_votes: Votes) -> AssetPairs:
    """Pair every two assets of a prompt of which one has more votes. The better asset is first."""
    asset_pairs: AssetPairs = []
    for first_asset, second_asset in combinations(candidates, 2):
        first_votes, second_votes = count_votes(first_asset, second_asset)
        if first_votes > second_votes:
            asset_pairs.append((first_asset, second_asset, {"votes": [first_votes, second_votes]}))
        elif second_votes > first_votes:
            asset_pairs.append((second_asset, first_asset, {"votes": [second_votes, first_votes]}))
    return asset_pairs


def write_latents(path: Path, latents: Mapping[str, Latent]) -> None:
    """Write the latents of one asset (name of a stage -> latent) to a file."""
    stages = list(latents)
    # Keys begin with the number of the stage. The metadata contains the names of the stages in the same
    # order.
    tensors = {}
    for i, stage in enumerate(stages):
        for part_name, tensor in parts_of(to_cpu(latents[stage])).items():
            tensors[f"{i}.{part_name}"] = tensor
    write_tensors(path, KIND, tensors, {"stages": stages})


def read_latents(path: Path) -> dict[str, Latent]:
    """Read the latents of an asset from a file of `write_latents`: name of a stage -> latent.

    Raises: FileNotFoundError if there is no file; ValueError if it is damaged or contains something else.
    """
    tensors, meta = read_tensors(path, KIND)
    latents = latents_of(tensors)
    return {stage: latents[str(i)] for i, stage in enumerate(meta["stages"])}


def rank_of(asset_line: Mapping, needs_rank: bool) -> float:
    """Return the rank that a line of the list of assets contains, or nan if ranks are not needed.

    Args:
        asset_line: line of the list, as a dictionary.
        needs_rank: True if the line must have a rank.
    Raises: ValueError if a required rank is missing or not a number.
    """
    rank = asset_line.get("rank")
    if not needs_rank:
        return math.nan
    # bool is a subclass of int, but `true` is not a rank.
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not math.isfinite(rank):
        raise ValueError(
            f"the rank is {rank!r}, but has to be a number. Write 1 for the best asset of a prompt."
        )
    return float(rank)


def file_of(asset_line: Mapping, folder: Path) -> Path | None:
    """Return the path of the file of an asset that people look at, or None if there is no such file.

    Args:
        asset_line: line of the list of assets, as a dictionary.
        folder: folder of the list.
    """
    # The key "asset" names an asset of the user, which has no other file to look at.
    file_name = asset_line.get("look_at", asset_line.get("asset"))
    return folder / file_name if isinstance(file_name, str) else None


# Function that reads a line of a list. Its arguments are the line, the name of the asset, the folder of the
# list, the generator, and True if the line must have a rank.
Candidates = Callable[[dict, str, Path, Any, bool], Candidate]


def _texts_of_line(asset_line: Any, *keys: str) -> list[str]:
    """Return the non-empty texts that a line of the list of assets has under some keys.

    Args:
        asset_line: line of the list.
        keys: keys whose values are returned, in this order.
    Raises: ValueError if a key is missing, or if its value is not a text or is empty.
    """
    texts = []
    missing_keys = []
    for key in keys:
        key_text = asset_line.get(key) if isinstance(asset_line, dict) else None
        if isinstance(key_text, str) and key_text:
            texts.append(key_text)
        else:
            missing_keys.append(key)
    if missing_keys:
        raise ValueError(
            f"the line has no text for {' and '.join(missing_keys)}. Add the missing text, or sample the"
            " assets again with eg3d-rlhf flow sample."
        )
    return texts


def sampled_candidate(record: dict, name: str, folder: Path, pipeline: Pipeline, ranked: bool) -> Candidate:
    """Make a candidate from a line of the list of assets that names a file of `write_latents`.

    Args:
        record: line of the list, as a dictionary.
        name: name of the asset.
        folder: folder of the list.
        pipeline: generator, by which the shapes of the latents are checked.
        ranked: True if the line must have a rank.
    Raises: ValueError or OSError for a line or a file that does not fit the generator.
    """
    condition, latents_file = _texts_of_line(record, "condition", "latents")
    rank = rank_of(record, ranked)
    latents = read_latents(folder / latents_file)
    for stage, latent in latents.items():
        stage_of(pipeline, stage).check(latents_file, latent)
    return Candidate(name=name, condition=condition, rank=rank, latents=latents, file=file_of(record, folder))


def asset_candidate(read_asset: Callable[[Path], Any]) -> Candidates:
    """Return a function that makes a candidate from a line which may name a file of the user's own asset.

    If the line names latents, they are read. Otherwise the user's asset is read, and the generator encodes
    it.

    Args:
        read_asset: function that reads the file of an asset in the form that the generator encodes.
    """

    def candidate(record: dict, name: str, folder: Path, pipeline: Any, ranked: bool) -> Candidate:
        """Make a candidate from a line of the list of assets; see `sampled_candidate` for the arguments."""
        # If the line names latents, they are read, because this is faster than to encode an asset.
        if not isinstance(record, dict) or "latents" in record or not isinstance(record.get("asset"), str):
            return sampled_candidate(record, name, folder, pipeline, ranked)
        condition, asset_file = _texts_of_line(record, "condition", "asset")
        (latents,) = pipeline.encode([read_asset(folder / asset_file)])
        for stage, latent in latents.items():
            stage_of(pipeline, stage).check(asset_file, latent)
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
    """Pairs that were read from a list of assets or from samples of another project."""

    pairs: Mapping[str, Sequence[PreferencePair]]  # name of a stage -> its pairs
    conditioning: Conditioning | None = None  # embeddings of the prompts; None if the source has none
    report: Mapping = field(default_factory=dict)  # numbers and texts for JSON about the source and the pairs


def read_candidates(
    path: Path,
    pipeline: Any,
    ranked: bool,
    on_asset: Callable[[], None] | None = None,
    make_candidate: Candidates = sampled_candidate,
) -> list[Candidate]:
    """Read the assets of a list. All of them must have latents of the same stages.

    Args:
        path: path of the list.
        pipeline: generator to which the latents belong.
        ranked: True if each line must have a rank.
        on_asset: function that is called after each asset; None for no call.
        make_candidate: function that makes a candidate from a line.
    Raises: FileNotFoundError if there is no list; ValueError, which names the line, if a line is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"ranking: there is no list of assets at {path}. Name a folder that eg3d-rlhf flow sample has"
            f" written, or a list such as {RANKING}."
        )
    candidates: list[Candidate] = []
    # The reader of label files, because people edit the list: it accepts empty lines and a byte order mark.
    for line_number, line_record in jsonl_records(path, '{"asset": ..., "rank": ...}'):
        try:
            candidates.append(
                make_candidate(line_record, f"{line_number:06d}", path.parent, pipeline, ranked)
            )
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}, line {line_number}: {error}") from error
        if on_asset:
            on_asset()
    stages = dict.fromkeys(stage for asset in candidates for stage in asset.latents)
    # Pairs of a stage need latents of this stage for all assets.
    incomplete_stages = [stage for stage in stages if not all(stage in asset.latents for asset in candidates)]
    if incomplete_stages:
        raise ValueError(
            f"{path}: some assets have latents of stage {incomplete_stages[0]!r}, and others have not. Use"
            " assets that were all sampled by the same call of eg3d-rlhf flow sample."
        )
    return candidates


def read_ranking(
    path: Path,
    pipeline: Any,
    on_asset: Callable[[], None] | None = None,
    make_candidate: Candidates = sampled_candidate,
) -> Imported:
    """Read a list of ranked assets, and pair the assets of each prompt.

    Args:
        path: path of the list.
        pipeline: generator to which the latents belong.
        on_asset: function that is called after each asset; None for no call.
        make_candidate: function that makes a candidate from a line.
    Raises: FileNotFoundError if there is no list; ValueError, which names the line, if a line is wrong.
    """
    candidates = read_candidates(path, pipeline, True, on_asset, make_candidate)
    pairs = pair_up(candidates)
    pair_counts = {stage: len(stage_pairs) for stage, stage_pairs in pairs.items()}
    return Imported(pairs=pairs, report={"assets": len(candidates), "pairs": pair_counts})


def write_import(folder: Path, imported: Imported, make_metadata: Callable[[str], Mapping]) -> dict[str, str]:
    """Write pairs in the layout that training reads, with a folder for each stage.

    The embeddings of the prompts are written to a file beside these folders, if there are any.

    Args:
        folder: folder to write.
        imported: pairs of all stages.
        make_metadata: function from the name of a stage to metadata of its pairs, as values for JSON.
    Returns: name of a stage -> hash of its pairs.
    """
    # The metadata of all stages is made first, so that an error of `make_metadata` leaves no files.
    metadata_by_stage = {
        stage: {"convention": CONVENTION, **make_metadata(stage)} for stage in imported.pairs
    }
    hash_by_stage = {
        stage: write_pairs(folder / stage, pairs, metadata_by_stage[stage])
        for stage, pairs in imported.pairs.items()
    }
    if imported.conditioning is not None:
        write_conditioning(folder / CONDITIONING_FILE, imported.conditioning)
    return hash_by_stage
