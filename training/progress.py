"""Progress bars: a bar that is redrawn on a terminal, or a line at least every 30 seconds in a log file."""

import threading
import time
import weakref
from typing import Any

import tqdm as library

from training.config import number_text

FIRST_LINE = 1.5  # seconds after which a bar that is still open writes its first line into a log
LINE_INTERVAL = 30.0  # seconds between two lines of a bar in a log


class tqdm(library.tqdm):
    """Progress bar with the signature of the class tqdm in the library of the same name.

    If the output is no terminal, the bar writes lines instead: the first after FIRST_LINE seconds, then one
    every LINE_INTERVAL seconds, also while a single step takes longer than that, and one at the end. Only the
    outermost of nested bars writes lines. A bar with leave=False has no line at the end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # the library leaves `fp` unset in a disabled bar
        if not self.disable and not self._is_terminal():
            # the work starts here; `start_t` is reset when a bar is reset
            self._next_line_time = time.monotonic() + FIRST_LINE
            _register(self)

    def _is_terminal(self) -> bool:
        """Return True if the output is a terminal, on which the bar can be redrawn."""
        return bool(self.fp.isatty())

    def display(self, msg=None, pos=None):
        """Draw the bar if the output is a terminal. See the library for arguments and result."""
        return super().display(msg, pos) if self._is_terminal() else True

    def write_line_if_due(self, now: float) -> None:
        """Write a line into the log if the bar is the outermost one and its next line is due.

        Args: now: time of `time.monotonic`, in seconds.
        """
        if self.disable or self.pos or now < self._next_line_time:
            return
        self._next_line_time = now + LINE_INTERVAL
        count_text = (
            f"{number_text(self.n)}"
            if self.total is None
            else f"{number_text(self.n)} of {number_text(self.total)}"
        )
        elapsed = self.format_dict["elapsed"]
        done = self.n - self.initial
        # Without a finished step the rest of the time is unknown.
        rest_text = (
            f", about {self.format_interval((self.total - self.n) * elapsed / done)} left"
            if self.total and done > 0
            else ""
        )
        self.fp.write(
            f"{self.desc.removesuffix(': ') or 'running'}: {count_text}{self._unit_text()},"
            f" {self.format_interval(elapsed)} elapsed{rest_text}\n"
        )
        self.fp.flush()

    def _unit_text(self) -> str:
        """Return a blank and the unit of the counts, in the plural where the count asks for it, or ""."""
        # in "1 of 13 parts" the total decides
        counted = self.n if self.total is None else self.total
        # "it" (iterations) is the library's default unit, which carries no information here.
        return "" if self.unit == "it" else f" {self.unit}" if counted == 1 else f" {self.unit}s"

    def close(self) -> None:
        """End the bar. If the output is no terminal, write one line with the number of units and the time."""
        if not self.disable and not self._is_terminal():
            # With leave=None, the library keeps only the outermost of nested bars, which has the position 0.
            if self.leave or self.leave is None and not self.pos:
                count_text = (
                    f"{number_text(self.n)}"
                    if self.total in (None, self.n)
                    else f"{number_text(self.n)} of {number_text(self.total)}"
                )
                elapsed_text = self.format_interval(self.format_dict["elapsed"])
                self.fp.write(
                    f"{self.desc.removesuffix(': ') or 'done'}: {count_text}{self._unit_text()} in"
                    f" {elapsed_text}\n"
                )
            # Without `sp`, its function that prints, the library's close() only removes the bar from
            # its list.
            self.sp = None
        super().close()


_open_bars: "weakref.WeakSet[tqdm]" = weakref.WeakSet()  # bars that write into a log
_line_thread: threading.Thread | None = None  # background thread that writes the lines of open bars


def _register(bar: tqdm) -> None:
    """Let the background thread write the lines of a bar. The thread is started with the first bar."""
    global _line_thread
    _open_bars.add(bar)
    # A child process of fork inherits the variable, but not the thread.
    if _line_thread is None or not _line_thread.is_alive():
        _line_thread = threading.Thread(target=_write_due_lines, name="progress", daemon=True)
        _line_thread.start()


def _write_due_lines() -> None:
    """Write the due lines of all open bars, twice a second, as long as the process lives."""
    while True:
        time.sleep(0.5)
        for bar in list(_open_bars):
            try:
                bar.write_line_if_due(time.monotonic())
            # The log may be closed by its owner while a bar is open; there is nowhere to report that.
            except (ValueError, OSError):
                _open_bars.discard(bar)
