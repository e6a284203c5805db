"""Lock of a run folder, handling of SIGTERM and SIGINT, and resource limits of helper processes."""

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
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP}  # errors of file systems that have no locks


class StoppedError(Exception):
    """Raised when a signal ended the work of a run, after the run has written its checkpoint."""


@contextlib.contextmanager
def run_lock(folder: Path, enabled: bool = True, wait: bool = False) -> Iterator[None]:
    """Hold the lock `folder`/run.lock inside the context.

    The lock file is deleted at the end. If the process is killed, the operating system frees the lock.

    Args:
        folder: an existing run folder.
        enabled: False takes no lock. Ranks other than rank 0 pass False.
        wait: True waits until the process that holds the lock frees it; False raises an error instead.

    Raises:
        ValueError: another process holds the lock, and `wait` is False.
        OSError: the folder cannot be written.
    """
    if not enabled:
        yield
        return
    lock_path = folder / LOCK
    folder_lock = FileLock(folder / LOCK, blocking=wait)
    try:
        folder_lock.acquire()
    except Timeout:
        lock_holder = lock_path.read_text(errors="replace").strip() or "another process"
        raise ValueError(
            f"run folder {folder} is in use by {lock_holder}. Wait until that process ends, stop it, or"
            " choose another folder."
        ) from None
    except OSError as error:
        # some network file systems have no locks; the run then continues without a lock
        if error.errno not in _UNSUPPORTED:
            raise
        print(
            f"Warning: the file system of {folder} has no locks. Do not start two runs in this folder at the"
            " same time.",
            file=sys.stderr,
        )
    # another process that finds the lock taken prints this text in its error message
    lock_path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    try:
        yield
    finally:
        # deleted before the release, since afterwards the file may be locked by another process
        lock_path.unlink(missing_ok=True)
        folder_lock.release()


class StopRequest:
    """Context manager inside which SIGTERM and the first SIGINT only set the attribute `received`.

    A second SIGINT ends the process at once. In a thread other than the main thread the context manager has
    no effect, because Python allows signal handlers in the main thread only.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # name of the last signal; None: no signal arrived
        self._previous_handlers: dict[int, Any] = {}  # by signal number

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signal_number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[signal_number] = signal.signal(signal_number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for signal_number, handler in self._previous_handlers.items():
            signal.signal(signal_number, handler)

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        """Store the name of a received signal, and give the next SIGINT its default effect."""
        del frame  # Python passes it to every signal handler
        self.received = signal.Signals(signal_number).name
        if signal_number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt inside the context, as SIGINT does.

    Python allows this in the main thread only; elsewhere it raises ValueError.
    """
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def serve_requests(
    answer_request: Callable[[Any], Any], max_memory: int, max_seconds: int, max_file_size: int | None = None
) -> None:
    """Answer requests until standard input ends, with limits of memory and processor time.

    A request is one line of JSON on standard input; its answer is one line of JSON on standard output.

    Args:
        answer_request: function that returns the answer to a request, both in JSON types.
        max_memory: largest address space of this process, in bytes.
        max_seconds: largest processor time of one request, in seconds.
        max_file_size: largest size of a file that this process writes, in bytes; None: no limit.
    """
    import resource  # this module does not exist on Windows

    # (soft limit, hard limit); a process cannot raise its hard limit again
    resource.setrlimit(resource.RLIMIT_AS, (max_memory, max_memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dumps of a process that runs out of memory
    if max_file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    for request_line in sys.stdin:
        # The limit counts from the start of the process, so it is raised by `max_seconds` for each request.
        # The first two entries of getrusage are the seconds of processor time in user mode and in the system.
        used_seconds = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
        resource.setrlimit(resource.RLIMIT_CPU, (used_seconds + max_seconds, resource.RLIM_INFINITY))
        print(json.dumps(answer_request(json.loads(request_line))), flush=True)


def peak_bytes(ru_maxrss: int) -> int:
    """Convert the peak resident memory of a process to bytes.

    Args: ru_maxrss: field of the result of `resource.getrusage` or `os.wait4`, in bytes on macOS and in
        kilobytes on Linux.
    """
    return ru_maxrss if sys.platform == "darwin" else ru_maxrss * 1024
