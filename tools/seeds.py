"""Repeat the demo with several training seeds and put their summaries side by side: `make seeds`.

Each seed has a folder below --out. Finished runs are not repeated, interrupted ones go on: the same command continues. Flags after -- go to
train.py.

\b
Example:
    python tools/seeds.py --seeds=0,1,2 --dry-run
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import _repository  # noqa: F401
import click

import train
from eg3d_rlhf.core.cli import GroupedCommand, file_hash, option
from eg3d_rlhf.evaluation.over_seeds import over_seeds, table
from eg3d_rlhf.experiments.media.rendering import parse_seeds
from eg3d_rlhf.experiments.run import recorded
from eg3d_rlhf.tuning.gan.settings import input_files, resolve
from training import checkpoint, storage

REPO = Path(__file__).resolve().parents[1]
DEMO = ("--reward=sigma", "--lambda-r=10")
SUMMARY = "summary.json"


def flags_of(seed: int, more: tuple[str, ...]) -> list[str]:
    """Flags of train.py for a seed. Raises: ValueError where `more` sets what this tool sets."""
    taken = [flag for flag in more if flag.split("=")[0] in ("--seed", "--outdir", "--resume", "--no-summary", "-n", "--dry-run")]
    if taken:
        raise ValueError(f"tools/seeds.py: expected flags that all seeds share, got {taken[0]}. Use --seeds and --out.")
    return [*DEMO, *more, f"--seed={seed}"]


def known_run(folder: Path, flags: list[str]) -> Path | None:
    """The newest run below `folder` that had these settings and began from the same files."""
    settings = resolve(train.check_eg3d_flags(train.main.make_context("train", list(flags)).params))
    wanted = json.loads(json.dumps(settings.to_dict()))
    hashes = {name: file_hash(path) for name, path in input_files(settings).items()}
    for run in sorted(folder.glob("[0-9]*-*"), reverse=True):
        own = recorded(run)
        if own.get("hashes") == hashes and all(own.get(name) == value for name, value in wanted.items()):
            return run
    return None


def command_of(folder: Path, flags: list[str]) -> list[str] | None:
    """What makes the run of `flags` below `folder`, or goes on with it; None where it is finished."""
    run = known_run(folder, flags)
    if run is not None and (run / SUMMARY).is_file():
        return None
    if run is not None and checkpoint.available(run):
        return ["train.py", f"--resume={run}"]
    return ["train.py", *flags, f"--outdir={folder}"]


def call(command: list[str]) -> None:
    """Run train.py. Raises: ValueError where it failed."""
    code = subprocess.call([sys.executable, str(REPO / command[0]), *command[1:]])
    if code:
        raise ValueError(f"train.py: expected status 0, got {code}. Its message stands above; the same command goes on.")


@click.command(cls=GroupedCommand, help=__doc__)
@option("--seeds", metavar="LIST", default="0,1,2", help="Training seeds.")
@option("--out", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/seeds"), help="Folder to write.")
@option("-n", "--dry-run", is_flag=True, help="Print the commands as JSON and stop.")
@click.argument("more", metavar="[-- FLAGS]", nargs=-1, type=click.UNPROCESSED)
def main(seeds: str, out: Path, dry_run: bool, more: tuple[str, ...]) -> None:
    flags = {str(seed): flags_of(seed, more) for seed in dict.fromkeys(parse_seeds(seeds))}
    folders = {seed: out / f"seed{seed}" for seed in flags}
    if dry_run:
        click.echo(json.dumps({seed: command_of(folders[seed], own) or "finished" for seed, own in flags.items()}, indent=1))
        return
    records, runs = {}, {}
    for seed, own in flags.items():
        if (command := command_of(folders[seed], own)) is not None:
            click.echo(f"\n== seed {seed}: python {shlex.join(command)}", err=True)
            call(command)
        run = known_run(folders[seed], own)
        if run is None or not (run / SUMMARY).is_file():
            raise ValueError(f"seed {seed}: expected a finished run in {folders[seed]}, got none. Run the same command to go on.")
        runs[seed], records[seed] = str(run.relative_to(out)), json.loads((run / SUMMARY).read_text())
    found = {**over_seeds(records), "runs": runs, "flags": [*DEMO, *more]}
    storage.write_atomic(out / SUMMARY, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
    cells = table(found)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    click.echo("\n" + "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells))
    click.echo(f"\nWritten to {out / SUMMARY}")


if __name__ == "__main__":
    main()
