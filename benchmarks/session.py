"""Runs rows one after the other: warm-up, rounds in turn, memory, agreement; keeps the results on disk after
each.

    python -m benchmarks.session NAME SIZE DEVICE PATH THREADS TINY
        prints the bytes that one path needs, alone in its process
"""

import contextlib
import fnmatch
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import torch
from torch.utils.benchmark.utils.timer import timer

from benchmarks import benchmark_report as report
from benchmarks.rows import (
    FAST,
    PATHS,
    REFERENCE,
    Agreement,
    Case,
    DisagreementError,
    Outcome,
    Row,
    check,
    compare,
)
from training.progress import tqdm

LONG = 3.0  # seconds of a reference pass from which on it is not warmed up at its real size
MOST_ROUNDS = 11
BUDGET = 15.0  # seconds of timed rounds of a row, where their number is not given
Meter = Callable[[Row, str, str, bool], int]  # (row, device, path, tiny) -> bytes


# Peak memory that one path needs on top of its inputs, in a process of its own.

REPO = Path(__file__).resolve().parents[1]


class PeakMeter:
    """High-water mark since its making: resident memory on a CPU, allocated memory on a GPU."""

    def __init__(self, device: str):
        self._device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        # some containers do not restart the mark: then it is that since the process began
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = resident_bytes("VmRSS")

    def extra_bytes(self) -> int:
        """Bytes at the peak beyond those at the beginning, >= 1."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            return max(torch.cuda.max_memory_allocated() - self._before, 1)
        return max(resident_bytes("VmHWM") - self._before, 1)


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, from /proc (Linux), else the peak that getrusage knows."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def extra_bytes_in_subprocess(row: Row, device: str, path: str, tiny: bool) -> int:
    """Peak while the row's case runs one path once, in a fresh process that has warmed up on a tiny case.

    Raises: RuntimeError with what the process wrote on stderr.
    """
    arguments = [row.name, row.size, device, path, str(torch.get_num_threads()), str(int(tiny))]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.session", *arguments], cwd=REPO, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{row.name}: the memory measurement of the {path} path failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


# Rounds and results


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a benchmark run."""

    device: str = "cpu"
    quick: bool = False  # tiny inputs, two rounds
    repeats: int | None = None  # rounds of every row; None: as many as fit into BUDGET, at least 2
    torch_compile: bool = False  # the further columns of the op rows
    out: Path = Path("benchmarks/results")
    meter: Meter | None = extra_bytes_in_subprocess  # None: no memory

    @property
    def stem(self) -> str:
        """Name of the files: a quick run does not replace the real figures."""
        return "quick" if self.quick else "latest"


def run(rows: Sequence[Row], options: Options) -> tuple[dict, list[str]]:
    """All rows: the report, which is on disk as well, and a line on each row whose paths disagree."""
    failures = []
    results = report.header(options.device, options.quick)
    with tqdm(total=len(rows)) as bar:
        for i, row in enumerate(rows):
            what = f"{row.name} ({row.size}, {options.device})"
            bar.set_description_str(what)
            try:
                results["rows"].append(run_row(row, options))
                report.write(options.out, options.stem, results)
                outcome = f"{results['rows'][-1]['ratio']:.2f}x"
            except DisagreementError as error:
                failures.append(f"{what}: the paths disagree: {error}")
                outcome = "DISAGREES"
            bar.write(f"[{i + 1}/{len(rows)}] {what}: {outcome}", file=sys.stderr)
            bar.update()
    report.write(options.out, options.stem, results)
    return results, failures


def select(rows: Sequence[Row], patterns: Sequence[str], size: str) -> list[Row]:
    """Rows of a size, or of "both", that one of `patterns` fits: a whole name, else part of names, else a
    shell pattern; all without any.

    Raises: ValueError for a pattern that fits no row.
    """
    sized = [row for row in rows if size in ("both", row.size)]
    names = {row.name.lower() for row in sized}

    def fits(row: Row, pattern: str) -> bool:
        name = row.name.lower()
        pattern = pattern.lower()
        return name == pattern if pattern in names else pattern in name or fnmatch.fnmatchcase(name, pattern)

    for pattern in patterns:
        if not any(fits(row, pattern) for row in sized):
            raise ValueError(
                f"--rows: expected part of a row's name, got {pattern!r}, which fits none of size {size}. See"
                " --list."
            )
    return [row for row in sized if not patterns or any(fits(row, pattern) for pattern in patterns)]


def run_row(row: Row, options: Options) -> dict:
    """Measure one row; returns its record.

    Raises: DisagreementError where the paths do not compute the same.
    """
    device = options.device
    if options.torch_compile:
        torch.compiler.reset()  # rows share code objects, and torch gives up on one after eight compilations
    case = _warm(row, options)
    measured = options.meter is not None and not options.quick
    names = [*PATHS, *(case.others if options.torch_compile else ())]
    times: dict[str, dict[str, list[float]]] = {}
    memory_used: dict[str, int] = {}
    errors: dict[str, str] = {}
    agreements: list[Agreement] = []  # of each round
    count = options.repeats or 2
    while len(agreements) < count:
        outcomes: dict[str, Outcome] = {}
        for name in [name for name in names if name not in errors]:
            meter = (
                PeakMeter(device)
                if row.meter_in_round and measured and not agreements and name == REFERENCE
                else None
            )
            _timed(case, name, times, outcomes, errors)
            if meter is not None:
                memory_used[REFERENCE] = meter.extra_bytes()
        agreements.append(_agree(row, case, outcomes, FAST, device))
        # times of a further column that computes something else are not shown
        for name in outcomes.keys() - set(PATHS):
            try:
                _agree(row, case, outcomes, name, device)
            except DisagreementError as error:
                errors[name] = f"disagrees: {error}"
        if len(agreements) == 1 and options.repeats is None:
            taken = sum(values["wall"][0] for values in times.values())
            count = 2 if options.quick else rounds(taken)
    del outcomes
    if options.meter is not None:
        for path in PATHS:
            if path not in memory_used:
                memory_used[path] = options.meter(row, device, path, options.quick)
    differences = {
        entry.name: [getattr(agreement, entry.name) for agreement in agreements]
        for entry in fields(Agreement)
    }
    worst = Agreement(
        **{name: None if None in values else max(values) for name, values in differences.items()}
    )
    record = report.row_record(
        row, device, {name: times[name] for name in PATHS}, worst, memory_used, judged=not options.quick
    )
    if options.torch_compile and len(names) > len(PATHS):
        record["others"] = {n: errors[n] if n in errors else median(times[n]["wall"]) for n in case.others}
        record["others_processor"] = {
            n: median(times[n]["processor"]) for n in case.others if n not in errors
        }
    return record


def _warm(row: Row, options: Options) -> Case:
    """The case, after both paths ran on a tiny one (libraries, threads, compiled ops) and, where that is not
    long, at the real size.
    """
    tiny = row.make(options.device, True)
    for path in PATHS:
        tiny.prepare()
        tiny.call(path)
    if options.quick:
        return tiny
    case = row.make(options.device, False)
    for path in PATHS if row.seconds_on(options.device) < LONG else (FAST,):
        case.prepare()
        torch.manual_seed(0)
        case.call(path)
    return case


def _timed(case: Case, name: str, times: dict, outcomes: dict[str, Outcome], errors: dict[str, str]) -> None:
    """One call of one path, added to `times` and `outcomes`; a further column that cannot run is noted in
    `errors` instead.
    """
    try:
        if name not in PATHS and name not in times:
            case.prepare()
            case.call(name)  # compile outside the clock
        case.prepare()
        torch.manual_seed(0)
        wall, processor = clock(lambda: outcomes.update({name: case.call(name)}))
    # any error of torch.compile is caught; the two paths themselves must not fail
    except Exception as error:  # noqa: BLE001
        if name in PATHS:
            raise
        errors[name] = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )
        times.pop(name, None)
        return
    values = times.setdefault(name, {"wall": [], "processor": []})
    values["wall"].append(wall)
    values["processor"].append(processor)


def clock(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds of one call, on a GPU until the device is done (torch's timer waits); and processor
    seconds of all threads.
    """
    wall = timer()
    processor = time.process_time()
    work()
    return timer() - wall, time.process_time() - processor


def _agree(row: Row, case: Case, outcomes: dict[str, Outcome], name: str, device: str) -> Agreement:
    agreement = (case.compare or compare)(outcomes[name], outcomes[REFERENCE])
    check(agreement, *row.tolerances(device))
    return agreement


def rounds(pair_seconds: float) -> int:
    """Return the number of rounds that keeps a row within its budget: 2 to MOST_ROUNDS."""
    return max(2, min(MOST_ROUNDS, int(BUDGET / max(pair_seconds, 1e-9))))


def main(name: str, size: str, device: str, path: str, threads: str, tiny: str) -> None:
    """The process that measures."""
    from benchmarks.rows import all_rows  # the module of that name, not this one run as __main__

    torch.set_num_threads(int(threads))
    (row,) = (row for row in all_rows() if (row.name, row.size) == (name, size))
    for small in (True, tiny == "1"):
        case = row.make(device, small)
        case.prepare()
        torch.manual_seed(0)
        meter = PeakMeter(device)
        case.call(path)
        used = meter.extra_bytes()
    print(used)


if __name__ == "__main__":
    main(*sys.argv[1:])
