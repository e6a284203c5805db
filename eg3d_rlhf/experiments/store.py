"""Content-addressed cache of artefacts: folders that are keyed by a hash of their inputs.

    <store>/<kind>-<first digits of the hash of the inputs>/
        inputs.json    the inputs; other artefacts by the hash of their content
        done.json      written last: the products with their hashes, and the maker's record
        ...            the products, and files from which an interrupted maker resumes

A folder without done.json is unfinished: its maker is called again, on the same folder.

>>> import tempfile
>>> store = Store(Path(tempfile.mkdtemp()))
>>> def maker(folder: Path):
...     # the folder holds the files of an earlier, interrupted call
...     (folder / "network.txt").write_text("trained")
...     return [folder / "network.txt"], {"loss": 0.5}  # the products, and a record in JSON
>>> made = store.make("training", {"steps": 2, "seed": 0}, maker, "a training with seed 0")
>>> # in another process, or tomorrow
>>> again = Store(store.root).make("training", {"seed": 0, "steps": 2}, maker)
>>> made.reused, again.reused, again.record["loss"], again.folder == made.folder
(False, True, 0.5, True)

An artefact that is made from another one has the other's `content` among its inputs, so that it is made again
when the other changes. Files are named by `core.cli.file_hash`. A maker without files returns `[], record`.
To make many artefacts in parallel, see `pool.run_tasks`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.experiments.process import run_lock
from eg3d_rlhf.experiments.version_0_1 import stored
from training.distributed import SINGLE, Ranks
from training.storage import write_atomic

INPUTS = "inputs.json"
DONE = "done.json"
ARRAYS = "arrays.safetensors"
FORMAT = 1  # increases when equal inputs lead to other results than before; part of the hash


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A finished artefact."""

    folder: Path
    content: str  # SHA-256 over the names and bytes of the products: what artefacts made from it depend on
    record: Mapping[str, Any]  # JSON that its maker returned
    reused: bool  # read from the store, not made by this call


# (folder) -> (files and folders that it wrote, record in JSON types). The folder may hold files of an
# earlier, interrupted call. Products must not contain times or paths: equal inputs give equal bytes.
Maker = Callable[[Path], tuple[Iterable[Path], Mapping[str, Any]]]


def json_hash(values: object) -> str:
    """Hash JSON values with SHA-256. The order of keys does not matter.

    Raises: TypeError for values that are not JSON, whose text could change between processes.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Store:
    """Folder of artefacts. All ranks must make the same calls; only rank 0 decides, writes and prints.

    Args:
        tell: called with a line for every artefact that is made or reused.
        hashed: False names the folder of an artefact by its kind alone, which may be a path. The lock of the
            surrounding run must then guard it.
        renew: True for artefacts that may be deleted and made again: a folder of other inputs is emptied, a
            product that has changed is made again, and the store waits for another process that makes the
            artefact. False: each of these cases is an error.
    """

    def __init__(
        self,
        root: Path,
        ranks: Ranks = SINGLE,
        tell: Callable[[str], None] = lambda line: None,
        hashed: bool = True,
        renew: bool = False,
    ):
        self.root = root
        self.ranks = ranks
        self._tell = tell
        self._hashed = hashed
        self._renew = renew
        self._seen: dict[Path, Artefact] = {}  # checked in this process

    def folder(self, kind: str, inputs: Mapping[str, Any]) -> Path:
        """Return the folder of the artefact of these inputs, which may not exist yet."""
        # `stored` gives old names to renamed keys, so that hashes of version 0.1 stay the same
        return self.root / (
            f"{kind}-{json_hash({'format': FORMAT, **stored(inputs)})[:16]}" if self._hashed else kind
        )

    def find(self, kind: str, inputs: Mapping[str, Any]) -> Artefact | None:
        """Return the finished artefact of these inputs, or None. Call it on one rank.

        Raises: ValueError as `make` does.
        """
        folder = self.folder(kind, inputs)
        done = self._finished(folder, inputs)
        return None if done is None else _artefact(folder, done, reused=True)

    def make(self, kind: str, inputs: Mapping[str, Any], maker: Maker, title: str = "") -> Artefact:
        """Return the artefact of these inputs: reuse it, make it, or resume an interrupted call.

        Args: kind: short word for the folder's name; inputs: JSON, everything that the result depends on;
            title: for the progress line.
        Raises: ValueError where the folder holds other inputs or changed products; also the errors of
            `maker`.
        """
        folder = self.folder(kind, inputs)
        # products were hashed once in this process; large ones are not read again
        if folder in self._seen:
            return self._seen[folder]
        if self.ranks.main:
            self.root.mkdir(parents=True, exist_ok=True)
        done = self.ranks.broadcast(self._finished(folder, inputs) if self.ranks.main else None)
        reused = done is not None
        if self.ranks.main:
            self._tell(
                f"{title or folder.name}:"
                f" {'reused from' if reused else 'resuming in' if folder.exists() else 'writing to'} {folder}"
            )
        if not reused:
            if self.ranks.main:
                # a folder of other inputs may hold files that the maker would take for its own
                if self._renew and _stated(folder) not in (None, json_hash(stored(inputs))):
                    shutil.rmtree(folder)
                folder.mkdir(parents=True, exist_ok=True)
            self.ranks.barrier()
            with run_lock(folder, enabled=self.ranks.main and self._hashed, wait=self._renew):
                if self._renew:  # it may have been made while this process waited
                    done = self.ranks.broadcast(self._finished(folder, inputs) if self.ranks.main else None)
                if done is None:
                    # inputs first, so that an interrupted folder states what it belongs to
                    if self.ranks.main:
                        self.begin(folder, inputs)
                    products, record = maker(folder)
                    self.ranks.barrier()  # all ranks have written their files before they are hashed
                    done = self.ranks.broadcast(
                        self.finish(folder, inputs, products, record) if self.ranks.main else None
                    )
        self._seen[folder] = _artefact(folder, done, reused)
        return self._seen[folder]

    def arrays(
        self, kind: str, inputs: Mapping[str, Any], compute: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Return arrays by name, which are computed at the first call only; see `make`."""

        def maker(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            values = {name: np.ascontiguousarray(value) for name, value in compute().items()}
            write_atomic(folder / ARRAYS, safetensors.numpy.save(values))
            return [folder / ARRAYS], {}

        self.make(kind, inputs, maker)
        return self.load_arrays(kind, inputs)

    def load_arrays(self, kind: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Read the arrays that `arrays` has computed."""
        values: dict[str, np.ndarray] = safetensors.numpy.load_file(self.folder(kind, inputs) / ARRAYS)
        return values

    def begun(self, kind: str, inputs: Mapping[str, Any]) -> bool:
        """Return whether the folder holds an artefact of these inputs, finished or not."""
        return _stated(self.folder(kind, inputs)) == json_hash(stored(inputs))

    @staticmethod
    def begin(folder: Path, inputs: Mapping[str, Any]) -> None:
        """Write inputs.json."""
        write_atomic(folder / INPUTS, _text(stored(inputs), sort_keys=True))

    @staticmethod
    def finish(
        folder: Path, inputs: Mapping[str, Any], products: Iterable[Path], record: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write inputs.json and done.json. Files that were made without a store can thus be added to it.

        Args: products: files and folders, inside `folder` or elsewhere.
        """
        paths = {
            file
            for path in products
            for file in (path.rglob("*") if path.is_dir() else [path])
            if file.is_file()
        }
        # relative to the folder, with "/", so that the content hash does not depend on where the store is
        names = {Path(os.path.relpath(path, folder)).as_posix(): path for path in paths}
        files = {name: file_hash(names[name]) for name in sorted(names)}
        done = {"files": files, "content": json_hash(files), "record": record}
        Store.begin(folder, inputs)
        write_atomic(folder / DONE, _text({**done, "sha256": json_hash(done)}))
        return done

    def _finished(self, folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read and check done.json; None for an unfinished artefact or, with `renew`, a damaged one."""
        if not (folder / DONE).exists():
            return None
        try:
            return _checked(folder, inputs)
        # a damaged artefact counts as unfinished where it may be made again
        except ValueError:
            if not self._renew:
                raise
            return None


def _artefact(folder: Path, done: Mapping[str, Any], reused: bool) -> Artefact:
    """Make the artefact that done.json describes."""
    return Artefact(folder=folder, content=done["content"], record=done["record"], reused=reused)


def _stated(folder: Path) -> str | None:
    """Hash the inputs in a folder's inputs.json; None if there is no file, "" if it is damaged."""
    try:
        return json_hash(json.loads((folder / INPUTS).read_text()))
    except FileNotFoundError:
        return None
    except ValueError:
        return ""


def _checked(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Read done.json, and check inputs, record and products. Raises: ValueError for any difference."""
    try:
        stated = json.loads((folder / INPUTS).read_text())
        done: dict[str, Any] = json.loads((folder / DONE).read_text())
        files = dict(done["files"])
        # artefacts of versions before 0.2 have no hash of their record, which then counts as correct
        expected = done.pop("sha256", None) or json_hash(done)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"artefact {folder}: expected intact files {INPUTS} and {DONE}, got: {error}. Delete the folder:"
            " the artefact is made again."
        ) from None
    if json_hash(stated) != json_hash(stored(inputs)):
        raise ValueError(
            f"artefact {folder}: expected the inputs whose hash is in its name, got others. Delete the"
            " folder: the artefact is made again."
        )
    if json_hash(done) != expected:
        raise ValueError(
            f"artefact {folder}: expected an unchanged {DONE}, got a changed one. Restore it, or delete the"
            " folder: the artefact is made again."
        )
    # every product is hashed, since a file may have been edited or cut off after it was written
    for name, expected in files.items():
        path = folder / name
        got = file_hash(path) if path.is_file() else "nothing"
        if got != expected:
            raise ValueError(
                f"artefact {folder}: expected {name} with the hash {expected[:12]}, got {got[:12]}. Delete"
                " the folder: the artefact is made again."
            )
    return done


def _text(values: Mapping[str, Any], sort_keys: bool = False) -> bytes:
    """Format JSON for a file.

    A record keeps the order of its keys, so that results from a reused record equal those from a new one.
    """
    return (json.dumps(values, indent=1, sort_keys=sort_keys) + "\n").encode()
