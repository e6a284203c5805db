"""Jobs that train several networks, compare them and write one table.

These are `report controlled-study`, `report rewards`, `report seeds` and `report sweep`.
"""

import functools
import shlex
import sys
from pathlib import Path

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, aligned, choose_device, file_hash, numbers_of, option, some_of
from eg3d_rlhf.core.seeds import LATENTS
from eg3d_rlhf.evaluation.comparison_sources import Sources
from eg3d_rlhf.evaluation.reward_comparison_entries import ENTRIES
from eg3d_rlhf.evaluation.settings import ARMS, LABELS
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.modes.shared_flags import count_option, print_json, shared
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS

_grid_option = functools.partial(option, group="Grid")


@click.command("controlled-study", cls=GroupedCommand, job="report controlled-study")
@shared(
    "network outdir dry-run",
    outdir={"default": "runs/controlled-study", "help": "Folder to write."},
    dry_run="Print the commands as JSON and stop.",
)
@option(
    "--seeds",
    metavar="LIST",
    default="0,1,2",
    help="Training seeds of every tuning run, as a list with ranges.",
)
@count_option(
    "--rewards", default=2, help="Number of rewards trained on each label set, with seeds 0, 1, ..."
)
@count_option("--label-sets", default=2, help="Number of label sets; the first is that of --labels.")
@option(
    "--only",
    metavar="LIST",
    default=",".join(ARMS),
    help="Arms to run, comma-separated; the arm `labels` always runs.",
)
@option(
    "--latents",
    metavar="INT",
    type=click.IntRange(min=2, max=LATENTS.count),
    default=64,
    help="Number of held-out latents.",
)
@option(
    "--labels",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=BUNDLED_LABELS,
    show_default="the bundled ones",
    help="File of the first label set.",
)
@option(
    "--train",
    metavar="FLAGS",
    default="",
    help='Additional flags for the training of rewards, such as "--epochs=4".',
)
@shared("jobs")
@click.argument("more", metavar="[-- FLAGS]", nargs=-1, type=click.UNPROCESSED)
def controlled_study(
    seeds: str,
    only: str,
    train: str,
    jobs: int,
    dry_run: bool,
    outdir: Path,
    label_sets: int,
    more: tuple[str, ...],
    **given,
) -> None:
    """Test whether labels reduce the error of synthetic heads, and whether anything cheaper does. Every arm
    runs with several training seeds (also `make controlled-study`).

    Arms: labels; no reward; the best label-free filter; truncation; a reward for smooth surfaces; the reward
    with permuted weights; randomised labels; inverted labels. All are tuned with the demo's settings. The
    same command resumes: finished parts are kept, interrupted ones continue. Flags after -- are passed to
    train.py. Writes controlled-study.json, controlled-study.md and controlled-study.png.

    \b
    Example:
        eg3d-rlhf report controlled-study --seeds=0,1,2 --rewards=1 --label-sets=1 --dry-run
    """
    from eg3d_rlhf.evaluation.controlled_study import Plan, commands
    from eg3d_rlhf.evaluation.controlled_study import work as work_study
    from eg3d_rlhf.experiments.media.rendering import parse_seeds

    plan = Plan(
        out=version_0_1.outdir(outdir),
        draws=label_sets,
        # the order of ARMS, whatever the order in --only
        arms=[name for name in ARMS if name in {LABELS, *some_of("--only", only, ARMS)}],
        seeds=list(dict.fromkeys(parse_seeds(seeds))),
        train=tuple(shlex.split(train)),
        tune=more,
        **given,
    )
    if dry_run:
        print_json(commands(plan))
        return
    _print_table(plan.out, work_study(plan, jobs))


def _print_table(out: Path, paths: list[Path]) -> None:
    """Print the table, which is the second file, and the names of all files."""
    click.echo(f"\n{paths[1].read_text()}\nWritten to {out}: {', '.join(path.name for path in paths)}")


@click.command("rewards", cls=GroupedCommand, job="report rewards")
@shared(
    "outdir dry-run",
    outdir={"default": "runs/rewards", "help": "Folder to write."},
    dry_run="Print the commands as JSON and stop.",
)
@option("--only", metavar="LIST", default=",".join(ENTRIES), help="Rewards to train, comma-separated.")
@option("--seeds", metavar="LIST", default="0", help="Training seeds of the tuning runs.")
@option(
    "--full",
    is_flag=True,
    help="Train and tune with the default sizes and lengths; without it, a shorter version runs.",
)
@shared("jobs")
def rewards(outdir: Path, only: str, seeds: str, full: bool, jobs: int, dry_run: bool) -> None:
    """Train every kind of reward on the bundled labels, tune the bundled generator with each, and compare the
    results (also `make rewards`).

    The default is a short version: smaller depth maps, fewer epochs, half the length of tuning. --full uses
    all defaults. Finished parts are kept, an interrupted training resumes. Writes rewards.json,
    rewards.md, rewards.png and rewards-latents.png, the same latents after tuning with every reward.

    \b
    Example:
        eg3d-rlhf report rewards --only=points --dry-run
    """
    from eg3d_rlhf.evaluation import reward_comparison
    from eg3d_rlhf.experiments.media.rendering import parse_seeds

    # raises ValueError for an unknown reward
    wanted = some_of("--only", only, ENTRIES)
    outdir = version_0_1.outdir(outdir)
    # repeated seeds count once
    numbers = list(dict.fromkeys(parse_seeds(seeds)))
    if dry_run:
        plans = reward_comparison.plans_of(outdir, wanted, numbers, full)
        shown = {name: {key: part.command() for key, part in parts.items()} for name, parts in plans.items()}
        print_json(shown)
        return
    _print_table(outdir, reward_comparison.work(outdir, wanted, numbers, full, jobs))


@click.command(cls=GroupedCommand, job="report seeds")
@option("--seeds", metavar="LIST", default="0,1,2", help="Training seeds, as a list with ranges.")
@shared(
    "outdir dry-run",
    outdir={"default": "runs/seeds", "help": "Folder to write."},
    dry_run="Print the commands as JSON and stop.",
)
@click.argument("more", metavar="[-- FLAGS]", nargs=-1, type=click.UNPROCESSED)
def seeds(seeds: str, outdir: Path, dry_run: bool, more: tuple[str, ...]) -> None:
    """Repeat the demo with several training seeds and compare the summaries (also `make seeds`).

    Each seed has a folder below --outdir. The same command resumes: finished runs are kept, interrupted ones
    continue. Flags after -- are passed to train.py.

    \b
    Example:
        eg3d-rlhf report seeds --seeds=0,1,2 --dry-run
    """
    from eg3d_rlhf.evaluation import over_seeds

    parts = over_seeds.trainings(outdir, seeds, more)
    if dry_run:
        print_json(
            {seed: "finished" if part.finished() else part.continued() for seed, part in parts.items()}
        )
        return
    figures = over_seeds.work(outdir, parts, [*over_seeds.DEMO, *more])
    click.echo(f"\n{aligned(over_seeds.table(figures))}\n\nWritten to {outdir / over_seeds.SUMMARY}")


@click.command(cls=GroupedCommand, job="report sweep")
@shared(
    "before reward-ckpt",
    before="Networks that every cell starts from: a network file or a run folder.",
    reward_ckpt={"help": "Reward to tune with.", "show_default": "bundled"},
)
@_grid_option(
    "--lambda-r", metavar="LIST", default="0,1,10", help="Weights lambda_r of the reward; 0 is the control."
)
@_grid_option(
    "--lambda-sigma",
    metavar="LIST",
    default="0,0.01,10",
    help="Weights lambda_sigma of the density-consistency term; 0 switches it off.",
)
@_grid_option(
    "--seeds",
    metavar="LIST",
    default="0",
    help="Training seeds of every cell; with two or more, intervals over runs are reported.",
)
@_grid_option(
    "--kimg",
    metavar="KIMG",
    type=click.FloatRange(min=0, min_open=True),
    default=0.24,
    help="Length of each run in thousands of images.",
)
@option("--train-flags", rare=True, default="", help="Additional flags for train.py, in one quoted string.")
@shared(
    "n jobs outdir device dry-run",
    "data psi seed images batch",
    n={"default": 32},
    jobs={"default": 2, "show_default": True},
    images={"default": 128},
    data="Dataset to train on and to measure distances to.",
    outdir={"default": "runs/reports/sweep", "help": "Folder to write; it contains the runs, too."},
    dry_run="Print the cells and their states as JSON and stop.",
)
def sweep(before, reward_ckpt, data, kimg, train_flags, jobs, outdir, device, dry_run, **more) -> None:
    """Train a grid of lambda_r and lambda_sigma, and plot the reward against the distance to the data and
    against geometry.

    Every cell of the grid is a run of train.py. The same command resumes: a finished cell is kept, an
    interrupted one continues from its checkpoint. lambda_sigma = 0 switches the density-consistency term off;
    lambda_r = 0 is the control. The table marks the settings on the Pareto front.

    \b
    Example:
        eg3d-rlhf report sweep --lambda-r=10 --lambda-sigma=0,10 --kimg=0.016 --n=16 --images=32 --outdir=out
    """
    from eg3d_rlhf.evaluation.sweep import GOALS, grid, make_cells, measure_cells, part_of
    from eg3d_rlhf.experiments.table import figure_table
    from eg3d_rlhf.generators import find_network

    # the axes of the grid
    kinds = {"lambda_r": float, "lambda_sigma": float, "seeds": int}
    lists = [numbers_of(f"--{name.replace('_', '-')}", more[name], kind) for name, kind in kinds.items()]
    sampling = {name: value for name, value in more.items() if name not in kinds}
    where = choose_device(device)
    network = find_network(before)
    given = {"init": before and network, "reward-ckpt": reward_ckpt, "data": data}
    # flags of train.py that are the same for all cells
    words = [
        f"--device={device}",
        *shlex.split(train_flags),
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
    ]
    parts = {cell: part_of(cell, outdir / "cells", kimg, words) for cell in grid(*lists)}
    # finished, begun or new
    states = {cell.name: part.state() for cell, part in parts.items()}
    if dry_run:
        hashes = {"init": file_hash(network), "reward": file_hash(reward_ckpt or bundled.REWARD)}
        shared = {
            "kimg": kimg,
            "train_flags": words,
            "hashes": hashes,
            "jobs": jobs,
            "device": str(where),
            **sampling,
        }
        print_json({**shared, "outdir": str(outdir), "cells": states})
        return
    click.echo(
        f"{len(parts)} cells of {kimg:g} thousand images, {sum(s != 'finished' for s in states.values())} to"
        " train.",
        err=True,
    )
    try:
        make_cells(parts, jobs)
    except KeyboardInterrupt:
        click.echo(
            "Stopped. Interrupted cells keep their checkpoints. Repeat the command to resume.", err=True
        )
        # 130 = 128 + SIGINT, as shells report an interrupted command
        sys.exit(130)
    # what the finished cells are measured with
    sources = Sources(
        before=before,
        reward_ckpt=reward_ckpt,
        data=data,
        device=where,
        runs_folder=outdir / "cells",
        **sampling,
    )
    finding = measure_cells(parts, sources, outdir)
    rows = {
        row["setting"] + (" (on the front)" if row["on_front"] else ""): {
            **{name: row["measures"][name]["mean"] for name in GOALS},
            **{f"{name}_ci95": [row["measures"][name][end] for end in ("lo", "hi")] for name in GOALS},
        }
        for row in finding.data["rows"]
    }
    columns = {name: (name, ".3g") for name in GOALS}
    click.echo("\n".join(figure_table("setting", rows, columns, intervals=GOALS)))
    click.echo(
        f"\nWritten to {outdir}: index.html (open it in a browser), figures/, data/, cells/ (the runs)"
    )
