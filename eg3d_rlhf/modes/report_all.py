"""The job `report all`: trains a run and its control if they are missing, and writes four reports on them."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, option, parse_names
from eg3d_rlhf.modes.shared_flags import print_json, shared
from eg3d_rlhf.tuning.gan.settings import DEMO_KIMG
from training.config import number_text

if TYPE_CHECKING:
    from eg3d_rlhf.evaluation.trainings import Part

REPORTS = ("evaluate", "attribute", "embed", "sweep")
RUNS = {"tuned": "10", "control": "0"}  # weight lambda_r of the reward in each run
# Flags of a small sweep, so that all four reports take minutes.
SWEEP = ("--kimg=0.032", "--lambda-r=0,1,10", "--lambda-sigma=0,10", "--n=32", "--set=images=128")


def trainings(job_folder: Path, kimg: float, seed: int) -> "dict[str, Part]":
    """Plan the training of the run and of its control, which differ only in the weight of the reward.

    Args:
        job_folder: folder of the job; the runs lie in its subfolder runs.
        kimg: length of each run in thousands of images.
        seed: training seed of both runs.

    Returns: the trainings by role, "tuned" and "control".
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.evaluation.trainings import Part

    common_flags = ("--snap=1", "--no-summary", f"--kimg={number_text(kimg)}", f"--seed={seed}")
    return {
        role: Part.keyed(
            f"{role}-s{seed}", job_folder / "runs", ["--reward=sigma", f"--lambda-r={weight}", *common_flags]
        )
        for role, weight in RUNS.items()
    }


def report_commands(
    job_folder: Path, run_folders: dict[str, Path], seed: int, report_names: list[str]
) -> dict[str, list[str]]:
    """Return the command lines of the reports by name.

    Args:
        job_folder: folder of the job; each report has a subfolder.
        run_folders: run folders by role.
        seed: training seed of the runs of the sweep.
        report_names: names of the reports to write.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.evaluation.trainings import PACKAGE

    # The tuned run is compared with its control where a report has both flags.
    run_flags = [f"--after={run_folders['tuned']}", f"--control={run_folders['control']}"]
    flags_by_report = {
        "evaluate": [f"--run={run_folders['tuned']}", *run_flags],
        # The attribution has no flag --control, so it gets the first flag only.
        "attribute": run_flags[:1],
        "embed": run_flags,
        "sweep": [*SWEEP, f"--seeds={seed}"],
    }
    return {
        name: [PACKAGE, "report", name, *flags_by_report[name], f"--outdir={job_folder / name}"]
        for name in REPORTS
        if name in report_names
    }


@click.command(cls=GroupedCommand, job="report all")
@shared(
    "outdir dry-run",
    outdir={
        "default": "runs/reports",
        "help": "Folder to write into; it contains both runs and a folder for each report.",
    },
    dry_run="Print the commands as JSON and stop.",
)
@option(
    "--only",
    group="Run",
    metavar="LIST",
    default=",".join(REPORTS),
    help="Names of the reports to write, separated by commas.",
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

    The command first trains the demo run and its control with lambda_r = 0, if they are missing. Then it runs
    `report evaluate`, `report attribute`, `report embed` and a small `report sweep`. Finished trainings and
    reports are not repeated when the command is called again, for example after an interruption.

    \b
    Example:
        eg3d-rlhf report all --dry-run
    """
    # raises ValueError for an unknown name
    report_names = parse_names("--only", only, REPORTS)
    # Imported here, so that --help and errors are printed without loading this module.
    from eg3d_rlhf.evaluation.trainings import call, make_in_terminal

    trainings_by_role = trainings(outdir, kimg, seed)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        # A finished run is not trained again; for another run the command is printed.
        run_states = {
            f"{role} run": "finished" if training.finished() else training.continued()
            for role, training in trainings_by_role.items()
        }
        folder_by_role = {
            role: training.run or training.folder for role, training in trainings_by_role.items()
        }
        print_json({**run_states, **report_commands(outdir, folder_by_role, seed, report_names)})
        return
    # The times of the two trainings are printed as one number.
    start_time = time.time()
    seconds_by_report = dict[str, float]()
    for role, training in trainings_by_role.items():
        # trains the run unless it is finished
        make_in_terminal(f"{role} run", training)
    seconds_by_report["runs"] = time.time() - start_time
    run_folders = {
        role: training.run for role, training in trainings_by_role.items() if training.run is not None
    }
    for name, command in report_commands(outdir, run_folders, seed, report_names).items():
        # each report runs in a process of its own
        seconds_by_report[name] = call(name, command)
    click.echo(
        "\n"
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in seconds_by_report.items())
        + f"; in all {sum(seconds_by_report.values()):.0f} s on {os.cpu_count()} cores"
    )
    for name in report_names:
        click.echo(f"{name:<10} {outdir / name / 'index.html'}")
