"""Convert the paper's released reward to this project's format, once, and show what its skewed training lattice makes of it.

SOURCE is the folder with best_model.pt and release_config.yaml (or run_config.yaml), the weights file itself, or the word
synthetic:reward for a small untrained one in the same layout. Nothing in the files is executed. The reward is then scored on samples of a
generator, on the straight grid and on the lattice of its training data.

\b
Example:
    python tools/import_reward.py synthetic:reward --out=runs/example/imported.safetensors --seeds=0-1
"""

import json
import statistics
import tempfile
from pathlib import Path

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option
from eg3d_rlhf.core.spec import LATTICES
from eg3d_rlhf.experiments.media.rendering import parse_seeds
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.rewards.release import WEIGHTS, compare_lattices, import_release, write_example
from eg3d_rlhf.rewards.reward import check_reward


@click.command(cls=GroupedCommand, help=__doc__)
@click.argument("source", metavar="SOURCE")
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), required=True,
        help="Reward to write (.safetensors; its description is written beside it as .json).")
@option("--config", metavar="FILE", type=click.Path(path_type=Path), default=None, show_default="the one beside the weights",
        help="Configuration of the release (YAML).", group="Release")
@option("--weights", metavar="NAME", default=WEIGHTS, help="Weights file inside a folder.", group="Release")
@option("--transform", type=click.Choice(["config", "published"]), default="config", group="Release",
        help="Grid and value range from the configuration, or the published 256 points and [0, 100].")
@option("--lattice", type=click.Choice(LATTICES), default="straight", group="Release",
        help="Lattice that the written reward reads; skewed is the one it was trained on, and several times slower.")
@option("--network", metavar="PATH", type=click.Path(path_type=Path), default=None, show_default="the bundled generator",
        help="Generator file or run folder to score.", group="Scores")
@option("--seeds", metavar="LIST", default="0-3", help="Seeds to score, such as 0,2-5, or none.", group="Scores")
@option("--psi", metavar="FLOAT", type=click.FloatRange(0, 2), default=1.0, help="Truncation.", group="Scores")
@option("--cutoff", metavar="INT", type=click.IntRange(min=0), default=14, help="ws that truncation reaches.", group="Scores")
@option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where generator and reward run.", group="Scores")
@option("--dry-run", is_flag=True, help="Read and check everything, print what was found as JSON, write and score nothing.")
def main(
    source: str, out: Path, config: Path | None, weights: str, transform: str, lattice: str, network: Path | None, seeds: str, psi: float,
    cutoff: int, device: str, dry_run: bool,
) -> None:
    with naming("--seeds"):
        chosen = [] if seeds == "none" else parse_seeds(seeds)
    with naming("SOURCE"), tempfile.TemporaryDirectory() as folder:
        reward = import_release(write_example(folder) if source == "synthetic:reward" else source, config, weights, transform, lattice)
    if dry_run:
        click.echo(json.dumps(reward.describe(), indent=1))
        return
    with naming("--out"):
        path = reward.save(out)
    parameters = sum(p.numel() for p in reward.parameters())
    click.echo(f"{path}: {parameters:,} parameters, slab {list(reward.observation.shape[1:])} (z, y, x), {lattice} lattice")
    if not chosen:
        return
    target = choose_device(device)
    with naming("--network"):
        generator = load_generator(network, target).generator
        check_reward(reward, generator)
    with tqdm(total=len(chosen), desc="scoring on both lattices", unit="seed") as bar:
        found = compare_lattices(reward.to(target), generator, chosen, psi, cutoff, on_seed=lambda scores: bar.update())
    click.echo(f"{'seed':>8}  {'straight':>12}  {'skewed':>12}  {'difference':>12}")
    means = (statistics.fmean(r.straight for r in found), statistics.fmean(r.skewed for r in found))
    for name, straight, skewed in (*found, ("mean", *means)):
        click.echo(f"{name:>8}  {straight:12.6f}  {skewed:12.6f}  {straight - skewed:+12.6f}")


if __name__ == "__main__":
    main()
