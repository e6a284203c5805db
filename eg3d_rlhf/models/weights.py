"""Read, check and write weights of networks in files on this machine, without running anything in them.

Every .safetensors, .ckpt, .pt and .pth file that this project did not write is read here. training/storage.py
reads the files that it did write, and generators/pickles reads EG3D's pickles. Nothing is downloaded. Error
messages begin with `who`, the flag or file that asked for the weights, and say what was expected, what was
given and what to do.

    state = weights.read(path, "--prior")                        {name: tensor}
    vae = weights.empty(lambda: VAE(config))                     on the meta device, without memory
    weights.fill(vae, weights.below(state, "first_stage_model."), f"--prior: {path.name}")
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import nn

from training.storage import check_fit, write_atomic

# Older transformers stored this buffer, which only counts positions. It is the only entry of a file that a
# network may lack.
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


def existing(path: str | Path, who: str) -> Path:
    """Return the path as a Path. Raises: FileNotFoundError if nothing exists there."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{who}: expected a local file or folder, got none at {path}. Nothing is downloaded: check the"
            " path."
        )
    return path


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class, cut to 200 characters."""
    # Libraries put stack dumps and hints into their messages; the first line names the cause.
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:200] + "..."


def only_file(path: Path, suffixes: tuple[str, ...], flag: str, expected: str) -> Path:
    """Return the file itself, or the only file in a folder that has one of the suffixes.

    Raises: ValueError for a folder with none or several of them; `flag` and `expected` word the message.
    """
    if path.is_file():
        return path
    # With several files it would be a guess which one is meant.
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if len(files) != 1:
        got = ", ".join(file.name for file in files[:4]) or "neither"
        raise ValueError(f"{flag}: expected {expected}, got {got} in {path}. Name the file.")
    return files[0]


def content(path: str | Path, who: str) -> Any:
    """Read everything that a file holds, on the CPU: tensors by name from .safetensors, else what torch.save
    wrote.

    Pickles are read with weights_only. A pickle that asks for more than tensors and plain containers is
    rejected before anything is called. Files in torch's zip format are mapped into memory and not copied.

    Raises: FileNotFoundError; ValueError for a file that asks for more, is damaged or cut short.
    """
    path = existing(path, who)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Files in the older format of torch.save are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except DAMAGED as error:
        # torch reports this for a file that is no pickle at all, rather than for one that would run code.
        operand = re.search(r"Unsupported operand \d+", str(error))
        if isinstance(error, pickle.UnpicklingError) and operand is None:
            raise ValueError(
                f"{who}: expected {path.name} to hold only weights, got a pickle that asks for more. It was"
                " not run. Get the file from its publisher, or save its state dict again."
            ) from error
        reason = operand[0] if operand else first_line(error)
        raise ValueError(
            f"{who}: expected weights in {path.name}, got: {reason}. The file may be truncated or of another"
            " kind. Copy it again."
        ) from error


def read(path: str | Path, who: str) -> State:
    """Read tensors by name from a .safetensors file or from a state dict that torch.save wrote.

    The state dict may be nested under "state_dict".

    Raises: as `content`; ValueError for a file that holds anything other than tensors by name.
    """
    held = content(path, who)
    # Training checkpoints often nest the tensors under this key.
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if (
        not isinstance(held, dict)
        or not held
        or not all(isinstance(value, torch.Tensor) for value in held.values())
    ):
        got = type(held).__name__
        raise ValueError(
            f"{who}: expected tensors by name in {Path(path).name}, got {got}. Export only the weights, or"
            " copy the file again."
        )
    return dict(held)


def below(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    """Return the entries whose names begin with a prefix, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def to_transformers(state: Mapping[str, torch.Tensor], names: Iterable[tuple[str, str]]) -> State:
    """Rename the entries of a vision transformer to transformers' names. Unknown names stay.

    A fused `.attn.qkv.` is also split into query, key and value.

    Args: names: regular expressions and their replacements, applied one after the other.
    """
    renamed: State = {}
    for name, tensor in state.items():
        for old, new in names:
            name = re.sub(old, new, name)
        stem, fused, leaf = name.partition(".attn.qkv.")
        if fused:
            kinds = ("query", "key", "value")
            # Not strict: a misshapen tensor is reported later, when the network is filled.
            parts = zip(kinds, tensor.chunk(3), strict=False)
            renamed |= {f"{stem}.attention.attention.{kind}.{leaf}": part for kind, part in parts}
        else:
            renamed[name] = tensor
    return renamed


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """Return the shapes of tensors by name."""
    return {name: list(tensor.shape) for name, tensor in state.items()}


def shape_of(state: Mapping[str, torch.Tensor], name: str, who: str, axes: int) -> tuple[int, ...]:
    """Return the shape of an entry that must have `axes` axes.

    Raises: ValueError if there is no such entry.
    """
    # Called while sizes are derived, before anything is built: the message is the first check of a file.
    if name not in state or state[name].ndim != axes:
        got = list(state[name].shape) if name in state else "no such entry"
        raise ValueError(
            f"{who}: expected {name} with {axes} axes, got {got}. The file may belong to another network:"
            " name the right one."
        )
    return tuple(state[name].shape)


def count(names: Iterable[str], prefix: str) -> int:
    """Return 1 + the largest N in names of the form prefix.N.rest, or 0 if there is none."""
    return 1 + max(
        (int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)),
        default=-1,
    )


def check_finite(state: Mapping[str, torch.Tensor], who: str) -> None:
    """Raise ValueError, beginning with `who`, for NaN or infinite values in floating-point tensors."""
    bad = [
        n
        for n, t in state.items()
        # Tensors on the meta device have no values
        if t.is_floating_point() and not t.is_meta and not bool(t.isfinite().all())
    ]
    if bad:
        raise ValueError(f"{who}: NaN or infinite values in {', '.join(bad[:8])}. Use an earlier checkpoint.")


def empty(make: Callable[[], Result]) -> Result:
    """Build a network with `make` on the meta device, without memory for its weights."""
    with torch.device("meta"), warnings.catch_warnings():
        # torch warns about initialisations that have no effect on the meta device.
        warnings.simplefilter("ignore")
        return make()


def fill(
    module: Module,
    state: Mapping[str, torch.Tensor],
    who: str,
    *,
    types: Mapping[str, torch.dtype] | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Module:
    """Copy tensors into a module; names must match exactly. Returns the module.

    A module on the meta device first gets memory on `device`. Its dtypes are `types`, one for all or by name,
    and otherwise those of the state.

    Raises: ValueError for missing, unexpected or misshapen entries, and for values that are not finite.
    """
    present = module.state_dict()
    check_fit(present, state, who)
    check_finite(state, who)
    if any(tensor.is_meta for tensor in present.values()):
        dtypes = dict.fromkeys(state, types) if isinstance(types, torch.dtype) else dict(types or {})
        dtypes = {name: tensor.dtype for name, tensor in state.items()} | dtypes
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            # Integer buffers keep their dtype; so do buffers that are in no file.
            if name in dtypes and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtypes[name])
        # Memory is allocated only now, in the final dtypes: a large network never exists twice.
        module.to_empty(device=device)
    module.load_state_dict(state)
    return module


def adopt(module: Module, state: Mapping[str, torch.Tensor], who: str) -> Module:
    """Make a module use the given tensors as float32, without a copy where they are float32 already.

    Names must match exactly, except for position_ids. The module may be on the meta device. Returns the
    module.

    Raises: as `fill`.
    """
    state = {
        name: t.float() if t.is_floating_point() else t
        for name, t in state.items()
        if not name.endswith(SKIPPED)
    }
    check_fit({name: t for name, t in module.state_dict().items() if not name.endswith(SKIPPED)}, state, who)
    check_finite(state, who)
    # assign=True makes the tensors the module's own parameters, without a copy.
    module.load_state_dict(state, strict=False, assign=True)
    for name, counted in list(module.named_buffers()):
        if name.endswith(SKIPPED):
            # Files may lack this buffer, so it may still be on the meta device, without values.
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent).register_buffer(
                leaf, torch.arange(counted.shape[-1])[None], persistent=False
            )
    return module


def frozen(module: Module, device: str | torch.device) -> Module:
    """Return a module in eval mode, without gradients, on a device."""
    return module.eval().requires_grad_(False).to(device)


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """Compute eight hexadecimal digits that identify a network by names, shapes and the first values of each
    tensor.

    They are the same for float16 and float32 files of one network.
    """
    digest = hashlib.sha256()
    # Sorted, since files differ in the order of their entries.
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        # Rounded to float16, so that the precision of the file does not matter.
        digest.update(tensor.flatten()[:16].to(torch.float16).cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def in_types_of(stored: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> State:
    """Replace tensors of `stored` by those of `state`, converted to the dtypes of `stored`, on the CPU.

    Other entries of `stored` are passed on.
    """
    new = {
        # clone() separates the tensors from the network that continues to train
        name: tensor.detach().cpu().to(stored[name].dtype).contiguous().clone()
        for name, tensor in state.items()
    }
    return {**stored, **new}


def write(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write tensors by name as a .safetensors file, atomically."""
    # safetensors rejects tensors that share memory, so each is copied.
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    write_atomic(path, safetensors.torch.save(copies, metadata={"format": "pt"}))


def rewrite(path: Path, held: Any) -> None:
    """Write what `content` returned to a file of the path's format, atomically.

    In contrast to `write`, large files are not copied in memory.
    """
    unfinished = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(held, unfinished, metadata={"format": "pt"})
        else:
            torch.save(held, unfinished)
        # The rename is atomic: readers see the old file or the complete new one.
        unfinished.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


@contextlib.contextmanager
def one_line(who: str, remedy: str) -> Iterator[None]:
    """Turn errors that libraries raise inside the block into one ValueError of one line, which ends with
    `remedy`.
    """
    try:
        yield
    # Other errors are bugs and keep their traceback.
    except DAMAGED as error:
        raise ValueError(
            f"{who}: expected its published layout, got: {first_line(error)} {remedy}"
        ) from error


def require_extra(flag: str, *modules: str) -> None:
    """Import modules of the optional extra `vision`, or of `sd` if diffusers is among them.

    Raises: ValueError if one of them is not installed.
    """
    # diffusers is in another extra than transformers.
    extra = "sd" if "diffusers" in modules else "vision"
    for name in modules:
        try:
            __import__(name)
        except ImportError as error:
            raise ValueError(
                f"{flag}: expected {' and '.join(modules)} for these files, got: {first_line(error)}. Run"
                f" pip install 'eg3d-rlhf[{extra}]'"
            ) from error


@functools.cache
def tell_once(text: str) -> None:
    """Print a text once per process."""
    print(text, flush=True)


def from_folder(cls: Any, folder: Path, flag: str) -> Any:
    """Load a network of diffusers or transformers from a local folder: float32, eval mode, every entry read.

    The folder must hold config.json and .safetensors files.

    Args: cls: class of the library.
    Raises: FileNotFoundError; ValueError for missing files, pickles, other shapes, and entries that are
        missing or unknown.
    """
    who = f"{flag}: {folder.parent.name}/{folder.name}"
    existing(folder / "config.json", flag)
    # Half-precision files have "fp16" in their names, which the libraries call a variant.
    variant = None if any(folder.glob("*model.safetensors")) else "fp16"
    if not any(folder.glob("*model.fp16.safetensors" if variant else "*model.safetensors")):
        raise ValueError(
            f"{who}: expected weights as .safetensors, got none. Pickles are not read. Convert them, or get"
            " the .safetensors files."
        )
    with one_line(who, "Copy the folder again."):
        options = {
            "local_files_only": True,
            "use_safetensors": True,
            "output_loading_info": True,
            "variant": variant,
        }
        if cls.__module__.startswith("diffusers."):
            # diffusers prints a long warning if it has to choose this itself.
            options["low_cpu_mem_usage"] = importlib.util.find_spec("accelerate") is not None
        model, loading_info = cls.from_pretrained(str(folder), **options)
    # The libraries only warn about keys that do not match; here they are errors.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in loading_info.get(kind, ()) if not str(name).endswith(SKIPPED))
        if names:
            got = f"{kind.replace('_', ' ')}: {', '.join(names[:3])}"
            raise ValueError(
                f"{who}: expected exactly the tensors of {cls.__name__}, got {got}. Copy the folder again."
            )
    return model.float().eval().requires_grad_(False)
