"""SIGTERM and SIGINT: a request to stop at the next iteration, where a second SIGINT kills at once; or an exception."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class StopRequest:
    """A with-statement inside which the first SIGTERM or SIGINT is only noted.

    After the first SIGINT the next one has its default effect. Outside the main thread, where Python allows no handlers, nothing changes.
    """

    def __init__(self):
        self.received: str | None = None  # name of the signal
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        del frame
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """A with-statement inside which SIGTERM raises KeyboardInterrupt, as SIGINT does; main thread alone."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt
