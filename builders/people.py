"""Train a generator of heads, with its discriminator: python -m builders.people

The third edition is the generator whose damaged scans are hollow and whose damage has latent coordinates of
its own. In the fourth, the identity decides about the damage and all scans are solid
(training/heads/people_flaws.py), the xy plane has two slices, more heads are in the pool, and more points lie
at the back of the head.

The command does four things, each of which continues where an interrupted run stopped: it computes distances
and colours of intact heads at random points (the pool, with the package warp), trains the generator on scans
with fresh damage, trains the discriminator against it, and writes the network file.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from builders.command import dry_run
from eg3d_rlhf.core.cli import ASSETS, GroupedCommand, option

RUNS = ASSETS.parent / "runs" / "assets"
HEADS_PER_FILE = 50  # heads in each file of the pool, people_pool.HEADS
NETWORK = "generator.safetensors"  # name of the result in the folder


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Size of the pool and changes of the training's settings for an edition of the heads."""

    heads: int  # heads in the pool, a multiple of HEADS_PER_FILE
    training: dict  # fields of `people_training.PeopleTraining` that differ from their defaults
    discriminator_steps: int = 700


RECIPES = {
    3: Recipe(heads=1600, training={}),
    4: Recipe(
        heads=3000,
        training={"edition": 4, "plane_slices": 2, "behind": 3000, "seed": 17, "renders_every": 1000},
    ),
}
# Settings of a trial, which shows within minutes that all parts work and that the losses fall.
TRIAL: dict[str, Any] = {
    "steps": (150, 30, 20),
    "save_every": 50,
    "renders_every": 100,
    "log_every": 10,
}
TRIAL_HEADS = 100


def trial_of(recipe: Recipe) -> Recipe:
    """Return a recipe with few heads and steps."""
    return replace(recipe, heads=TRIAL_HEADS, training={**recipe.training, **TRIAL}, discriminator_steps=20)


def make_generator(folder: Path, recipe: Recipe, say: Callable[[str], None] = print) -> Path:
    """Make the pool, train the generator and its discriminator, and write FOLDER/generator.safetensors.

    Args:
        folder: folder of the pool, of the training with its checkpoints and renders, and of the result.
        recipe: settings.
        say: function that prints a line.
    Returns: path of the network file.
    """
    # imported here, because --help and --dry-run must not load torch's networks or warp
    from builders import people_pool, people_training
    from training import networks
    from training.heads import people
    from training.progress import tqdm

    pool_folder = folder / "pool"
    pool_folder.mkdir(parents=True, exist_ok=True)
    file_count = recipe.heads // HEADS_PER_FILE
    say(f"{folder}: {recipe.heads} heads in {file_count} files of the pool")
    for chunk in tqdm(range(file_count), desc="pool", unit="file"):
        people_pool.write_chunk(pool_folder / f"chunk-{chunk:04d}.npz", people.load_basis(), chunk)
    pool = people_training.Pool(pool_folder, file_count)
    options = people_training.PeopleTraining(**recipe.training)
    network = networks.load(people_training.train(folder / "training", pool, options))
    people_training.train_discriminator(
        network, people_training.FrontTraining(steps=recipe.discriminator_steps)
    )
    networks.save(folder / NETWORK, network)
    say(f"wrote {folder / NETWORK}")
    return folder / NETWORK


@click.command("python -m builders.people", cls=GroupedCommand)
@option(
    "--edition",
    type=click.Choice([str(edition) for edition in RECIPES]),
    default="4",
    group="Data",
    help="Edition of the heads.",
)
@option(
    "--heads",
    metavar="NUM",
    type=click.IntRange(min=HEADS_PER_FILE),
    default=None,
    show_default="3000 for edition 4, 1600 for edition 3, 100 with --trial",
    group="Data",
    help=f"Number of heads in the pool, a multiple of {HEADS_PER_FILE}. 1,000 heads take 0.33 GB of memory.",
)
@option(
    "--trial",
    is_flag=True,
    group="Run",
    help=f"Train {sum(TRIAL['steps'])} steps on {TRIAL_HEADS} heads, to see that all parts work.",
)
@option(
    "--threads",
    metavar="NUM",
    type=click.IntRange(min=1),
    default=1,
    group="Run",
    help="Number of threads. The weights differ slightly between numbers of threads.",
)
@option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    show_default="runs/assets/people<edition>",
    group="Run",
    help="Folder of the pool, the checkpoints, the renders and the network file. A run that was interrupted"
    " is continued.",
)
@dry_run
def people(
    edition: str, heads: int | None, trial: bool, threads: int, outdir: Path | None, dry_run: bool
) -> None:
    """Train a generator of synthetic heads from scratch.

    The folder holds training/log.jsonl with the losses, training/renders with images of eight latents from
    the front, the side and the back above the ground truth, and training/network.safetensors, the network of
    the last checkpoint. The pool needs the package warp-lang (pip install '.[assets]').

    \b
    Example:
        python -m builders.people --trial
    """
    recipe = RECIPES[int(edition)]
    if trial:
        recipe = trial_of(recipe)
    if heads is not None:
        if heads % HEADS_PER_FILE:
            raise ValueError(
                f"--heads: expected a multiple of {HEADS_PER_FILE}, got {heads}. Use"
                f" {heads // HEADS_PER_FILE * HEADS_PER_FILE}."
            )
        recipe = replace(recipe, heads=heads)
    folder = outdir or RUNS / f"people{edition}"
    if dry_run:
        from builders.people_training import PeopleTraining

        training = asdict(PeopleTraining(**recipe.training))
        click.echo(json.dumps({"outdir": str(folder), **asdict(recipe), "training": training}, indent=1))
        return
    import torch

    torch.set_num_threads(threads)
    make_generator(folder, recipe, click.echo)


if __name__ == "__main__":
    people()
