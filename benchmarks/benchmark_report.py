"""Results as JSON and Markdown, and their comparison with older ones.
Nothing in them names a host or a path.
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

WORSE = 0.9  # of the old ratio: below, a row has regressed
_MB = 1e6
LEGEND = (
    (
        "Seconds: median [least, most] of rounds in which both paths ran in turn. Interval of the ratio: the"
        " extremes of"
    ),
    "the rounds' own ratios. Errors: largest absolute of the outputs; of gradients, relative",
    (
        "to the largest. Memory: peak beyond the inputs, each path in a process of its own (references of"
        " minutes in their first round)."
    ),
)


def machine(device: str) -> dict[str, str | int | float]:
    """The machine in words."""
    cpuinfo = Path("/proc/cpuinfo")  # the processor's model, from the kernel where that says so
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    info: dict[str, str | int | float] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": models[0] if models else platform.processor() or "unknown",
        "cores": os.cpu_count() or 1,
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        info["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    if device == "cuda":
        info["gpu"] = torch.cuda.get_device_name()
    return info


def compiled_ops(device: str) -> dict[str, bool]:
    """For every op that has a source for the device, whether its compiled form could be had: without it the
    fast path is plain torch.
    """
    from torch_utils import build  # here: reading a report needs no compiler

    return {op: build.available(op, device) for op in build.ops(device)}


def header(device: str, quick: bool) -> dict:
    """The record without its rows."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    versions |= {"cuda": str(torch.version.cuda)} if device == "cuda" else {}
    return {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "compiled_ops": compiled_ops(device),
        "quick": quick,
        "rows": [],
    }


def ratio(reference: list[float], fast: list[float]) -> float:
    """Return the speed-up: median time of the reference over median time of the fast path."""
    return statistics.median(reference) / statistics.median(fast)


def row_record(
    row: Row,
    device: str,
    times: dict[str, dict[str, list[float]]],
    agreement: Agreement,
    memory: dict[str, int],
    judged: bool,
) -> dict:
    """One row.

    Args:
        times: path -> {"wall": seconds of each round, "processor": the same of all threads together}.
        memory: path -> extra bytes; empty where not measured.
        judged: whether the target applies (not for tiny inputs).
    """
    walls = {path: values["wall"] for path, values in times.items()}
    # of rounds: both ran in the same
    ratios = [reference / fast for reference, fast in zip(walls[REFERENCE], walls[FAST], strict=True)]
    record = {
        "name": row.name,
        "size": row.size,
        "device": device,
        "repeats": len(walls[FAST]),
        "ratio": ratio(walls[REFERENCE], walls[FAST]),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "processor_ratio": (
            ratio(times[REFERENCE]["processor"], times[FAST]["processor"]) if device == "cpu" else None
        ),
    }
    for path, values in walls.items():
        record |= {
            f"{path}_s": statistics.median(values),
            f"{path}_min_s": min(values),
            f"{path}_max_s": max(values),
        }
        record |= {
            f"{path}_all_s": values,
            f"{path}_processor_s": statistics.median(times[path]["processor"]),
        }
    record |= dataclasses.asdict(agreement)
    megabytes = {path: memory[path] / _MB if path in memory else None for path in (FAST, REFERENCE)}
    record |= {"extra_memory_mb": megabytes[FAST], "reference_extra_memory_mb": megabytes[REFERENCE]}
    target = row.target if device == "cpu" else None  # they were set for CPUs
    record["target"] = None if target is None else {"at_least": target.at_least, "aim": target.aim}
    if target is not None and target.memory_mb_below is not None:
        record["target"]["extra_memory_mb_below"] = target.memory_mb_below
    record["met"] = target.met(record["ratio"], megabytes[FAST]) if target is not None and judged else None
    return record


def key(record: dict) -> tuple[str, str, str]:
    """Return the key of a row of a file: name, size and device."""
    return record["name"], record["size"], record["device"]


def read(path: Path) -> dict:
    """A file of results. Raises: ValueError for a file that is none."""
    try:
        report = json.loads(Path(path).read_text())
        for record in report["rows"]:
            key(record), record["ratio"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected results of `python -m benchmarks`, got another file ({type(error).__name__})."
        ) from error
    return report


def write(folder: Path, stem: str, report: dict) -> None:
    """FOLDER/STEM.json and FOLDER/STEM.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(
        folder / f"{stem}.json", (json.dumps(report, indent=1, allow_nan=False, default=str) + "\n").encode()
    )
    write_atomic(folder / f"{stem}.md", markdown(report).encode())


def regressions(old: dict, new: dict) -> list[str]:
    """One line for every row whose ratio is over 10 % below that of the old results."""
    before = {key(record): record["ratio"] for record in old["rows"]}
    return [
        f"{record['name']} ({record['size']}, {record['device']}): {before[key(record)]:.2f}x before,"
        f" {record['ratio']:.2f}x now"
        for record in new["rows"]
        if key(record) in before and record["ratio"] < WORSE * before[key(record)]
    ]


def markdown(report: dict) -> str:
    """The table, under a line on the machine."""
    about = report["machine"]
    threads = report["threads"]
    where = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items())
    lines = [
        "# Benchmark",
        "",
        f"{where}; {threads} threads; " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".",
        "",
    ]
    missing = [op for op, there in report["compiled_ops"].items() if not there]
    if missing:
        lines += [f"Not compiled here, so plain torch: {', '.join(missing)}.", ""]
    if report["quick"]:
        lines += ["Quick run on tiny inputs: it shows that everything works, not how fast it is.", ""]
    others = sorted({name for record in report["rows"] for name in record.get("others", {})})
    titles = [
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
    titles += ["at least / aim", "met", *(f"{name} s" for name in others)]
    lines += ["| " + " | ".join(titles) + " |", "| " + " | ".join(["---"] * len(titles)) + " |"]
    lines += ["| " + " | ".join(_cells(record, others)) + " |" for record in report["rows"]]
    return "\n".join([*lines, "", *LEGEND, ""])


def _cells(record: dict, others: list[str]) -> list[str]:
    """A row's cells: of `others`, the further columns, the medians, or that one could not run."""

    def spread(path: str) -> str:
        return f"{record[f'{path}_s']:.3g} [{record[f'{path}_min_s']:.3g}, {record[f'{path}_max_s']:.3g}]"

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    target = record["target"]
    memory = (
        number(record["extra_memory_mb"], ".0f") + f" ({number(record['reference_extra_memory_mb'], '.0f')})"
    )
    return [
        record["name"],
        record["size"],
        record["device"],
        spread(REFERENCE),
        spread(FAST),
        f"{record['ratio']:.2f}",
        f"{record['ratio_low']:.2f} to {record['ratio_high']:.2f}",
        number(record["max_abs_error"], ".1e"),
        number(record["gradient_error"], ".1e"),
        "" if record["extra_memory_mb"] is None else memory,
        "" if target is None else f"{target['at_least']:g} / {target['aim']:g}",
        {True: "yes", False: "no", None: ""}[record["met"]],
        *(
            (
                f"{value:.3g}"
                if isinstance(value := record.get("others", {}).get(name, ""), float)
                else value and "failed"
            )
            for name in others
        ),
    ]
