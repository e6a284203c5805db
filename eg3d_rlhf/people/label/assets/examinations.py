"""Record of the examined files of a folder, so that an examination resumes after a stop and is not repeated.

The examination of a file (reading.py) reads it completely, which takes seconds for a large mesh. The record
examined.jsonl in the folder of the files has one line for each file that the label page can show: its name,
its size and time of change, and the fields of `Examined`. A file whose size or time has changed is examined
again, and so is a file that could not be shown, or that has a note.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.people.label.assets.reading import Examined, examine_or_reason

RECORD = "examined.jsonl"
CHUNK = 16  # number of files after which the record is extended; each chunk starts a process


def examine_and_record(
    paths: Sequence[Path], on_progress: Callable[[int], None] = lambda done: None
) -> list[Examined | str]:
    """Examine files as `examine_or_reason` does, and extend the records of their folders as it proceeds.

    Args:
        paths: paths of the files, which may lie in several folders.
        on_progress: function that is called with the number of examined files, those of the record included.
    """
    known = read_records(paths)
    results: dict[Path, Examined | str] = dict(known)
    remaining = [path for path in paths if path not in known]
    on_progress(len(known))
    for start in range(0, len(remaining), CHUNK):
        chunk = remaining[start : start + CHUNK]
        done_count = len(known) + start
        # The stamps are taken before the files are read: a file that changes meanwhile is examined again.
        stamps = [_stamp(path) for path in chunk]
        chunk_results = examine_or_reason(
            chunk,
            lambda n: on_progress(done_count + n),  # noqa: B023 (called in this iteration)
        )
        for path, stamp, result in zip(chunk, stamps, chunk_results, strict=True):
            results[path] = result
            if isinstance(result, Examined):
                with open(path.parent / RECORD, "a", encoding="utf-8") as record:
                    record.write(json.dumps({"file": path.name, "stamp": stamp, **asdict(result)}) + "\n")
    return [results[path] for path in paths]


def examine_with_records(
    paths: Sequence[Path],
    on_progress: Callable[[int], None] = lambda done: None,
    root: Path | None = None,
) -> list[Examined | str]:
    """Examine those files that the records of their folders lack. The records are not changed.

    The arguments and the result are those of `examine_or_reason`.
    """
    results: dict[Path, Examined | str] = dict(read_records(paths))
    remaining = [path for path in paths if path not in results]
    known_count = len(results)
    if known_count and not remaining:
        on_progress(known_count)
    examined = examine_or_reason(remaining, lambda n: on_progress(known_count + n), root) if remaining else []
    results |= zip(remaining, examined, strict=True)
    return [results[path] for path in paths]


def read_records(paths: Sequence[Path]) -> dict[Path, Examined]:
    """Return the files that are unchanged since they were examined without a note: path -> examination."""
    records: dict[Path, dict[str, dict]] = {}
    for folder in {path.parent for path in paths}:
        records[folder] = {}
        if (folder / RECORD).is_file():
            for text_line in (folder / RECORD).read_text(encoding="utf-8").splitlines():
                # A run that was killed may have written half a line. It is ignored.
                try:
                    entry = json.loads(text_line)
                    records[folder][entry["file"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue
    examinations = {}
    for path in paths:
        entry = records[path.parent].get(path.name)
        if entry is None or not path.is_file() or entry.get("stamp") != _stamp(path):
            continue
        examination = Examined(kind=entry["kind"], hash=entry["hash"], note=entry["note"])
        # The hash of an OBJ file with materials includes other files, which may have changed. The record of a
        # downloaded folder may contain anything, so the hash of every file is compared.
        if examination.hash == file_hash(path) and not examination.note:
            examinations[path] = examination
    return examinations


def _stamp(path: Path) -> list[int]:
    """Return the size of a file in bytes and the time of its last change in ns; [] for a missing file."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
