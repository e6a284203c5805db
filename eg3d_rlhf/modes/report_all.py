"""The job `report all`: trains one run and its control where they are missing, and writes four reports."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, option, some_of
from eg3d_rlhf.modes.shared_flags import print_json, shared
from eg3d_rlhf.tuning.gan.settings import DEMO_KIMG

if TYPE_CHECKING:
    from eg3d_rlhf.evaluation.trainings import Part

REPORTS = ("evaluate", "attribute", "embed", "sweep")
RUNS = {"tuned": "10", "control": "0"}  # lambda_r of each run
# a small sweep, so that the whole job takes minutes
SWEEP = ("--kimg=0.032", "--lambda-r=0,1,10", "--lambda-sigma=0,10", "--n=32", "--set=images=128")


def trainings(out: Path, kimg: float, seed: int) -> "dict[str, Part]":
    """Plan the run and its control, which differ in lambda_r alone."""
    from eg3d_rlhf.evaluation.trainings import Part

    shared = ("--snap=1", "--no-summary", f"--kimg={kimg:g}", f"--seed={seed}")
    return {
        role: Part.keyed(f"{role}-s{seed}", out / "runs", ["--reward=sigma", f"--lambda-r={weight}", *shared])
        for role, weight in RUNS.items()
    }


def report_commands(out: Path, runs: dict[str, Path], seed: int, only: list[str]) -> dict[str, list[str]]:
    """Return the command lines of the reports by name."""
    from eg3d_rlhf.evaluation.trainings import DOOR

    # attribution needs no control
    pair = [f"--after={runs['tuned']}", f"--control={runs['control']}"]
    flags = {
        "evaluate": [f"--run={runs['tuned']}", *pair],
        "attribute": pair[:1],
        "embed": pair,
        "sweep": [*SWEEP, f"--seeds={seed}"],
    }
    return {
        name: [DOOR, "report", name, *flags[name], f"--outdir={out / name}"]
        for name in REPORTS
        if name in only
    }


@click.command(cls=GroupedCommand, job="report all")
@shared(
    "outdir dry-run",
    outdir={
        "default": "runs/reports",
        "help": "Folder to write; it contains both runs and a folder for each report.",
    },
    dry_run="Print the commands as JSON and stop.",
)
@option(
    "--only",
    group="Run",
    metavar="LIST",
    default=",".join(REPORTS),
    help="Reports to write, comma-separated.",
)
@option(
    "--kimg",
    group="Run",
    metavar="KIMG",
    type=click.FloatRange(min=0, min_open=True),
    default=DEMO_KIMG,
    help="Length of both runs in thousands of images.",
)
@option(
    "--seed",
    group="Run",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    help="Training seed of both runs.",
)
def report_all(outdir: Path, only: str, kimg: float, seed: int, dry_run: bool) -> None:
    """Write all four reports on a tuning run with one command (also `make reports`).

    Trains the demo run and its control with lambda_r = 0, with a snapshot at every tick, where they are
    missing. Then runs `report evaluate`, `attribute`, `embed` and a small `sweep`. Each keeps its results,
    so a second call, or a call after an interruption, continues from there.

    \b
    Example:
        eg3d-rlhf report all --dry-run
    """
    from eg3d_rlhf.evaluation.trainings import call, make_in_terminal

    # raises ValueError for an unknown report
    chosen = some_of("--only", only, REPORTS)
    parts = trainings(outdir, kimg, seed)
    if dry_run:
        planned = {
            f"{role} run": "finished" if part.finished() else part.continued() for role, part in parts.items()
        }
        folders = {role: part.run or part.folder for role, part in parts.items()}
        print_json({**planned, **report_commands(outdir, folders, seed, chosen)})
        return
    # both runs count as one entry of the summary
    started = time.time()
    times = dict[str, float]()
    for role, part in parts.items():
        make_in_terminal(f"{role} run", part)
    times["runs"] = time.time() - started
    runs = {role: part.run for role, part in parts.items() if part.run is not None}
    for name, command in report_commands(outdir, runs, seed, chosen).items():
        times[name] = call(name, command)
    click.echo(
        "\n"
        + ", ".join(f"{name} {spent:.0f} s" for name, spent in times.items())
        + f"; in all {sum(times.values()):.0f} s on {os.cpu_count()} cores"
    )
    for name in chosen:
        click.echo(f"{name:<10} {outdir / name / 'index.html'}")
