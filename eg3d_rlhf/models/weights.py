"""Read, check and write files of network weights on this machine, without executing code from them.

This module reads all .safetensors, .ckpt, .pt and .pth files that this project did not write.
training/storage.py reads files that this project wrote, and generators/pickles reads EG3D's pickles. Nothing
is downloaded. In all functions, `who` is the text with which error messages begin: the option or the file
that the weights belong to.

    state = weights.read(path, "--prior")             # dictionary {name: tensor}
    vae = weights.empty(lambda: VAE(config))          # network on torch's meta device, which stores no values
    weights.fill(vae, weights.entries_below(state, "first_stage_model."), f"--prior: {path.name}")
"""

import contextlib
import functools
import hashlib
import importlib.util
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import nn

from training.input_paths import existing_path
from training.storage import check_fit, reject_lfs_pointer, write_atomic

# Older releases of transformers stored this buffer, which contains the numbers 0, 1, 2, ... It may be missing
# in a file or in a network; all other names must match.
SKIPPED = "position_ids"
DAMAGED = (  # exceptions that the libraries raise for damaged or foreign files
    safetensors.SafetensorError,
    RuntimeError,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    OSError,
)
State = dict[str, torch.Tensor]
Result = TypeVar("Result")
Module = TypeVar("Module", bound=nn.Module)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not blank, cut to 200 characters.

    If the error has no text, return the name of its class.
    """
    # Messages of libraries may contain stack traces and hints. Their first line states the cause.
    stated_cause = next(
        (stripped_line.strip() for stripped_line in str(error).splitlines() if stripped_line.strip()),
        type(error).__name__,
    )
    return stated_cause if len(stated_cause) <= 200 else stated_cause[:200] + "..."


def only_file(path: Path, suffixes: tuple[str, ...], flag: str, expected_content: str) -> Path:
    """Return `path` if it is a file, and otherwise the only file of a folder with one of the suffixes.

    Args:
        path: file or folder.
        suffixes: suffixes of the files to search for, for example ".safetensors".
        flag: name of the option that the message begins with.
        expected_content: description of what the folder must contain, for the message.

    Raises: ValueError for a folder in which no file or several files have such a suffix.
    """
    if path.is_file():
        return path
    matching_files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if not matching_files:
        raise ValueError(
            f"{flag}: the folder {path} must contain {expected_content}, but has no file with the suffix"
            f" {' or '.join(suffixes)}. Pass the path of the file."
        )
    if len(matching_files) > 1:
        file_names = ", ".join(file.name for file in matching_files[:4])
        raise ValueError(
            f"{flag}: the folder {path} must contain {expected_content}, but has several files: {file_names}."
            " Pass the path of one file."
        )
    return matching_files[0]


def read_content(path: str | Path, who: str) -> Any:
    """Read the complete content of a file of weights to the CPU.

    A .safetensors file gives a dictionary of tensors by name. From all other files, the object that
    torch.save wrote is read with weights_only: a pickle that contains other objects than tensors and plain
    containers is rejected before any of its code is called. Files in torch's zip format are mapped into
    memory and not copied.

    Args:
        path: file of weights.
        who: text that error messages begin with.

    Raises: FileNotFoundError if the file is missing; ValueError if it is damaged or contains other objects.
    """
    path = existing_path(path, who)
    reject_lfs_pointer(path, who)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Files in the older format of torch.save are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except DAMAGED as error:
        # UnpicklingError has two causes. With this text, the file is no pickle at all. With any other text,
        # the pickle contains objects that weights_only does not allow.
        operand_match = re.search(r"Unsupported operand \d+", str(error))
        if isinstance(error, pickle.UnpicklingError) and operand_match is None:
            raise ValueError(
                f"{who}: {path.name} is a pickle that contains more than weights. Its code was not executed."
                " Download the file from its publisher, or save only its state dict."
            ) from error
        reason = operand_match[0] if operand_match else first_line(error)
        raise ValueError(
            f"{who}: no weights can be read from {path.name} ({reason}). The file may be incomplete or of"
            " another kind. Copy it again."
        ) from error


def read(path: str | Path, who: str) -> State:
    """Read tensors by name from a .safetensors file or from a state dict that torch.save wrote.

    If the file contains a dictionary with the key "state_dict", that entry is the state dict.

    Args:
        path: file of weights.
        who: text that error messages begin with.

    Raises: FileNotFoundError if the file is missing; ValueError if it is damaged, empty, or contains anything
        other than tensors by name.
    """
    file_content = read_content(path, who)
    # Checkpoints of a training often contain the state dict beside other values.
    state_dict = (
        file_content.get("state_dict", file_content) if isinstance(file_content, dict) else file_content
    )
    if (
        not isinstance(state_dict, dict)
        or not state_dict
        or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values())
    ):
        raise ValueError(
            f"{who}: {Path(path).name} must contain only tensors by name, but contains a"
            f" {type(state_dict).__name__} that is empty or has other values. Export only the weights, or"
            " copy the file again."
        )
    return dict(state_dict)


def entries_below(state_dict: Mapping[str, torch.Tensor], prefix: str) -> State:
    """Return the entries of a state dict whose names begin with a prefix. The prefix is removed.

    Args:
        state_dict: state dict.
        prefix: beginning of the names of the entries.
    """
    return {
        name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)
    }


def to_transformers(state_dict: Mapping[str, torch.Tensor], name_rules: Iterable[tuple[str, str]]) -> State:
    """Rename the entries of a vision transformer to the names of the library transformers.

    Names that match no expression stay as they are. An entry of a layer that computes queries, keys and
    values together (`.attn.qkv.`) is split into three entries.

    Args:
        state_dict: state dict.
        name_rules: pairs of a regular expression and its replacement, applied in order.
    """
    renamed_state: State = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in name_rules:
            name = re.sub(pattern, replacement, name)
        block_name, qkv_separator, parameter_name = name.partition(".attn.qkv.")
        if qkv_separator:
            projection_names = ("query", "key", "value")
            # Not strict: a tensor of another shape is reported later, when the network is filled.
            for projection_name, projection in zip(projection_names, tensor.chunk(3), strict=False):
                renamed_state[f"{block_name}.attention.attention.{projection_name}.{parameter_name}"] = (
                    projection
                )
        else:
            renamed_state[name] = tensor
    return renamed_state


def shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """Return the shapes of the tensors of a state dict, by name."""
    return {name: list(tensor.shape) for name, tensor in state_dict.items()}


def shape_of(
    state_dict: Mapping[str, torch.Tensor], entry_name: str, who: str, axis_count: int
) -> tuple[int, ...]:
    """Return the shape of an entry of a state dict.

    Args:
        state_dict: state dict.
        entry_name: name of the entry.
        who: text that error messages begin with.
        axis_count: number of axes that the entry must have.

    Raises: ValueError if the entry is missing or has another number of axes.
    """
    if entry_name not in state_dict:
        raise ValueError(
            f"{who}: the entry {entry_name} with {axis_count} axes is missing. The file may belong to another"
            " network: use the file of this network."
        )
    if state_dict[entry_name].ndim != axis_count:
        raise ValueError(
            f"{who}: {entry_name} must have {axis_count} axes, but has the shape"
            f" {list(state_dict[entry_name].shape)}. The file may belong to another network: use the file of"
            " this network."
        )
    return tuple(state_dict[entry_name].shape)


def count(entry_names: Iterable[str], prefix: str) -> int:
    """Count the numbered parts of a network, such as its blocks, by the names of its tensors.

    Parts are counted from 0, and the names of the tensors of part N begin with `prefix` and "N.".

    Args:
        entry_names: names of the tensors.
        prefix: beginning of the names of all parts, for example "blocks.".

    Returns: the largest N plus 1, or 0 if no name begins with the prefix.
    """
    return 1 + max(
        (
            int(entry_name.removeprefix(prefix).split(".")[0])
            for entry_name in entry_names
            if entry_name.startswith(prefix)
        ),
        default=-1,
    )


# Parts of names that the library PEFT, and other programs, give to adapters that are not merged.
_ADAPTER_NAME = re.compile(r"(?:^|\.)(?:lora_(?:A|B|down|up|embedding_[AB])|base_layer)(?:\.|$)")


def unmerged_layers(names: Iterable[str]) -> list[str]:
    """Return the layers that have adapters (LoRA) in a file whose adapters are not merged into the weights.

    Args:
        names: names of the tensors of the file.
    """
    return sorted({name[: part.start()] for name in names if (part := _ADAPTER_NAME.search(name))})


def unmerged_message(who: str, layer_names: Sequence[str]) -> str:
    """Return the message for a file whose adapters are not merged.

    Args:
        who: text that the message begins with.
        layer_names: names of the layers with adapters, see `unmerged_layers`.
    """
    return (
        f"{who}: the file holds adapters (LoRA) of {len(layer_names)} layers that are not merged into the"
        f" weights, such as {layer_names[0]}. Merge them (PEFT: merge_and_unload), or put the file of the"
        " base network here and pass the adapters as tuned weights (flow export --weights=STAGE=PATH)."
    )


def nonfinite_names(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the floating-point tensors that have a value which is NaN or infinite."""
    return [
        name
        for name, tensor in state_dict.items()
        # Tensors on the meta device have no values.
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all())
    ]


def check_finite(state_dict: Mapping[str, torch.Tensor], who: str) -> None:
    """Raise ValueError if a floating-point tensor has a value that is NaN or infinite.

    Args:
        state_dict: state dict.
        who: text that the error message begins with.
    """
    faulty_names = nonfinite_names(state_dict)
    if faulty_names:
        raise ValueError(
            f"{who}: the values of {', '.join(faulty_names[:8])} are not finite (NaN or infinity). Use an"
            " earlier checkpoint."
        )


def empty(make: Callable[[], Result]) -> Result:
    """Build a network by the function `make` on torch's meta device, without memory for its weights."""
    with torch.device("meta"), warnings.catch_warnings():
        # torch warns about initialisations that have no effect on the meta device.
        warnings.simplefilter("ignore")
        return make()


def fill(
    network: Module,
    new_state: Mapping[str, torch.Tensor],
    who: str,
    *,
    requested_dtypes: Mapping[str, torch.dtype] | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Module:
    """Copy the tensors of a state dict into a network, and return the network.

    A network on the meta device first gets memory on `device`.

    Args:
        network: network to fill.
        new_state: state dict, whose names must match exactly those of the network.
        who: text that error messages begin with.
        requested_dtypes: dtype of all tensors or dtypes by name, for a network on the meta device. Tensors
            without a dtype here have the dtype of the state dict.
        device: device for a network on the meta device.

    Raises: ValueError for entries that are missing, superfluous or of another shape, and for values that are
        not finite.
    """
    present_state = network.state_dict()
    layers_with_adapters = unmerged_layers(new_state.keys() - present_state.keys())
    if layers_with_adapters:
        raise ValueError(unmerged_message(who, layers_with_adapters))
    check_fit(present_state, new_state, who)
    check_finite(new_state, who)
    if any(tensor.is_meta for tensor in present_state.values()):
        dtypes = (
            dict.fromkeys(new_state, requested_dtypes)
            if isinstance(requested_dtypes, torch.dtype)
            else dict(requested_dtypes or {})
        )
        # Dtypes that the caller gives replace those of the state dict.
        dtypes = {name: tensor.dtype for name, tensor in new_state.items()} | dtypes
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            # Integer buffers do not change their dtype, and neither do buffers that are not part of the file.
            if name in dtypes and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtypes[name])
        # Memory is allocated after the dtypes are set, so that a large network never exists twice.
        network.to_empty(device=device)
    network.load_state_dict(new_state)
    return network


def adopt(network: Module, new_state: Mapping[str, torch.Tensor], who: str) -> Module:
    """Replace the tensors of a network by those of a state dict, in float32, and return the network.

    Tensors that are float32 already are not copied. Names must match exactly, except for position_ids. The
    network may be on the meta device.

    Args:
        network: network.
        new_state: state dict that replaces the tensors of the network.
        who: text that error messages begin with.

    Raises: ValueError for entries that are missing, superfluous or of another shape, and for values that are
        not finite.
    """
    new_state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in new_state.items()
        if not name.endswith(SKIPPED)
    }
    present_state = {
        name: tensor for name, tensor in network.state_dict().items() if not name.endswith(SKIPPED)
    }
    check_fit(present_state, new_state, who)
    check_finite(new_state, who)
    # assign=True: the network refers to the tensors and does not copy them.
    network.load_state_dict(new_state, strict=False, assign=True)
    for name, position_ids in list(network.named_buffers()):
        if name.endswith(SKIPPED):
            # The buffer may not be part of the file, and then has no values on the meta device.
            parent_name, _, buffer_name = name.rpartition(".")
            network.get_submodule(parent_name).register_buffer(
                buffer_name, torch.arange(position_ids.shape[-1])[None], persistent=False
            )
    return network


def freeze(network: Module, device: str | torch.device) -> Module:
    """Put a network into evaluation mode, without gradients of its parameters, on a device, and return it."""
    return network.eval().requires_grad_(False).to(device)


def fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Compute eight hexadecimal digits that identify the weights of a network.

    They depend on the names, the shapes and the first 16 values of all tensors. The float16 file and the
    float32 file of a network have the same fingerprint.
    """
    digest = hashlib.sha256()
    # Sorted, since files differ in the order of their entries.
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        # Rounded to float16, so that the precision of the file does not matter.
        digest.update(tensor.flatten()[:16].to(torch.float16).cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def in_types_of(stored_state: Mapping[str, torch.Tensor], new_state: Mapping[str, torch.Tensor]) -> State:
    """Return a stored state dict in which new tensors replace the stored ones, in the stored dtypes.

    The new tensors are copied to the CPU.

    Args:
        stored_state: stored state dict; entries that `new_state` does not contain are returned unchanged.
        new_state: new tensors, whose names must occur in `stored_state`.
    """
    new_tensors = {
        # clone(): the result does not share memory with the network, which may continue its training.
        name: tensor.detach().cpu().to(stored_state[name].dtype).contiguous().clone()
        for name, tensor in new_state.items()
    }
    return {**stored_state, **new_tensors}


def write(path: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict as a .safetensors file, atomically."""
    # safetensors rejects tensors that share memory, so each tensor is copied.
    tensor_copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    write_atomic(path, safetensors.torch.save(tensor_copies, metadata={"format": "pt"}))


def rewrite(path: Path, file_content: Any) -> None:
    """Write a file of weights, atomically.

    In contrast to `write`, tensors are not copied in memory, so large files can be written.

    Args:
        path: file; the suffix .safetensors selects that format, any other suffix the format of torch.save.
        file_content: content of the file, as `read_content` returns it.
    """
    unfinished_file = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(file_content, unfinished_file, metadata={"format": "pt"})
        else:
            torch.save(file_content, unfinished_file)
        # Renaming is atomic: the path leads to the old file or to the complete new file at any time.
        unfinished_file.replace(path)
    finally:
        # After a successful rename there is no unfinished file.
        with contextlib.suppress(FileNotFoundError):
            unfinished_file.unlink()


@contextlib.contextmanager
def library_errors_as_one_line(who: str, remedy: str) -> Iterator[None]:
    """Convert errors that libraries raise inside a `with` block into a ValueError with a message of one line.

    Args:
        who: text that the message begins with.
        remedy: sentence that the message ends with, which says what the user can do.
    """
    try:
        yield
    # All other errors are faults of this package and keep their traceback.
    except DAMAGED as error:
        raise ValueError(f"{who}: the files cannot be read ({first_line(error)}). {remedy}") from error


def require_extra(flag: str, *libraries: str) -> None:
    """Check that optional libraries are installed, by importing them.

    Args:
        flag: option that the error message begins with.
        libraries: names of the libraries, for example "transformers" and "diffusers".

    Raises: ValueError if one of them is not installed. The message names the package's extra that contains
        it.
    """
    # diffusers belongs to the extra `sd`, transformers to the extra `vision`.
    extra_name = "sd" if "diffusers" in libraries else "vision"
    for library in libraries:
        try:
            __import__(library)
        except ImportError as error:
            raise ValueError(
                f"{flag}: these files need {' and '.join(libraries)}, but {library} cannot be imported"
                f" ({first_line(error)}). Run pip install 'eg3d-rlhf[{extra_name}]'."
            ) from error


@functools.cache
def print_once(message: str) -> None:
    """Print a text, unless this process has printed the same text before."""
    # functools.cache calls the function only once per text.
    print(message, flush=True)


def from_folder(network_class: Any, folder: Path, flag: str) -> Any:
    """Load a network of the library diffusers or transformers from a local folder.

    Args:
        network_class: class of the library.
        folder: folder with config.json and a .safetensors file of weights.
        flag: option that error messages begin with.

    Returns: the network in float32, in evaluation mode and without gradients of its parameters.
    Raises: FileNotFoundError if config.json is missing; ValueError if there is no .safetensors file, if a
        file is damaged, or if an entry is missing, superfluous or of another shape.
    """
    who = f"{flag}: {folder.parent.name}/{folder.name}"
    existing_path(folder / "config.json", flag)
    # Names of half-precision files contain "fp16". The libraries call this the variant of a file.
    variant = None if any(folder.glob("*model.safetensors")) else "fp16"
    if not any(folder.glob("*model.fp16.safetensors" if variant else "*model.safetensors")):
        raise ValueError(
            f"{who}: the folder has no file model.safetensors, and weights in other formats are not read."
            " Download the .safetensors files, or convert the weights to this format."
        )
    with library_errors_as_one_line(who, "Copy the folder again."):
        loading_options = {
            "local_files_only": True,
            "use_safetensors": True,
            "output_loading_info": True,
            "variant": variant,
        }
        if network_class.__module__.startswith("diffusers."):
            # diffusers prints a long warning if accelerate is missing and this option is not given.
            loading_options["low_cpu_mem_usage"] = importlib.util.find_spec("accelerate") is not None
        model, loading_info = network_class.from_pretrained(str(folder), **loading_options)
    # The libraries only print a warning if names do not match. Here this is an error.
    for mismatch_kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        entry_names = sorted(
            str(entry_name)
            for entry_name in loading_info.get(mismatch_kind, ())
            if not str(entry_name).endswith(SKIPPED)
        )
        if entry_names:
            raise ValueError(
                f"{who}: the tensors of the file are not those of {network_class.__name__}"
                f" ({mismatch_kind.replace('_', ' ')}: {', '.join(entry_names[:3])}). Copy the folder again."
            )
    return model.float().eval().requires_grad_(False)
