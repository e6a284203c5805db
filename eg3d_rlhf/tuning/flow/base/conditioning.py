"""Conditioning of flows: one tensor of tokens, or several tensors by name, with a row per sample.

A prompt is the name of a conditioning input: a text, or the name of an image. Embeddings are stored by
prompt, either in one file that this package writes, or in a folder of another program with one file per
prompt.

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

# tokens [N, L, E], or several tensors by name, [N, ...] each
Condition = torch.Tensor | Mapping[str, torch.Tensor]


def each(change: Callable[..., torch.Tensor], condition: Condition, *others: Condition) -> Condition:
    """Apply `change` to each tensor of the conditioning and to the tensors of the same name in `others`.

    Raises: ValueError where another conditioning has tensors of other names.
    """
    if isinstance(condition, torch.Tensor):
        return change(condition, *others)
    # one missing name would pair tensors that do not belong together, so the sets of names must be equal
    named = [
        other for other in others if not isinstance(other, torch.Tensor) and set(other) == set(condition)
    ]
    if len(named) < len(others):
        raise ValueError(
            f"conditioning: expected the tensors {', '.join(condition)} in every conditioning input, got"
            " other names. Encode all inputs, the empty one included, with one encoder."
        )
    return {name: change(tensor, *(other[name] for other in named)) for name, tensor in condition.items()}


def to_device(condition: Condition, device: torch.device | str) -> Condition:
    """Move every tensor of the conditioning to a device."""
    return each(lambda tensor: tensor.to(device), condition)


def tensor_of(condition: Condition) -> torch.Tensor:
    """Return one tensor of the conditioning. All of them are on one device, which callers read from it."""
    return condition if isinstance(condition, torch.Tensor) else next(iter(condition.values()))


def rows(condition: Condition) -> int:
    """Return N, the number of samples. Raises: ValueError where the tensors have different N."""
    if isinstance(condition, torch.Tensor):
        return len(condition)
    counts = {name: len(tensor) for name, tensor in condition.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"conditioning: expected tensors with one row per sample, got {counts} rows. Collate all of them"
            " from the same samples."
        )
    return next(iter(counts.values()))


def expanded(empty: Condition, condition: Condition) -> Condition:
    """Repeat an empty conditioning of one row for each row of `condition`; one of N rows stays as it is."""
    # expand_as makes a view: the rows share memory, so the result must not be written to
    return each(lambda null, full: null.expand_as(full) if len(null) == 1 else null, empty, condition)


def where(mask: torch.Tensor, yes: Condition, no: Condition) -> Condition:
    """Choose row by row: the row of `yes` where mask [N] is true, of `no` elsewhere."""
    # the mask is viewed as [N, 1, ..., 1], so that it broadcasts over the other axes of each tensor
    return each(
        lambda a, b: torch.where(mask.to(b.device).view(-1, *[1] * (b.ndim - 1)), a.to(b), b), yes, no
    )


def twice(condition: Condition) -> Condition:
    """Repeat all N rows once more after themselves: the result has 2 N rows."""
    return each(lambda tensor: tensor.repeat(2, *[1] * (tensor.ndim - 1)), condition)


KIND = "conditions"  # kind that the header of a file states; part of the format, so it keeps its spelling
CONDITIONS = version_0_1.CONDITIONING[0]  # usual name of the file of `write_conditions`
NULL = ""  # prompt of the empty conditioning, where a file has one
SUFFIXES = (".pt", ".npy", ".npz", ".safetensors")  # formats of other programs' embeddings


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Embeddings by prompt.

    The empty conditioning, which classifier-free guidance needs, is zeros for images. For texts it is the
    embedding of '', which must be among the embeddings.
    """

    tokens: Mapping[str, Condition]  # by prompt: [L, E] float32, or several tensors by name; all of one shape
    encoder: str = ""  # encoder that computed them, and how it prepared images; "": unknown
    zero_null: bool = False  # the empty conditioning is zeros
    names: tuple[str, ...] = field(init=False)  # all prompts but the empty one

    def __post_init__(self):
        # the dataclass is frozen, so a derived field can only be set through object
        object.__setattr__(self, "names", tuple(name for name in self.tokens if name != NULL))
        # compared as texts: shapes are lists or dictionaries, which a set cannot hold
        forms = {str(form_of(t)) for t in self.tokens.values()}
        first = next(iter(self.tokens.values()), None)
        if (
            not self.names
            or len(forms) != 1
            or (isinstance(first, torch.Tensor) and first.ndim != 2)
            or not form_of(first)
        ):
            raise ValueError(
                "conditioning: expected embeddings of one shape [L, E], got the shapes"
                f" {', '.join(sorted(forms)) or 'of no embedding'}. Embed all prompts with one encoder."
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
                f"conditioning: expected finite embeddings, got NaN or infinite numbers for {bad!r}. Embed it"
                " again."
            )
        if not self.zero_null and NULL not in self.tokens:
            raise ValueError(
                "conditioning: expected the embedding of the empty text, named '', which guidance needs, got"
                " none. Embed '' as well."
            )

    @property
    def form(self) -> Mapping[str, list[int]] | list[int]:
        """Return the shape of each embedding, or its shapes by name."""
        return form_of(next(iter(self.tokens.values())))

    def check(self, who: str, expected: Mapping[str, list[int]] | list[int], encoder: str) -> None:
        """Raise ValueError, beginning with `who`, unless every embedding has the expected shape."""
        if self.form != expected:
            source = f" of {self.encoder}" if self.encoder else ""
            raise ValueError(
                f"{who}: expected embeddings of shape {expected}, got {self.form}{source}. Embed them with"
                f" {encoder}."
            )

    def check_source(self, who: str, source: str, encoder: str) -> None:
        """Raise ValueError where another encoder or another preparation made the embeddings.

        An unknown encoder is accepted, since files of other programs do not state it.
        Args: source: the encoder that they must state; after a leading *, the end of its name.
        """
        fits = self.encoder.endswith(source[1:]) if source.startswith("*") else self.encoder == source
        if self.encoder and not fits:
            raise ValueError(
                f"{who}: expected embeddings of {source}, got those of {self.encoder}. Embed them with"
                f" {encoder}."
            )

    def select(self, names: Sequence[str]) -> Condition:
        """Stack the embeddings of N prompts: [N, L, E], or several tensors by name, [N, ...] each.

        Raises: ValueError for prompts without an embedding.
        """
        missing = sorted({name for name in names if name not in self.tokens})
        if missing:
            raise ValueError(
                f"conditioning: expected an embedding of every prompt, got none for {_listed(missing)}. Embed"
                " these prompts too."
            )
        first, *others = [self.tokens[name] for name in names]
        return each(lambda *rows: torch.stack(rows), first, *others)

    def null(self, n: int) -> Condition:
        """Return the empty conditioning n times, in the form of `select`."""
        empty = (
            each(torch.zeros_like, next(iter(self.tokens.values()))) if self.zero_null else self.tokens[NULL]
        )
        # [L, E] -> [n, L, E], a view: -1 keeps the size of an axis
        return each(lambda tensor: tensor.expand(n, *[-1] * tensor.ndim), empty)


def form_of(condition: Condition | None) -> Any:
    """Return the shape as a list, the shapes by name sorted by name, or [] for None."""
    if condition is None or isinstance(condition, torch.Tensor):
        return [] if condition is None else list(condition.shape)
    return {name: list(tensor.shape) for name, tensor in sorted(condition.items())}


def tensors_of(condition: Condition) -> list[torch.Tensor]:
    """Return all tensors of the conditioning."""
    return [condition] if isinstance(condition, torch.Tensor) else list(condition.values())


def write_conditions(path: Path, conditions: Conditions) -> None:
    """Write embeddings to one file, with their prompts, their encoder and the kind of empty conditioning."""
    names = list(conditions.tokens)
    tensors: dict[str, torch.Tensor] = {}
    # tensors are keyed by number, because a prompt may contain the / that separates parts in a key; the
    # metadata lists the prompts in the same order
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
    """Read embeddings from a file of `write_conditions`, or from a folder.

    A folder holds such a file, or files <prompt>.pt, .npy, .npz or .safetensors with one tensor [L, E] or
    [1, L, E] each.
    Args:
        zero_null: for a folder: the empty conditioning is zeros, as for images, rather than the embedding of
            '' in a file named null.
    Raises: FileNotFoundError; ValueError for a file without an embedding.
    """
    path = Path(path)
    # the file in a folder has another name where version 0.1 wrote it
    if (inside := version_0_1.conditioning_file(path)).is_file():
        path = inside
    if path.is_file():
        tensors, meta = read_tensors(path, KIND)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            # "tokens.3" is the one tensor of prompt 3 (part ""), "tokens.3/name" one of its several tensors
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
            f"conditioning: expected a file or a folder of files {endings}, got none at {path}. Embed the"
            " prompts first."
        )
    named = {p.stem: read_embedding(p) for p in files}
    # a file cannot have an empty stem, so the embedding of '' is named null in a folder
    if not zero_null and "null" in named:
        named[NULL] = named.pop("null")
    return Conditions(tokens=named, zero_null=zero_null)


def read_embedding(path: Path) -> torch.Tensor:
    """Read the tokens [L, E] of one prompt as float32.

    Raises: as `read_array`; ValueError for another shape.
    """
    embedding = read_array(path)
    # a saved batch of one: [1, L, E] -> [L, E]
    if embedding.ndim == 3 and len(embedding) == 1:
        embedding = embedding[0]
    if embedding.ndim != 2:
        raise ValueError(
            f"{path}: expected tokens [L, E], got {list(embedding.shape)}. Save one prompt's tokens per file."
        )
    return embedding.float()


def read_array(path: Path, key: str | None = None) -> torch.Tensor:
    """Read the only array of a .pt, .npy, .npz or .safetensors file, or among several the one named `key`.

    Raises: FileNotFoundError; ValueError for a damaged file, one that would run code, or one without that
        array.
    """
    if not path.is_file():
        raise FileNotFoundError(f"array: expected a file, got none at {path}. Check the path.")
    try:
        content = _READERS[path.suffix](path)
    except KeyError:
        raise ValueError(
            f"{path}: expected a file of type {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}."
            " Convert it."
        ) from None
    except (ValueError, EOFError, OSError) as error:
        # the readers' own messages run over several lines, and users get one
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{path}: expected an array, got a damaged or foreign file ({reason}). Restore it."
        ) from None
    if isinstance(content, Mapping):
        names = list(content)
        # a single array is unambiguous under any name
        chosen = key if key in names else names[0] if len(names) == 1 else None
        if chosen is None:
            raise ValueError(
                f"{path}: expected one array{f' named {key}' if key else ''}, got {_listed(names)}. Save the"
                f" array {'under that name' if key else 'alone'}."
            )
        content = content[chosen]
    if not isinstance(content, torch.Tensor):
        raise ValueError(f"{path}: expected an array, got {type(content).__name__}. Save the tensor alone.")
    return content


def _npz(path: Path) -> dict[str, torch.Tensor]:
    """Read all arrays of a .npz file by name."""
    with np.load(path) as file:  # allow_pickle is off by default: no code of the file runs
        return {name: torch.from_numpy(file[name]) for name in file.files}


_tensors = partial(weights.content, who="array")
_READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _tensors,
    ".safetensors": _tensors,
    ".npz": _npz,
    ".npy": lambda path: torch.from_numpy(np.load(path)),
}


def _listed(names: Sequence[str]) -> str:
    """Join at most five names, and state how many more there are."""
    return ", ".join(repr(n) for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
