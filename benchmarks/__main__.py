"""Measure the speed of the project against the direct implementation of EG3D.

See `python -m benchmarks --help`.
"""

import functools
from pathlib import Path

import click
import torch

from benchmarks import benchmark_report as report
from benchmarks.rows import all_rows
from benchmarks.session import Options, run, select
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.core.device_option import DeviceChoice

RESULTS = Path(__file__).parent / "results"
_how_option = functools.partial(option, group="How")
_results_option = functools.partial(option, group="Results")
_what_option = functools.partial(option, group="What")


@click.command(
    cls=GroupedCommand,
    job="python -m benchmarks",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 140},
)
@_what_option(
    "--rows",
    "patterns",
    metavar="PATTERN",
    multiple=True,
    show_default="all",
    help=(
        "Measure only the rows whose name contains this text or matches this shell pattern. The option may be"
        " repeated."
    ),
)
@_what_option(
    "--size",
    type=click.Choice(["bundled", "full", "both"]),
    default="both",
    help=(
        "Networks to measure: those of the bundled generator (bundled), those of ffhq512-128 (full), or both."
    ),
)
@_what_option(
    "--list", "list_rows", is_flag=True, help="Print the names of the rows and their targets, and exit."
)
@_how_option(
    "--device", type=DeviceChoice(["cpu", "cuda"]), default="cpu", help="Device on which both paths run."
)
@_how_option(
    "--threads",
    metavar="INT",
    type=click.IntRange(1, 256),
    default=2,
    help="Number of CPU threads. The targets apply to 2 threads.",
)
@_how_option(
    "--repeats",
    metavar="ROUNDS",
    type=click.IntRange(1, 1000),
    show_default="what fits into 15 s, at least 2",
    help="Number of rounds of every row. Both paths run once in each round.",
)
@_how_option(
    "--quick",
    is_flag=True,
    help=(
        "Use tiny inputs and two rounds, which only tests that every row works. Results are written to"
        " quick.json and quick.md."
    ),
)
@_how_option(
    "--memory/--no-memory",
    default=None,
    show_default="on; off with --quick",
    help="Measure the peak memory of each path in a separate process.",
)
@_how_option(
    "--torch-compile",
    is_flag=True,
    help=(
        "In the rows of single ops, also time plain torch, and torch.compile of the reference and of plain"
        " torch."
    ),
)
@_results_option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS,
    show_default="benchmarks/results",
    help="Folder into which latest.json and latest.md are written.",
)
@_results_option(
    "--compare",
    metavar="OLD.json",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help=(
        "File of earlier results. Rows whose ratio has fallen by more than 10 % since then are printed, and"
        " the exit code is 1 if there are any."
    ),
)
def main(
    patterns: tuple[str, ...],
    size: str,
    list_rows: bool,
    device: str,
    threads: int,
    memory: bool | None,
    outdir: Path,
    compare: Path | None,
    **measuring_options,
) -> None:
    """Time every fast path against its direct reference, alternately in one process.

    Writes DIR/latest.json and DIR/latest.md after every row. The exit code is 1 if two paths compute
    different results, or if --compare finds a regression.

    \b
    Example:
        python -m benchmarks --rows=slab --size=bundled --repeats=5
    """
    selected_rows = select(all_rows(), patterns, size)
    if list_rows:
        for row in selected_rows:
            target = (
                "" if row.target is None else f"at least {row.target.at_least:g}x, aim {row.target.aim:g}x"
            )
            click.echo(f"{row.size:8s} {row.name:48s} {target}".rstrip())
        return
    for row in [row for row in selected_rows if row.cpu_only and device != "cpu"]:
        click.echo(f"Left out, because it runs only on a CPU: {row.name}", err=True)
        selected_rows.remove(row)
    choose_device(device)  # raises an error if there is no such device
    torch.set_num_threads(threads)
    old_report = None if compare is None else report.read(compare)  # read before the file may be overwritten
    # By default, the memory is not measured with tiny inputs.
    measure_memory = not measuring_options["quick"] if memory is None else memory
    run_options = Options(
        device=device, out=outdir, **measuring_options, **({} if measure_memory else {"meter": None})
    )
    new_report, failures = run(selected_rows, run_options)
    click.echo(report.markdown(new_report))
    regressions = report.regressions(old_report, new_report) if old_report is not None else []
    for message in regressions:
        click.echo(f"Regression: {message}", err=True)
    for message in failures:
        click.echo(f"Error: {message}", err=True)
    if regressions or failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
