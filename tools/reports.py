"""Every evidence report of one tuning run, with one command: `make reports`.

Trains the demo run and its lambda_r = 0 control with a snapshot at every tick where they are missing, then calls evaluate.py,
attribute.py, embed.py and a small sweep.py. Each of them keeps what it has computed: a second call, or one after an interrupt, goes on
from there.

\b
Example:
    python tools/reports.py --dry-run
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import _repository  # noqa: F401
import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, file_hash, option
from eg3d_rlhf.evaluation.comparison import settings_of, snapshots
from eg3d_rlhf.tuning.gan.settings import PRESETS, REWARDED
from training import checkpoint

REPO = Path(__file__).resolve().parents[1]
REPORTS = ("evaluate", "attribute", "embed", "sweep")
RUNS = {"tuned": "10", "control": "0"}  # lambda_r
SWEEP = ("--kimg=0.032", "--lambda-r=0,1,10", "--lambda-sigma=0,10", "--n=32", "--images=128")


def last_run(folder: Path, kimg: float) -> tuple[Path | None, bool]:
    """The newest run in a folder that used the bundled networks as they are now, and whether it has reached its length."""
    hashes = {"init": file_hash(bundled.GENERATOR), "reward": file_hash(bundled.REWARD)}
    for run in sorted(folder.glob("[0-9]*-*"), reverse=True):
        used = settings_of(run).get("hashes", {})
        if all(used.get(name) == digest for name, digest in hashes.items()) and settings_of(run).get("kimg") == kimg:
            reached = max((round(1000 * at) for at, _ in snapshots(run)), default=0)
            return run, reached >= round(1000 * kimg)
    return None, False


def training_command(runs: Path, role: str, kimg: float, seed: int) -> list[str] | None:
    """What trains a run, or goes on with it; None where it is finished."""
    folder = runs / f"{role}-s{seed}"
    run, done = last_run(folder, kimg)
    if done:
        return None
    if run is not None and checkpoint.available(run):
        return ["train.py", f"--resume={run}"]
    return ["train.py", "--reward=sigma", f"--lambda-r={RUNS[role]}", "--snap=1", "--no-summary", f"--kimg={kimg:g}", f"--seed={seed}",
            f"--outdir={folder}"]


def report_commands(out: Path, runs: dict[str, Path], seed: int, only: list[str]) -> dict[str, list[str]]:
    """The command line of each report."""
    pair = [f"--after={runs['tuned']}", f"--control={runs['control']}"]
    flags = {"evaluate": [f"--run={runs['tuned']}", *pair], "attribute": pair[:1], "embed": pair, "sweep": [*SWEEP, f"--seeds={seed}"]}
    return {name: [f"tools/{name}.py", *flags[name], f"--out={out / name}"] for name in REPORTS if name in only}


def run(name: str, command: list[str]) -> float:
    """Call one of our scripts; returns its seconds. Raises: ValueError where it failed."""
    click.echo(f"\n== {name}: python {shlex.join(command)}", err=True)
    started = time.time()
    done = subprocess.run([sys.executable, str(REPO / command[0]), *command[1:]])
    if done.returncode:
        raise ValueError(f"{name}: expected status 0, got {done.returncode}. Its message stands above; the same command goes on.")
    return time.time() - started


@click.command(cls=GroupedCommand, help=__doc__)
@option("--out", group="Run", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/reports"),
        help="Folder to write; holds both runs and a folder for each report.")
@option("--only", group="Run", metavar="LIST", default=",".join(REPORTS), help="Reports to make.")
@option("--kimg", group="Run", metavar="KIMG", type=click.FloatRange(min=0, min_open=True),
        default=PRESETS["heads64", REWARDED]["kimg"], help="Length of both runs; the demo's unless given.")
@option("--seed", group="Run", metavar="INT", type=click.IntRange(min=0), default=0, help="Training seed.")
@option("-n", "--dry-run", group="Run", is_flag=True, help="Print the commands as JSON and stop.")
def main(out, only, kimg, seed, dry_run) -> None:
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    if not chosen or set(chosen) - set(REPORTS):
        raise ValueError(f"--only: expected some of {', '.join(REPORTS)}, got {only!r}. Correct the list.")
    runs = out / "runs"
    if dry_run:
        planned = {f"{role} run": training_command(runs, role, kimg, seed) or "finished" for role in RUNS}
        folders = {role: last_run(runs / f"{role}-s{seed}", kimg)[0] or runs / f"{role}-s{seed}" for role in RUNS}
        click.echo(json.dumps({**planned, **report_commands(out, folders, seed, chosen)}, indent=1))
        return
    times, folders = {"runs": 0.0}, {}
    for role in RUNS:
        if (command := training_command(runs, role, kimg, seed)) is not None:
            times["runs"] += run(f"{role} run", command)
        folder, done = last_run(runs / f"{role}-s{seed}", kimg)
        if folder is None or not done:
            raise ValueError(f"{role} run: expected {kimg:g} thousand images, got fewer in {folder}. Run the same command to go on.")
        folders[role] = folder
    for name, command in report_commands(out, folders, seed, chosen).items():
        times[name] = run(name, command)
    click.echo("\n" + ", ".join(f"{name} {spent:.0f} s" for name, spent in times.items()) + f"; in all {sum(times.values()):.0f} s on "
               f"{os.cpu_count()} cores")
    for name in chosen:
        click.echo(f"{name:<10} {out / name / 'index.html'}")


if __name__ == "__main__":
    main()
