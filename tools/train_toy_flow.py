"""Train the bundled networks of the toy flow generator: both stages and the learned reward (a quarter of an hour on one core).

\b
Example:
    python tools/train_toy_flow.py reward --dry-run
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import _repository  # noqa: F401
import click
import torch
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.tuning.flow.toy.bundled import BASES, FOLDER, BaseTraining, save_network, train_base
from eg3d_rlhf.tuning.flow.toy.judges import RewardTraining, train_reward
from eg3d_rlhf.tuning.flow.toy.pipeline import STRUCTURE, VOXELS

PARTS = (STRUCTURE, VOXELS, "reward")


def make(part: str, training: BaseTraining | RewardTraining, out: Path) -> None:
    """Train one network with a bar, store it, print how it did."""
    losses, started = [], time.monotonic()
    with tqdm(unit="step", desc=part) as bar:

        def on_step(step: int, steps: int, loss: float) -> None:
            losses.append(loss)
            bar.total = steps
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        if isinstance(training, RewardTraining):
            network: torch.nn.Module
            network, found = train_reward(training, on_step)
        else:
            network, found = train_base(part, training, on_step), {}
    last = losses[-max(len(losses) // 20, 1) :]
    found = {"loss": sum(last) / len(last), **found}
    path = save_network(part, network, {"training": asdict(training), **found}, out)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    click.echo(f"{part}: {figures}, {time.monotonic() - started:.0f} s, saved to {path}")


@click.command(cls=GroupedCommand, help=__doc__)
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@option("--out", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=FOLDER, show_default="the bundled files",
        help="Where to save the networks.")
@option("--steps", metavar="INT", type=click.IntRange(min=1), show_default="as the bundled ones",
        help="Steps of each stage.", group="Training")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Seed of initialisation and data.", group="Training")
@option("--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(parts: tuple[str, ...], out: Path, steps: int | None, seed: int, dry_run: bool) -> None:
    reward = RewardTraining(seed=seed)
    bases = {part: replace(one, seed=seed, steps=steps or one.steps) for part, one in BASES.items()}
    settings = {part: reward if part == "reward" else bases[part] for part in parts or PARTS}
    if dry_run:
        click.echo(json.dumps({part: asdict(one) for part, one in settings.items()}, indent=1))
        return
    torch.set_num_threads(1)  # sums come out the same on every machine of one kind
    for part, training in settings.items():
        make(part, training, out)


if __name__ == "__main__":
    main()
