"""Files of tensors with a description: safetensors with JSON in the header.

Files are written atomically. Reading one executes nothing from it.
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
    import torch  # slow to import; readers of descriptions and writers of other files do without it

HEADER_KEY = "eg3d_rlhf"  # key of the JSON text in the safetensors header
CHECKSUM_KEY = "sha256"
_ROOT = Path(__file__).resolve().parents[1]
_PLACES = (_ROOT / "assets", _ROOT / "eg3d_rlhf" / "assets")  # in a checkout; in an installed wheel
# Folder of the bundled files.
ASSETS = next((place for place in _PLACES if (place / "people-basis.safetensors").is_file()), _PLACES[0])
# Format of the files that this version writes. From 2 on the header states it; format 1 does not, so that
# equal contents keep their bytes. Files of a later format are rejected.
FORMAT = 1


def write_atomic(path: str | Path, data: bytes, private: bool = False) -> None:
    """Write a file so that readers see either the old content or the new one, never a part.

    The bytes go to a temporary file beside `path`, are flushed to the disk, and the file is renamed.

    Args:
        path: target; missing folders are created.
        data: content.
        private: make the file, and a folder that is created for it, readable by their owner only.
    Raises: OSError, with the old content intact.
    """
    path = Path(path)
    # Hidden, and with the process id: two processes that write the same file do not disturb each other.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(0o700 if private else 0o777, parents=True, exist_ok=True)
        # os.open sets the permissions when the file is created. A later chmod would leave a moment in which
        # others could read a private file.
        with os.fdopen(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666), "wb"
        ) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the rename, else a crash could leave an empty file
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"{path}: cannot write {len(data)} bytes: {reason}. The old content is intact. Free space, or"
            " choose another folder."
        ) from error
    finally:
        # The folder may be deleted or read-only; then nothing more can be done.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    # The rename itself is on the disk once its folder is flushed.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files that a process left in `folder` when it was killed inside `write_atomic`."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_tensors(path: str | Path, kind: str, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Save tensors and a JSON-able description as one file.

    Args:
        path: target.
        kind: 'network', 'checkpoint', 'reward', ...; `read_tensors` checks it.
        tensors: by name.
        meta: description.
    """
    from safetensors.torch import save

    # Copies: safetensors does not accept tensors that share storage.
    copies = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    content = {"kind": kind, "meta": meta, **({"format": FORMAT} if FORMAT > 1 else {})}
    described = json.dumps({**content, CHECKSUM_KEY: checksum(copies, content)}, sort_keys=True)
    write_atomic(path, save(copies, metadata={HEADER_KEY: described}))


def checksum(tensors: dict[str, torch.Tensor], content: object) -> str:
    """Return a SHA-256 over a JSON-able description and the names, shapes, types and bytes of tensors."""
    import torch

    as_read = json.loads(json.dumps(content))  # JSON turns keys into text; a reader has this form
    digest = hashlib.sha256(json.dumps(as_read, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{list(data.shape)}{data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)  # as bytes: numpy has no bfloat16
    return digest.hexdigest()


def read_meta(path: str | Path, kind: str | None = None) -> dict:
    """Return the description in a file written by `write_tensors`, without reading its tensors."""
    with _opened(path, kind) as (_, content):
        return content["meta"]


def read_tensors(
    path: str | Path, kind: str | None = None, device: str | torch.device = "cpu"
) -> tuple[dict[str, torch.Tensor], dict]:
    """Return tensors and description of a file written by `write_tensors`.

    A file without a checksum, like the bundled ones, is not compared with one.

    Args:
        path: file.
        kind: required kind; None accepts any.
        device: device of the tensors.
    Raises: FileNotFoundError; ValueError for a truncated file, one whose bytes changed, one that this project
        did not write, one of another kind, or one that a later version wrote.
    """
    with _opened(path, kind) as (file, content):
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    expected = content.pop(CHECKSUM_KEY, None)
    if expected is not None and checksum(tensors, content) != expected:
        what = f"a {kind or 'tensor'} file with its checksum"
        raise ValueError(
            f"{path}: expected {what}, but its bytes have changed since it was written. Restore the file, or"
            " name another."
        )
    return {name: tensor.to(device) for name, tensor in tensors.items()}, content["meta"]


@contextlib.contextmanager
def _opened(path: str | Path, kind: str | None) -> Iterator[tuple[Any, dict]]:
    """Open a file and yield it with its description. Errors of safetensors become ours."""
    path = Path(path)
    what = f"{path}: expected a {kind or 'tensor'} file"
    if not path.is_file():
        raise FileNotFoundError(f"{what}, but there is no file. Check the path.")
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
        # A damaged header can hold any text or value. All such cases end in the message below.
        try:
            content = json.loads(described)
        except ValueError:
            content = None
        if not isinstance(content, dict) or not isinstance(content.get("format", 1), int):
            content = {}
        if content.get("format", 1) > FORMAT:
            raise ValueError(
                f"{what}, got one of format {content['format']}, which a later version wrote. Use that"
                " version of the package."
            )
        if not {"kind", "meta"} <= content.keys():
            raise ValueError(f"{what}, got one whose header is damaged. Restore it or name another file.")
        if kind is not None and content["kind"] != kind:
            raise ValueError(f"{what}, got one of kind {content['kind']!r}. Name a {kind} file.")
        yield file, content


def check_fit(
    expected: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    who: str,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
) -> None:
    """Raise ValueError if tensors do not fit a module, listing missing, unexpected and misshapen names.

    Args:
        expected: state dict of the module.
        tensors: tensors from a file.
        who: file and network, for the message.
        names: missing and unexpected names, if the module itself has determined them.
    """
    odd = [k for k in expected if k in tensors and tensors[k].shape != expected[k].shape]
    shapes = {k: f"{k} {list(tensors[k].shape)} instead of {list(expected[k].shape)}" for k in odd}
    missing, unexpected = names or (expected.keys() - tensors.keys(), tensors.keys() - expected.keys())
    # Names come from a file. They are made safe for a terminal: shortened, with control characters escaped.
    problems = [
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
            f"{who}: expected tensors that fit the network, got {'; '.join(problems)}. Use a file of the same"
            " architecture."
        )


def load_strict(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], who: str) -> None:
    """Copy tensors into a module by name. The module's load_state_dict may supply some itself.

    Raises: ValueError like `check_fit`.
    """
    state = module.state_dict()
    # load_state_dict would raise a RuntimeError of many lines
    # for wrong shapes; `check_fit` lists them instead.
    fitting = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in state or state[name].shape == tensor.shape
    }
    missing, unexpected = module.load_state_dict(fitting, strict=False)
    check_fit(state, tensors, who, (missing, unexpected))
