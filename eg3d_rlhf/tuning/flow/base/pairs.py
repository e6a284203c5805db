"""Preference pairs of a stage's latents, from people or from the circular loop, and folders that hold them.

DPO trains on these pairs. A folder holds the pairs of one stage:

    meta.json           stage, number of pairs, hashes, and the writer's metadata; written last, so that a
                        folder without it is unfinished
    pairs.jsonl         one line per pair: its columns, and the names of its two latents
    latents-000.safetensors ...     latents; a latent that several pairs share is stored once
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
    """Two latents of one stage, sampled for one prompt, of which the first is preferred."""

    id: str  # unique within its set
    condition: str  # prompt; the pipeline has its conditioning tokens
    stage: str
    preferred: Latent
    rejected: Latent
    source: str = "human"
    reward_preferred: float | None = None  # scores of the finished assets; None: not scored
    reward_rejected: float | None = None
    w1: float | None = None  # filter: kept where above the threshold; see training/circular/loop_pairs.py
    w2: float | None = None  # weight, mean 1 over the kept pairs
    # seeds, hashes of networks and files that it came from; JSON types
    provenance: Mapping = field(default_factory=dict)

    def __post_init__(self):
        who = f"pair {self.id!r}"
        if not self.id or self.source not in SOURCES:
            raise ValueError(
                f"{who}: expected an id and source {' or '.join(SOURCES)}, got source {self.source!r}."
                " Correct them."
            )
        # only w2 is a weight, and must not be negative; scores and w1 have any sign
        for name in ("reward_preferred", "reward_rejected", "w1", "w2"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (name != "w2" or value >= 0)):
                expected = "a number >= 0" if name == "w2" else "a finite number"
                raise ValueError(
                    f"{who}, {name}: expected {expected} or None, got {value}. Drop the pair, or score it"
                    " again."
                )
        # both latents are checked alone, then compared: voxels may differ, channels may not
        forms = []
        for name in ("preferred", "rejected"):
            latent = getattr(self, name)
            values = feats_of(latent)
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                got = f"{bad} of {values.numel()} numbers NaN or infinite"
                raise ValueError(f"{who}, {name}: expected finite latents, got {got}. Drop the pair.")
            # a repeated voxel would count twice in the flow-matching error
            twice = (
                len(latent.coords) - len(torch.unique(latent.places))
                if isinstance(latent, SparseSample)
                else 0
            )
            if twice:
                raise ValueError(
                    f"{who}, {name}: expected every voxel once, got {twice} repeated. Merge their features,"
                    " or drop the pair."
                )
            forms.append(_form(latent))
        if forms[0] != forms[1]:
            raise ValueError(
                f"{who}: expected two latents of one form, got {forms[0]} and {forms[1]}. Pair latents of one"
                " stage."
            )

    @property
    def scored(self) -> bool:
        return self.reward_preferred is not None and self.reward_rejected is not None

    @property
    def rewards(self) -> tuple[float, float]:
        """Return the scores of the preferred and of the rejected asset of a scored pair."""
        assert self.reward_preferred is not None and self.reward_rejected is not None
        return self.reward_preferred, self.reward_rejected

    @property
    def reward_gap(self) -> float:
        preferred, rejected = self.rewards
        return preferred - rejected


def _form(latent: Latent) -> str:
    """Describe what two latents of one stage must share: kind, channels and shape, but not the voxels."""
    if isinstance(latent, SparseSample):
        more = "" if latent.given is None else f", {latent.given.shape[1]} given"
        return f"voxels of {latent.feats.shape[1]} channels{more}"
    if isinstance(latent, NamedSample):
        return "tensors " + ", ".join(
            f"{name} {list(tensor.shape)}" for name, tensor in latent.tensors.items()
        )
    return f"a {'grid' if latent.ndim == 4 else 'tensor'} {list(latent.shape)}"


class Lazy(Mapping[str, T]):
    """Mapping whose values are made at their first access, and then kept in memory."""

    def __init__(self, names: Collection[str], make: Callable[[str], T]):
        self._names = tuple(names)
        self._make = make
        self._made: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise self.missing(name)
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def missing(self, name: str) -> Exception:
        """Make the error for a name that is not in the mapping."""
        return KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class PairsByStage(Lazy[list[PreferencePair]]):
    """Preference pairs by the name of a stage.

    Raises ValueError for a stage without pairs, since users choose the stages.
    """

    def missing(self, name: str) -> Exception:
        return ValueError(
            f"pairs: expected pairs of stage {name!r}, got pairs of {', '.join(self) or 'no stage'}. Add the"
            " pairs of that stage, or leave the stage out."
        )


def pairs_of_conditions(pairs: Iterable[PreferencePair], names: Collection[str]) -> list[PreferencePair]:
    """Select the pairs of the prompts `names`, in the order of `pairs`."""
    kept = set(names)
    return [pair for pair in pairs if pair.condition in kept]


def check_unique(who: str, examples: Iterable[Any], what: str = "pairs") -> None:
    """Raise ValueError, whose message begins with `who`, where two examples have the same id.

    The id seeds a pair's noise and names the pair in files.
    """
    repeated = [name for name, n in Counter(example.id for example in examples).items() if n > 1]
    if repeated:
        raise ValueError(
            f"{who}: expected unique ids, got {len(repeated)} repeated, such as {repeated[0]!r}. Number the"
            f" {what}."
        )


def by_condition(examples: Iterable[Any]) -> dict[str, list[Any]]:
    """Group examples by prompt, in their order."""
    groups: dict[str, list[Any]] = {}
    for example in examples:
        groups.setdefault(example.condition, []).append(example)
    return groups


FORMAT = 1  # version of the folder's layout, in meta.json
SHARD_BYTES = 256 * 10**6  # size at which a new file of latents is begun
LATENTS = ("preferred", "rejected")
COLUMNS = tuple(f.name for f in fields(PreferencePair) if f.name not in LATENTS)


def write_pairs(
    folder: str | Path, pairs: Sequence[PreferencePair], meta: dict, shard_bytes: int = SHARD_BYTES
) -> str:
    """Write pairs of one stage, and return a hash of the content. Equal pairs and meta give an equal hash.

    Pairs that are already in the folder are replaced. Until meta.json is written again, the folder cannot be
    read.
    Args: meta: JSON types, which read_pairs returns.
    Raises: ValueError for no pairs, pairs of two stages, or ids that occur twice.
    """
    folder = Path(folder)
    stages = sorted({p.stage for p in pairs})
    if len(stages) != 1:
        raise ValueError(
            f"write_pairs: expected pairs of one stage, got {', '.join(stages) or 'no pairs'}. Keep a folder"
            " for each stage."
        )
    check_unique("write_pairs", pairs)
    # meta.json is deleted first and written last: an interrupted write never looks complete
    (folder / "meta.json").unlink(missing_ok=True)
    # the new pairs may need fewer shards, so old ones would stay
    for old in folder.glob("latents-*.safetensors"):
        old.unlink()
    # by identity of the object: an asset that is in many pairs is stored once
    unique = {id(latent): latent for p in pairs for latent in (p.preferred, p.rejected)}
    names = {key: f"{i:06d}" for i, key in enumerate(unique)}
    shards = {}
    parts = _shards({names[key]: latent for key, latent in unique.items()}, shard_bytes)
    for i, tensors in enumerate(tqdm(parts, desc="pairs", unit="shard", leave=False, disable=None)):
        path = folder / f"latents-{i:03d}.safetensors"
        write_tensors(path, "pairs", tensors, {"stage": stages[0]})
        shards[path.name] = file_hash(path)
    # columns of each pair, with the names of its latents in place of the tensors
    rows = [
        {
            **{name: getattr(p, name) for name in COLUMNS},
            "provenance": dict(p.provenance),
            **{name: names[id(getattr(p, name))] for name in LATENTS},
        }
        for p in pairs
    ]
    records = "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows).encode()
    write_atomic(folder / "pairs.jsonl", records)
    content = {
        "format": FORMAT,
        "stage": stages[0],
        "pairs": len(pairs),
        "shards": shards,
        "records": hashlib.sha256(records).hexdigest(),
        "meta": meta,
    }
    # the hash covers the hashes of shards and list, and thus all bytes of the folder
    digest = json_hash(content)
    text = json.dumps({**content, "hash": digest}, indent=1, sort_keys=True, allow_nan=False)
    write_atomic(folder / "meta.json", (text + "\n").encode())
    return digest


def read_pairs(folder: str | Path, stage: FlowStage | str | None = None) -> tuple[list[PreferencePair], dict]:
    """Read the pairs of a folder, and the meta that its writer passed.

    Args: stage: the stage that the pairs must belong to, by name or as a FlowStage, which also checks the
        shapes of the latents. None accepts any stage.
    Raises: FileNotFoundError or ValueError for unfinished, damaged, missing or foreign files, another stage,
        or latents that are not finite.
    """
    folder = Path(folder)
    # cheap checks first: the description, then the list, then the large files of latents
    content = _read_description(folder)
    wanted = stage.name if isinstance(stage, FlowStage) else stage
    if wanted is not None and content["stage"] != wanted:
        raise ValueError(
            f"{folder}: expected pairs of stage {wanted!r}, got pairs of {content['stage']!r}. Name that"
            " stage's folder."
        )
    path = folder / "pairs.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the list of {content['pairs']} pairs, got nothing there. Restore the folder."
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != content["records"]:
        raise ValueError(
            f"{path}: expected the list whose hash is in meta.json, got other bytes. Restore the folder."
        )
    rows = [json.loads(line) for line in data.splitlines()]
    latents = _read_latents(folder, content)
    # PreferencePair checks each pair again: a matching hash proves the bytes, not that the values are valid
    try:
        pairs = [PreferencePair(**{**row, **{name: latents[row[name]] for name in LATENTS}}) for row in rows]
    except (KeyError, TypeError) as error:
        got = f"others: {error}"
        raise ValueError(
            f"{path}: expected the columns of pairs and their latents, got {got}. Make the pairs again."
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    check_unique(f"{path}", pairs)
    # meta.json states one stage, but each line states its own as well
    foreign = next((p for p in pairs if p.stage != content["stage"]), None)
    if foreign is not None:
        raise ValueError(
            f"{folder}: expected pairs of stage {content['stage']!r} alone, got {foreign.id} of"
            f" {foreign.stage!r}. Keep a folder for each stage."
        )
    if isinstance(stage, FlowStage):
        for pair in pairs:
            for name in LATENTS:
                stage.check(f"{folder}, pair {pair.id!r}, {name}", getattr(pair, name))
    return pairs, content["meta"]


def pairs_hash(folder: str | Path) -> str:
    """Read the hash that write_pairs returned, without reading the pairs."""
    return _read_description(Path(folder))["hash"]


def _shards(unique: dict[str, Latent], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Divide tensors by name into parts of at most `limit` bytes.

    The tensors of one latent stay together, so a latent above the limit gets a part of its own.
    """
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, latent in unique.items():
        # "000003" names a latent of one tensor ("x"), "000003.coords" a tensor of a latent of several
        tensors = {
            name if key == "x" else f"{name}.{key}": tensor for key, tensor in parts_of(latent).items()
        }
        more = sum(t.numel() * t.element_size() for t in tensors.values())
        # an empty part is never yielded here, even if one latent is above the limit
        if part and size + more > limit:
            yield part
            part = {}
            size = 0
        # on the CPU and without graph, as safetensors stores them
        part.update({key: t.detach().cpu() for key, t in tensors.items()})
        size += more
    yield part


def _read_description(folder: Path) -> dict:
    """Read meta.json of a folder of pairs, and check it against the hash that it contains."""
    path = folder / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: expected a folder of pairs, got no meta.json in it. Check the path, or finish"
            " writing it."
        )
    try:
        content = json.loads(path.read_text())
        intact = content["format"] == FORMAT and content["hash"] == json_hash(
            {k: v for k, v in content.items() if k != "hash"}
        )
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(
            f"{path}: expected the description of pairs, format {FORMAT}, got a damaged or foreign file."
            " Write them again."
        )
    return content


def _read_latents(folder: Path, content: dict) -> dict[str, Latent]:
    """Read the latents of all shards by name, and check each file against its hash."""
    tensors: dict[str, torch.Tensor] = {}
    for name, expected in tqdm(
        sorted(content["shards"].items()), desc="pairs", unit="shard", leave=False, disable=None
    ):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected a shard of {len(content['shards'])}, got nothing there. Restore the"
                " folder."
            )
        if file_hash(path) != expected:
            raise ValueError(
                f"{path}: expected the bytes whose hash is in meta.json, got others. Restore the folder: the"
                " file is damaged or from another folder."
            )
        tensors.update(read_tensors(path, "pairs")[0])
    return latents_of(tensors)
