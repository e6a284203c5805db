"""Preference pairs of a stage's latents, from people or from the loop: what DPO trains on, and the folders that keep them.

    meta.json           stage, number of pairs, hashes, and what the writer has to say; written last: a folder without it is unfinished
    pairs.jsonl         per pair its columns, and the names of its two latents
    latents-000.safetensors ...     latents; one that several pairs share is stored once
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from tqdm import tqdm

from eg3d_rlhf.cli import file_hash
from eg3d_rlhf.flow.sparse import Latent, SparseSample
from eg3d_rlhf.flow.stage import FlowStage
from training.storage import read_tensors, write_atomic, write_tensors

SOURCES = ("human", "loop")


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferencePair:
    """Two latents of one stage under one condition."""

    id: str  # unique within its set
    condition: str  # name; the pipeline knows its tokens
    stage: str
    preferred: Latent
    rejected: Latent
    source: str = "human"
    reward_preferred: float | None = None  # scores of the finished assets, where a reward has seen them
    reward_rejected: float | None = None
    w1: float | None = None  # filter: kept where above the threshold; see weights.py
    w2: float | None = None  # weight, mean 1 over the kept pairs
    provenance: Mapping = field(default_factory=dict)  # seeds, hashes of networks and files that it came from; JSON types

    def __post_init__(self):
        who = f"pair {self.id!r}"
        if not self.id or self.source not in SOURCES:
            raise ValueError(f"{who}: expected an id and source {' or '.join(SOURCES)}, got source {self.source!r}. Correct them.")
        for name in ("reward_preferred", "reward_rejected", "w1", "w2"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (name != "w2" or value >= 0)):
                expected = "a number >= 0" if name == "w2" else "a finite number"
                raise ValueError(f"{who}, {name}: expected {expected} or None, got {value}. Drop the pair, or score it again.")
        for name in ("preferred", "rejected"):
            _check_latent(f"{who}, {name}", getattr(self, name))
        a, b = (_form(x) for x in (self.preferred, self.rejected))
        if a != b:
            raise ValueError(f"{who}: expected two latents of one form, got {a} and {b}. Pair latents of one stage.")


def _check_latent(who: str, latent: Latent) -> None:
    values = latent.feats if isinstance(latent, SparseSample) else latent
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{who}: expected finite latents, got {bad} of {values.numel()} numbers NaN or infinite. Drop the pair.")
    if isinstance(latent, SparseSample):
        x, y, z = latent.coords.long().unbind(1)
        twice = len(latent.coords) - len(torch.unique((x << 42) + (y << 21) + z))
        if twice:
            raise ValueError(f"{who}: expected every voxel once, got {twice} repeated. Merge their features, or drop the pair.")


def _form(latent: Latent) -> str:
    if isinstance(latent, SparseSample):
        return f"voxels of {latent.feats.shape[1]} channels"
    return f"a grid {list(latent.shape)}"


def check_unique(who: str, pairs: Iterable[PreferencePair]) -> None:
    """Raise ValueError, in the name of `who`, where two pairs have one id: the id seeds a pair's noise and names it in files."""
    repeated = [name for name, n in Counter(p.id for p in pairs).items() if n > 1]
    if repeated:
        raise ValueError(f"{who}: expected every id once, got {len(repeated)} repeated, such as {repeated[0]!r}. Number the pairs.")


FORMAT = 1
SHARD_BYTES = 256 * 10**6
LATENTS = ("preferred", "rejected")
COLUMNS = tuple(f.name for f in fields(PreferencePair) if f.name not in LATENTS)


def write_pairs(folder: str | Path, pairs: Sequence[PreferencePair], meta: dict, shard_bytes: int = SHARD_BYTES) -> str:
    """Write pairs of one stage and return the hash of all that was written; equal pairs and meta give an equal hash.

    A folder that has pairs already gets these instead; until meta.json is there again, nobody can read it.
    Args: meta: JSON types, given back by read_pairs.
    Raises: ValueError for no pairs, pairs of two stages, or ids that occur twice.
    """
    folder = Path(folder)
    stages = sorted({p.stage for p in pairs})
    if len(stages) != 1:
        raise ValueError(f"write_pairs: expected pairs of one stage, got {', '.join(stages) or 'no pairs'}. Keep a folder for each stage.")
    check_unique("write_pairs", pairs)
    (folder / "meta.json").unlink(missing_ok=True)
    for old in folder.glob("latents-*.safetensors"):
        old.unlink()
    names, unique = _named(pairs)
    shards = {}
    for i, tensors in enumerate(tqdm(_shards(unique, shard_bytes), desc="pairs", unit="shard", leave=False, disable=None)):
        path = folder / f"latents-{i:03d}.safetensors"
        write_tensors(path, "pairs", tensors, {"stage": stages[0]})
        shards[path.name] = file_hash(path)
    rows = [
        {**{name: _plain(getattr(p, name)) for name in COLUMNS}, "preferred": names[id(p.preferred)], "rejected": names[id(p.rejected)]}
        for p in pairs
    ]
    records = "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows).encode()
    write_atomic(folder / "pairs.jsonl", records)
    content = {
        "format": FORMAT, "stage": stages[0], "pairs": len(pairs), "shards": shards, "records": hashlib.sha256(records).hexdigest(),
        "meta": meta,
    }  # fmt: skip
    content["hash"] = json_hash(content)
    write_atomic(folder / "meta.json", (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    return content["hash"]


def read_pairs(folder: str | Path, stage: FlowStage | str | None = None) -> tuple[list[PreferencePair], dict]:
    """The pairs of a folder and the meta of its writer.

    Args: stage: what they must belong to, by name or, to check their shapes as well, the stage itself; None takes any.
    Raises: FileNotFoundError or ValueError for unfinished, damaged, missing or foreign files, another stage, or latents not finite.
    """
    folder = Path(folder)
    content = _read_description(folder)
    wanted = stage.name if isinstance(stage, FlowStage) else stage
    if wanted is not None and content["stage"] != wanted:
        raise ValueError(f"{folder}: expected pairs of stage {wanted!r}, got pairs of {content['stage']!r}. Name that stage's folder.")
    rows = _read_rows(folder, content)
    latents = _read_latents(folder, content)
    pairs = [_pair(folder, row, latents) for row in rows]
    check_unique(f"{folder / 'pairs.jsonl'}", pairs)
    foreign = next((p for p in pairs if p.stage != content["stage"]), None)
    if foreign is not None:
        raise ValueError(f"{folder}: expected pairs of stage {content['stage']!r} alone, got {foreign.id} of {foreign.stage!r}. Divide it.")
    if isinstance(stage, FlowStage):
        for pair in pairs:
            for name in LATENTS:
                stage.check(f"{folder}, pair {pair.id!r}, {name}", getattr(pair, name))
    return pairs, content["meta"]


def pairs_hash(folder: str | Path) -> str:
    """The hash that write_pairs returned, without reading the pairs."""
    return _read_description(Path(folder))["hash"]


def _named(pairs: Sequence[PreferencePair]) -> tuple[dict[int, str], dict[str, Latent]]:
    """A name for every latent, by its identity, and each latent once."""
    names: dict[int, str] = {}
    unique: dict[str, Latent] = {}
    for pair in pairs:
        for latent in (pair.preferred, pair.rejected):
            if id(latent) not in names:
                names[id(latent)] = f"{len(names):06d}"
                unique[names[id(latent)]] = latent
    return names, unique


def _shards(unique: dict[str, Latent], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors by name, in parts below `limit` bytes; a latent stays whole."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, latent in unique.items():
        sparse = isinstance(latent, SparseSample)
        tensors = {f"{name}.coords": latent.coords, f"{name}.feats": latent.feats} if sparse else {name: latent}
        more = sum(t.numel() * t.element_size() for t in tensors.values())
        if part and size + more > limit:
            yield part
            part, size = {}, 0
        part.update({key: t.detach().cpu() for key, t in tensors.items()})
        size += more
    yield part


def _plain(value):
    return dict(value) if not isinstance(value, (str, float, int, type(None))) else value


def json_hash(values: Mapping) -> str:
    """SHA-256 of JSON values, whatever their order.

    Raises: TypeError for what is no JSON, since its text would not be the same tomorrow.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _read_description(folder: Path) -> dict:
    path = folder / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected a folder of pairs, got no meta.json in it. Check the path, or finish writing it.")
    try:
        content = json.loads(path.read_text())
        sound = content["format"] == FORMAT and content["hash"] == json_hash({k: v for k, v in content.items() if k != "hash"})
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: expected the description of pairs, format {FORMAT}, got a damaged or foreign file. Write them again.")
    return content


def _read_rows(folder: Path, content: dict) -> list[dict]:
    path = folder / "pairs.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the list of {content['pairs']} pairs, got nothing there. Restore the folder.")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != content["records"]:
        raise ValueError(f"{path}: expected the list that meta.json speaks of, got other bytes. Restore the folder.")
    return [json.loads(line) for line in data.splitlines()]


def _read_latents(folder: Path, content: dict) -> dict[str, Latent]:
    tensors: dict[str, torch.Tensor] = {}
    for name, expected in tqdm(sorted(content["shards"].items()), desc="pairs", unit="shard", leave=False, disable=None):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a shard of {len(content['shards'])}, got nothing there. Restore the folder.")
        if file_hash(path) != expected:
            raise ValueError(f"{path}: expected the bytes that meta.json speaks of, got others. It is damaged or from another folder.")
        tensors.update(read_tensors(path, "pairs")[0])
    found: dict[str, Latent] = {}
    for name in sorted(tensors):
        stem, _, part = name.partition(".")
        if part == "coords":
            found[stem] = SparseSample(tensors[name], tensors[f"{stem}.feats"])
        elif not part:
            found[stem] = tensors[name]
    return found


def _pair(folder: Path, row: dict, latents: dict[str, Latent]) -> PreferencePair:
    try:
        return PreferencePair(**{**row, **{name: latents[row[name]] for name in LATENTS}})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: expected a pair's columns and latents, got {error} wrong. Write it again.") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
