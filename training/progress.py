"""Progress bars: a bar that is redrawn on a terminal, or a line at least every 30 seconds in a log file."""

import os
import sys
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
    outermost of nested bars writes lines. A bar with leave=False has no line at the end. Processes of
    torchrun with a rank above 0 show no bar.
    """

    has_steps = True  # False for work whose share is unknown, see `working`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Under torchrun, every process does the same work, so one of them shows it.
        if os.environ.get("RANK", "0") != "0":
            kwargs["disable"] = True
        super().__init__(*args, **kwargs)
        # the library leaves `fp` unset in a disabled bar
        if not self.disable and not self._is_terminal():
            # the work starts here; `start_t` is reset when a bar is reset
            self._next_line_time = time.monotonic() + FIRST_LINE
            _register(self)

    def _is_terminal(self) -> bool:
        """Return True if the output is a terminal, on which the bar can be redrawn."""
        return not self.disable and bool(self.fp.isatty())

    def display(self, msg=None, pos=None):
        """Draw the bar if the output is a terminal. See the library for arguments and result."""
        return super().display(msg, pos) if self._is_terminal() else True

    def clear(self, nolock: bool = False) -> None:
        """Clear the bar on a terminal. In a log there is no bar, and cursor codes would be written."""
        if self._is_terminal():
            super().clear(nolock=nolock)

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> bool | None:
        """Draw the bar again on a terminal. In a log nothing is drawn."""
        return super().refresh(nolock=nolock, lock_args=lock_args) if self._is_terminal() else None

    def write_line_if_due(self, now: float) -> None:
        """Write a line into the log if the bar is the outermost one and its next line is due.

        Args: now: time of `time.monotonic`, in seconds.
        """
        if self.disable or now < self._next_line_time or self._is_hidden():
            return
        self._next_line_time = now + LINE_INTERVAL
        if not self.has_steps:
            elapsed_text = self.format_interval(self.format_dict["elapsed"])
            self.fp.write(f"{self.desc.removesuffix(': ')}: {elapsed_text} elapsed\n")
            self.fp.flush()
            return
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

    def _is_hidden(self) -> bool:
        """Return True if another open bar writes the lines: an outer one, or any bar if this has no steps."""
        return any(
            bar is not self
            and not bar.disable
            and bar.has_steps
            # the outermost bar has the position 0, and the next ones -1, -2 and so on
            and (not self.has_steps or abs(bar.pos) < abs(self.pos))
            for bar in list(_open_bars)
        )

    def _unit_text(self) -> str:
        """Return a blank and the unit of the counts, in the plural where the count asks for it, or ""."""
        # in "1 of 13 parts" the total decides
        counted = self.n if self.total is None else self.total
        # "it" (iterations) is the library's default unit, which carries no information here.
        if self.unit == "it":
            return ""
        plural = f"{self.unit}es" if self.unit.endswith(("ch", "sh", "s", "x")) else f"{self.unit}s"
        return f" {self.unit if counted == 1 else plural}"

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
            _open_bars.discard(self)
            # Without `sp`, its function that prints, the library's close() only removes the bar from
            # its list.
            self.sp = None
        super().close()


class _Working(tqdm):
    """Bar without steps, which shows how long the work has taken so far."""

    has_steps = False


def working(title: str) -> tqdm:
    """Return a bar for work that has no steps to count. Use it as a context manager.

    In a log it writes "title: 00:31 elapsed" at the times of other bars, and nothing while a bar inside it is
    open.
    """
    return _Working(desc=title, bar_format="{desc}: {elapsed}", leave=False)


def log_bar(total: int, initial: int, title: str, unit: str, enabled: bool = True) -> tqdm:
    """Return a bar that writes lines into a log, for a loop that prints status lines of its own.

    The lines show that the job is alive while the next status line takes long. On a terminal the bar is
    switched off, because it would be drawn over the status lines.

    Args:
        total: number of steps at the end of the loop.
        initial: number of steps that are done already.
        title: text at the start of a line.
        unit: name of a step.
        enabled: False for a bar that writes nothing, such as on ranks above 0.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        leave=False,
        disable=not enabled or sys.stderr.isatty(),
    )


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
        try:
            bars = list(_open_bars)
        except RuntimeError:  # another thread opened a bar meanwhile; the set is read again in half a second
            continue
        for bar in bars:
            try:
                bar.write_line_if_due(time.monotonic())
            except RuntimeError:  # as above
                continue
            # The log may be closed by its owner while a bar is open; there is nowhere to report that.
            except (ValueError, OSError):
                _open_bars.discard(bar)
