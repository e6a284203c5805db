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
from eg3d_rlhf.tuning.flow.toy.names import PROMPTS, STRUCTURE, VOXELS
from eg3d_rlhf.tuning.flow.toy.toy_oracles import Judged, LearnedReward, RewardTraining, fit, judge_drafts
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import ToyPipeline, draw_drafts


@dataclass(frozen=True, kw_only=True)
class BaseTraining:
    """Settings for training a base network on drafts, the randomly sampled objects of the toy generator."""

    steps: int = 2500
    batch: int = 32
    lr: float = 3e-3  # peak learning rate of AdamW; it decays to 0 along a cosine
    warm_up: int = 50  # steps in which the learning rate rises linearly to its peak
    ema: float = 0.99  # decay per step of the moving average of the weights, which is stored
    no_condition: float = 0.1  # share of samples that are trained with the empty conditioning
    seed: int = 0


# Settings of the bundled base networks, by stage.
BASES = {STRUCTURE: BaseTraining(steps=7000, batch=64), VOXELS: BaseTraining(steps=4000)}


def train_base(
    stage_name: str, training: BaseTraining, on_step: Callable[[int, int, float], None] | None = None
) -> nn.Module:
    """Train a base network by flow matching (Lipman et al. 2023) on new drafts of random prompts.

    Args:
        stage_name: name of the stage.
        training: settings.
        on_step: function that is called after every step with (step, steps, mean loss of the batch).
    Returns: network with the moving average of the weights, in eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        pipeline = ToyPipeline(StructureFlow(), VoxelFlow())
    stage = stage_of(pipeline, stage_name)
    # Data have another seed than the initialisation.
    generator = torch.Generator().manual_seed(training.seed + 1)
    average_model = torch.optim.swa_utils.AveragedModel(
        stage.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(training.ema)
    )
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=training.lr, weight_decay=0.01)
    lr_schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=training.warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(training.steps - training.warm_up, 1)),
        ],
        [training.warm_up],
    )
    for step in range(1, training.steps + 1):
        indices = torch.randint(len(PROMPTS), (training.batch,), generator=generator)
        prompts = [PROMPTS[i] for i in indices.tolist()]  # prompts
        x_0: Batch = draw_drafts(prompts, generator).latents(stage.name)
        eps = with_feats(x_0, torch.randn(feats_of(x_0).shape, generator=generator))
        t = stage.path.times(count(x_0), generator)
        cond = pipeline.conditioning(prompts, stage.name)
        # True for samples that keep their conditioning; for others, zeros are the empty conditioning.
        has_prompt = torch.rand(len(prompts), generator=generator) >= training.no_condition
        x_t = stage.path.mix(x_0, t, eps)
        # A new batch object: data that depend on the voxels are cached in it, and are valid for this step
        # only.
        if isinstance(x_t, SparseBatch):
            x_t = SparseBatch(x_t.coords, x_t.feats, x_t.size)
        loss = stage.path.errors(stage.model(x_t, t, cond * has_prompt.view(-1, 1, 1)), x_0, eps).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        optimizer.step()
        lr_schedule.step()
        average_model.update_parameters(stage.model)
        if on_step is not None:
            on_step(step, training.steps, float(loss.detach()))
    return average_model.module.eval()


def save_network(name: str, network: nn.Module, meta: dict, folder: Path = FOLDER) -> Path:
    """Store a network in half precision and return the path of the file.

    Args:
        name: name of the network, such as a stage.
        network: network to store.
        meta: description in JSON types, stored in the file.
        folder: folder of the file.
    """
    write_network(path_of(name, folder), name, network.state_dict(), meta)
    return path_of(name, folder)


def train_reward(
    training: RewardTraining, on_step: Callable[[int, int, float], None] | None = None
) -> tuple[LearnedReward, dict]:
    """Train the learned reward on pairs of drafts that a simulated annotator labelled.

    Args:
        training: settings.
        on_step: function that is called after every step with (step, steps, loss).
    Returns: reward, and its accuracy on held-out pairs; see `accuracy`.
    """
    generator = torch.Generator().manual_seed(training.seed)
    # Prompts of the pairs, each of the training prompts in turn.
    train_prompts = [toy.TRAINED[i % len(toy.TRAINED)] for i in range(training.pairs)]
    held_out_prompts = [toy.TRAINED[i % len(toy.TRAINED)] for i in range(training.held_out)]
    # Both are labelled before the fit, because they use the same generator.
    train_pairs = judge_drafts(train_prompts, generator)
    held_out_pairs = judge_drafts(held_out_prompts, generator)
    network = fit(*train_pairs.assets, train_pairs.prompts, training, generator, on_step)
    return network, accuracy(network, held_out_pairs)


def accuracy(network: LearnedReward, judged: Judged) -> dict[str, float]:
    """Compute the accuracy of a reward on labelled pairs.

    Returns: "labels", the share of pairs in which the reward prefers the same asset as the simulated
        annotator; and "clean", the share in which it prefers the same asset as the annotator without label
        noise.
    """
    # The annotator preferred the first asset of every pair.
    prefers_chosen = network(judged.assets[0], judged.prompts) > network(judged.assets[1], judged.prompts)
    return {
        "labels": float(prefers_chosen.float().mean()),
        "clean": float((prefers_chosen == judged.agrees).float().mean()),
    }


TOY_PARTS = (STRUCTURE, VOXELS, "reward")
_training_option = functools.partial(option, group="Training")


def make_toy(network_name: str, training: BaseTraining | RewardTraining, out: Path) -> None:
    """Train a network of the toy generator, save it, and print its loss and accuracy.

    Args:
        network_name: name of the network: a stage, or "reward".
        training: settings.
        out: folder of the file.
    """
    losses: list[float] = []
    start_time = time.monotonic()
    network: torch.nn.Module
    with command.loss_bar(network_name, losses) as on_step:
        if isinstance(training, RewardTraining):
            network, metrics = train_reward(training, on_step)
        else:
            network = train_base(network_name, training, on_step)
            metrics = {}
    metrics = {"loss": command.final_loss(losses), **metrics}
    path = save_network(network_name, network, {"training": asdict(training), **metrics}, out)
    metrics_text = ", ".join(f"{name} {metric_value:.4f}" for name, metric_value in metrics.items())
    click.echo(f"{network_name}: {metrics_text}, {time.monotonic() - start_time:.0f} s, saved to {path}")


@click.command("python -m builders.toy_flow", cls=GroupedCommand)
@click.argument("parts", nargs=-1, type=click.Choice(TOY_PARTS))
@option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=FOLDER,
    show_default="the bundled files",
    group="Run",
    help="Folder into which the networks are written.",
)
@_training_option(
    "--steps",
    metavar="INT",
    type=click.IntRange(min=1),
    show_default="as for the bundled networks",
    help="Training steps of the networks of both stages. The reward is not affected.",
)
@_training_option(
    "--seed",
    metavar="INT",
    type=click.IntRange(min=0),
    default=0,
    help="Random seed of the initial weights and of the training data.",
)
@command.dry_run
def toy_flow(parts: tuple[str, ...], outdir: Path, steps: int | None, seed: int, dry_run: bool) -> None:
    """Train the bundled networks of the toy flow generator. PARTS are structure, voxels and reward; without
    PARTS, all three are trained, which takes a quarter of an hour on one core.

    \b
    Example:
        python -m builders.toy_flow reward --dry-run
    """
    trainings: dict[str, BaseTraining | RewardTraining] = {
        network_name: replace(base, seed=seed, steps=steps or base.steps)
        for network_name, base in BASES.items()
    }
    trainings["reward"] = RewardTraining(seed=seed)
    chosen_trainings = {network_name: trainings[network_name] for network_name in parts or TOY_PARTS}
    if dry_run:
        click.echo(
            json.dumps(
                {network_name: asdict(training) for network_name, training in chosen_trainings.items()},
                indent=1,
            )
        )
        return
    # With one thread, sums have the same order on every machine of one kind.
    torch.set_num_threads(1)
    for network_name, training in chosen_trainings.items():
        make_toy(network_name, training, outdir)


if __name__ == "__main__":
    toy_flow()
