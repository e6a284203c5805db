"""Measure the speed of the project against straightforward EG3D; see `python -m benchmarks --help`."""

import functools
from pathlib import Path

import click
import torch

from benchmarks import benchmark_report as report
from benchmarks.rows import all_rows
from benchmarks.session import Options, run, select
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option

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
    help="Rows whose name contains this, or fits it as a shell pattern. May be given more than once.",
)
@_what_option(
    "--size",
    type=click.Choice(["bundled", "full", "both"]),
    default="both",
    help="The bundled generator, ffhq512-128, or both.",
)
@_what_option("--list", "list_rows", is_flag=True, help="Print the rows and their targets, and stop.")
@_how_option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where both paths run.")
@_how_option(
    "--threads",
    metavar="INT",
    type=click.IntRange(1, 256),
    default=2,
    help="CPU threads; the targets hold for 2.",
)
@_how_option(
    "--repeats",
    metavar="ROUNDS",
    type=click.IntRange(1, 1000),
    show_default="what fits into 15 s, at least 2",
    help="Rounds of every row; both paths run in each.",
)
@_how_option(
    "--quick",
    is_flag=True,
    help="Tiny inputs and two rounds: shows that every row works. Writes quick.json and quick.md.",
)
@_how_option(
    "--memory/--no-memory",
    default=None,
    show_default="on; off with --quick",
    help="Measure the peak memory of each path in a process of its own.",
)
@_how_option(
    "--torch-compile",
    is_flag=True,
    help=(
        "Op rows: time plain torch, torch.compile of the reference and torch.compile of plain torch as well."
    ),
)
@_results_option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS,
    show_default="benchmarks/results",
    help="Folder of latest.json and latest.md.",
)
@_results_option(
    "--compare",
    metavar="OLD.json",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Name the rows whose ratio fell by more than 10 % since then; exit code 1 where there are any.",
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
    **how,
) -> None:
    """Time every fast path against the straightforward one, in turn in one process.

    Writes DIR/latest.json and DIR/latest.md after every row. Exit code 1 where two paths disagree or
    --compare finds a regression.

    \b
    Example:
        python -m benchmarks --rows=slab --size=bundled --repeats=5
    """
    rows = select(all_rows(), patterns, size)
    if list_rows:
        for row in rows:
            target = (
                "" if row.target is None else f"at least {row.target.at_least:g}x, aim {row.target.aim:g}x"
            )
            click.echo(f"{row.size:8s} {row.name:48s} {target}".rstrip())
        return
    choose_device(device)  # an error where there is no such device
    torch.set_num_threads(threads)
    old = None if compare is None else report.read(compare)  # before anything is written over it
    measured = not how["quick"] if memory is None else memory
    options = Options(device=device, out=outdir, **how, **({} if measured else {"meter": None}))
    results, failures = run(rows, options)
    click.echo(report.markdown(results))
    worse = report.regressions(old, results) if old is not None else []
    for line in worse:
        click.echo(f"Regression: {line}", err=True)
    for line in failures:
        click.echo(f"Error: {line}", err=True)
    if worse or failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
