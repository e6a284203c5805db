"""Train the bundled feature network on synthetic heads and print how its distances respond to damage (a few minutes on two cores).

\b
Example:
    python tools/train_features.py --check-only --check-data=synthetic:heads64@n=256
"""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import _repository  # noqa: F401
import click
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.measures.feature_training import FeatureTraining, adequacy, factors, read_images, train_features
from eg3d_rlhf.measures.features import DEFAULT_ASSET, load_features
from training.synthetic_heads import load_truth, resolve_dataset


@click.command(cls=GroupedCommand, help=__doc__)
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_ASSET, show_default="the bundled asset",
        help="Where to save the network (.safetensors; a .json record is written beside it).")
@option("--data", metavar="NAME", default="synthetic:heads64@n=6000,seed=71", help="Synthetic heads to train on.", group="Training")
@option("--epochs", metavar="INT", type=click.IntRange(min=1), default=FeatureTraining.epochs, help="Passes over them.", group="Training")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Seed of initialisation, order and damage.", group="Training")
@option("--check-data", metavar="NAME", default="synthetic:heads64", help="Reals of the damage table; halves are compared.", group="Check")
@option("--check-only", is_flag=True, group="Check",
        help="Print the table for the network at --out (also a TorchScript Inception) without training.")
@option("--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(out: Path, data: str, check_data: str, epochs: int, seed: int, check_only: bool, dry_run: bool) -> None:
    options = FeatureTraining(epochs=epochs, seed=seed)
    if dry_run:
        click.echo(json.dumps({"out": out.name, "data": data, "check_data": check_data, **asdict(options)}, indent=1))
        return
    if check_only:
        network = load_features(out)
    else:
        path = resolve_dataset(data)
        images, targets = read_images(path), factors(load_truth(path))
        with tqdm(unit="step", desc="features") as bar:

            def on_step(step: int, steps: int, loss: float) -> None:
                bar.total = steps
                bar.update(step - bar.n)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

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


if __name__ == "__main__":
    main()
