"""Published networks from files of this machine: weights are read, nothing in a file is run, and nothing is fetched.

Every error names the flag that brought the file, what was expected and got, and the remedy, in one line.
"""

import contextlib
import functools
import importlib.util
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

EXTRA = "pip install 'eg3d-rlhf[sd]'"
SKIPPED = "position_ids"  # a counted buffer of older transformers: the only entry that may be in a file alone
DAMAGED = (safetensors.SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, OSError)
Result = TypeVar("Result")
Module = TypeVar("Module", bound=torch.nn.Module)


def existing(path: str | Path, flag: str) -> Path:
    """The path. Raises: FileNotFoundError where nothing is there."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{flag}: expected a local file or folder, got none at {path}. Nothing is fetched: check the path.")
    return path


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:200] + "..."


def only_file(path: Path, suffixes: tuple[str, ...], flag: str, expected: str) -> Path:
    """A file, or a folder's only one with such a suffix. Raises: ValueError."""
    if path.is_file():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if len(found) != 1:
        got = ", ".join(file.name for file in found[:4]) or "neither"
        raise ValueError(f"{flag}: expected {expected}, got {got} in {path}. Name the file.")
    return found[0]


def read_state(path: str | Path, flag: str) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU, of a .safetensors file or a state dict of torch.save, there perhaps under "state_dict".

    A pickle is read with weights_only: one that asks for more than tensors and plain containers is refused before anything is called.
    Files in torch's zip format are mapped into memory, not copied.

    Raises: FileNotFoundError; ValueError for what holds no tensors, asks for more than weights, is cut short, or holds NaN.
    """
    path = existing(path, flag)
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = first_line(error).removesuffix(".")
        raise ValueError(
            f"{flag}: expected {path.name} to hold weights alone, got a pickle that asks for more ({reason}). It was not run: get the file "
            "from its publisher, or save its state dict again."
        ) from None
    except DAMAGED as error:
        raise ValueError(f"{flag}: expected weights in {path.name}, got: {first_line(error)} Cut short? Copy it again.") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise ValueError(f"{flag}: expected tensors by name in {path.name}, got {type(found).__name__}. Export the weights alone.")
    return dict(found)


def below(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def shape_of(state: Mapping[str, torch.Tensor], name: str, who: str, axes: int) -> tuple[int, ...]:
    """Shape of an entry of `axes` axes. Raises: ValueError where there is no such entry."""
    if name not in state or state[name].ndim != axes:
        got = list(state[name].shape) if name in state else "no such entry"
        raise ValueError(f"{who}: expected {name} with {axes} axes, got {got}. Is it another network's file?")
    return tuple(state[name].shape)


def count(names: Iterable[str], prefix: str) -> int:
    """1 + the largest N in names prefix.N.rest; 0 for none."""
    return 1 + max((int(n.removeprefix(prefix).split(".")[0]) for n in names if n.startswith(prefix)), default=-1)


def load_strict(module: torch.nn.Module, state: Mapping[str, torch.Tensor], who: str) -> None:
    """Fill a module, every entry of both but position_ids; the numbers become float32.

    The module may be on the meta device: it takes the tensors over. Raises: ValueError for missing, unknown, misshapen or NaN entries.
    """
    state = {name: t.float() if t.is_floating_point() else t for name, t in state.items() if not name.endswith(SKIPPED)}
    wanted = {name: t for name, t in module.state_dict().items() if not name.endswith(SKIPPED)}
    both = {name: (state[name], t.shape) for name, t in wanted.items() if name in state}
    faults = {
        "missing": sorted(wanted.keys() - state.keys()), "unknown": sorted(state.keys() - wanted.keys()),
        "of other shapes": [f"{n} {list(t.shape)} for {list(shape)}" for n, (t, shape) in both.items() if t.shape != shape],
        "not finite": [n for n, (t, _) in both.items() if not t.is_meta and not bool(t.isfinite().all())],
    }
    for kind, names in faults.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{who}: expected {len(wanted)} tensors, got {kind}: {', '.join(names[:3])}{more}. Use the published file.")
    module.load_state_dict(state, strict=False, assign=True)
    for name, counted in list(module.named_buffers()):
        if name.endswith(SKIPPED):  # no file's business, so it may still be on the meta device
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent).register_buffer(leaf, torch.arange(counted.shape[-1])[None], persistent=False)


def build_on_meta(make: Callable[[], Result]) -> Result:
    """What `make` builds, without memory for its numbers."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialisations that do nothing there
        return make()


def frozen(module: Module, device: str | torch.device) -> Module:
    """The module in eval mode, without gradients of its parameters, on a device."""
    return module.eval().requires_grad_(False).to(device)


@contextlib.contextmanager
def one_line(who: str, remedy: str) -> Iterator[None]:
    """Errors of libraries inside become one line. Raises: ValueError."""
    try:
        yield
    except DAMAGED as error:
        raise ValueError(f"{who}: expected its published layout, got: {first_line(error)} {remedy}") from error


def require_extra(flag: str, *modules: str) -> None:
    """Check that the libraries of the extra are installed. Raises: ValueError."""
    for name in modules:
        try:
            __import__(name)
        except ImportError as error:
            raise ValueError(f"{flag}: expected {' and '.join(modules)} for these files, got: {first_line(error)}. Run {EXTRA}") from error


@functools.cache
def tell_once(text: str) -> None:
    """Print a line, the first time it is said in this process."""
    print(text, flush=True)


def from_folder(cls: Any, folder: Path, flag: str) -> Any:
    """A network of diffusers or transformers from its local folder: config.json and safetensors, every entry read, float32, eval mode.

    Raises: FileNotFoundError; ValueError for missing files, pickles, other shapes, and entries that are missing or unknown.
    """
    who = f"{flag}: {folder.parent.name}/{folder.name}"
    existing(folder / "config.json", flag)
    variant = None if any(folder.glob("*model.safetensors")) else "fp16"
    if not any(folder.glob("*model.fp16.safetensors" if variant else "*model.safetensors")):
        raise ValueError(f"{who}: expected weights as .safetensors, got none. Pickles are not read: convert them, or get the safetensors.")
    with one_line(who, "Copy the folder again."):
        options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, "variant": variant}
        if cls.__module__.startswith("diffusers."):  # it warns at length where it has to choose
            options["low_cpu_mem_usage"] = importlib.util.find_spec("accelerate") is not None
        model, told = cls.from_pretrained(str(folder), **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in told.get(kind, ()) if not str(name).endswith(SKIPPED))
        if names:
            got = f"{kind.replace('_', ' ')}: {', '.join(names[:3])}"
            raise ValueError(f"{who}: expected exactly {cls.__name__}'s tensors, got {got}. Copy it again.")
    return model.float().eval().requires_grad_(False)
