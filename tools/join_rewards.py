"""Join rewards into one file whose score is an aggregate of theirs, for train.py --reward-ckpt.

Members are put on one scale by their scores of the same untuned samples. They should differ in their labels and in their initialisation;
five are usual. The reward that watches a run must not be among them.

\b
Example:
    python tools/join_rewards.py assets/reward.safetensors assets/reward-watch.safetensors --out=runs/example/joined.safetensors
"""

import json
from pathlib import Path

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option
from eg3d_rlhf.core.seeds import SCALES
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.rewards.ensembles import CHOICES
from eg3d_rlhf.rewards.join import join
from eg3d_rlhf.rewards.reward import load_reward


@click.command(cls=GroupedCommand, help=__doc__)
@click.argument("rewards", metavar="REWARD...", nargs=-1, required=True, type=click.Path(path_type=Path))
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), required=True,
        help="Reward to write (.safetensors; its description is written beside it as .json).")
@option("--aggregate", type=click.Choice(CHOICES), default="softmin",
        help="What the members become; warm is the mean of their weights, for members that share a trained start.")
@option("--strength", metavar="FLOAT", type=click.FloatRange(min=0, min_open=True), default=None, show_default="1, 0.5, 0.5",
        help="k of lcb, lambda of uwo, beta of softmin.")
@option("--network", metavar="PATH", type=click.Path(path_type=Path), default=None, show_default="the bundled generator",
        help="The rewards' generator, untuned: network file or run folder.")
@option("--batch", metavar="INT", type=click.IntRange(min=1), default=16, help="Samples at once.")
@option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where generator and rewards run.")
@option("-n", "--dry-run", is_flag=True, help="Check and join everything, print the description as JSON, write nothing.")
def main(rewards, out, aggregate, strength, network, batch, device, dry_run) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name ending in .safetensors, got {out.name}. Rename it.")
    twice = next((path for i, path in enumerate(rewards) if path in rewards[:i]), None)
    if twice is not None:
        raise ValueError(f"REWARD: expected different files, got {twice} again. Leave one out.")
    named = {str(path): load_reward(path, choose_device(device)) for path in rewards}
    with naming("--network"):
        generator = load_generator(network, choose_device(device))
    with tqdm(total=SCALES.count, desc="scales", unit="shape", dynamic_ncols=True) as bar:
        joined = join(named, generator, aggregate, strength, batch, bar.update)
    if dry_run:
        click.echo(json.dumps(joined.describe(), indent=1))
        return
    path, known = joined.save(out), joined.provenance
    click.echo(f"{path}: {aggregate} of {len(known['joined'])} members; mean {known['score_mean']:.3f}, deviation {known['score_std']:.3f} "
               f"over {SCALES.count} untuned samples")


if __name__ == "__main__":
    main()
