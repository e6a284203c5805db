"""Conditioning of flows: one tensor of tokens, or several tensors by name, with one row for each sample.

A prompt is the name of a conditioning input: a text, or the name of an image. The embeddings of prompts are
stored in one file that this package writes, or in a folder that another program wrote, with one file for each
prompt.

Shapes: N samples; L tokens of a sample; E entries of a token.
"""

import re
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


def each(
    transform: Callable[..., torch.Tensor], condition: Condition, *other_conditionings: Condition
) -> Condition:
    """Apply a function to the tensors of one or more conditionings, name by name.

    Args:
        transform: function of one tensor of `condition` and the tensors of the same name in
            `other_conditionings`.
        condition: conditioning.
        other_conditionings: conditionings with tensors of the same names.
    Returns: conditioning that consists of the results.
    Raises: ValueError if another conditioning has tensors of other names.
    """
    if isinstance(condition, torch.Tensor):
        return transform(condition, *other_conditionings)
    matching_conditionings = [
        other_conditioning
        for other_conditioning in other_conditionings
        if not isinstance(other_conditioning, torch.Tensor) and set(other_conditioning) == set(condition)
    ]
    if len(matching_conditionings) < len(other_conditionings):
        raise ValueError(
            f"conditioning: all conditioning inputs need the tensors {', '.join(condition)}, but one of them"
            " has tensors of other names. Embed all prompts, also the empty prompt, with one encoder."
        )
    return {
        tensor_name: transform(
            tensor, *(other_conditioning[tensor_name] for other_conditioning in matching_conditionings)
        )
        for tensor_name, tensor in condition.items()
    }


def to_device(condition: Condition, device: torch.device | str) -> Condition:
    """Move every tensor of the conditioning to a device."""
    return each(lambda tensor: tensor.to(device), condition)


def tensor_of(condition: Condition) -> torch.Tensor:
    """Return one tensor of the conditioning, for example to read the device, which all its tensors share."""
    return condition if isinstance(condition, torch.Tensor) else next(iter(condition.values()))


def rows(condition: Condition) -> int:
    """Return the number N of samples of a conditioning.

    Raises: ValueError if the tensors have different numbers of rows.
    """
    if isinstance(condition, torch.Tensor):
        return len(condition)
    row_count_by_name = {name: len(tensor) for name, tensor in condition.items()}
    if len(set(row_count_by_name.values())) != 1:
        row_counts = ", ".join(f"{name}: {count}" for name, count in row_count_by_name.items())
        raise ValueError(
            f"conditioning: the tensors have different numbers of rows ({row_counts}). Make all of them from"
            " the same samples, with one row for each sample."
        )
    return next(iter(row_count_by_name.values()))


def expanded(empty_conditioning: Condition, condition: Condition) -> Condition:
    """Return the empty conditioning with as many rows as `condition`.

    An empty conditioning of one row is repeated, and one of N rows is returned unchanged.
    """
    # expand_as returns a view whose rows share memory, so callers must not write to the result.
    return each(
        lambda empty_rows, full_rows: empty_rows.expand_as(full_rows) if len(empty_rows) == 1 else empty_rows,
        empty_conditioning,
        condition,
    )


def where(mask: torch.Tensor, if_true: Condition, if_false: Condition) -> Condition:
    """Return the rows of `if_true` where mask [N] is True, and the rows of `if_false` elsewhere."""
    # The mask is viewed as [N, 1, ..., 1], so that it broadcasts over the other dimensions of each tensor.
    return each(
        lambda true_rows, false_rows: torch.where(
            mask.to(false_rows.device).view(-1, *[1] * (false_rows.ndim - 1)),
            true_rows.to(false_rows),
            false_rows,
        ),
        if_true,
        if_false,
    )


def twice(condition: Condition) -> Condition:
    """Return a conditioning that has all N rows twice: the N rows, followed by the same N rows."""
    return each(lambda tensor: tensor.repeat(2, *[1] * (tensor.ndim - 1)), condition)


KIND = "conditions"  # kind that the header of a file states; it is part of the format, so it cannot change
CONDITIONING_FILE = version_0_1.CONDITIONING[0]  # usual name of the file of `write_conditioning`
NULL = ""  # prompt of the empty conditioning
SUFFIXES = (".pt", ".npy", ".npz", ".safetensors")  # formats of files with embeddings of other programs


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Embeddings of prompts, with the empty conditioning for classifier-free guidance.

    The empty conditioning is zeros for images. For texts it is the embedding of '', which must then be among
    the embeddings.

    Raises: ValueError if the embeddings have different shapes or are not finite, or if that of '' is missing.
    """

    # Prompt -> embedding: tokens [L, E] in float32, or several tensors by name. All embeddings have the same
    # shape.
    tokens: Mapping[str, Condition]
    encoder: str = ""  # encoder that computed the embeddings, and how it prepared images; "" if unknown
    zero_null: bool = False  # True: the empty conditioning is zeros
    names: tuple[str, ...] = field(init=False)  # all prompts except the empty prompt

    def __post_init__(self):
        # The dataclass is frozen, so the derived field cannot be assigned in the usual way.
        object.__setattr__(self, "names", tuple(prompt for prompt in self.tokens if prompt != NULL))
        if not self.names:
            raise ValueError("conditioning: there are no embeddings. Embed at least one prompt.")
        # Shapes are lists or dictionaries, which cannot be elements of a set, so their texts are compared.
        shape_texts = {shape_text(form_of(embedding)) for embedding in self.tokens.values()}
        first_embedding = next(iter(self.tokens.values()), None)
        has_wrong_dimensions = isinstance(first_embedding, torch.Tensor) and first_embedding.ndim != 2
        if len(shape_texts) != 1:
            raise ValueError(
                f"conditioning: the embeddings have different shapes ({'; '.join(sorted(shape_texts))})."
                " Embed all prompts with one encoder."
            )
        if has_wrong_dimensions or not form_of(first_embedding):
            raise ValueError(
                "conditioning: expected embeddings [L, E], with E numbers for each of L tokens, got the shape"
                f" {shape_texts.pop()}. Save the tokens of each prompt as one array with two dimensions."
            )
        for prompt, embedding in self.tokens.items():
            if not all(torch.isfinite(tensor).all() for tensor in tensors_of(embedding)):
                raise ValueError(
                    f"conditioning: the embedding of {prompt!r} contains NaN or infinity. Run the encoder"
                    " on this prompt again."
                )
        if not self.zero_null and NULL not in self.tokens:
            raise ValueError(
                "conditioning: the embedding of the empty text '' is missing, which guidance needs. Embed the"
                " empty text, too."
            )

    @property
    def form(self) -> Mapping[str, list[int]] | list[int]:
        """Shape of an embedding, as a list; or name of a tensor -> its shape."""
        return form_of(next(iter(self.tokens.values())))

    def check(self, who: str, expected_form: Mapping[str, list[int]] | list[int], encoder: str) -> None:
        """Raise ValueError if the embeddings do not have the expected shape.

        Args:
            who: beginning of the message.
            expected_form: expected shape, in the form of the property `form`.
            encoder: encoder that makes embeddings of this shape, in words.
        """
        if self.form != expected_form:
            encoder_text = f", which {self.encoder} has made" if self.encoder else ""
            raise ValueError(
                f"{who}: expected embeddings of the shape {shape_text(expected_form)}, got"
                f" {shape_text(self.form)}{encoder_text}. Embed the"
                f" prompts with {encoder}."
            )

    def check_source(self, who: str, required_encoder: str, encoder: str) -> None:
        """Raise ValueError if the embeddings are from another encoder or from differently prepared images.

        An unknown encoder is accepted, since files of other programs do not state it.

        Args:
            who: beginning of the message.
            required_encoder: required value of `encoder`; each * in it stands for any text.
            encoder: encoder with which the user has to embed the prompts, in words.
        """
        required_pattern = ".*".join(map(re.escape, required_encoder.split("*")))
        if self.encoder and not re.fullmatch(required_pattern, self.encoder):
            raise ValueError(
                f"{who}: expected embeddings of {required_encoder}, got embeddings of {self.encoder}. Embed"
                f" the prompts with {encoder}."
            )

    def select(self, prompts: Sequence[str]) -> Condition:
        """Return the embeddings of N prompts: [N, L, E], or several tensors [N, ...] by name.

        Raises: ValueError for a prompt without an embedding.
        """
        missing_prompts = sorted({prompt for prompt in prompts if prompt not in self.tokens})
        if missing_prompts:
            raise ValueError(
                f"conditioning: there is no embedding of {_listed(missing_prompts)}. Embed these prompts,"
                " too, with the same encoder as the others."
            )
        first_embedding, *other_embeddings = [self.tokens[prompt] for prompt in prompts]
        return each(lambda *rows: torch.stack(rows), first_embedding, *other_embeddings)

    def null(self, n: int) -> Condition:
        """Return n copies of the empty conditioning, in the form of `select`."""
        if self.zero_null:
            empty_embedding = each(torch.zeros_like, next(iter(self.tokens.values())))
        else:
            empty_embedding = self.tokens[NULL]
        # [L, E] -> [n, L, E]. expand returns a view; -1 keeps the size of a dimension.
        return each(lambda tensor: tensor.expand(n, *[-1] * tensor.ndim), empty_embedding)


def form_of(condition: Condition | None) -> Any:
    """Return the shape of a conditioning as a list, or name of a tensor -> shape; [] for None.

    The names of tensors are sorted.
    """
    if condition is None or isinstance(condition, torch.Tensor):
        return [] if condition is None else list(condition.shape)
    return {name: list(tensor.shape) for name, tensor in sorted(condition.items())}


def shape_text(form: Mapping[str, Sequence[int]] | Sequence[int]) -> str:
    """Return the result of `form_of` as text for messages.

    Examples are "[77, 768]" for one tensor, and "image [4, 8], size [1]" for several tensors by name.
    """
    if isinstance(form, Mapping):
        return ", ".join(f"{name} {list(shape)}" for name, shape in form.items()) or "no tensor"
    return str(list(form))


def tensors_of(condition: Condition) -> list[torch.Tensor]:
    """Return all tensors of the conditioning."""
    return [condition] if isinstance(condition, torch.Tensor) else list(condition.values())


def write_conditioning(path: Path, conditioning: Conditioning) -> None:
    """Write embeddings to one file, with their prompts, their encoder and the type of empty conditioning."""
    prompts = list(conditioning.tokens)
    tensors: dict[str, torch.Tensor] = {}
    # Keys contain the number of the prompt and not the prompt, which may contain the separator "/". The
    # metadata lists the prompts in the same order.
    for prompt_number, prompt in enumerate(prompts):
        embedding = conditioning.tokens[prompt]
        tensors_by_suffix = (
            {"": embedding}
            if isinstance(embedding, torch.Tensor)
            else {f"/{tensor_suffix}": tensor for tensor_suffix, tensor in embedding.items()}
        )
        tensors |= {
            f"tokens.{prompt_number}{tensor_suffix}": tensor
            for tensor_suffix, tensor in tensors_by_suffix.items()
        }
    metadata = {"names": prompts, "encoder": conditioning.encoder, "zero_null": conditioning.zero_null}
    write_tensors(path, KIND, tensors, metadata)


def read_conditioning(path: Path, zero_null: bool = True) -> Conditioning:
    """Read embeddings from a file of `write_conditioning`, or from a folder.

    Args:
        path: path of the file; or of a folder that contains such a file, or files <prompt>.pt, .npy, .npz or
            .safetensors with one tensor [L, E] or [1, L, E] each.
        zero_null: for a folder of files by prompt. True: the empty conditioning is zeros, as for images.
            False: it is the embedding of '' in the file named null.
    Raises: FileNotFoundError if there are no embeddings; ValueError for a damaged file.
    """
    path = Path(path)
    # The name of the file in a folder differs if version 0.1 has written it.
    if (file_in_folder := version_0_1.conditioning_file(path)).is_file():
        path = file_in_folder
    if path.is_file():
        tensors, metadata = read_tensors(path, KIND)
        tensors_by_prompt_number: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            # "tokens.3" is the only tensor of prompt 3, and "tokens.3/name" is one of its several tensors.
            prompt_number, _, tensor_name = key.removeprefix("tokens.").partition("/")
            tensors_by_prompt_number.setdefault(prompt_number, {})[tensor_name] = tensor
        tokens: dict[str, Condition] = {}
        for i, prompt in enumerate(metadata["names"]):
            tensors_by_name = tensors_by_prompt_number[str(i)]
            tokens[prompt] = tensors_by_name.get("", tensors_by_name)  # "" is the name of an only tensor
        return Conditioning(tokens=tokens, encoder=metadata["encoder"], zero_null=metadata["zero_null"])
    embedding_files = sorted(
        embedding_file for embedding_file in path.glob("*") if embedding_file.suffix in SUFFIXES
    )
    if not embedding_files:
        allowed_suffixes = ", ".join(SUFFIXES)
        raise FileNotFoundError(
            f"conditioning: {path} is neither a file of embeddings nor a folder with files"
            f" {allowed_suffixes}. Embed the prompts with eg3d-rlhf flow new, or name the file or folder of"
            " their embeddings."
        )
    embeddings: dict[str, Condition] = {
        embedding_file.stem: read_embedding(embedding_file) for embedding_file in embedding_files
    }
    # A file name cannot be empty, so the embedding of '' is in a file named null.
    if not zero_null and "null" in embeddings:
        embeddings[NULL] = embeddings.pop("null")
    return Conditioning(tokens=embeddings, zero_null=zero_null)


def read_embedding(path: Path) -> torch.Tensor:
    """Read the embedding of one prompt from a file, [L, E] float32.

    Raises: the errors of `read_array`; ValueError for an array of another shape.
    """
    embedding = read_array(path)
    # A batch of one prompt: [1, L, E] -> [L, E].
    if embedding.ndim == 3 and len(embedding) == 1:
        embedding = embedding[0]
    if embedding.ndim != 2:
        raise ValueError(
            f"{path}: expected tokens [L, E], got an array of the shape {list(embedding.shape)}. Save the"
            " tokens of one prompt in each file."
        )
    return embedding.float()


def read_array(path: Path, key: str | None = None) -> torch.Tensor:
    """Read an array from a .pt, .npy, .npz or .safetensors file. Code in the file is not executed.

    Args:
        path: path of the file.
        key: name of the array, if the file contains several arrays.
    Raises: FileNotFoundError if there is no file; ValueError if it is damaged, contains other objects than
    arrays, or has no array of this name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"array: there is no file {path}. Name an existing file.")
    try:
        loaded_content = _READERS[path.suffix](path)
    except KeyError:
        raise ValueError(
            f"{path}: expected a file of type {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}."
            " Convert the file to one of these types."
        ) from None
    except (ValueError, EOFError, OSError) as error:
        # Messages of libraries have several lines, of which the first one is shown.
        error_summary = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{path}: the file is damaged, or contains something else than an array ({error_summary})."
            " Restore it from a copy, or save the array again."
        ) from None
    if isinstance(loaded_content, Mapping):
        array_names = list(loaded_content)
        # The name of an only array does not matter.
        array_name = key if key in array_names else array_names[0] if len(array_names) == 1 else None
        if array_name is None:
            raise ValueError(
                f"{path}: expected one array{f' named {key}' if key else ''}, got {_listed(array_names)}."
                f" Save the array {'under that name' if key else 'alone'}."
            )
        loaded_content = loaded_content[array_name]
    if not isinstance(loaded_content, torch.Tensor):
        raise ValueError(
            f"{path}: expected an array, got {type(loaded_content).__name__}. Save the tensor alone."
        )
    return loaded_content


def _npz(path: Path) -> dict[str, torch.Tensor]:
    """Read all arrays of a .npz file by name."""
    with np.load(path) as file:  # allow_pickle is False by default, so code in the file is not executed
        return {name: torch.from_numpy(file[name]) for name in file.files}


_tensors = partial(weights.read_content, who="array")
_READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": _tensors,
    ".safetensors": _tensors,
    ".npz": _npz,
    ".npy": lambda path: torch.from_numpy(np.load(path)),
}


def _listed(names: Sequence[str]) -> str:
    """Return at most five names as text, with the number of further names."""
    return ", ".join(repr(n) for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
