"""One file for tensors and their description: safetensors with JSON in its header, written atomically, read without running anything."""

import json
import os
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save

FORMAT_KEY = "eg3d_rlhf"


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and rename: readers see the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_temporaries(folder: Path) -> None:
    """Delete what a process that was killed inside `write_atomic` left in `folder`."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_tensors(path: str | Path, kind: str, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Save tensors and a JSON-able description as one file of the given kind ('network', 'checkpoint', 'reward', ...)."""
    described = json.dumps({"kind": kind, "meta": meta}, sort_keys=True)
    plain = {name: t.detach().contiguous().clone() for name, t in tensors.items()}  # safetensors refuses shared storage
    write_atomic(path, save(plain, metadata={FORMAT_KEY: described}))


def read_meta(path: str | Path, kind: str | None = None) -> dict:
    """The description of a file written by `write_tensors`, without reading its tensors."""
    with _opened(path, kind) as (_, meta):
        return meta


def read_tensors(path: str | Path, kind: str | None = None, device: str | torch.device = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and description.

    Raises: FileNotFoundError; ValueError for a truncated file, a foreign file, or one of another kind.
    """
    with _opened(path, kind, str(device)) as (file, meta):
        return {name: file.get_tensor(name) for name in file.keys()}, meta


class _opened:  # noqa: N801 (used as a with-statement's function)
    """Open, check the kind, and translate safetensors' errors."""

    def __init__(self, path: str | Path, kind: str | None, device: str = "cpu"):
        self.path, self.kind, self.device = Path(path), kind, device

    def __enter__(self):
        what = f"{self.path}: expected a {self.kind or 'tensor'} file"
        if not self.path.is_file():
            raise FileNotFoundError(f"{what}, got nothing there. Check the path.")
        try:
            self.file = safetensors.safe_open(str(self.path), framework="pt", device=self.device).__enter__()
        except safetensors.SafetensorError as error:
            raise ValueError(f"{what}, got a truncated or foreign one ({error}). Restore it or name another file.") from None
        described = (self.file.metadata() or {}).get(FORMAT_KEY)
        if described is None:
            raise ValueError(f"{what}, got safetensors without this project's header. Name a file that train.py or a tool wrote.")
        content = json.loads(described)
        if self.kind is not None and content["kind"] != self.kind:
            raise ValueError(f"{what}, got one of kind {content['kind']!r}. Name a {self.kind} file.")
        return self.file, content["meta"]

    def __exit__(self, *exc):
        self.file.__exit__(*exc)
        return False


def load_strict(module: torch.nn.Module, tensors: dict[str, torch.Tensor], who: str) -> None:
    """Copy tensors into a module, name by name.

    Raises: ValueError listing missing, unexpected and misshapen names.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(tensors))
    unexpected = sorted(set(tensors) - set(own))
    shapes = [
        f"{k} {list(tensors[k].shape)} instead of {list(own[k].shape)}"
        for k in sorted(set(own) & set(tensors)) if own[k].shape != tensors[k].shape
    ]
    problems = [
        f"{title}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes)) if names
    ]
    if problems:
        raise ValueError(f"{who}: expected the network's own tensors, got {'; '.join(problems)}. Use a file of the same architecture.")
    module.load_state_dict(tensors, strict=True)
