"""Write the results of the benchmark as JSON and Markdown, and compare them with older results.

The results contain no host name and no path.
"""

import dataclasses
import json
import os
import platform
import statistics
from pathlib import Path

import numpy
import torch

from benchmarks.rows import FAST, REFERENCE, Agreement, Row
from training.storage import write_atomic

WORSE = 0.9  # a row has regressed if its ratio is below this share of the old ratio
_MB = 1e6
LEGEND = (
    (
        "Seconds: median [least, greatest] over rounds, in each of which both paths ran. Ratio: time of the"
        " reference / time of the fast path; its interval"
    ),
    (
        "is the range of the ratios of single rounds. Errors: largest absolute difference of the outputs;"
        " largest difference of the gradients,"
    ),
    (
        "relative to the largest gradient. Memory: peak beyond the inputs, of each path in a separate process"
        " (of a reference that takes minutes, in its first round)."
    ),
)


def describe_machine(device: str) -> dict[str, str | int | float]:
    """Return the system, the processor, the number of cores, the memory and the GPU of this machine."""
    # Linux lists the model of the processor here; other systems have no such file.
    cpuinfo = Path("/proc/cpuinfo")
    cpuinfo_lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor_names = [
        cpu_line.split(":", 1)[1].strip() for cpu_line in cpuinfo_lines if cpu_line.startswith("model name")
    ]
    description: dict[str, str | int | float] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor_names[0] if processor_names else platform.processor() or "unknown",
        "cores": os.cpu_count() or 1,
    }
    # Not all systems can state the size of the memory.
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        description["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if device == "cuda":
        description["gpu"] = torch.cuda.get_device_name()
    return description


def compiled_ops(device: str) -> dict[str, bool]:
    """Return for every op with source code for the device whether its compiled form is available.

    If it is not available, the fast path is plain torch.
    """
    from torch_utils import build  # imported here, since reading results needs no compiler

    return {op: build.available(op, device) for op in build.ops(device)}


def new_report(device: str, quick: bool) -> dict:
    """Return the record of a benchmark, in which the list of rows is still empty."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    versions |= {"cuda": str(torch.version.cuda)} if device == "cuda" else {}
    return {
        "machine": describe_machine(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "compiled_ops": compiled_ops(device),
        "quick": quick,
        "rows": [],
    }


def ratio(reference_times: list[float], fast_times: list[float]) -> float:
    """Return the speed-up: median time of the reference over median time of the fast path."""
    return statistics.median(reference_times) / statistics.median(fast_times)


def row_record(
    row: Row,
    device: str,
    times: dict[str, dict[str, list[float]]],
    agreement: Agreement,
    memory: dict[str, int],
    applies_target: bool,
) -> dict:
    """Return the record of a row as JSON values.

    Args:
        row: the row.
        device: device on which it was measured.
        times: path -> {"wall": seconds of each round, "processor": processor seconds of each round}.
        agreement: differences between the results of both paths.
        memory: path -> peak memory beyond the inputs, bytes; empty if it was not measured.
        applies_target: False for tiny inputs, to which the row's target does not apply.
    """
    wall_times = {path: path_times["wall"] for path, path_times in times.items()}
    # Both paths run in each round, so there is a ratio for each round.
    ratios = [
        reference_time / fast_time
        for reference_time, fast_time in zip(wall_times[REFERENCE], wall_times[FAST], strict=True)
    ]
    values_by_key = {
        "name": row.name,
        "size": row.size,
        "device": device,
        "repeats": len(wall_times[FAST]),
        "ratio": ratio(wall_times[REFERENCE], wall_times[FAST]),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "processor_ratio": (
            ratio(times[REFERENCE]["processor"], times[FAST]["processor"]) if device == "cpu" else None
        ),
    }
    for path, path_times in wall_times.items():
        values_by_key |= {
            f"{path}_s": statistics.median(path_times),
            f"{path}_min_s": min(path_times),
            f"{path}_max_s": max(path_times),
        }
        values_by_key |= {
            f"{path}_all_s": path_times,
            f"{path}_processor_s": statistics.median(times[path]["processor"]),
        }
    values_by_key |= dataclasses.asdict(agreement)
    memory_mb = {path: memory[path] / _MB if path in memory else None for path in (FAST, REFERENCE)}
    values_by_key |= {"extra_memory_mb": memory_mb[FAST], "reference_extra_memory_mb": memory_mb[REFERENCE]}
    target = row.target if device == "cpu" else None  # the targets were set for CPUs
    values_by_key["target"] = None if target is None else {"at_least": target.at_least, "aim": target.aim}
    if target is not None and target.memory_mb_below is not None:
        values_by_key["target"]["extra_memory_mb_below"] = target.memory_mb_below
    # None: the row has no target, or its inputs are tiny.
    values_by_key["met"] = (
        target.met(values_by_key["ratio"], memory_mb[FAST]) if target is not None and applies_target else None
    )
    return values_by_key


def key(row_record: dict) -> tuple[str, str, str]:
    """Return name, size and device of a row's record, which identify the row."""
    return row_record["name"], row_record["size"], row_record["device"]


def read(path: Path) -> dict:
    """Read a file of results. Raises: ValueError if the file has other content."""
    try:
        report = json.loads(Path(path).read_text())
        for row_record in report["rows"]:
            key(row_record), row_record["ratio"]  # raises KeyError if an entry is missing
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold results of `python -m benchmarks` ({type(error).__name__}). Pass a .json"
            " file that the benchmark has written."
        ) from error
    return report


def write(folder: Path, stem: str, report: dict) -> None:
    """Write a report to <folder>/<stem>.json and <folder>/<stem>.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(
        folder / f"{stem}.json", (json.dumps(report, indent=1, allow_nan=False, default=str) + "\n").encode()
    )
    write_atomic(folder / f"{stem}.md", markdown(report).encode())


def regressions(old_report: dict, new_report: dict) -> list[str]:
    """List the rows whose ratio is more than 10 % below the ratio in the old results, one text for each."""
    old_ratios = {key(row_record): row_record["ratio"] for row_record in old_report["rows"]}
    return [
        f"{row_record['name']} ({row_record['size']}, {row_record['device']}):"
        f" {old_ratios[key(row_record)]:.2f}x before, {row_record['ratio']:.2f}x now"
        for row_record in new_report["rows"]
        if key(row_record) in old_ratios and row_record["ratio"] < WORSE * old_ratios[key(row_record)]
    ]


def markdown(report: dict) -> str:
    """Return a report as Markdown: a line on the machine, the table, and its legend."""
    machine_info = report["machine"]
    thread_count = report["threads"]
    machine_text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine_info.items())
    markdown_lines = [
        "# Benchmark",
        "",
        f"{machine_text}; {thread_count} threads; "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "",
    ]
    missing_ops = [op for op, is_compiled in report["compiled_ops"].items() if not is_compiled]
    if missing_ops:
        markdown_lines += [f"Not compiled here, so plain torch: {', '.join(missing_ops)}.", ""]
    if report["quick"]:
        markdown_lines += [
            "Quick run on tiny inputs: it tests that every row works, but does not measure speed.",
            "",
        ]
    other_columns = sorted({name for row_record in report["rows"] for name in row_record.get("others", {})})
    column_titles = [
        "row",
        "size",
        "device",
        "reference s",
        "fast s",
        "ratio",
        "interval",
        "error",
        "gradient error",
        "extra MB (reference)",
    ]
    column_titles += ["at least / aim", "met", *(f"{name} s" for name in other_columns)]
    markdown_lines += [
        "| " + " | ".join(column_titles) + " |",
        "| " + " | ".join(["---"] * len(column_titles)) + " |",
    ]
    markdown_lines += [
        "| " + " | ".join(_cells(row_record, other_columns)) + " |" for row_record in report["rows"]
    ]
    return "\n".join([*markdown_lines, "", *LEGEND, ""])


def _cells(row_record: dict, other_columns: list[str]) -> list[str]:
    """Return the cells of a row of the table.

    Args:
        row_record: record of the row.
        other_columns: names of the further columns. Their cell is the median of the seconds, "failed" if the
            measurement failed, or empty if the row has no such measurement.
    """

    def seconds_text(path: str) -> str:
        return (
            f"{row_record[f'{path}_s']:.3g} [{row_record[f'{path}_min_s']:.3g},"
            f" {row_record[f'{path}_max_s']:.3g}]"
        )

    def number_text(column_value: float | None, number_format: str) -> str:
        return "" if column_value is None else format(column_value, number_format)

    target = row_record["target"]
    memory_text = (
        number_text(row_record["extra_memory_mb"], ".0f")
        + f" ({number_text(row_record['reference_extra_memory_mb'], '.0f')})"
    )
    # The value of a further column is the median of its seconds, or an error message.
    other_cells = []
    for column_name in other_columns:
        column_value = row_record.get("others", {}).get(column_name, "")
        if isinstance(column_value, float):
            other_cells.append(f"{column_value:.3g}")
        else:
            other_cells.append("failed" if column_value else "")
    return [
        row_record["name"],
        row_record["size"],
        row_record["device"],
        seconds_text(REFERENCE),
        seconds_text(FAST),
        f"{row_record['ratio']:.2f}",
        f"{row_record['ratio_low']:.2f} to {row_record['ratio_high']:.2f}",
        number_text(row_record["max_abs_error"], ".1e"),
        number_text(row_record["gradient_error"], ".1e"),
        "" if row_record["extra_memory_mb"] is None else memory_text,
        "" if target is None else f"{target['at_least']:g} / {target['aim']:g}",
        {True: "yes", False: "no", None: ""}[row_record["met"]],
        *other_cells,
    ]
