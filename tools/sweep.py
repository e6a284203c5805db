"""What do the weights buy? Trains a grid of lambda_r and lambda_sigma, and draws reward against distance and geometry.

Every cell is a run of train.py. A finished cell is not run again, an interrupted one goes on from its checkpoint: give the same command.
lambda_sigma = 0 is the run without the density-consistency term, lambda_r = 0 the control. The table names the settings on the front.

\b
Example:
    python tools/sweep.py --lambda-r=10 --lambda-sigma=0,10 --kimg=0.016 --n=16 --images=32 --out=runs/example/sweep
"""

import json
import shlex
import sys
from pathlib import Path

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, choose_device, file_hash, option
from eg3d_rlhf.evaluation import flags, sweep
from eg3d_rlhf.evaluation.comparison import Comparison, Sources, load_comparison
from eg3d_rlhf.evaluation.sweep import Cell, Training, begun, finished, grid, train_all
from eg3d_rlhf.experiments import jobs as running
from eg3d_rlhf.experiments.page import write_page
from eg3d_rlhf.experiments.process import sigterm_interrupts
from eg3d_rlhf.generators import find_network

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def numbers(flag: str, text: str, kind: type = float) -> list:
    """Comma-separated values of a flag. Raises: ValueError naming the flag."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{flag}: expected numbers with commas between them, such as 0,1,10, got {text!r}. Correct the list.") from None


def write(c: Comparison, networks: dict[Cell, Path], out: Path, fresh: bool = False, quiet: bool = False):
    """Measure the cells, draw the front, write the page; returns the finding of the front."""
    found = running.run(sweep.cell_jobs(c, networks), out, fresh=fresh, quiet=quiet)
    job = sweep.front_job(c, list(networks), found)
    front = running.run([job], out, fresh=fresh, quiet=True)
    introduction = (
        f"{len(networks)} runs of train.py from {c.before.path.name}, compared with it on the same {c.n} held-out latents. The data of "
        "every run lies in data/cell-*.json."
    )
    write_page(out / "index.html", sweep.TITLE, introduction, [job], front, front[sweep.KEY].says[:1])
    return front[sweep.KEY]


@click.command(cls=GroupedCommand, help=__doc__)
@flags.shared("before reward-ckpt data", before="Initial networks.", reward_ckpt={"help": "Reward that tunes.", "show_default": "bundled"},
              data={"help": "Images.", "show_default": "train.py's default"})
@option("--lambda-r", group="Grid", metavar="LIST", default="0,1,10", help="Reward weights; 0 is the control.")
@option("--lambda-sigma", group="Grid", metavar="LIST", default="0,0.01,10", help="Density-consistency weights; 0 leaves the term out.")
@option("--seeds", group="Grid", metavar="LIST", default="0", help="Training seeds of every cell; two or more give intervals over runs.")
@option("--kimg", group="Grid", metavar="KIMG", type=click.FloatRange(min=0, min_open=True), default=0.24, help="Length of a cell.")
@option("--train-flags", group="Grid", metavar="FLAGS", default="", show_default="none",
        help="More flags of train.py, in one quoted string.")
@option("--workers", group="Grid", metavar="INT", type=click.IntRange(min=1), default=2, help="Cells trained at the same time.")
@flags.shared("psi n seed images out fresh batch device dry-run", n={"default": 32}, images={"default": 128},
              out={"default": "runs/reports/sweep", "help": "Folder to write; holds the cells' runs too."},
              fresh="Measure again; finished cells are not trained again.",
              dry_run="Print the cells and what is left to train as JSON and stop.")
def main(
    before, reward_ckpt, data, lambda_r, lambda_sigma, seeds, kimg, train_flags, workers, out, fresh, device, dry_run, **sampling
) -> None:
    lists = numbers("--lambda-r", lambda_r), numbers("--lambda-sigma", lambda_sigma), numbers("--seeds", seeds, int)
    cells, where = grid(*lists), choose_device(device)
    network = find_network(before)
    given = {"init": before and network, "reward-ckpt": reward_ckpt, "data": data}
    words = [f"--device={device}", *shlex.split(train_flags), *(f"--{name}={value}" for name, value in given.items() if value is not None)]
    hashes = {"init": file_hash(network), "reward": file_hash(reward_ckpt or bundled.REWARD)}
    t = Training(folder=out / "cells", script=TRAIN, kimg=kimg, flags=words, hashes=hashes, workers=workers)
    states = {cell.name: "finished" if finished(t, cell) else "begun" if begun(t, cell) else "new" for cell in cells}
    if dry_run:
        shared = {"kimg": kimg, "train_flags": list(t.flags), "hashes": t.hashes, "workers": workers, "device": str(where), **sampling}
        click.echo(json.dumps({**shared, "out": str(out), "cells": states}, indent=1))
        return
    click.echo(f"{len(cells)} cells of {kimg:g} thousand images, {sum(s != 'finished' for s in states.values())} to train.", err=True)
    try:
        with sigterm_interrupts(), tqdm(total=len(cells), desc="training", unit="cell", dynamic_ncols=True) as bar:
            networks = train_all(cells, t, lambda cell: bar.update())
    except KeyboardInterrupt:
        click.echo("Stopped; begun cells keep a checkpoint. The same command goes on from there.", err=True)
        sys.exit(130)
    first = next(iter(networks.values()))
    c = load_comparison(Sources(
        before=before, after=first, reward_ckpt=reward_ckpt, data=data, device=where, runs_folder=t.folder, **sampling
    ))
    front = write(c, networks, out, fresh)
    click.echo(f"{'setting':<26} " + " ".join(f"{name:>28}" for name in sweep.GOALS) + "  front")
    for row in front.data["rows"]:
        texts = [f"{m['mean']:.3g} [{m['lo']:.3g}, {m['hi']:.3g}]" for m in (row["measures"][name] for name in sweep.GOALS)]
        click.echo(f"{row['setting']:<26} " + " ".join(f"{text:>28}" for text in texts) + f"  {'on the front' if row['on_front'] else '-'}")
    click.echo(f"\nWritten to {out}: index.html (open it in a browser), figures/, data/, cells/ (the runs)")


if __name__ == "__main__":
    main()
