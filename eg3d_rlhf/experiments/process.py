"""The process that a run is: alone in its folder, and asked to stop by SIGTERM and SIGINT."""

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
    """A signal ended the work; its state is on the disk."""


@contextlib.contextmanager
def run_lock(folder: Path, enabled: bool = True, wait: bool = False) -> Iterator[None]:
    """Hold `folder`/run.lock inside a with-statement; it is removed at the end, and free where its holder has
    died.

    Args:
        folder: an existing run folder; enabled: False does nothing (ranks other than the first);
        wait: wait for the process that holds it.
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
        if error.errno not in _UNSUPPORTED:
            raise
        print(
            f"Warning: {folder} is on a file system without locks; start one run at a time in it.",
            file=sys.stderr,
        )
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


class StopRequest:
    """A with-statement inside which the first SIGTERM or SIGINT is only noted.

    After the first SIGINT the next one has its default effect. Outside the main thread, where Python allows
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
        del frame
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """A with-statement inside which SIGTERM raises KeyboardInterrupt, as SIGINT does; main thread alone."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def serve_requests(
    answer: Callable[[Any], Any], memory: int, seconds: int, largest_file: int | None = None
) -> None:
    """Answer requests, JSON lines from standard input, each with a limit of processor time.

    Args: memory: bytes of this process; seconds: for each request; largest_file: bytes of what it may write;
        None: any.
    """
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    for line in sys.stdin:
        used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))
        print(json.dumps(answer(json.loads(line))), flush=True)
