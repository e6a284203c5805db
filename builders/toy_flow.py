"""Train the bundled networks of the toy flow generator: python -m builders.toy_flow"""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from torch import nn

from builders import command
from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.models.sparse import Batch, SparseBatch, count, feats_of, with_feats
from eg3d_rlhf.tuning.flow.base.stage import stage_of
from eg3d_rlhf.tuning.flow.toy import toy_pipeline as toy
from eg3d_rlhf.tuning.flow.toy.bundled import FOLDER, StructureFlow, VoxelFlow, path_of, write_network
from eg3d_rlhf.tuning.flow.toy.names import CONDITIONS, STRUCTURE, VOXELS
from eg3d_rlhf.tuning.flow.toy.toy_oracles import Judged, LearnedReward, RewardTraining, fit, judge_drafts
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import ToyPipeline, draw_drafts


@dataclass(frozen=True, kw_only=True)
class BaseTraining:
    """Settings of training the base networks on drafts."""

    steps: int = 2500
    batch: int = 32
    lr: float = 3e-3  # of AdamW, after a warm-up, falling to 0 along a cosine
    warm_up: int = 50  # steps
    ema: float = 0.99  # kept of the average per step; the average is what is stored
    no_condition: float = 0.1  # share of samples that are trained without their conditioning
    seed: int = 0


# of the bundled ones
BASES = {STRUCTURE: BaseTraining(steps=7000, batch=64), VOXELS: BaseTraining(steps=4000)}


def train_base(
    stage_name: str, training: BaseTraining, on_step: Callable[[int, int, float], None] | None = None
) -> nn.Module:
    """Train a base network by flow matching on new drafts of all prompts; return the average of the weights.

    Args: on_step: called with (step, steps, mean loss of the batch).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        pipeline = ToyPipeline(StructureFlow(), VoxelFlow())
    stage = stage_of(pipeline, stage_name)
    generator = torch.Generator().manual_seed(training.seed + 1)
    average = torch.optim.swa_utils.AveragedModel(
        stage.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(training.ema)
    )
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=training.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=training.warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(training.steps - training.warm_up, 1)),
        ],
        [training.warm_up],
    )
    for step in range(1, training.steps + 1):
        names = [
            CONDITIONS[i]
            for i in torch.randint(len(CONDITIONS), (training.batch,), generator=generator).tolist()
        ]
        x_0: Batch = draw_drafts(names, generator).latents(stage.name)
        eps = with_feats(x_0, torch.randn(feats_of(x_0).shape, generator=generator))
        t = stage.path.times(count(x_0), generator)
        cond = pipeline.conditions(names, stage.name)
        known = torch.rand(len(names), generator=generator) >= training.no_condition
        x_t = stage.path.mix(x_0, t, eps)
        # a batch of its own: every step computes what depends on its voxels once and for itself
        if isinstance(x_t, SparseBatch):
            x_t = SparseBatch(x_t.coords, x_t.feats, x_t.size)
        loss = stage.path.errors(stage.model(x_t, t, cond * known.view(-1, 1, 1)), x_0, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(stage.model)
        if on_step is not None:
            on_step(step, training.steps, float(loss.detach()))
    return average.module.eval()


def save_network(name: str, network: nn.Module, meta: dict, folder: Path = FOLDER) -> Path:
    """Store as half precision with a description."""
    write_network(path_of(name, folder), name, network.state_dict(), meta)
    return path_of(name, folder)


def train_reward(
    training: RewardTraining, on_step: Callable[[int, int, float], None] | None = None
) -> tuple[LearnedReward, dict]:
    """Train the reward by preference_loss; return it, and its accuracy on pairs that it has not seen.

    Args: on_step: called with (step, steps, loss).
    """
    generator = torch.Generator().manual_seed(training.seed)
    names = [
        [toy.TRAINED[i % len(toy.TRAINED)] for i in range(n)] for n in (training.pairs, training.held_out)
    ]
    judged = [judge_drafts(prompts, generator) for prompts in names]
    network = fit(*judged[0].assets, judged[0].conditions, training, generator, on_step)
    return network, accuracy(network, judged[1])


def accuracy(network: LearnedReward, judged: Judged) -> dict[str, float]:
    """Return the share of pairs ordered as the simulated annotator chose, and as its oracle orders."""
    ordered = network(judged.assets[0], judged.conditions) > network(judged.assets[1], judged.conditions)
    return {
        "labels": float(ordered.float().mean()),
        "clean": float((ordered == judged.agrees).float().mean()),
    }


TOY_PARTS = (STRUCTURE, VOXELS, "reward")
_training_option = functools.partial(option, group="Training")


def make_toy(part: str, training: BaseTraining | RewardTraining, out: Path) -> None:
    """Train a network of the toy generator, save it, and print its figures."""
    losses: list[float] = []
    started = time.monotonic()
    network: torch.nn.Module
    with command.loss_bar(part, losses) as on_step:
        if isinstance(training, RewardTraining):
            network, figures = train_reward(training, on_step)
        else:
            network = train_base(part, training, on_step)
            figures = {}
    figures = {"loss": command.last(losses), **figures}
    path = save_network(part, network, {"training": asdict(training), **figures}, out)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    click.echo(f"{part}: {shown}, {time.monotonic() - started:.0f} s, saved to {path}")


@click.command("python -m builders.toy_flow", cls=GroupedCommand)
@click.argument("parts", nargs=-1, type=click.Choice(TOY_PARTS))
@option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=FOLDER,
    show_default="the bundled files",
    group="Run",
    help="Folder to write the networks into.",
)
@_training_option(
    "--steps",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="as the bundled ones",
    help="Steps of each stage.",
)
@_training_option(
    "--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Seed of initialisation and data."
)
@command.dry_run
def toy_flow(parts: tuple[str, ...], outdir: Path, steps: int | None, seed: int, dry_run: bool) -> None:
    """Train the bundled networks of the toy flow generator: both stages and the learned reward
    (a quarter of an hour on one core).

    \b
    Example:
        python -m builders.toy_flow reward --dry-run
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


if __name__ == "__main__":
    toy_flow()
