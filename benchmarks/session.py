"""Measure rows one after the other, and write the results after each of them.

For each row, both paths are warmed up, timed alternately in several rounds, and their results and peak memory
are compared. The memory of a path is measured in a separate process, which is started as

    python -m benchmarks.session NAME SIZE DEVICE PATH THREADS TINY

and prints the peak memory in bytes.
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
from eg3d_rlhf.experiments.process import peak_bytes
from training.progress import tqdm

LONG = 3.0  # a reference that takes longer, in seconds, is warmed up only with tiny inputs
MAX_ROUNDS = 11  # largest number of rounds, if --repeats is not given
BUDGET = 15.0  # seconds for all rounds of a row, if --repeats is not given
Meter = Callable[[Row, str, str, bool], int]  # (row, device, path, tiny) -> bytes


# Peak memory that one path needs in addition to its inputs, measured in a separate process.

REPO = Path(__file__).resolve().parents[1]


class PeakMeter:
    """Meter of the peak memory since its creation: resident memory on a CPU, allocated memory on a GPU."""

    def __init__(self, device: str):
        self._device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        # Writing 5 resets the peak of the resident memory. Some containers do not allow it; the peak is then
        # measured since the start of the process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = resident_bytes("VmRSS")

    def extra_bytes(self) -> int:
        """Return by how many bytes the peak exceeds the memory at the creation of the meter, at least 1."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            return max(torch.cuda.max_memory_allocated() - self._before, 1)
        return max(resident_bytes("VmHWM") - self._before, 1)


def resident_bytes(field_name: str) -> int:
    """Return the resident memory of this process in bytes.

    Args: field_name: "VmRSS" for the current memory, "VmHWM" for its peak. Without /proc (not Linux) the peak
        is returned in both cases.
    """
    status_file = Path("/proc/self/status")
    if status_file.exists():
        for status_line in status_file.read_text().splitlines():
            if status_line.startswith(field_name + ":"):
                return int(status_line.split()[1]) * 1024  # /proc states kilobytes
    import resource  # imported here, since Windows does not have it

    return peak_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def extra_bytes_in_subprocess(row: Row, device: str, path: str, tiny: bool) -> int:
    """Return the peak memory of one call of a path, measured in a new process after a tiny warm-up.

    Raises: RuntimeError with the output of the process on stderr if the process fails.
    """
    arguments = [row.name, row.size, device, path, str(torch.get_num_threads()), str(int(tiny))]
    completed = subprocess.run(
        [sys.executable, "-m", "benchmarks.session", *arguments], cwd=REPO, capture_output=True, text=True
    )
    if completed.returncode:
        raise RuntimeError(
            f"{row.name}: the memory measurement of the {path} path failed:\n{completed.stderr}"
        )
    return int(completed.stdout.split()[-1])


# Rounds and results


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a benchmark run."""

    device: str = "cpu"
    quick: bool = False  # True: tiny inputs and two rounds
    repeats: int | None = None  # number of rounds of every row; None: as many as fit into BUDGET, at least 2
    torch_compile: bool = False  # True: the rows of single ops have further columns
    out: Path = Path("benchmarks/results")  # folder of the results
    meter: Meter | None = extra_bytes_in_subprocess  # measures the memory; None: memory is not measured

    @property
    def stem(self) -> str:
        """Return the stem of the files' names, which differs for quick runs, so that they replace nothing."""
        return "quick" if self.quick else "latest"


def run(rows: Sequence[Row], run_options: Options) -> tuple[dict, list[str]]:
    """Measure all rows, and write the report after each of them.

    Returns: the report, and a text for each row whose paths compute different results.
    """
    failures = []  # texts on rows whose paths disagree
    benchmark_results = report.new_report(run_options.device, run_options.quick)
    with tqdm(total=len(rows)) as progress_bar:
        for row_index, row in enumerate(rows):
            row_text = f"{row.name} ({row.size}, {run_options.device})"
            progress_bar.set_description_str(row_text)
            try:
                # The report is written after each row, so that an interrupted benchmark keeps its results.
                benchmark_results["rows"].append(run_row(row, run_options))
                report.write(run_options.out, run_options.stem, benchmark_results)
                outcome_text = f"{benchmark_results['rows'][-1]['ratio']:.2f}x"
            except DisagreementError as error:
                failures.append(f"{row_text}: the paths disagree: {error}")
                outcome_text = "DISAGREES"
            progress_bar.write(f"[{row_index + 1}/{len(rows)}] {row_text}: {outcome_text}", file=sys.stderr)
            progress_bar.update()
    report.write(run_options.out, run_options.stem, benchmark_results)
    return benchmark_results, failures


def select(rows: Sequence[Row], patterns: Sequence[str], size_name: str) -> list[Row]:
    """Select rows by size and name.

    Args:
        rows: all rows.
        patterns: full names of rows, parts of names, or shell patterns; without any, all names are selected.
            A full name selects only this row, even if it is also a part of other names.
        size_name: "full", "bundled" or "both".

    Raises: ValueError if a pattern matches no row.
    """
    rows_of_size = [row for row in rows if size_name in ("both", row.size)]
    row_names = {row.name.lower() for row in rows_of_size}

    def matches(row: Row, pattern: str) -> bool:
        # A full name of a row matches this row alone.
        row_name = row.name.lower()
        pattern = pattern.lower()
        return (
            row_name == pattern
            if pattern in row_names
            else pattern in row_name or fnmatch.fnmatchcase(row_name, pattern)
        )

    for pattern in patterns:
        if not any(matches(row, pattern) for row in rows_of_size):
            raise ValueError(
                f"--rows: no row of --size={size_name} has a name that contains or matches {pattern!r}. Run"
                " with --list to print the names."
            )
    return [row for row in rows_of_size if not patterns or any(matches(row, pattern) for pattern in patterns)]


def run_row(row: Row, run_options: Options) -> dict:
    """Measure a row, and return its record.

    Raises: DisagreementError if the two paths compute different results.
    """
    device = run_options.device
    if run_options.torch_compile:
        # Rows share code objects, and torch stops compiling a code object after eight compilations.
        torch.compiler.reset()
    case = _warm(row, run_options)
    measure_memory = run_options.meter is not None and not run_options.quick
    path_names = [
        *PATHS,
        *(case.others if run_options.torch_compile else ()),
    ]  # the two paths, and further columns
    times_by_path: dict[str, dict[str, list[float]]] = {}
    memory_used: dict[str, int] = {}
    errors_by_path: dict[str, str] = {}
    agreements: list[Agreement] = []  # differences in each round
    round_count = run_options.repeats or 2  # until the first round has shown how long it takes
    while len(agreements) < round_count:
        outcomes_by_path: dict[str, Outcome] = {}
        for name in [name for name in path_names if name not in errors_by_path]:
            memory_meter = (
                PeakMeter(device)
                if row.meter_in_round and measure_memory and not agreements and name == REFERENCE
                else None
            )
            _time_call(case, name, times_by_path, outcomes_by_path, errors_by_path)
            if memory_meter is not None:
                memory_used[REFERENCE] = memory_meter.extra_bytes()
        agreements.append(_check_agreement(row, case, outcomes_by_path, FAST, device))
        # If a further column computes something else, its times are not shown.
        for name in outcomes_by_path.keys() - set(PATHS):
            try:
                _check_agreement(row, case, outcomes_by_path, name, device)
            except DisagreementError as error:
                errors_by_path[name] = f"disagrees: {error}"
        if len(agreements) == 1 and run_options.repeats is None:
            first_round_seconds = sum(
                measured_values["wall"][0] for measured_values in times_by_path.values()
            )
            round_count = 2 if run_options.quick else round_count_within_budget(first_round_seconds)
    del outcomes_by_path
    if run_options.meter is not None:
        for path in PATHS:
            if path not in memory_used:
                memory_used[path] = run_options.meter(row, device, path, run_options.quick)
    differences_by_field = {
        agreement_field.name: [getattr(agreement, agreement_field.name) for agreement in agreements]
        for agreement_field in fields(Agreement)
    }
    largest_differences = Agreement(
        **{
            name: None if None in measured_values else max(measured_values)
            for name, measured_values in differences_by_field.items()
        }
    )
    row_record = report.row_record(
        row,
        device,
        {name: times_by_path[name] for name in PATHS},
        largest_differences,
        memory_used,
        applies_target=not run_options.quick,
    )
    if run_options.torch_compile and len(path_names) > len(PATHS):
        row_record["others"] = {
            name: errors_by_path[name] if name in errors_by_path else median(times_by_path[name]["wall"])
            for name in case.others
        }
        row_record["others_processor"] = {
            name: median(times_by_path[name]["processor"])
            for name in case.others
            if name not in errors_by_path
        }
    return row_record


def _warm(row: Row, run_options: Options) -> Case:
    """Return the case of a row after a warm-up.

    Both paths are called with tiny inputs, which loads libraries, starts threads and compiles ops. Then they
    are called with the real inputs, except for a reference that takes too long. In a quick run, the tiny case
    is returned.
    """
    tiny_case = row.make(run_options.device, True)  # tiny inputs
    for path in PATHS:
        tiny_case.prepare()
        tiny_case.call(path)
    if run_options.quick:
        return tiny_case
    case = row.make(run_options.device, False)  # real inputs
    for path in PATHS if row.seconds_on(run_options.device) < LONG else (FAST,):
        case.prepare()
        torch.manual_seed(0)
        case.call(path)
    return case


def _time_call(
    case: Case,
    path_name: str,
    times_by_path: dict,
    outcomes_by_path: dict[str, Outcome],
    errors_by_path: dict[str, str],
) -> None:
    """Call a path once, and add its times to `times_by_path` and its results to `outcomes_by_path`.

    If a further column fails, its error is added to `errors_by_path` instead.

    Args:
        case: case of the row.
        path_name: "reference", "fast", or the name of a further column.
        times_by_path: {"wall": seconds of each call, "processor": processor seconds of each call} by path.
        outcomes_by_path: outcome of each path in this round.
        errors_by_path: error of each further column that failed.
    """
    try:
        if path_name not in PATHS and path_name not in times_by_path:
            case.prepare()
            case.call(path_name)  # compiles before the time is measured
        case.prepare()
        torch.manual_seed(0)
        wall_seconds, processor_seconds = measure_seconds(
            lambda: outcomes_by_path.update({path_name: case.call(path_name)})
        )
    # torch.compile may raise any error, which concerns only its own column. Errors of the paths are raised.
    except Exception as error:  # noqa: BLE001
        if path_name in PATHS:
            raise
        errors_by_path[path_name] = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )
        times_by_path.pop(path_name, None)
        return
    path_times = times_by_path.setdefault(path_name, {"wall": [], "processor": []})
    path_times["wall"].append(wall_seconds)
    path_times["processor"].append(processor_seconds)


def measure_seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Measure one call of a function.

    Returns: wall-clock seconds, and processor seconds of all threads. On a GPU the wall-clock time ends when
        the device has finished.
    """
    wall_start = timer()  # torch's timer waits for the GPU
    processor_start = time.process_time()
    function()
    return timer() - wall_start, time.process_time() - processor_start


def _check_agreement(
    row: Row, case: Case, outcomes_by_path: dict[str, Outcome], path_name: str, device: str
) -> Agreement:
    """Compare the outcome of a path with the outcome of the reference.

    Args:
        row: the row, which has the tolerances.
        case: the row's case, which may have its own function of comparison.
        outcomes_by_path: outcome of each path in this round.
        path_name: "fast", or the name of a further column.
        device: device on which the outcomes were computed.

    Returns: the differences between the two outcomes.

    Raises: DisagreementError if the differences exceed the row's tolerances.
    """
    agreement = (case.compare or compare)(outcomes_by_path[path_name], outcomes_by_path[REFERENCE])
    check(agreement, *row.tolerances(device))
    return agreement


def round_count_within_budget(round_seconds: float) -> int:
    """Return the number of rounds that fit into the budget of a row, from 2 to MAX_ROUNDS.

    Args: round_seconds: seconds of one round of both paths.
    """
    return max(2, min(MAX_ROUNDS, int(BUDGET / max(round_seconds, 1e-9))))


def main(row_name: str, size_name: str, device: str, path: str, thread_count: str, tiny_text: str) -> None:
    """Print the peak memory of one path. This function runs in a separate process.

    Args:
        row_name: name of the row.
        size_name: size of the row.
        device: device on which the path runs.
        path: "fast" or "reference".
        thread_count: number of threads.
        tiny_text: "1" for tiny inputs, else "0".
    """
    # Imported here, since only this process needs the rows.
    from benchmarks.rows import all_rows

    torch.set_num_threads(int(thread_count))
    (row,) = (row for row in all_rows() if (row.name, row.size) == (row_name, size_name))
    # The first call, with tiny inputs, is the warm-up; only the second measurement is printed.
    for is_tiny in (True, tiny_text == "1"):
        case = row.make(device, is_tiny)
        case.prepare()
        torch.manual_seed(0)
        meter = PeakMeter(device)
        case.call(path)
        memory_used = meter.extra_bytes()
    print(memory_used)


if __name__ == "__main__":
    main(*sys.argv[1:])
