"""Files with tensors and a description: safetensors files with JSON in the header.

Files are written atomically. No code from a file is executed.
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

from training.input_paths import existing_file

if TYPE_CHECKING:
    import torch  # slow to import, and not needed for descriptions and other files

HEADER_KEY = "eg3d_rlhf"  # key of the JSON text in the safetensors header
CHECKSUM_KEY = "sha256"  # key of the checksum in this JSON text
_ROOT = Path(__file__).resolve().parents[1]
# Possible folders of the bundled files: in a checkout of the repository, and in an installed package.
_FOLDERS = (_ROOT / "assets", _ROOT / "eg3d_rlhf" / "assets")
# Folder of the bundled files: the first one that contains them.
ASSETS = next((folder for folder in _FOLDERS if (folder / "people-basis.safetensors").is_file()), _FOLDERS[0])
# Format of the files that this version writes. The header contains it only from format 2 on, so that the
# bytes of files of format 1 do not change. Files of a later format are rejected.
FORMAT = 1


def write_atomic(path: str | Path, data: bytes, private: bool = False) -> None:
    """Write a file so that it contains either the old or the new content at any time, never a part of it.

    The content is written to a temporary file in the same folder, which is then renamed.

    Args:
        path: path of the file; missing folders are created.
        data: content of the file.
        private: True: only the owner can read the file, and a folder that is created for it.
    Raises: OSError if the file cannot be written. The old content is then intact.
    """
    path = Path(path)
    # The name contains the process id, so that two processes can write the same file at the same time.
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(0o700 if private else 0o777, parents=True, exist_ok=True)
        # os.open sets the permissions when it creates the file. With a later chmod, other users could read a
        # private file for a moment.
        with os.fdopen(
            os.open(temporary_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666), "wb"
        ) as temporary_file:
            temporary_file.write(data)
            temporary_file.flush()
            # The bytes must be on the disk before the file is renamed, otherwise a crash could leave an
            # empty file.
            os.fsync(temporary_file.fileno())
        os.replace(temporary_path, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"{path}: the file ({len(data)} bytes) cannot be written: {reason}. The old content is intact."
            " Free space, or use another folder."
        ) from error
    finally:
        # After success there is no temporary file. The folder may have been deleted, which is no
        # further error.
        with contextlib.suppress(OSError):
            temporary_path.unlink(missing_ok=True)
    # Flushing the folder writes the new name of the file to the disk.
    folder_descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder_descriptor)
    finally:
        os.close(folder_descriptor)


def remove_temporaries(folder: Path) -> None:
    """Delete temporary files in a folder, which remain if a process is killed inside `write_atomic`."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


# First bytes of the small text file that git leaves in place of a large file that Git LFS has not fetched.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def reject_lfs_pointer(path: str | Path, who: str = "") -> None:
    """Raise ValueError if a file is a pointer of Git LFS, which stands for a file that was not downloaded.

    Args:
        path: path of the file; nothing is checked if there is no file.
        who: beginning of the message; "": the path.
    """
    path = Path(path)
    if not path.is_file():
        return
    with open(path, "rb") as file:
        is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    if is_pointer:
        raise ValueError(
            f"{who or path}: {path.name} is a pointer of Git LFS ({path.stat().st_size} bytes) in place of"
            f" the file itself. Run `git lfs pull` in {path.parent}, or download the file again."
        )


def write_tensors(path: str | Path, kind: str, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors and their description to one file.

    Args:
        path: path of the file.
        kind: kind of the file, such as 'network', 'checkpoint' or 'reward', which `read_tensors` checks.
        tensors: tensors by name.
        meta: description, JSON values by name.
    """
    from safetensors.torch import save

    # safetensors does not accept tensors that share a storage, so all are copied.
    tensor_copies = {
        tensor_name: tensor.detach().contiguous().clone() for tensor_name, tensor in tensors.items()
    }
    description = {"kind": kind, "meta": meta, **({"format": FORMAT} if FORMAT > 1 else {})}
    header_text = json.dumps(
        {**description, CHECKSUM_KEY: checksum(tensor_copies, description)}, sort_keys=True
    )
    write_atomic(path, save(tensor_copies, metadata={HEADER_KEY: header_text}))


def checksum(tensors: dict[str, torch.Tensor], description: object) -> str:
    """Compute the SHA-256 of a description and of the names, shapes, dtypes and bytes of tensors, in hex.

    Args: tensors: tensors by name; description: description, JSON values.
    """
    import torch

    # Writing and reading JSON converts keys to texts and tuples to lists. The reader computes the checksum of
    # this form.
    json_description = json.loads(json.dumps(description))
    digest = hashlib.sha256(json.dumps(json_description, sort_keys=True).encode())
    for tensor_name, tensor in sorted(tensors.items()):
        cpu_tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tensor_name}{list(cpu_tensor.shape)}{cpu_tensor.dtype}".encode())
        # Viewed as bytes, because numpy has no bfloat16.
        digest.update(cpu_tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_meta(path: str | Path, kind: str | None = None) -> dict:
    """Return the description in a file of `write_tensors`, without reading its tensors.

    Args: path: path of the file; kind: required kind; None: any kind.
    Raises: FileNotFoundError and ValueError in the same cases as `read_tensors`. Changed bytes of tensors are
        not detected, because the tensors are not read.
    """
    with _opened(path, kind) as (_, header):
        return header["meta"]


def kind_of(path: str | Path) -> str | None:
    """Return the kind of a file of `write_tensors`, or None if the file is missing or no such file.

    The tensors are not read.
    """
    try:
        with _opened(path, None) as (_, header):
            return str(header["kind"])
    except (OSError, ValueError):
        return None


def read_names(path: str | Path, kind: str | None = None) -> list[str]:
    """Return the names of the tensors in a file of `write_tensors`, without reading the tensors.

    Args and errors: as in `read_meta`.
    """
    with _opened(path, kind) as (file, _):
        return list(file.keys())


def read_tensors(
    path: str | Path, kind: str | None = None, device: str | torch.device = "cpu"
) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors and the description in a file of `write_tensors`.

    The checksum is compared if the file contains one. The bundled files contain none.

    Args:
        path: path of the file.
        kind: required kind; None: any kind.
        device: device of the tensors.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, its bytes have changed, it is not of this project or of another
            kind, or a later version wrote it.
    """
    with _opened(path, kind) as (file, header):
        tensors = {tensor_name: file.get_tensor(tensor_name) for tensor_name in file.keys()}
    stored_checksum = header.pop(CHECKSUM_KEY, None)
    if stored_checksum is not None and checksum(tensors, header) != stored_checksum:
        raise ValueError(
            f"{path}: the content of this {kind or 'tensor'} file differs from its checksum, so it has"
            " changed since it was written. Restore the file from a copy, or name another file."
        )
    return {tensor_name: tensor.to(device) for tensor_name, tensor in tensors.items()}, header["meta"]


@contextlib.contextmanager
def _opened(path: str | Path, kind: str | None) -> Iterator[tuple[Any, dict]]:
    """Open a file and yield it with the content of its header.

    Raises: FileNotFoundError and ValueError in the same cases as `read_tensors`, except for a wrong checksum.
    """
    file_kind = f"{kind or 'tensor'} file"
    path = existing_file(path, file_kind)
    reject_lfs_pointer(path)
    try:
        tensor_file = safetensors.safe_open(str(path), framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: expected a {file_kind}, got a truncated file or another format ({error}). Restore the"
            " file from a copy, or name another file."
        ) from None
    with tensor_file as file:
        header_text = (file.metadata() or {}).get(HEADER_KEY)
        if header_text is None:
            raise ValueError(
                f"{path}: expected a {file_kind}, got a safetensors file without this project's header. Name"
                " a file that train.py or a tool of this project wrote."
            )
        # A damaged header can contain any text or value. It is replaced by an empty dict, which is
        # rejected below.
        try:
            header = json.loads(header_text)
        except ValueError:
            header = None
        if not isinstance(header, dict) or not isinstance(header.get("format", 1), int):
            header = {}
        if header.get("format", 1) > FORMAT:
            raise ValueError(
                f"{path}: the file has the format {header['format']}, which a later version of the package"
                " wrote. Update the package."
            )
        if not {"kind", "meta"} <= header.keys():
            raise ValueError(
                f"{path}: the header of the file is damaged. Restore the file from a copy, or name another"
                f" {file_kind}."
            )
        if kind is not None and header["kind"] != kind:
            raise ValueError(
                f"{path}: expected a {file_kind}, got a file of the kind {header['kind']!r}. Name a"
                f" {file_kind}."
            )
        yield file, header


def check_fit(
    expected_tensors: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    who: str,
    names: tuple[Sequence[str], Sequence[str]] | None = None,
) -> None:
    """Raise ValueError if the tensors of a file do not fit a module.

    The message lists names that are missing or unexpected, and names of tensors with another shape.

    Args:
        expected_tensors: state dict of the module.
        tensors: tensors of the file by name.
        who: file and network, for the message.
        names: (missing names, unexpected names) as torch has determined them; None: determine them here.
    """
    shape_errors = {}
    for tensor_name in expected_tensors:
        if tensor_name in tensors and tensors[tensor_name].shape != expected_tensors[tensor_name].shape:
            shape_errors[tensor_name] = (
                f"{tensor_name} {list(tensors[tensor_name].shape)} instead of"
                f" {list(expected_tensors[tensor_name].shape)}"
            )
    missing_names, unexpected_names = names or (
        expected_tensors.keys() - tensors.keys(),
        tensors.keys() - expected_tensors.keys(),
    )
    texts_by_problem = (
        # `load_strict` leaves out tensors of another shape, so torch reports them as missing, too.
        ("missing", sorted(set(missing_names) - set(shape_errors))),
        ("unexpected", sorted(unexpected_names)),
        ("misshapen", sorted(shape_errors.values())),
    )
    problems = []
    for problem_name, problem_texts in texts_by_problem:
        if problem_texts:
            # At most eight names are listed. Names come from a file, so they are shortened, and control
            # characters, which could change the terminal, are escaped.
            safe_texts = [
                problem_text[:120].encode("unicode_escape").decode() for problem_text in problem_texts[:8]
            ]
            problems.append(
                f"{problem_name}: {', '.join(safe_texts)}{' ...' if len(problem_texts) > 8 else ''}"
            )
    if problems:
        raise ValueError(
            f"{who}: the tensors of the file do not fit the network ({'; '.join(problems)}). Use a file of"
            " the same architecture."
        )


def load_strict(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], who: str) -> None:
    """Copy tensors into a module by name.

    The load_state_dict of a module may itself supply tensors that are missing in the file.

    Args: module: module that is changed in place; tensors: tensors by name; who: file and network, for the
        message.
    Raises: ValueError if the tensors do not fit, see `check_fit`.
    """
    state_dict = module.state_dict()
    # For another shape, load_state_dict raises an error of many lines. Such tensors are left out, and
    # `check_fit` lists them.
    tensors_that_fit = {
        tensor_name: tensor
        for tensor_name, tensor in tensors.items()
        if tensor_name not in state_dict or state_dict[tensor_name].shape == tensor.shape
    }
    missing_names, unexpected_names = module.load_state_dict(tensors_that_fit, strict=False)
    check_fit(state_dict, tensors, who, (missing_names, unexpected_names))
