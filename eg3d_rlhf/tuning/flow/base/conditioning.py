"""Conditioning of flows: one tensor of tokens, or several tensors by name, with a row per sample.

Embeddings are kept by the names of conditions, in a file of ours, or in those of other programs, one file per
condition.

Shape letters: N samples, L tokens, E their size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.models import weights
from training.storage import read_tensors, write_tensors

Condition = torch.Tensor | Mapping[str, torch.Tensor]  # [N, L, E], or by name [N, ...]


def each(change: Callable[..., torch.Tensor], condition: Condition, *others: Condition) -> Condition:
    """The condition with each of its tensors changed, together with those of others of the same form."""
    if isinstance(condition, torch.Tensor):
        return change(condition, *others)
    named = [
        other for other in others if not isinstance(other, torch.Tensor) and set(other) == set(condition)
    ]
    if len(named) < len(others):
        raise ValueError(
            f"conditions: expected tensors {', '.join(condition)} of each, got others. The empty condition"
            " has the same."
        )
    return {name: change(tensor, *(other[name] for other in named)) for name, tensor in condition.items()}


def to_device(condition: Condition, device: torch.device | str) -> Condition:
    return each(lambda tensor: tensor.to(device), condition)


def tensor_of(condition: Condition) -> torch.Tensor:
    """Return one of its tensors, for the device that all are on."""
    return condition if isinstance(condition, torch.Tensor) else next(iter(condition.values()))


def rows(condition: Condition) -> int:
    """Return N. Raises: ValueError where tensors differ in it."""
    if isinstance(condition, torch.Tensor):
        return len(condition)
    counts = {name: len(tensor) for name, tensor in condition.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"conditions: expected tensors of one row per sample, got {counts}. Collate them alike."
        )
    return next(iter(counts.values()))


def expanded(empty: Condition, condition: Condition) -> Condition:
    """Repeat an empty condition that is given once for each row of the other."""
    return each(lambda null, full: null.expand_as(full) if len(null) == 1 else null, empty, condition)


def where(mask: torch.Tensor, yes: Condition, no: Condition) -> Condition:
    """Choose row by row: `yes` where mask [N] is true."""
    return each(
        lambda a, b: torch.where(mask.to(b.device).view(-1, *[1] * (b.ndim - 1)), a.to(b), b), yes, no
    )


def twice(condition: Condition) -> Condition:
    """Repeat all rows once more behind them."""
    return each(lambda tensor: tensor.repeat(2, *[1] * (tensor.ndim - 1)), condition)


KIND = "conditions"
CONDITIONS = version_0_1.CONDITIONING[0]  # usual name of the file of `write_conditions`
NULL = ""  # name of the empty condition, where a file has one
SUFFIXES = (".pt", ".npy", ".npz", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Tokens by name, or several tensors for each. Images have a null of zeros; a text's null is the
    embedding of '' and must be there.
    """

    tokens: Mapping[str, Condition]  # [L, E] float32 each, or tensors by name; all alike
    encoder: str = ""  # what computed them and of what pictures; "" where it is unknown
    zero_null: bool = False  # the empty condition is zeros
    names: tuple[str, ...] = field(init=False)  # all but the empty one

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(name for name in self.tokens if name != NULL))
        forms = {str(form_of(t)) for t in self.tokens.values()}
        first = next(iter(self.tokens.values()), None)
        if (
            not self.names
            or len(forms) != 1
            or (isinstance(first, torch.Tensor) and first.ndim != 2)
            or not form_of(first)
        ):
            raise ValueError(
                f"conditions: expected embeddings [L, E], all alike, got shapes {', '.join(sorted(forms))}."
                " Use one encoder."
            )
        bad = next(
            (
                name
                for name, t in self.tokens.items()
                if not all(torch.isfinite(x).all() for x in tensors_of(t))
            ),
            None,
        )
        if bad is not None:
            raise ValueError(
                f"conditions: expected finite embeddings, got others for {bad!r}. Embed it again."
            )
        if not self.zero_null and NULL not in self.tokens:
            raise ValueError(
                "conditions: expected the embedding of the empty text, named '', for guidance, got none."
                " Embed '' as well."
            )

    @property
    def form(self) -> Mapping[str, list[int]] | list[int]:
        """The shape of each embedding, or shapes by name."""
        return form_of(next(iter(self.tokens.values())))

    def check(self, who: str, expected: Mapping[str, list[int]] | list[int], encoder: str) -> None:
        """Raise ValueError, in the name of `who`, unless each has this shape, or these shapes by name."""
        if self.form != expected:
            source = f" of {self.encoder}" if self.encoder else ""
            raise ValueError(
                f"{who}: expected embeddings {expected}, got {self.form}{source}. Embed them with {encoder}."
            )

    def check_source(self, who: str, source: str, encoder: str) -> None:
        """Raise ValueError where another encoder or another preparation made them; an unknown source is
        accepted.

        Args: source: what they must state; with * in front whatever ends so.
        """
        fits = self.encoder.endswith(source[1:]) if source.startswith("*") else self.encoder == source
        if self.encoder and not fits:
            raise ValueError(
                f"{who}: expected embeddings of {source}, got those of {self.encoder}. Embed them with"
                f" {encoder}."
            )

    def select(self, names: Sequence[str]) -> Condition:
        """Stack the conditions of these names: [N, L, E], or by name [N, ...].

        Raises: ValueError for names without an embedding.
        """
        missing = sorted({name for name in names if name not in self.tokens})
        if missing:
            raise ValueError(
                f"conditions: expected embeddings of all names, got none for {_listed(missing)}. Embed them"
                " too."
            )
        first, *others = [self.tokens[name] for name in names]
        return each(lambda *rows: torch.stack(rows), first, *others)

    def null(self, n: int) -> Condition:
        empty = (
            each(torch.zeros_like, next(iter(self.tokens.values()))) if self.zero_null else self.tokens[NULL]
        )
        return each(lambda tensor: tensor.expand(n, *[-1] * tensor.ndim), empty)


def form_of(condition: Condition | None) -> Any:
    if condition is None or isinstance(condition, torch.Tensor):
        return [] if condition is None else list(condition.shape)
    return {name: list(tensor.shape) for name, tensor in sorted(condition.items())}


def tensors_of(condition: Condition) -> list[torch.Tensor]:
    return [condition] if isinstance(condition, torch.Tensor) else list(condition.values())


def write_conditions(path: Path, conditions: Conditions) -> None:
    names = list(conditions.tokens)
    tensors: dict[str, torch.Tensor] = {}
    for i, name in enumerate(names):
        embedding = conditions.tokens[name]
        named = (
            {"": embedding}
            if isinstance(embedding, torch.Tensor)
            else {f"/{key}": tensor for key, tensor in embedding.items()}
        )
        tensors |= {f"tokens.{i}{key}": tensor for key, tensor in named.items()}
    meta = {"names": names, "encoder": conditions.encoder, "zero_null": conditions.zero_null}
    write_tensors(path, KIND, tensors, meta)


def read_conditions(path: Path, zero_null: bool = True) -> Conditions:
    """Read a file of `write_conditions`, its folder, or a folder of <name>.pt, .npy, .npz or .safetensors
    with one tensor [L, E] or [1, L, E] each.

    Args:
        zero_null: for a folder: the empty condition is zeros, as for images, rather than the embedding of ''
            in a file named null.
    Raises: FileNotFoundError; ValueError for what is not an embedding.
    """
    path = Path(path)
    if (inside := version_0_1.conditioning_file(path)).is_file():
        path = inside
    if path.is_file():
        tensors, meta = read_tensors(path, KIND)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, part = key.removeprefix("tokens.").partition("/")
            parts.setdefault(number, {})[part] = tensor
        tokens = {
            name: part_of.get("", part_of)
            for name, part_of in ((name, parts[str(i)]) for i, name in enumerate(meta["names"]))
        }
        return Conditions(tokens=tokens, encoder=meta["encoder"], zero_null=meta["zero_null"])
    files = sorted(p for p in path.glob("*") if p.suffix in SUFFIXES)
    if not files:
        endings = ", ".join(SUFFIXES)
        raise FileNotFoundError(
            f"conditions: expected a file or a folder of {endings}, got none at {path}. Embed the conditions"
            " first."
        )
    named = {p.stem: read_embedding(p) for p in files}
    if not zero_null and "null" in named:
        named[NULL] = named.pop("null")
    return Conditions(tokens=named, zero_null=zero_null)


def read_embedding(path: Path) -> torch.Tensor:
    """Read one condition's tokens [L, E] as float32."""
    embedding = read_array(path)
    if embedding.ndim == 3 and len(embedding) == 1:
        embedding = embedding[0]
    if embedding.ndim != 2:
        raise ValueError(
            f"{path}: expected tokens [L, E], got {list(embedding.shape)}. Save one condition per file."
        )
    return embedding.float()


def read_array(path: Path, key: str | None = None) -> torch.Tensor:
    """Read the one array of a .pt, .npy, .npz or .safetensors file, or of several the one called `key`.

    Raises: FileNotFoundError; ValueError for a damaged file, one that would run code, or one without that
        array.
    """
    if not path.is_file():
        raise FileNotFoundError(f"array: expected a file, got none at {path}. Check the path.")
    try:
        content = _READERS[path.suffix](path)
    except KeyError:
        raise ValueError(f"{path}: expected one of {', '.join(SUFFIXES)}. Convert it.") from None
    except (ValueError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{path}: expected an array, got a damaged or foreign file ({reason}). Restore it."
        ) from None
    if isinstance(content, Mapping):
        names = list(content)
        chosen = key if key in names else names[0] if len(names) == 1 else None
        if chosen is None:
            raise ValueError(
                f"{path}: expected an array {key or ''} alone, got {_listed(names)}. Save it under that name."
            )
        content = content[chosen]
    if not isinstance(content, torch.Tensor):
        raise ValueError(f"{path}: expected an array, got {type(content).__name__}. Save the tensor alone.")
    return content


def _npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


_tensors = partial(weights.content, who="array")
_READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _tensors,
    ".safetensors": _tensors,
    ".npz": _npz,
    ".npy": lambda path: torch.from_numpy(np.load(path)),
}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
