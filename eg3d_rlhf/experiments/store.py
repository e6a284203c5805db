"""Content-addressed cache of artefacts: folders that are keyed by a hash of their inputs.

    <store>/<kind>-<first digits of the hash of the inputs>/
        inputs.json    the inputs; an input that is itself an artefact is given by the hash of its content
        done.json      written last: the hashes of the products, and the record that the maker returned
        ...            the products, and files from which an interrupted maker resumes

A maker is the function that computes an artefact. A folder without done.json is unfinished: its maker is
called again, with the same folder.

>>> import tempfile
>>> store = Store(Path(tempfile.mkdtemp()))
>>> def maker(folder: Path):
...     # the folder holds the files of an earlier, interrupted call
...     (folder / "network.txt").write_text("trained")
...     return [folder / "network.txt"], {"loss": 0.5}  # the products, and a record in JSON
>>> made = store.make("training", {"steps": 2, "seed": 0}, maker, "a training with seed 0")
>>> # in another process, or tomorrow
>>> reused = Store(store.root).make("training", {"seed": 0, "steps": 2}, maker)
>>> made.reused, reused.reused, reused.record["loss"], reused.folder == made.folder
(False, True, 0.5, True)

If artefact B is made from artefact A, the inputs of B contain `A.content`, so that B is made again when A
changes. An input file is represented by its hash (`core.cli.file_hash`). A maker that writes no files returns
`[], record`. `pool.run_tasks` makes many artefacts in parallel.
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
# Version of the results; part of every hash. It is increased when a change of the code makes equal inputs
# lead to other results.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """Finished artefact in a store: its folder, the hash of its files, and the record of its maker."""

    folder: Path
    # SHA-256 of the names and bytes of the products; an input of artefacts that are made from this one
    content: str
    record: Mapping[str, Any]  # values that its maker returned, in JSON types
    reused: bool  # True if it was read from the store, False if this call made it


# (folder) -> (files and folders that it wrote, record in JSON types). The folder may hold files of an
# earlier, interrupted call. Products must not contain times or paths: equal inputs give equal bytes.
Maker = Callable[[Path], tuple[Iterable[Path], Mapping[str, Any]]]


def json_hash(json_values: object) -> str:
    """Return the SHA-256 of JSON values as hexadecimal digits. The order of keys does not matter.

    Raises:
        TypeError: a value is not a JSON type. Its text could differ between processes.
    """
    return hashlib.sha256(json.dumps(json_values, sort_keys=True).encode()).hexdigest()


class Store:
    """Folder of artefacts. All ranks must make the same calls; only rank 0 decides, writes and prints.

    Args:
        root: folder of the store, which is made if it does not exist.
        ranks: this process among the processes of the run.
        report_line: function that is called with a status line for every artefact that is made or reused.
        hashed: True names the folder of an artefact by its kind and a hash of its inputs. False names it by
            its kind alone, which may then be a relative path, and takes no lock. The lock of the surrounding
            run must then protect the folder.
        renew: True if artefacts may be deleted and made again. A folder with other inputs is emptied, a
            product that has changed is made again, and the store waits for another process that makes the
            same artefact. False: each of these cases raises ValueError.
    """

    def __init__(
        self,
        root: Path,
        ranks: Ranks = SINGLE,
        report_line: Callable[[str], None] = lambda line: None,
        hashed: bool = True,
        renew: bool = False,
    ):
        self.root = root
        self.ranks = ranks
        self._report_line = report_line
        self._hashed = hashed
        self._renew = renew
        self._checked_artefacts: dict[Path, Artefact] = {}  # by folder; checked or made by this process

    def folder(self, kind: str, inputs: Mapping[str, Any]) -> Path:
        """Return the path of the folder of an artefact, which may not exist yet.

        Args:
            kind: short word at the start of the folder's name.
            inputs: all values on which the artefact depends, in JSON types.
        """
        if not self._hashed:
            return self.root / kind
        # `stored` gives old names to renamed values, so that hashes of version 0.1 stay the same
        inputs_hash = json_hash({"format": FORMAT, **stored(inputs)})
        return self.root / f"{kind}-{inputs_hash[:16]}"

    def find(self, kind: str, inputs: Mapping[str, Any]) -> Artefact | None:
        """Return an artefact if it is finished, and None otherwise.

        This method is not collective: a rank can call it without the others, unlike `make`.

        Args:
            kind: short word at the start of the folder's name.
            inputs: all values on which the artefact depends, in JSON types.

        Raises:
            ValueError: the artefact has other inputs or changed products, and `renew` is False.
        """
        folder = self.folder(kind, inputs)
        done_record = self._finished(folder, inputs)
        return None if done_record is None else _artefact(folder, done_record, is_reused=True)

    def make(self, kind: str, inputs: Mapping[str, Any], maker: Maker, title: str = "") -> Artefact:
        """Return an artefact. It is read from the store if it is finished, and made otherwise.

        Args:
            kind: short word at the start of the folder's name.
            inputs: all values on which the artefact depends, in JSON types.
            maker: function that makes the artefact in a folder. After an interruption it is called again, and
                may resume from its files.
            title: name of the artefact in the status line; "": the name of its folder.

        Raises:
            ValueError: the artefact has other inputs or changed products, and `renew` is False.
        """
        folder = self.folder(kind, inputs)
        # this process has hashed the products already; large files are not read again
        if folder in self._checked_artefacts:
            return self._checked_artefacts[folder]
        if self.ranks.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
        # rank 0 reads the files, and all ranks get its result; the other ranks pass a value that is ignored
        done_record = self.ranks.broadcast(self._finished(folder, inputs) if self.ranks.is_main else None)
        is_reused = done_record is not None
        if self.ranks.is_main:
            if is_reused:
                action_text = "reused from"
            elif folder.exists():
                action_text = "resuming in"
            else:
                action_text = "writing to"
            self._report_line(f"{title or folder.name}: {action_text} {folder}")
        if not is_reused:
            if self.ranks.is_main:
                # A folder with other inputs may hold files from which the maker would wrongly resume. None:
                # the folder states no inputs, since it is new or its maker wrote no inputs.json yet.
                if self._renew and _stated(folder) not in (None, json_hash(stored(inputs))):
                    shutil.rmtree(folder)
                folder.mkdir(parents=True, exist_ok=True)
            # no rank may use the folder before rank 0 has made it
            self.ranks.barrier()
            with run_lock(folder, enabled=self.ranks.is_main and self._hashed, wait=self._renew):
                # another process may have made the artefact while this one waited for the lock
                if self._renew:
                    done_record = self.ranks.broadcast(
                        self._finished(folder, inputs) if self.ranks.is_main else None
                    )
                if done_record is None:
                    # The inputs are written first, so that the folder of an interrupted call states its
                    # inputs.
                    if self.ranks.is_main:
                        self.begin(folder, inputs)
                    product_paths, maker_record = maker(folder)
                    self.ranks.barrier()  # all ranks have written their files before they are hashed
                    done_record = self.ranks.broadcast(
                        self.finish(folder, inputs, product_paths, maker_record)
                        if self.ranks.is_main
                        else None
                    )
        self._checked_artefacts[folder] = _artefact(folder, done_record, is_reused)
        return self._checked_artefacts[folder]

    def arrays(
        self, kind: str, inputs: Mapping[str, Any], compute: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Return arrays by name. They are computed by the first call, and read from the store by later calls.

        Args:
            kind: short word at the start of the folder's name.
            inputs: all values on which the arrays depend, in JSON types.
            compute: function that returns the arrays by name.

        Raises:
            ValueError: the artefact has other inputs or changed products, and `renew` is False.
        """

        def maker(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            # safetensors writes the memory of an array as it is, so the array must be contiguous
            array_by_name = {name: np.ascontiguousarray(array) for name, array in compute().items()}
            write_atomic(folder / ARRAYS, safetensors.numpy.save(array_by_name))
            return [folder / ARRAYS], {}

        self.make(kind, inputs, maker)
        return self.load_arrays(kind, inputs)

    def load_arrays(self, kind: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the arrays, by name, that an earlier call of `arrays` with the same arguments has stored."""
        array_by_name: dict[str, np.ndarray] = safetensors.numpy.load_file(self.folder(kind, inputs) / ARRAYS)
        return array_by_name

    def begun(self, kind: str, inputs: Mapping[str, Any]) -> bool:
        """Return True if the folder of the artefact has an inputs.json with these inputs.

        The artefact may be unfinished.
        """
        return _stated(self.folder(kind, inputs)) == json_hash(stored(inputs))

    @staticmethod
    def begin(folder: Path, inputs: Mapping[str, Any]) -> None:
        """Write the inputs of an artefact into inputs.json of its folder."""
        write_atomic(folder / INPUTS, _text(stored(inputs), sort_keys=True))

    @staticmethod
    def finish(
        folder: Path, inputs: Mapping[str, Any], products: Iterable[Path], record: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Mark an artefact as finished: write inputs.json and done.json.

        A caller can use this function to add files to a store that were made without it.

        Args:
            folder: folder of the artefact.
            inputs: all values on which the artefact depends, in JSON types.
            products: files and folders that belong to the artefact, inside `folder` or elsewhere. All files
                in these folders are hashed.
            record: further values that the store keeps, in JSON types.

        Returns:
            Content of done.json without its own hash.
        """
        product_files: set[Path] = set()
        for product_path in products:
            candidate_paths = product_path.rglob("*") if product_path.is_dir() else [product_path]
            product_files.update(file for file in candidate_paths if file.is_file())
        # Names are relative to the folder, with "/", so that the content hash does not depend on the position
        # of the store or on the operating system.
        files_by_name = {
            Path(os.path.relpath(product_path, folder)).as_posix(): product_path
            for product_path in product_files
        }
        hash_by_name = {name: file_hash(files_by_name[name]) for name in sorted(files_by_name)}
        done_record = {"files": hash_by_name, "content": json_hash(hash_by_name), "record": record}
        Store.begin(folder, inputs)
        # written last, because a folder with this file counts as finished
        write_atomic(folder / DONE, _text({**done_record, "sha256": json_hash(done_record)}))
        return done_record

    def _finished(self, folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read and check done.json.

        Returns None if the artefact is unfinished. With `renew`, a damaged artefact counts as unfinished,
        too.

        Raises:
            ValueError: the artefact is damaged, and `renew` is False.
        """
        if not (folder / DONE).exists():
            return None
        try:
            return _checked(folder, inputs)
        except ValueError:
            if not self._renew:
                raise
            return None


def _artefact(folder: Path, done_record: Mapping[str, Any], is_reused: bool) -> Artefact:
    """Make the `Artefact` object from the content of done.json."""
    return Artefact(
        folder=folder, content=done_record["content"], record=done_record["record"], reused=is_reused
    )


def _stated(folder: Path) -> str | None:
    """Return the hash of the inputs in inputs.json of a folder.

    Returns None if there is no such file, and "", which equals no hash, if the file is damaged.
    """
    try:
        return json_hash(json.loads((folder / INPUTS).read_text()))
    except FileNotFoundError:
        return None
    except ValueError:
        return ""


def _checked(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Read done.json of a folder, and check the inputs, the record and the products.

    Raises:
        ValueError: a file is missing or damaged, the inputs differ, or a product has changed.
    """
    try:
        recorded_inputs = json.loads((folder / INPUTS).read_text())
        done_record: dict[str, Any] = json.loads((folder / DONE).read_text())
        recorded_hashes = dict(done_record["files"])
        # Artefacts of versions before 0.2 have no hash of done.json, which is then accepted unchecked.
        recorded_hash_of_done = done_record.pop("sha256", None) or json_hash(done_record)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"artefact {folder}: {INPUTS} or {DONE} cannot be read: {error}. Delete the folder, and run the"
            " same command again, which makes the artefact anew."
        ) from None
    if json_hash(recorded_inputs) != json_hash(stored(inputs)):
        raise ValueError(
            f"artefact {folder}: its {INPUTS} does not state the inputs of this command. Delete the folder,"
            " and run the same command again, which makes the artefact anew."
        )
    if json_hash(done_record) != recorded_hash_of_done:
        raise ValueError(
            f"artefact {folder}: {DONE} was changed after it was written. Restore the file, or delete the"
            " folder and run the same command again, which makes the artefact anew."
        )
    # every product is hashed, since a file may have been edited or cut off after it was written
    for file_name, recorded_hash in recorded_hashes.items():
        file_path = folder / file_name
        if not file_path.is_file():
            raise ValueError(
                f"artefact {folder}: its file {file_name} is missing. Delete the folder, and run the same"
                " command again, which makes the artefact anew."
            )
        current_hash = file_hash(file_path)
        if current_hash != recorded_hash:
            raise ValueError(
                f"artefact {folder}: its file {file_name} was changed: the SHA-256 was"
                f" {recorded_hash[:12]}... and is {current_hash[:12]}... now. Delete the folder, and run the"
                " same command again, which makes the artefact anew."
            )
    return done_record


def _text(json_values: Mapping[str, Any], sort_keys: bool = False) -> bytes:
    """Format JSON values as the bytes of a file.

    Without `sort_keys` the order of the keys is kept. A record that is read back then has the same order as
    the record that the maker returned, and leads to the same results.
    """
    return (json.dumps(json_values, indent=1, sort_keys=sort_keys) + "\n").encode()
