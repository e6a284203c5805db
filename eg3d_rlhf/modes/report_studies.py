"""Jobs that train several networks, compare them, and write one table.

These jobs are `report controlled-study`, `report rewards`, `report steering`, `report seeds` and
`report sweep`. Each training
is a run of train.py. Finished trainings are not repeated when a command is called again.
"""

import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import (
    GroupedCommand,
    aligned,
    choose_device,
    file_hash,
    option,
    parse_names,
    parse_numbers,
)
from eg3d_rlhf.core.input_paths import find_network
from eg3d_rlhf.core.seeds import LATENTS, parse_seeds
from eg3d_rlhf.evaluation.comparison_sources import Sources
from eg3d_rlhf.evaluation.reward_comparison_entries import ENTRIES
from eg3d_rlhf.evaluation.settings import ACTIVE, ARMS, LABELS, STEERING_LABEL_KINDS, STEERING_LABELS
from eg3d_rlhf.experiments import version_0_1
from eg3d_rlhf.modes.shared_flags import count_option, print_json, shared
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from training.config import number_text

_grid_option = functools.partial(option, group="Grid")


@click.command("controlled-study", cls=GroupedCommand, job="report controlled-study")
@shared(
    "network outdir dry-run",
    outdir={
        "default": "runs/controlled-study",
        "help": "Folder to write into; it contains all trainings and the table.",
    },
    dry_run="Print the commands as JSON and stop.",
)
@option(
    "--seeds",
    check=parse_seeds,
    metavar="LIST",
    default="0,1,2",
    help="Training seeds with which every arm is tuned, as a list with ranges, such as 0-2.",
)
@count_option(
    "--rewards",
    default=2,
    help="Number of rewards that are trained on each label set, with the training seeds 0, 1 and so on.",
)
@count_option(
    "--label-sets",
    default=2,
    help="Number of label sets. The first set is the file of --labels; the others are simulated.",
)
@option(
    "--only",
    metavar="LIST",
    default=",".join(ARMS),
    help="Names of the arms to run, separated by commas. The arm `labels` always runs.",
)
@option(
    "--latents",
    metavar="INT",
    type=click.IntRange(min=2, max=LATENTS.count),
    default=64,
    help="Number of held-out latents on which the generators are compared.",
)
@option(
    # Labels and rewards on which the arms are tuned.
    "--labels",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=BUNDLED_LABELS,
    show_default="the bundled labels",
    help="File of the first label set.",
)
@shared("seed", seed="Number that shifts the held-out latents: another number selects other latents.")
@option(
    "--train",
    metavar="FLAGS",
    default="",
    help='Additional flags for the training of rewards, such as "--epochs=4".',
)
@shared("jobs")
@click.argument("train_flags", metavar="[-- FLAGS]", nargs=-1, type=click.UNPROCESSED)
def controlled_study(
    seeds: str,
    only: str,
    train: str,
    jobs: int,
    dry_run: bool,
    outdir: Path,
    label_sets: int,
    train_flags: tuple[str, ...],
    **plan_settings,
) -> None:
    """Test whether tuning on labels reduces the error of synthetic heads, and whether cheaper methods do so,
    too. Every arm is tuned with several training seeds (also `make controlled-study`).

    The arms are: labels; latents moved by 25, 100 and all labels, without tuning, and tuning after that; a
    search in w by the reward; the best direction without labels; weighed filters; no reward; the best
    post-processing filter without labels; truncation; a reward for smooth surfaces; the reward with permuted
    weights; randomised labels; inverted labels. Tuned arms have the settings of the demo. The same command
    resumes after an interruption. Flags after -- are passed to train.py. The results are
    controlled-study.json, controlled-study.md, controlled-study.png and, with the errors of each latent,
    controlled-study.safetensors.

    \b
    Example:
        eg3d-rlhf report controlled-study --seeds=0,1,2 --rewards=1 --label-sets=1 --dry-run
    """
    for flag, own_flag in (("--init", "--network"), ("--reward-ckpt", "--labels")):
        reject_train_flag("flags after --", train_flags, flag, own_flag)
    # raises ValueError for an unknown name
    named_arms = {LABELS, *parse_names("--only", only, ARMS)}
    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.evaluation.controlled_study.plan import Plan, commands
    from eg3d_rlhf.evaluation.controlled_study.study import work as work_study

    plan = Plan(
        # version 0.1 named this folder otherwise; results in the old folder are used again
        out=version_0_1.outdir(outdir),
        # number of label sets; all sets after the first are drawn by the simulated annotator
        draws=label_sets,
        # in the order of ARMS, whatever the order in --only
        arms=[arm_name for arm_name in ARMS if arm_name in named_arms],
        seeds=list(dict.fromkeys(parse_seeds(seeds))),
        # split like a command line, so that quoted values may contain spaces
        train=tuple(shlex.split(train)),
        # flags after "--"
        tune=train_flags,
        **plan_settings,
    )
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        print_json(commands(plan))
        return
    _print_table(plan.out, work_study(plan, jobs))


def reject_train_flag(source: str, train_flags: Sequence[str], flag: str, own_flag: str) -> None:
    """Raise ValueError if flags for train.py contain one that a job must know itself.

    The job measures what train.py tunes. With a network that only train.py knows, it would measure another.

    Args:
        source: flag or place in which the flags were given, for the message.
        train_flags: flags for train.py.
        flag: flag of train.py that is not allowed.
        own_flag: flag of the job that replaces it.
    """
    for train_flag in train_flags:
        if train_flag == flag or train_flag.startswith(f"{flag}="):
            raise ValueError(
                f"{source}: {train_flag} is not passed on, because this job has to open the same file. Use"
                f" {own_flag} of this job."
            )


def _print_table(study_folder: Path, paths: list[Path]) -> None:
    """Print the table of a study, and the names of the written files.

    Args:
        study_folder: folder of the study.
        paths: written files; the second file is the table as Markdown.
    """
    click.echo(
        f"\n{paths[1].read_text()}\nWritten to {study_folder}: {', '.join(path.name for path in paths)}"
    )


@click.command("steering", cls=GroupedCommand, job="report steering")
@shared(
    "network outdir dry-run",
    network="Generator of synthetic heads: a network file or a run folder.",
    outdir={"default": "runs/steering-study", "help": "Folder to write into."},
    dry_run="Print the settings as JSON and stop.",
)
@option(
    "--labels",
    metavar="LIST",
    default=",".join(map(str, STEERING_LABELS)),
    help="Numbers of labels, separated by commas.",
)
@option(
    "--draws",
    metavar="INT",
    type=click.IntRange(1, 40),
    default=10,
    help="Number of draws of labels, each of other samples.",
)
@option(
    "--arms",
    metavar="LIST",
    default=",".join(STEERING_LABEL_KINDS),
    help=(
        "What the labels are, separated by commas: labels (of random pairs), active (of pairs that a linear"
        " reward of the earlier labels chose), randomised or inverted."
    ),
)
@option(
    "--held-out",
    "sets",
    metavar="LIST",
    default="held-out,readme",
    help=(
        "Sets of latents to measure, separated by commas: held-out (172 latents that nothing else uses),"
        " readme (the 64 latents of the README), validation (64 latents, for choices)."
    ),
)
@option(
    "--strength",
    metavar="FLOAT",
    type=click.FloatRange(min=0, max=7),
    default=1.0,
    help="Strength of all steerings, in standard deviations.",
)
@option(
    "--target",
    metavar="0..1",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=0.7,
    help="Error reduction for which the number of labels is stated, for labels and active.",
)
def steering(
    network: Path | None,
    outdir: Path,
    labels: str,
    draws: int,
    arms: str,
    sets: str,
    strength: float,
    target: float,
    dry_run: bool,
) -> None:
    """Measure steering of synthetic heads by numbers of labels, over draws of simulated labels, with the
    controls of randomised and inverted labels.

    The same command resumes after an interruption, and adds draws or numbers of labels. The results are
    steering-study.json, steering-study.md and steering-study.safetensors with the errors of each latent.

    \b
    Example:
        eg3d-rlhf report steering --labels=50 --draws=1 --held-out=validation --dry-run
        eg3d-rlhf report steering --labels=25,33,41,49 --arms=labels,active --dry-run
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation import steering_study

    plan = steering_study.Plan(
        outdir=Path(outdir),
        network=network,
        labels=tuple(parse_numbers("--labels", labels, int)),
        draws=draws,
        arms=tuple(parse_names("--arms", arms, (*STEERING_LABEL_KINDS, ACTIVE))),
        sets=tuple(parse_names("--held-out", sets, list(steering_study.SETS))),
        strength=strength,
        target=target,
    )
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        print_json(
            {
                "network": str(network or "bundled"),
                "outdir": str(outdir),
                "labels": labels,
                "draws": draws,
                "arms": arms,
                "held_out": sets,
                "strength": strength,
                "target": target,
            }
        )
        return
    _print_table(plan.outdir, steering_study.work(plan))


@click.command("rewards", cls=GroupedCommand, job="report rewards")
@shared(
    "outdir dry-run",
    outdir={
        "default": "runs/rewards",
        "help": "Folder to write into; it contains all trainings and the table.",
    },
    dry_run="Print the commands as JSON and stop.",
)
@option(
    "--only",
    metavar="LIST",
    default=",".join(ENTRIES),
    help="Names of the kinds of rewards to train, separated by commas.",
)
@option(
    "--seeds",
    check=parse_seeds,
    metavar="LIST",
    default="0",
    help="Training seeds with which the generator is tuned with each reward, as a list with ranges.",
)
@option(
    "--full",
    is_flag=True,
    help="Use the default sizes and lengths of all trainings instead of a shorter version.",
)
@shared("jobs")
def rewards(outdir: Path, only: str, seeds: str, full: bool, jobs: int, dry_run: bool) -> None:
    """Train every kind of reward on the bundled labels, tune the bundled generator with each reward, and
    compare the results (also `make rewards`).

    By default, a short version runs: smaller depth maps, fewer epochs, and half the length of tuning. --full
    uses all default values. The same command resumes after an interruption. The results are rewards.json,
    rewards.md, rewards.png, and rewards-latents.png with samples of the same latents for every reward.

    \b
    Example:
        eg3d-rlhf report rewards --only=points --dry-run
    """
    # raises ValueError for an unknown name
    entry_names = parse_names("--only", only, ENTRIES)
    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.evaluation import reward_comparison

    # version 0.1 named this folder otherwise; results in the old folder are used again
    outdir = version_0_1.outdir(outdir)
    # a seed that is listed twice is used once
    training_seeds = list(dict.fromkeys(parse_seeds(seeds)))
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        trainings_by_entry = reward_comparison.plans_of(outdir, entry_names, training_seeds, full)
        commands = {
            name: {key: training.command() for key, training in trainings.items()}
            for name, trainings in trainings_by_entry.items()
        }
        print_json(commands)
        return
    _print_table(outdir, reward_comparison.work(outdir, entry_names, training_seeds, full, jobs))


@click.command(cls=GroupedCommand, job="report seeds")
@option(
    "--seeds",
    check=parse_seeds,
    metavar="LIST",
    default="0,1,2",
    help="Training seeds with which the demo is repeated, as a list with ranges, such as 0-2.",
)
@shared(
    "outdir dry-run",
    outdir={"default": "runs/seeds", "help": "Folder to write into; each seed has a subfolder."},
    dry_run="Print the commands as JSON and stop.",
)
@click.argument("train_flags", metavar="[-- FLAGS]", nargs=-1, type=click.UNPROCESSED)
def seeds(seeds: str, outdir: Path, dry_run: bool, train_flags: tuple[str, ...]) -> None:
    """Repeat the demo with several training seeds and compare the summaries of the runs (also `make seeds`).

    Each seed has a subfolder in --outdir. The same command resumes after an interruption. Flags after -- are
    passed to train.py.

    \b
    Example:
        eg3d-rlhf report seeds --seeds=0,1,2 --dry-run
    """
    # Imported here, so that --help is printed without loading this module.
    from eg3d_rlhf.evaluation import over_seeds

    trainings = over_seeds.list_runs(outdir, seeds, train_flags)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        print_json(
            {
                # "finished", or the arguments with which train.py starts or resumes
                seed: "finished" if training.finished() else training.continued()
                for seed, training in trainings.items()
            }
        )
        return
    # Trains the runs that are not finished, and compares all summaries.
    metrics = over_seeds.work(outdir, trainings, [*over_seeds.DEMO, *train_flags])
    click.echo(f"\n{aligned(over_seeds.table(metrics))}\n\nWritten to {outdir / over_seeds.SUMMARY}")


@click.command(cls=GroupedCommand, job="report sweep")
@shared(
    "before reward-ckpt",
    before={
        "help": "Generator that every run of the grid starts from: a network file or a run folder.",
        "show_default": "the bundled generator",
    },
    reward_ckpt={"help": "Reward file to tune with.", "show_default": "the bundled reward"},
)
@_grid_option(
    # The grid consists of all combinations of lambda_r, lambda_sigma and seed.
    "--lambda-r",
    metavar="LIST",
    default="0,1,10",
    help="Weights lambda_r of the reward, separated by commas; 0 is the control.",
)
@_grid_option(
    "--lambda-sigma",
    metavar="LIST",
    default="0,0.01,10",
    help=(
        "Weights lambda_sigma of the density-consistency term, separated by commas; 0 switches the term off."
    ),
)
@_grid_option(
    "--seeds",
    metavar="LIST",
    default="0",
    help=(
        "Training seeds of each pair of weights, separated by commas. With two or more seeds, intervals over"
        " runs are reported."
    ),
)
@_grid_option(
    "--kimg",
    metavar="KIMG",
    type=click.FloatRange(min=0, min_open=True),
    default=0.24,
    help="Length of each run in thousands of images.",
)
@option(
    "--train-flags",
    rare=True,
    default="",
    help="Additional flags that are passed to train.py, in one quoted string.",
)
@shared(
    "n jobs outdir device dry-run",
    "data psi seed images batch",
    n={"default": 32},
    jobs={"default": 2, "show_default": True},
    images={"default": 128},
    data="Dataset to train on, and to which the image distance is measured.",
    outdir={
        "default": "runs/reports/sweep",
        "help": "Folder to write into; its subfolder cells contains the runs.",
    },
    dry_run="Print the runs of the grid and their states (finished, begun or new) as JSON and stop.",
)
def sweep(
    before, reward_ckpt, data, kimg, train_flags, jobs, outdir, device, dry_run, **grid_and_sampling
) -> None:
    """Train a grid of runs over the weights lambda_r and lambda_sigma. Plot the reward against the distance
    of the images to the dataset, and against measures of the geometry.

    Every cell of the grid is a run of train.py. The same command resumes after an interruption: finished
    cells are not trained again, and interrupted cells continue from their checkpoints. lambda_sigma = 0
    switches the density-consistency term off; lambda_r = 0 is the control. The table marks the settings on
    the Pareto front.

    \b
    Example:
        eg3d-rlhf report sweep --lambda-r=10 --lambda-sigma=0,10 --kimg=0.016 --n=16 --images=32 --outdir=out
    """
    # axes of the grid, and the types of their numbers; the other flags belong to the sampling
    axis_types = {"lambda_r": float, "lambda_sigma": float, "seeds": int}
    axis_values = [
        parse_numbers(f"--{name.replace('_', '-')}", grid_and_sampling[name], axis_type)
        for name, axis_type in axis_types.items()
    ]
    sampling_settings = {name: value for name, value in grid_and_sampling.items() if name not in axis_types}
    for flag, own_flag in (("--init", "--before"), ("--reward-ckpt", "--reward-ckpt")):
        reject_train_flag("--set train_flags", shlex.split(train_flags), flag, own_flag)

    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.evaluation.sweep import GOALS, grid, make_cells, make_part, measure_cells
    from eg3d_rlhf.experiments.table import figure_table
    from eg3d_rlhf.rewards.stated_accuracy import WEAK_REWARD, RewardUse, announce_file

    target_device = choose_device(device)
    # a run folder is replaced by its newest network
    network_path = find_network(before)
    # without --before, train.py chooses its default network itself, hence None for init
    network_flags = {"init": before and network_path, "reward-ckpt": reward_ckpt, "data": data}
    # flags of train.py that are the same for all cells
    train_arguments = [
        f"--device={device}",
        *shlex.split(train_flags),
        *(f"--{name}={value}" for name, value in network_flags.items() if value is not None),
    ]
    trainings_by_cell = {
        cell: make_part(cell, outdir / "cells", kimg, train_arguments) for cell in grid(*axis_values)
    }
    # state of each cell: finished, begun or new
    state_by_cell = {cell.name: training.state() for cell, training in trainings_by_cell.items()}
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        # the hashes show whether two sweeps used the same files
        file_hashes = {"init": file_hash(network_path), "reward": file_hash(reward_ckpt or bundled.REWARD)}
        common_settings = {
            "kimg": kimg,
            "train_flags": train_arguments,
            "hashes": file_hashes,
            "jobs": jobs,
            "device": str(target_device),
            **sampling_settings,
        }
        print_json({**common_settings, "outdir": str(outdir), "cells": state_by_cell})
        return
    # A weak reward is rejected here, before the first cell is trained. The runs of the cells check it again.
    announce_file(
        reward_ckpt or bundled.REWARD,
        "--reward-ckpt",
        RewardUse(
            tunes=any(axis_values[0]),
            allows_weak=WEAK_REWARD in train_arguments,
            remedy=f"--train-flags={WEAK_REWARD}",
        ),
    )
    click.echo(
        f"{len(trainings_by_cell)} cells of {number_text(kimg)} thousand images,"
        f" {sum(state != 'finished' for state in state_by_cell.values())} to train.",
        err=True,
    )
    try:
        # Finished cells are skipped.
        make_cells(trainings_by_cell, jobs)
    except KeyboardInterrupt:
        click.echo(
            "Stopped. Interrupted cells keep their checkpoints. Repeat the command to resume.", err=True
        )
        # 130 = 128 + SIGINT, as shells report an interrupted command
        sys.exit(130)
    # generator, reward and latents with which the finished cells are measured
    sources = Sources(
        before=before,
        reward_ckpt=reward_ckpt,
        data=data,
        device=target_device,
        runs_folder=outdir / "cells",
        **sampling_settings,
    )
    finding = measure_cells(trainings_by_cell, sources, outdir)
    metrics_by_setting = {
        setting_row["setting"] + (" (on the front)" if setting_row["on_front"] else ""): {
            **{name: setting_row["measures"][name]["mean"] for name in GOALS},
            **{
                f"{name}_ci95": [setting_row["measures"][name][bound_key] for bound_key in ("lo", "hi")]
                for name in GOALS
            },
        }
        for setting_row in finding.data["rows"]
    }
    # printed with three digits
    column_formats = {name: (name, ".3g") for name in GOALS}
    click.echo("\n".join(figure_table("setting", metrics_by_setting, column_formats, intervals=GOALS)))
    click.echo(
        f"\nWritten to {outdir}: index.html (open it in a browser), figures/, data/, cells/ (the runs)"
    )
