"""Weights of networks, from files of this machine: read without running anything, put into a network
strictly, written back.

Every .safetensors, .ckpt, .pt and .pth that this project did not write goes through here (training/storage.py
has those that it did; EG3D's pickles have generators/pickles). Nothing is fetched. An error names who asked
(a flag or a file), what it expected and got, and the remedy.

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

# a counted buffer of older transformers: the only entry of a published network that may be in a file alone
SKIPPED = "position_ids"
DAMAGED = (  # what the libraries raise for files of other bytes than they expect
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
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{who}: expected a local file or folder, got none at {path}. Nothing is fetched: check the path."
        )
    return path


def first_line(error: BaseException) -> str:
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:200] + "..."


def only_file(path: Path, suffixes: tuple[str, ...], flag: str, expected: str) -> Path:
    """A file, or a folder's only one with such a suffix. Raises: ValueError."""
    if path.is_file():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if len(files) != 1:
        got = ", ".join(file.name for file in files[:4]) or "neither"
        raise ValueError(f"{flag}: expected {expected}, got {got} in {path}. Name the file.")
    return files[0]


def content(path: str | Path, who: str) -> Any:
    """All that a file holds, on the CPU: tensors by name of a .safetensors, what torch.save wrote of any
    other.

    A pickle is read with weights_only: one that asks for more than tensors and plain containers is refused
    before anything is called. Files in torch's zip format are mapped into memory, not copied.
    Raises: FileNotFoundError; ValueError for what asks for more, is damaged or cut short.
    """
    path = existing(path, who)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except DAMAGED as error:
        operand = re.search(r"Unsupported operand \d+", str(error))  # no pickle at all
        if isinstance(error, pickle.UnpicklingError) and operand is None:
            raise ValueError(
                f"{who}: expected {path.name} to hold weights alone, got a pickle that asks for more. It was"
                " not run: get the file from its publisher, or save its state dict again."
            ) from error
        reason = operand[0] if operand else first_line(error)
        raise ValueError(
            f"{who}: expected weights in {path.name}, got: {reason}. Truncated or foreign? Copy it again."
        ) from error


def read(path: str | Path, who: str) -> State:
    """Tensors by name of a .safetensors file or of a state dict that torch.save wrote, there perhaps under
    "state_dict".

    Raises: as `content`; ValueError for what holds anything else than tensors.
    """
    held = content(path, who)
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if (
        not isinstance(held, dict)
        or not held
        or not all(isinstance(value, torch.Tensor) for value in held.values())
    ):
        got = type(held).__name__
        raise ValueError(
            f"{who}: expected tensors by name in {Path(path).name}, got {got}. Export the weights alone, or"
            " copy it again."
        )
    return dict(held)


def below(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def to_transformers(state: Mapping[str, torch.Tensor], names: Iterable[tuple[str, str]]) -> State:
    """Rename the entries of a vision transformer to those of transformers; unknown names stay.

    Args: names: regular expressions and their replacements, applied in turn. Besides, a fused `.attn.qkv.`
    becomes query, key and value.
    """
    renamed: State = {}
    for name, tensor in state.items():
        for old, new in names:
            name = re.sub(old, new, name)
        stem, fused, leaf = name.partition(".attn.qkv.")
        if fused:
            kinds = ("query", "key", "value")
            parts = zip(kinds, tensor.chunk(3), strict=False)  # a misshapen one is an error when it is filled
            renamed |= {f"{stem}.attention.attention.{kind}.{leaf}": part for kind, part in parts}
        else:
            renamed[name] = tensor
    return renamed


def shapes(state: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """Of tensors by name."""
    return {name: list(tensor.shape) for name, tensor in state.items()}


def shape_of(state: Mapping[str, torch.Tensor], name: str, who: str, axes: int) -> tuple[int, ...]:
    """Shape of an entry of `axes` axes. Raises: ValueError where there is no such entry."""
    if name not in state or state[name].ndim != axes:
        got = list(state[name].shape) if name in state else "no such entry"
        raise ValueError(f"{who}: expected {name} with {axes} axes, got {got}. Is it another network's file?")
    return tuple(state[name].shape)


def count(names: Iterable[str], prefix: str) -> int:
    """1 + the largest N in names prefix.N.rest; 0 for none."""
    return 1 + max(
        (int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)),
        default=-1,
    )


def check_finite(state: Mapping[str, torch.Tensor], who: str) -> None:
    bad = [
        n
        for n, t in state.items()
        if t.is_floating_point() and not t.is_meta and not bool(t.isfinite().all())
    ]
    if bad:
        raise ValueError(
            f"{who}: expected finite numbers, got others in {', '.join(bad[:8])}. Use an earlier checkpoint."
        )


def empty(make: Callable[[], Result]) -> Result:
    """What `make` builds, on the meta device: without memory for its numbers."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialisations that do nothing there
        return make()


def fill(
    module: Module,
    state: Mapping[str, torch.Tensor],
    who: str,
    *,
    types: Mapping[str, torch.dtype] | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Module:
    """Copy tensors into a module, every entry of both; returns it.

    A module on the meta device is first given memory on `device`, in the type, or by name the types, that
    `types` says, else in those of the state.
    Raises: ValueError for missing, unexpected and misshapen entries, and for numbers that are not finite.
    """
    own = module.state_dict()
    check_fit(own, state, who)
    check_finite(state, who)
    if any(tensor.is_meta for tensor in own.values()):
        known = dict.fromkeys(state, types) if isinstance(types, torch.dtype) else dict(types or {})
        known = {name: tensor.dtype for name, tensor in state.items()} | known
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name in known and tensor.is_floating_point():
                tensor.data = tensor.data.to(known[name])
        module.to_empty(device=device)
    module.load_state_dict(state)
    return module


def adopt(module: Module, state: Mapping[str, torch.Tensor], who: str) -> Module:
    """Have a module take tensors over as float32, without a copy where they are; every entry of both but
    position_ids; returns it.

    It may be on the meta device. Raises: as `fill`.
    """
    state = {
        name: t.float() if t.is_floating_point() else t
        for name, t in state.items()
        if not name.endswith(SKIPPED)
    }
    check_fit({name: t for name, t in module.state_dict().items() if not name.endswith(SKIPPED)}, state, who)
    check_finite(state, who)
    module.load_state_dict(state, strict=False, assign=True)
    for name, counted in list(module.named_buffers()):
        if name.endswith(SKIPPED):  # no file's business, so it may still be on the meta device
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent).register_buffer(
                leaf, torch.arange(counted.shape[-1])[None], persistent=False
            )
    return module


def frozen(module: Module, device: str | torch.device) -> Module:
    return module.eval().requires_grad_(False).to(device)


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """Eight digits of names, shapes and the first numbers of each tensor, the same for float16 and float32
    files of one network.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:16].to(torch.float16).cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def in_types_of(stored: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> State:
    """`stored` with the tensors of `state` in place of its own, in its types and on the CPU; others are
    passed on.
    """
    new = {
        name: tensor.detach().cpu().to(stored[name].dtype).contiguous().clone()
        for name, tensor in state.items()
    }
    return {**stored, **new}


def write(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    # safetensors refuses shared storage
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    write_atomic(path, safetensors.torch.save(plain, metadata={"format": "pt"}))


def rewrite(path: Path, held: Any) -> None:
    """What `content` gives, in a file of the path's kind, whole or not at all; large ones never stand in
    memory twice.
    """
    unfinished = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(held, unfinished, metadata={"format": "pt"})
        else:
            torch.save(held, unfinished)
        unfinished.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()


@contextlib.contextmanager
def one_line(who: str, remedy: str) -> Iterator[None]:
    """Errors of libraries inside become one line. Raises: ValueError."""
    try:
        yield
    except DAMAGED as error:
        raise ValueError(
            f"{who}: expected its published layout, got: {first_line(error)} {remedy}"
        ) from error


def require_extra(flag: str, *modules: str) -> None:
    """Import modules of the extra `vision`, or, with diffusers, of `sd`. Raises: ValueError where one is not
    installed.
    """
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
    print(text, flush=True)


def from_folder(cls: Any, folder: Path, flag: str) -> Any:
    """A network of diffusers or transformers from its local folder: config.json and safetensors, every entry
    read, float32, eval mode.

    Raises: FileNotFoundError; ValueError for missing files, pickles, other shapes, and entries that are
        missing or unknown.
    """
    who = f"{flag}: {folder.parent.name}/{folder.name}"
    existing(folder / "config.json", flag)
    variant = None if any(folder.glob("*model.safetensors")) else "fp16"
    if not any(folder.glob("*model.fp16.safetensors" if variant else "*model.safetensors")):
        raise ValueError(
            f"{who}: expected weights as .safetensors, got none. Pickles are not read: convert them, or get"
            " the safetensors."
        )
    with one_line(who, "Copy the folder again."):
        options = {
            "local_files_only": True,
            "use_safetensors": True,
            "output_loading_info": True,
            "variant": variant,
        }
        if cls.__module__.startswith("diffusers."):  # it warns at length where it has to choose
            options["low_cpu_mem_usage"] = importlib.util.find_spec("accelerate") is not None
        model, told = cls.from_pretrained(str(folder), **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in told.get(kind, ()) if not str(name).endswith(SKIPPED))
        if names:
            got = f"{kind.replace('_', ' ')}: {', '.join(names[:3])}"
            raise ValueError(f"{who}: expected exactly {cls.__name__}'s tensors, got {got}. Copy it again.")
    return model.float().eval().requires_grad_(False)
