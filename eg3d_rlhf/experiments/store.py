"""Work that is done once: a store's folders, each named by all that it is made from, found again by this run
or another.

    <store>/<kind>-<first digits of the hash of the inputs>/
        inputs.json    what it is made from; other artefacts by the hash of their content
        done.json      written last: the products with their hashes, and the maker's record
        ...            the products, and what an unfinished making left to go on from

A folder without done.json is unfinished: its maker is called again, on the same folder.

>>> import tempfile
>>> store = Store(Path(tempfile.mkdtemp()))
>>> def maker(folder: Path):
...     # where an earlier call was interrupted, what it left lies here
...     (folder / "network.txt").write_text("trained")
...     return [folder / "network.txt"], {"loss": 0.5}  # the products, and a record in JSON
>>> made = store.make("training", {"steps": 2, "seed": 0}, maker, "a training with seed 0")
>>> # in another process, or tomorrow
>>> found = Store(store.root).make("training", {"seed": 0, "steps": 2}, maker)
>>> made.reused, found.reused, found.record["loss"], found.folder == made.folder
(False, True, 0.5, True)

What is made from an artefact has its `content` among the inputs, so that it is made anew where that was. Of a
file: `core.cli.file_hash`. A maker that has no files returns `[], record`. Many at once: `pool.run_tasks`.
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
FORMAT = 1  # goes up when equal inputs come to mean other results


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A finished artefact."""

    folder: Path
    content: str  # SHA-256 over the names and bytes of the products: what artefacts made from it depend on
    record: Mapping[str, Any]  # what its maker had to say, JSON
    reused: bool  # found, not made


# Given the folder, in which it may find what an earlier, interrupted call left; returns the files and folders
# that it wrote, without times or places in them (equal inputs, equal bytes), and a record, JSON.
Maker = Callable[[Path], tuple[Iterable[Path], Mapping[str, Any]]]


def json_hash(values: object) -> str:
    """SHA-256 of JSON values, whatever their order.

    Raises: TypeError for what is no JSON, since its text would not be the same tomorrow.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Store:
    """A folder of artefacts. All ranks call alike; rank 0 alone decides, writes and prints.

    Args: tell: is called with a line for everything made or found. hashed: False where the folder of an
        artefact is named by its kind alone, which may be a path, and is guarded by the lock of a run around
        it. renew: for what may be made again at will: a folder of other inputs is emptied, a product that has
        changed is made again, and another process that is making the artefact is waited for. False: each of
        these is an error.
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
        """Where the artefact of these inputs lies, once it is begun."""
        return self.root / (
            f"{kind}-{json_hash({'format': FORMAT, **stored(inputs)})[:16]}" if self._hashed else kind
        )

    def find(self, kind: str, inputs: Mapping[str, Any]) -> Artefact | None:
        """The finished artefact of these inputs, or None; called on one rank.

        Raises: ValueError as `make` does.
        """
        folder = self.folder(kind, inputs)
        done = self._finished(folder, inputs)
        return None if done is None else _artefact(folder, done, reused=True)

    def make(self, kind: str, inputs: Mapping[str, Any], maker: Maker, title: str = "") -> Artefact:
        """The artefact of these inputs: found, or made, or gone on with where its making was interrupted.

        Args: kind: short word for the folder's name; inputs: JSON, all that the result depends on; title: for
            the progress line.
        Raises: ValueError where the folder holds other inputs, or products that are not those it was finished
            with; what the maker raises.
        """
        folder = self.folder(kind, inputs)
        if folder in self._seen:
            return self._seen[folder]
        if self.ranks.main:
            self.root.mkdir(parents=True, exist_ok=True)
        done = self.ranks.broadcast(self._finished(folder, inputs) if self.ranks.main else None)
        reused = done is not None
        if self.ranks.main:
            self._tell(
                f"{title or folder.name}:"
                f" {'found in' if reused else 'going on in' if folder.exists() else 'into'} {folder}"
            )
        if not reused:
            if self.ranks.main:
                if self._renew and _stated(folder) not in (None, json_hash(stored(inputs))):
                    shutil.rmtree(folder)
                folder.mkdir(parents=True, exist_ok=True)
            self.ranks.barrier()
            with run_lock(folder, enabled=self.ranks.main and self._hashed, wait=self._renew):
                if self._renew:  # it may have been made while this process waited
                    done = self.ranks.broadcast(self._finished(folder, inputs) if self.ranks.main else None)
                if done is None:
                    if self.ranks.main:
                        self.begin(folder, inputs)
                    products, record = maker(folder)
                    self.ranks.barrier()
                    done = self.ranks.broadcast(
                        self.finish(folder, inputs, products, record) if self.ranks.main else None
                    )
        self._seen[folder] = _artefact(folder, done, reused)
        return self._seen[folder]

    def arrays(
        self, kind: str, inputs: Mapping[str, Any], compute: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Arrays by name that are computed once; see `make`."""

        def maker(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            values = {name: np.ascontiguousarray(value) for name, value in compute().items()}
            write_atomic(folder / ARRAYS, safetensors.numpy.save(values))
            return [folder / ARRAYS], {}

        self.make(kind, inputs, maker)
        return self.load_arrays(kind, inputs)

    def load_arrays(self, kind: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays that `arrays` has computed."""
        found: dict[str, np.ndarray] = safetensors.numpy.load_file(self.folder(kind, inputs) / ARRAYS)
        return found

    def begun(self, kind: str, inputs: Mapping[str, Any]) -> bool:
        """Tell whether a folder holds an artefact of these inputs, finished or not."""
        return _stated(self.folder(kind, inputs)) == json_hash(stored(inputs))

    @staticmethod
    def begin(folder: Path, inputs: Mapping[str, Any]) -> None:
        """Write inputs.json."""
        write_atomic(folder / INPUTS, _text(stored(inputs), sort_keys=True))

    @staticmethod
    def finish(
        folder: Path, inputs: Mapping[str, Any], products: Iterable[Path], record: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write inputs.json and done.json; also of what was made without a store, which is then found again.

        Args: products: files and folders, inside `folder` or elsewhere.
        """
        paths = {
            file
            for path in products
            for file in (path.rglob("*") if path.is_dir() else [path])
            if file.is_file()
        }
        names = {Path(os.path.relpath(path, folder)).as_posix(): path for path in paths}
        files = {name: file_hash(names[name]) for name in sorted(names)}
        done = {"files": files, "content": json_hash(files), "record": record}
        Store.begin(folder, inputs)
        write_atomic(folder / DONE, _text({**done, "sha256": json_hash(done)}))
        return done

    def _finished(self, folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """done.json of a finished artefact, after checking that it is what it says."""
        if not (folder / DONE).exists():
            return None
        try:
            return _checked(folder, inputs)
        except ValueError:
            if not self._renew:
                raise
            return None


def _artefact(folder: Path, done: Mapping[str, Any], reused: bool) -> Artefact:
    return Artefact(folder=folder, content=done["content"], record=done["record"], reused=reused)


def _stated(folder: Path) -> str | None:
    """The hash of the inputs that a folder states; None where it states none, "" where they are damaged."""
    try:
        return json_hash(json.loads((folder / INPUTS).read_text()))
    except FileNotFoundError:
        return None
    except ValueError:
        return ""


def _checked(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """done.json of an artefact. Raises: ValueError where the folder is not what it says."""
    try:
        stated = json.loads((folder / INPUTS).read_text())
        done: dict[str, Any] = json.loads((folder / DONE).read_text())
        files = dict(done["files"])
        # artefacts that were made before 0.2 state no hash of their record
        expected = done.pop("sha256", None) or json_hash(done)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"artefact {folder}: expected {INPUTS} and {DONE} whole, got: {error}. Delete the folder."
        ) from None
    if json_hash(stated) != json_hash(stored(inputs)):
        raise ValueError(
            f"artefact {folder}: expected the inputs that its name stands for, got others. Delete the folder."
        )
    if json_hash(done) != expected:
        raise ValueError(
            f"artefact {folder}: expected {DONE} as it was written, got another. Restore it, or delete the"
            " folder: the artefact is made again."
        )
    for name, expected in files.items():
        path = folder / name
        got = file_hash(path) if path.is_file() else "nothing"
        if got != expected:
            raise ValueError(
                f"artefact {folder}: expected {name} as it was finished ({expected[:12]}), got {got[:12]}."
                " Delete the folder: it is made again."
            )
    return done


def _text(values: Mapping[str, Any], sort_keys: bool = False) -> bytes:
    """A record keeps its order, so that what is made from one that was found equals what is made from a fresh
    one.
    """
    return (json.dumps(values, indent=1, sort_keys=sort_keys) + "\n").encode()
