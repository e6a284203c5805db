"""One file for tensors and their description: safetensors with JSON in its header, written atomically, read
without running anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

if TYPE_CHECKING:
    import torch  # what reads descriptions and writes files alone does not wait for it

HEADER_KEY = "eg3d_rlhf"
CHECKSUM_KEY = "sha256"
_ROOT = Path(__file__).resolve().parents[1]
_PLACES = (_ROOT / "assets", _ROOT / "eg3d_rlhf" / "assets")  # of a checkout; of an installed wheel
# what is bundled
ASSETS = next((place for place in _PLACES if (place / "people-basis.safetensors").is_file()), _PLACES[0])
# of the files that are written; they say so from 2 on, so that equal contents keep their bytes; later ones
# are refused
FORMAT = 1


def write_atomic(path: str | Path, data: bytes, private: bool = False) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, and rename: readers see the old file or
    the new one, never half.

    A `private` file, and a folder that is made for it, can be read by their owner alone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(0o700 if private else 0o777, parents=True, exist_ok=True)
        with os.fdopen(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666), "wb"
        ) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"{path}: expected to write {len(data)} bytes, got: {reason}. What was there is whole. Make room"
            " or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # nothing more can be done in a folder that is gone or read-only
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
    """Save tensors and a JSON-able description as one file of the given kind ('network', 'checkpoint',
    'reward', ...).
    """
    from safetensors.torch import save

    # safetensors refuses shared storage
    plain = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    content = {"kind": kind, "meta": meta, **({"format": FORMAT} if FORMAT > 1 else {})}
    described = json.dumps({**content, CHECKSUM_KEY: checksum(plain, content)}, sort_keys=True)
    write_atomic(path, save(plain, metadata={HEADER_KEY: described}))


def checksum(tensors: dict[str, torch.Tensor], content: object) -> str:
    """SHA-256 over a JSON-able description and the names, shapes, types and bytes of tensors."""
    import torch

    as_read = json.loads(json.dumps(content))  # keys become text
    digest = hashlib.sha256(json.dumps(as_read, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{list(plain.shape)}{plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_meta(path: str | Path, kind: str | None = None) -> dict:
    """The description of a file written by `write_tensors`, without reading its tensors."""
    with _opened(path, kind) as (_, content):
        return content["meta"]


def read_tensors(
    path: str | Path, kind: str | None = None, device: str | torch.device = "cpu"
) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and description; a file without a checksum, as the bundled ones, is not compared.

    Raises: FileNotFoundError; ValueError for a truncated file, one whose bytes changed, a foreign file, one
    of another kind, or one that a later version wrote.
    """
    with _opened(path, kind) as (file, content):
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    expected = content.pop(CHECKSUM_KEY, None)
    if expected is not None and checksum(tensors, content) != expected:
        what = f"a {kind or 'tensor'} file with its checksum"
        raise ValueError(
            f"{path}: expected {what}, got other bytes than were written. It is damaged: restore it or name"
            " another."
        )
    return {name: tensor.to(device) for name, tensor in tensors.items()}, content["meta"]


@contextlib.contextmanager
def _opened(path: str | Path, kind: str | None) -> Iterator[tuple[Any, dict]]:
    """Open, check the kind, and translate safetensors' errors."""
    path = Path(path)
    what = f"{path}: expected a {kind or 'tensor'} file"
    if not path.is_file():
        raise FileNotFoundError(f"{what}, got nothing there. Check the path.")
    try:
        opened = safetensors.safe_open(str(path), framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{what}, got a truncated or foreign one ({error}). Restore it or name another file."
        ) from None
    with opened as file:
        described = (file.metadata() or {}).get(HEADER_KEY)
        if described is None:
            raise ValueError(
                f"{what}, got safetensors without this project's header. Name a file that train.py or a tool"
                " wrote."
            )
        try:
            content = json.loads(described)
        except ValueError:
            content = None
        if not isinstance(content, dict) or not isinstance(content.get("format", 1), int):
            content = {}
        if content.get("format", 1) > FORMAT:
            raise ValueError(
                f"{what}, got one of format {content['format']}. It was written by a later version: use a"
                " later package."
            )
        if not {"kind", "meta"} <= content.keys():
            raise ValueError(f"{what}, got one whose header is damaged. Restore it or name another file.")
        if kind is not None and content["kind"] != kind:
            raise ValueError(f"{what}, got one of kind {content['kind']!r}. Name a {kind} file.")
        yield file, content


def check_fit(
    own: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    who: str,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
) -> None:
    """Raise ValueError listing missing, unexpected and misshapen names of `tensors` for a module whose state
    dict is `own`.

    Args: names: those missing and unexpected, where the module itself has said which.
    """
    odd = [k for k in own if k in tensors and tensors[k].shape != own[k].shape]
    shapes = {k: f"{k} {list(tensors[k].shape)} instead of {list(own[k].shape)}" for k in odd}
    missing, unexpected = names or (own.keys() - tensors.keys(), tensors.keys() - own.keys())
    problems = [  # names out of a file are made fit for a terminal: cut, control characters escaped
        f"{title}: {', '.join(n[:120].encode('unicode_escape').decode() for n in listed[:8])}"
        f"{' ...' if len(listed) > 8 else ''}"
        for title, listed in (
            ("missing", sorted(set(missing) - set(shapes))),
            ("unexpected", sorted(unexpected)),
            ("misshapen", sorted(shapes.values())),
        )
        if listed
    ]
    if problems:
        raise ValueError(
            f"{who}: expected the network's own tensors, got {'; '.join(problems)}. Use a file of the same"
            " architecture."
        )


def load_strict(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], who: str) -> None:
    """Copy tensors into a module, name by name; it may supply some itself.

    Raises: ValueError as `check_fit`.
    """
    own = module.state_dict()
    fitting = {
        name: tensor for name, tensor in tensors.items() if name not in own or own[name].shape == tensor.shape
    }
    missing, unexpected = module.load_state_dict(fitting, strict=False)
    check_fit(own, tensors, who, (missing, unexpected))
