"""Process of a run: the lock of its folder, the signals SIGTERM and SIGINT, limits of helper processes."""

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

LOCK = "run.lock"
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP}


class StoppedError(Exception):
    """Raised when a signal ended the work; the state is on disk."""


@contextlib.contextmanager
def run_lock(folder: Path, enabled: bool = True, wait: bool = False) -> Iterator[None]:
    """Hold the lock `folder`/run.lock inside the context.

    The file is removed at the end. If the process dies, the operating system frees the lock.
    Args:
        folder: an existing run folder; enabled: False does nothing (for ranks other than the first);
        wait: wait for the process that holds the lock.
    Raises: ValueError where another process holds it; OSError where the folder cannot be written.
    """
    if not enabled:
        yield
        return
    path = folder / LOCK
    lock = FileLock(folder / LOCK, blocking=wait)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text(errors="replace").strip() or "another process"
        raise ValueError(
            f"run folder {folder}: expected no other run in it, got {holder}. Wait for it, stop it, or use"
            " another folder."
        ) from None
    except OSError as error:
        # some network file systems have no locks; the run then continues without one
        if error.errno not in _UNSUPPORTED:
            raise
        print(
            f"Warning: {folder} is on a file system without locks; start one run at a time in it.",
            file=sys.stderr,
        )
    # for the message that another process prints
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


class StopRequest:
    """Context manager inside which the first SIGTERM or SIGINT only sets `received`.

    After the first SIGINT, the next one has its default effect. Outside the main thread, where Python allows
    no handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # name of the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: set its name, and let a second SIGINT interrupt at once."""
        del frame
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt inside the context, as SIGINT does. Main thread only."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def serve_requests(
    answer: Callable[[Any], Any], memory: int, seconds: int, largest_file: int | None = None
) -> None:
    """Answer requests, one JSON line each from standard input, with a limit of processor time per request.

    Args: memory: largest address space of this process, in bytes; seconds: of processor time per request;
        largest_file: largest size of a written file in bytes, None: no limit.
    """
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dumps of a process that runs out of memory
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    for line in sys.stdin:
        # the limit counts from the start of the process, so it is moved forward for each request
        used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))
        print(json.dumps(answer(json.loads(line))), flush=True)
