"""Preference pairs of a stage's latents, and the folders in which they are stored.

The pairs are labelled by people, or made by the circular loop (Circular-DPO). DPO trains on them. A folder
contains the pairs of one stage:

    meta.json                       stage, number of pairs, hashes, and metadata of the writer. It is
                                    written last, so a folder without it is unfinished.
    pairs.jsonl                     one line for each pair, with its columns and the names of its two latents
    latents-000.safetensors ...     latents; a latent that is in several pairs is stored once
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.experiments.store import json_hash
from eg3d_rlhf.models.sparse import Latent, NamedSample, SparseSample, feats_of, latents_of, parts_of
from eg3d_rlhf.tuning.flow.base.stage import FlowStage
from training.progress import tqdm
from training.storage import read_tensors, write_atomic, write_tensors

SOURCES = ("human", "loop")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferencePair:
    """Preferred and rejected latent of one stage, for one prompt.

    Raises: ValueError if a value is not finite, or if the two latents cannot belong to one stage.
    """

    id: str  # name that is unique within a set of pairs
    condition: str  # prompt
    stage: str  # name of the stage
    preferred: Latent
    rejected: Latent
    source: str = "human"  # one of SOURCES: labelled by people, or made by the circular loop
    reward_preferred: float | None = None  # score of the preferred asset; None: it was not scored
    reward_rejected: float | None = None  # score of the rejected asset
    # Value by which the circular loop filters pairs: only pairs above a threshold are used, see
    # training/circular/loop_pairs.py.
    w1: float | None = None
    w2: float | None = None  # weight of the pair in the loss; its mean over the used pairs is 1
    # Values for JSON about the origin of the pair: seeds, and hashes of networks and files.
    provenance: Mapping = field(default_factory=dict)

    def __post_init__(self):
        who = f"pair {self.id!r}"
        if not self.id:
            raise ValueError("pair: the id is empty. Give each pair an id that is unique within its set.")
        if self.source not in SOURCES:
            raise ValueError(f"{who}: the source {self.source!r} is not allowed. Use {' or '.join(SOURCES)}.")
        # w2 is a weight and must not be negative. Scores and w1 may have any sign.
        for field_name in ("reward_preferred", "reward_rejected", "w1", "w2"):
            score = getattr(self, field_name)
            if score is not None and not (math.isfinite(score) and (field_name != "w2" or score >= 0)):
                allowed_score_text = "a number >= 0" if field_name == "w2" else "a finite number"
                raise ValueError(
                    f"{who}, {field_name}: expected {allowed_score_text} or None, got {score}. Drop the pair,"
                    " or score it again."
                )
        latent_descriptions = []
        for field_name in ("preferred", "rejected"):
            latent = getattr(self, field_name)
            features = feats_of(latent)
            invalid_count = int((~torch.isfinite(features)).sum())
            if invalid_count:
                raise ValueError(
                    f"{who}, {field_name}: {invalid_count} of {features.numel()} numbers of the latent are"
                    " NaN or infinite. Drop the pair."
                )
            # A voxel that occurs twice would have twice the weight in the flow-matching error.
            if isinstance(latent, SparseSample):
                repeated_voxel_count = len(latent.coords) - len(torch.unique(latent.places))
                if repeated_voxel_count:
                    raise ValueError(
                        f"{who}, {field_name}: {repeated_voxel_count} voxel indices are repeated, but each"
                        " voxel may occur once only. Merge the features of equal voxels, or drop the pair."
                    )
            latent_descriptions.append(_describe(latent))
        if latent_descriptions[0] != latent_descriptions[1]:
            raise ValueError(
                f"{who}: the two latents are {latent_descriptions[0]} and {latent_descriptions[1]}, so they"
                " cannot belong to one stage. Pair latents of one stage."
            )

    @property
    def scored(self) -> bool:
        """True if both assets of the pair have a score."""
        return self.reward_preferred is not None and self.reward_rejected is not None

    @property
    def rewards(self) -> tuple[float, float]:
        """Scores of the preferred and of the rejected asset, if `scored` is True."""
        assert self.reward_preferred is not None and self.reward_rejected is not None
        return self.reward_preferred, self.reward_rejected

    @property
    def reward_gap(self) -> float:
        """Score of the preferred asset minus that of the rejected asset, if `scored` is True."""
        preferred_score, rejected_score = self.rewards
        return preferred_score - rejected_score


def _describe(latent: Latent) -> str:
    """Describe what two latents of one stage have in common: kind, channels and shape, but not voxels."""
    if isinstance(latent, SparseSample):
        given_text = "" if latent.given is None else f", {latent.given.shape[1]} given"
        return f"voxels of {latent.feats.shape[1]} channels{given_text}"
    if isinstance(latent, NamedSample):
        return "tensors " + ", ".join(
            f"{name} {list(tensor.shape)}" for name, tensor in latent.tensors.items()
        )
    # A dense grid [C, R, R, R] has four dimensions.
    return f"a {'grid' if latent.ndim == 4 else 'tensor'} {list(latent.shape)}"


class Lazy(Mapping[str, T]):
    """Mapping whose values are made at their first access, and then kept in memory.

    Args:
        keys: keys of the mapping.
        make_value: function from a key to its value.
    """

    def __init__(self, keys: Collection[str], make_value: Callable[[str], T]):
        self._names = tuple(keys)
        self._make = make_value
        self._values: dict[str, T] = {}

    def __getitem__(self, key: str) -> T:
        if key not in self._names:
            raise self.missing(key)
        if key not in self._values:
            self._values[key] = self._make(key)
        return self._values[key]

    def missing(self, key: str) -> Exception:
        """Return the error for a key that the mapping does not have."""
        return KeyError(key)

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class PairsByStage(Lazy[list[PreferencePair]]):
    """Mapping from the name of a stage to its preference pairs.

    A stage without pairs raises ValueError and not KeyError, because users choose the stages.
    """

    def missing(self, key: str) -> Exception:
        return ValueError(
            f"pairs: there are no pairs of stage {key!r}, only of {', '.join(self) or 'no stage'}. Add pairs"
            " of that stage, or leave the stage out."
        )


def pairs_of_prompts(
    pairs: Iterable[PreferencePair], requested_prompts: Collection[str]
) -> list[PreferencePair]:
    """Return the pairs whose prompt is one of `requested_prompts`, in the order of `pairs`."""
    prompt_set = set(requested_prompts)
    return [pair for pair in pairs if pair.condition in prompt_set]


def check_unique(who: str, examples: Iterable[Any], examples_noun: str = "pairs") -> None:
    """Raise ValueError if two examples have the same id.

    The noise of an example in training is derived from its id, and files name the example by it.

    Args:
        who: beginning of the message.
        examples: objects with the field `id`.
        examples_noun: plural noun for the examples in the message, such as "pairs".
    """
    id_counts = Counter(example.id for example in examples)
    repeated_ids = [name for name, count in id_counts.items() if count > 1]
    if repeated_ids:
        raise ValueError(
            f"{who}: {len(repeated_ids)} ids occur more than once, such as {repeated_ids[0]!r}. Give the"
            f" {examples_noun} different ids, for example numbers."
        )


def by_condition(examples: Iterable[Any]) -> dict[str, list[Any]]:
    """Group examples by prompt: prompt -> its examples, in their order."""
    examples_by_prompt: dict[str, list[Any]] = {}
    for example in examples:
        examples_by_prompt.setdefault(example.condition, []).append(example)
    return examples_by_prompt


FORMAT = 1  # version of the folder's layout, which meta.json contains
SHARD_BYTES = 256 * 10**6  # largest size of a file of latents in bytes
LATENTS = ("preferred", "rejected")  # fields of a pair that are stored in the files of latents
COLUMNS = tuple(f.name for f in fields(PreferencePair) if f.name not in LATENTS)  # fields in pairs.jsonl


def write_pairs(
    folder: str | Path, pairs: Sequence[PreferencePair], metadata: dict, shard_bytes: int = SHARD_BYTES
) -> str:
    """Write the pairs of one stage into a folder, in place of all pairs that it contains.

    Args:
        folder: folder to write.
        pairs: pairs of one stage, with different ids.
        metadata: metadata as values for JSON, which `read_pairs` returns.
        shard_bytes: largest size of a file of latents in bytes.
    Returns: hash of the content of the folder. Equal pairs and metadata have equal hashes.
    Raises: ValueError if there are no pairs, pairs of several stages, or pairs with equal ids.
    """
    folder = Path(folder)
    stages = sorted({pair.stage for pair in pairs})
    if not stages:
        raise ValueError("write_pairs: there are no pairs to write. Pass at least one pair.")
    if len(stages) > 1:
        raise ValueError(
            f"write_pairs: the pairs belong to the stages {', '.join(stages)}, but a folder contains pairs of"
            " one stage only. Write a folder for each stage."
        )
    check_unique("write_pairs", pairs)
    # meta.json is deleted first and written last, so that a folder whose writing was interrupted is not read.
    (folder / "meta.json").unlink(missing_ok=True)
    # The new pairs may need fewer files of latents than the old ones.
    for old_file in folder.glob("latents-*.safetensors"):
        old_file.unlink()
    # By the identity of the object, so that a latent that is in several pairs is stored once.
    unique_latents = {id(latent): latent for pair in pairs for latent in (pair.preferred, pair.rejected)}
    latent_names = {object_id: f"{i:06d}" for i, object_id in enumerate(unique_latents)}
    shard_hashes = {}
    shards = _shards(
        {latent_names[object_id]: latent for object_id, latent in unique_latents.items()}, shard_bytes
    )
    for i, tensors in enumerate(tqdm(shards, desc="pairs", unit="shard", leave=False)):
        path = folder / f"latents-{i:03d}.safetensors"
        write_tensors(path, "pairs", tensors, {"stage": stages[0]})
        shard_hashes[path.name] = file_hash(path)
    # A row contains the names of the two latents in place of their tensors.
    pair_rows = [
        {
            **{name: getattr(pair, name) for name in COLUMNS},
            "provenance": dict(pair.provenance),
            **{name: latent_names[id(getattr(pair, name))] for name in LATENTS},
        }
        for pair in pairs
    ]
    pairs_jsonl = "".join(
        json.dumps(pair_row, sort_keys=True, allow_nan=False) + "\n" for pair_row in pair_rows
    ).encode()
    write_atomic(folder / "pairs.jsonl", pairs_jsonl)
    description = {
        "format": FORMAT,
        "stage": stages[0],
        "pairs": len(pairs),
        "shards": shard_hashes,
        "records": hashlib.sha256(pairs_jsonl).hexdigest(),
        "meta": metadata,
    }
    # A hash of hashes, which covers all bytes of the folder.
    folder_hash = json_hash(description)
    meta_json = json.dumps({**description, "hash": folder_hash}, indent=1, sort_keys=True, allow_nan=False)
    write_atomic(folder / "meta.json", (meta_json + "\n").encode())
    return folder_hash


def read_pairs(folder: str | Path, stage: FlowStage | str | None = None) -> tuple[list[PreferencePair], dict]:
    """Read the pairs of a folder, and the metadata that was passed to `write_pairs`.

    Args:
        folder: folder of `write_pairs`.
        stage: stage to which the pairs must belong: its name, or the stage itself, which also checks the
            shapes of the latents. None for any stage.
    Raises: FileNotFoundError or ValueError for an unfinished folder, for damaged or missing files, for pairs
    of another stage, and for latents that are not valid.
    """
    folder = Path(folder)
    # Small files are checked before the large files of latents are read.
    description = _read_description(folder)
    required_stage = stage.name if isinstance(stage, FlowStage) else stage
    if required_stage is not None and description["stage"] != required_stage:
        raise ValueError(
            f"{folder}: expected pairs of stage {required_stage!r}, got pairs of {description['stage']!r}."
            " Name the folder of that stage."
        )
    pairs_file = folder / "pairs.jsonl"
    if not pairs_file.is_file():
        raise FileNotFoundError(
            f"{pairs_file}: the list of {description['pairs']} pairs is missing. Restore the folder from a"
            " copy, or write the pairs again."
        )
    pairs_jsonl = pairs_file.read_bytes()
    if hashlib.sha256(pairs_jsonl).hexdigest() != description["records"]:
        raise ValueError(
            f"{pairs_file}: the file does not have the hash that meta.json records, so it has changed."
            " Restore the folder from a copy, or write the pairs again."
        )
    pair_rows = [json.loads(line) for line in pairs_jsonl.splitlines()]
    latents = _read_latents(folder, description)
    # A matching hash shows that the bytes are those that were written, but the values may still be invalid.
    # The constructor of PreferencePair checks them.
    try:
        pairs = [
            PreferencePair(
                **{**pair_row, **{latent_field: latents[pair_row[latent_field]] for latent_field in LATENTS}}
            )
            for pair_row in pair_rows
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{pairs_file}: a line has missing or unknown columns, or names a latent that is not stored"
            f" ({error}). Write the pairs again with this version."
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    check_unique(f"{pairs_file}", pairs)
    # Each line contains the name of its stage, too.
    other_pair = next((pair for pair in pairs if pair.stage != description["stage"]), None)
    if other_pair is not None:
        raise ValueError(
            f"{folder}: meta.json names the stage {description['stage']!r}, but the pair {other_pair.id}"
            f" belongs to {other_pair.stage!r}. Write a folder for each stage."
        )
    if isinstance(stage, FlowStage):
        for pair in pairs:
            for latent_field in LATENTS:
                stage.check(f"{folder}, pair {pair.id!r}, {latent_field}", getattr(pair, latent_field))
    return pairs, description["meta"]


def pairs_hash(folder: str | Path) -> str:
    """Return the hash that `write_pairs` has returned for a folder. The pairs are not read."""
    return _read_description(Path(folder))["hash"]


def _shards(latents: dict[str, Latent], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of latents in groups of at most `max_bytes` bytes, one group for each file.

    The tensors of a latent are in the same group. A latent that is larger than the limit has a group of its
    own.

    Args:
        latents: name -> latent.
        max_bytes: largest size of a group in bytes.
    """
    shard_tensors: dict[str, torch.Tensor] = {}
    shard_byte_count = 0
    for name, latent in latents.items():
        # The key of a latent of one tensor ("x") is its name, such as "000003". The keys of a latent of
        # several tensors are such as "000003.coords".
        tensors = {
            name if key == "x" else f"{name}.{key}": tensor for key, tensor in parts_of(latent).items()
        }
        latent_byte_count = sum(
            tensor_part.numel() * tensor_part.element_size() for tensor_part in tensors.values()
        )
        # The first condition avoids an empty group before a latent that is larger than the limit.
        if shard_tensors and shard_byte_count + latent_byte_count > max_bytes:
            yield shard_tensors
            shard_tensors = {}
            shard_byte_count = 0
        shard_tensors.update({key: tensor_part.detach().cpu() for key, tensor_part in tensors.items()})
        shard_byte_count += latent_byte_count
    yield shard_tensors


def _read_description(folder: Path) -> dict:
    """Read the meta.json of a folder of pairs, and check the hash that it contains.

    Raises: FileNotFoundError if there is no meta.json; ValueError if it is damaged.
    """
    path = folder / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: the folder contains no meta.json, so it is not a folder of pairs, or its writing was"
            " interrupted. Name a folder of pairs, or write the pairs again."
        )
    try:
        description = json.loads(path.read_text())
        is_intact = description["format"] == FORMAT and description["hash"] == json_hash(
            {k: v for k, v in description.items() if k != "hash"}
        )
    except (ValueError, KeyError, TypeError):
        is_intact = False
    if not is_intact:
        raise ValueError(
            f"{path}: the file is damaged, or is not a description of pairs in format {FORMAT}. Restore it"
            " from a copy, or write the pairs again."
        )
    return description


def _read_latents(folder: Path, description: dict) -> dict[str, Latent]:
    """Read the latents of a folder: name -> latent.

    Args:
        folder: folder of pairs.
        description: content of its meta.json, with the hashes of the files.
    Raises: FileNotFoundError or ValueError for a missing or changed file.
    """
    tensor_by_key: dict[str, torch.Tensor] = {}
    for file_name, expected_hash in tqdm(
        sorted(description["shards"].items()), desc="pairs", unit="shard", leave=False
    ):
        path = folder / file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: this file, one of {len(description['shards'])} files of latents, is missing."
                " Restore the folder from a copy, or write the pairs again."
            )
        if file_hash(path) != expected_hash:
            raise ValueError(
                f"{path}: the file does not have the hash that meta.json records, so it is damaged, or"
                " belongs to another folder. Restore the folder from a copy, or write the pairs again."
            )
        tensor_by_key.update(read_tensors(path, "pairs")[0])
    return latents_of(tensor_by_key)
