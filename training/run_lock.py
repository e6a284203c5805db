"""One run per folder: an advisory lock that the operating system releases when its holder dies."""

import errno
import fcntl
import os
import socket
import sys
from pathlib import Path

FILE = "run.lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class RunLock:
    """Hold `folder`/run.lock for the length of a with-statement; it is removed at the end.

    Args:
        folder: an existing run folder; enabled: False does nothing (ranks other than the first).
    Raises: ValueError where another process holds it; OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path, enabled: bool = True):
        self.path, self.enabled = folder / FILE, enabled
        self._file: int | None = None

    def __enter__(self) -> "RunLock":
        while self.enabled and self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._claim(file)
            except BaseException:
                os.close(file)
                raise
            if _same(file, self.path):
                self._file = file
            else:  # the last holder removed it between our two calls
                os.close(file)
        return self

    def _claim(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            raise ValueError(
                f"run folder {self.path.parent}: expected no other run in it, got {holder}. Wait for it, stop it, or use another folder."
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            print(f"Warning: {self.path.parent} is on a file system without locks; start one run at a time in it.", file=sys.stderr)
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __exit__(self, *exc) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def _same(file: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    own = os.fstat(file)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)
