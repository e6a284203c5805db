"""File of a judge's answers: a cache that survives a crash, and the replay of a run without a server.

The file has one JSON object per line. Each line is written and flushed before the answer is used, so a run
that is killed keeps every answer that it received. The key of an answer is a hash of all that it depends on
(images, question, model and settings), so the file may hold the answers of many runs. A call that failed has
a record without a text: a replay repeats the failure, and a run with a server asks again.
"""

import json
import os
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

MAX_LINE = 1 << 20  # characters of a line; longer lines are no answers of this program


class AnswerFile:
    """Answers by their key, in memory and in a file.

    Args:
        path: file of answers, which is created if it is missing; None: in memory alone.
        is_replay: True: the file is only read, and must exist.

    Raises: FileNotFoundError for a missing replay; ValueError for a line that is no answer, or if another
        process writes to the file.
    """

    def __init__(self, path: Path | None = None, is_replay: bool = False):
        self.path = path
        self._is_replay = is_replay
        # By key; a later line replaces an earlier one, such as a failed call.
        self._records: dict[str, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None
        self._lock: FileLock | None = None
        # Without a file, answers last as long as the object.
        if path is None:
            return
        if is_replay:
            if not path.is_file():
                raise FileNotFoundError(
                    f"--replay: the file of answers {path} does not exist. Correct --answers."
                )
            self._read(path)
            return
        # The folder may be --outdir, which the command makes at its end.
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two writers would ask the same questions twice, and mix their lines.
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"--answers: another process writes to {path}. Wait for it, or name another file."
            ) from None
        if path.is_file():
            # The last line may be incomplete if an earlier run was killed while it wrote.
            kept_bytes = self._read(path)
            if kept_bytes < path.stat().st_size:
                # Otherwise the next line would continue the incomplete one.
                os.truncate(path, kept_bytes)
        # closed by `close`; every line is one write
        self._file = path.open("ab", buffering=0)

    def _read(self, path: Path) -> int:
        """Read the complete lines of a file, and return their length in bytes."""
        kept_bytes = 0
        # Bytes and not text, because a truncated line may end within a letter.
        with path.open("rb") as file:
            for line_number, line in enumerate(file, 1):
                # Only the last line can be incomplete, because each line is one write.
                if not line.endswith(b"\n"):
                    break
                kept_bytes += len(line)
                try:
                    if len(line) > MAX_LINE:
                        raise ValueError
                    record = json.loads(line)
                    self._records[record["key"]] = record
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"{path.name}, line {line_number}: the line is no answer of a judge. Remove it, or"
                        " name another file."
                    ) from None
        return kept_bytes

    def __len__(self) -> int:
        """Return the number of answers."""
        return len(self._records)

    def find(self, key: str) -> dict[str, Any] | None:
        """Return an answer, or None if there is none with this key. In a replay it may be a failed call."""
        # A failure may pass, so a run with a server asks again.
        record = self._records.get(key)
        is_failure = record is not None and record.get("text") is None
        return None if is_failure and not self._is_replay else record

    def add(self, record: dict[str, Any]) -> None:
        """Store an answer, or a failed call, under its field `key`, in the file first."""
        if self._file is not None:
            # Unbuffered: the line is in the file before the answer is used.
            self._file.write(json.dumps(record, sort_keys=True).encode() + b"\n")
        self._records[record["key"]] = record

    def close(self) -> None:
        """Close the file, so that another process can write to it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()
