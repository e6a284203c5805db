"""SIGTERM and SIGINT as a request to stop at the next iteration; a second SIGINT kills at once."""

import signal
import threading


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
