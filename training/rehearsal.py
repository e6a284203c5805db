"""Rehearsal of a long run: do a little of each kind of work, and estimate the time of the whole run from it.

`train.py --rehearse` runs the code of the real run inside `rehearsing()`. The loops of a run contain these
calls, which change nothing in a real run:

    with rehearsal.timed("training", "updates", planned=1000):    measures one of 1,000 equal steps
        update()
    for batch in rehearsal.first(batches):                        iterates over the first batch alone
        ...
    with rehearsal.section(times=4):                              work that the real run does four times
        ...

The estimate of a kind of work is

    seconds of one step * steps of the whole run,

where the seconds are the mean over the steps that the rehearsal has done. If a step contains loops over
`first`, its seconds are multiplied by (number of items / number of items that the rehearsal has done).
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

START = "start"  # part of a run: all work that no `timed` block contains, such as opening the files
TRAINING = "training"
CHECKPOINTS = "checkpoints"
SUMMARY = "summary"
PARTS = (START, TRAINING, CHECKPOINTS, SUMMARY)  # in the order of the printed table
LATENTS = 2  # number of latents of the summary that a rehearsal computes for each measurement


@dataclass
class Cost:
    """Measured time of one kind of work."""

    part: str  # one of PARTS
    name: str  # name of the work in the printed table
    planned: float  # number of steps of the whole run
    seconds: float = 0.0  # time of the measured steps, for all items of their loops
    steps: int = 0  # number of measured steps

    @property
    def seconds_per_step(self) -> float:
        """Return the mean time of a step."""
        return self.seconds / self.steps

    @property
    def estimate(self) -> float:
        """Return the estimated time of this work in the whole run, in seconds."""
        return self.seconds_per_step * self.planned


@dataclass
class _Block:
    """A `timed` block that is running."""

    done_items: int = 0  # items that the loops of the block do
    all_items: int = 0  # items that they would do in a real run
    inner_seconds: float = 0.0  # time of the blocks inside this one, which have their own costs


@dataclass
class Rehearsal:
    """Measured times of a run that is rehearsed."""

    # seconds of a clock with an arbitrary zero; the lambda reads the clock when the object is made
    began: float = field(default_factory=lambda: time.monotonic())
    ended: float | None = None  # time of the end; None while the run is rehearsed
    measured_seconds: float = 0.0  # time in outermost blocks
    _costs: dict[tuple, Cost] = field(default_factory=dict)  # by (section, part, name)
    _blocks: list[_Block] = field(default_factory=list)  # running blocks, the outermost first
    _sections: list[tuple[int, float]] = field(default_factory=list)  # (number, times) of running sections
    _section_count: int = 0

    def costs(self) -> list[Cost]:
        """Return the measured costs in the order of PARTS, costs of the same name joined."""
        ended = time.monotonic() if self.ended is None else self.ended
        # All time outside of blocks, such as loading files and compiling kernels. It occurs once in a run.
        seconds_of_start = ended - self.began - self.measured_seconds
        all_costs = [Cost(START, "opening and other work", 1, seconds_of_start, 1), *self._costs.values()]
        costs_by_name: dict[tuple[str, str], list[Cost]] = {}
        for cost in sorted(all_costs, key=lambda cost: PARTS.index(cost.part)):
            # The sort is stable, so costs of one part keep the order in which they were measured.
            costs_by_name.setdefault((cost.part, cost.name), []).append(cost)
        joined_costs = []
        for (part, name), costs in costs_by_name.items():
            planned = sum(cost.planned for cost in costs)
            # The mean over all planned steps, with which the estimate is the sum of the single estimates.
            seconds = sum(cost.estimate for cost in costs) / planned if planned else 0.0
            joined_costs.append(Cost(part, name, planned, seconds, 1))
        return joined_costs

    def seconds_by_part(self) -> dict[str, float]:
        """Return the estimated seconds of each part of the whole run, in the order of PARTS."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for cost in self.costs():
            seconds[cost.part] += cost.estimate
        return seconds

    @contextlib.contextmanager
    def _timed(self, part: str, name: str, planned: float | None) -> Iterator[None]:
        """Measure one step of a kind of work, see `timed`."""
        block = _Block()
        self._blocks.append(block)
        # GPU kernels run asynchronously. Without waiting, their time would be counted in a later block.
        _synchronise()
        start_time = time.monotonic()
        try:
            yield
            _synchronise()
        finally:
            # Also after an error, so that the stack stays correct for the blocks around this one.
            self._blocks.pop()
        seconds = time.monotonic() - start_time
        if self._blocks:
            # The outer block subtracts this time, since it belongs to the cost of the inner one.
            self._blocks[-1].inner_seconds += seconds
        else:
            self.measured_seconds += seconds
        # Without loops over `first`, the block has done all of its work.
        ratio = block.all_items / block.done_items if block.done_items else 1.0
        times = 1.0
        # Nested sections multiply: two trainings in each of three folds are six.
        for _, section_times in self._sections:
            times *= section_times
        # The number of the section separates equal names in
        # different sections, whose steps may take different times.
        cost_key = (tuple(number for number, _ in self._sections), part, name)
        cost = self._costs.setdefault(cost_key, Cost(part, name, 0.0))
        # Without a plan, each entry counts as one step. With a plan, a later entry replaces it.
        cost.planned = cost.planned + times if planned is None else planned * times
        cost.seconds += (seconds - block.inner_seconds) * ratio
        cost.steps += 1

    def _first(self, items: Sequence[T], count: int) -> Sequence[T]:
        """Return the first `count` items, and record their share in the innermost block."""
        first_items = items[:count]
        if self._blocks:
            self._blocks[-1].done_items += len(first_items)
            self._blocks[-1].all_items += len(items)
        return first_items

    @contextlib.contextmanager
    def _section(self, times: float) -> Iterator[None]:
        """Multiply the steps that are planned inside, see `section`."""
        self._section_count += 1
        # A number that is never used again, because two sections may have the same factor.
        self._sections.append((self._section_count, times))
        try:
            yield
        finally:
            self._sections.pop()


_current: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)


def current() -> Rehearsal | None:
    """Return the rehearsal that is running, or None in a real run."""
    return _current.get()


@contextlib.contextmanager
def rehearsing() -> Iterator[Rehearsal]:
    """Rehearse every run inside the context, and yield the object that collects the measured times."""
    rehearsal = Rehearsal()
    # A context variable and not a global one, so that threads with their own contexts do not rehearse.
    token = _current.set(rehearsal)
    try:
        yield rehearsal
    finally:
        _current.reset(token)
        rehearsal.ended = time.monotonic()


def timed(part: str, name: str, planned: float | None = None) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that measures one step of work in a rehearsal, and nothing in a real run.

    The time of `timed` blocks inside this one is not counted twice: it belongs to them.

    Args:
        part: TRAINING, CHECKPOINTS or SUMMARY.
        name: name of the work in the printed table.
        planned: number of such steps in the whole run. None: the whole run does this work as often as the
            rehearsal enters the block.
    """
    rehearsal = current()
    return contextlib.nullcontext() if rehearsal is None else rehearsal._timed(part, name, planned)


def section(times: float = 1) -> contextlib.AbstractContextManager[None]:
    """Return a context manager for a part of a run, such as one training of several.

    Steps of the same name in two sections are added, and not averaged.

    Args: times: how often the whole run does what is inside; a share below 1 if processes divide the work.
    """
    rehearsal = current()
    return contextlib.nullcontext() if rehearsal is None else rehearsal._section(times)


def first(items: Sequence[T], count: int = 1) -> Sequence[T]:
    """Return all items in a real run, and the first `count` items in a rehearsal."""
    rehearsal = current()
    return items if rehearsal is None else rehearsal._first(items, count)


def active() -> bool:
    """Return True in a rehearsal, where loops end after their first tick."""
    return current() is not None


def _synchronise() -> None:
    """Wait for the GPU, whose work is not finished when the functions return that start it."""
    # A process that has not imported torch has given no work to a GPU.
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
