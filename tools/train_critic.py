"""Train the shape critic, and the features of the shape Fréchet distance, on normal maps of true heads and of generators' shapes.

The critic learns to tell true heads from the shapes of the networks that --fakes names: early and varied ones, never the network that it
is to judge. One thread, so that the same command writes the same bytes on the same machine.

\b
Example:
    python tools/train_critic.py --fakes=assets/generator.safetensors --latents=8 --heads=40 --reference=40 --out=runs/critic.safetensors
"""

import json
from dataclasses import asdict
from pathlib import Path

import _repository  # noqa: F401
import click
import torch
from tqdm import tqdm

from eg3d_rlhf.core.cli import GroupedCommand, naming, option, options_of
from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.seeds import CRITIC
from eg3d_rlhf.generators import LoadedGenerator, load_generator
from eg3d_rlhf.measures.critic_training import CriticTraining, fake_maps, train_critic, true_maps
from eg3d_rlhf.measures.shape_critic import DEFAULT_ASSET, ShapeCritic
from eg3d_rlhf.measures.true_heads import true_shapes

REFERENCE, TRAINED = 1_000, 10_000  # first of the true heads behind the Fréchet distance, and of those that are learnt from


def networks(paths: tuple[Path, ...]) -> dict[str, LoadedGenerator]:
    """The networks by 'folder/file'. Raises: ValueError naming --fakes."""
    found: dict[str, LoadedGenerator] = {}
    with naming("--fakes"):
        for path in paths:
            loaded = load_generator(path)
            name = f"{loaded.path.resolve().parent.name}/{loaded.path.name}"
            if name in found or loaded.hash in {other.hash for other in found.values()}:
                raise ValueError(f"expected different networks, got {name} twice. Name each once.")
            if loaded.generator.bounds != Bounds():
                raise ValueError(f"expected generators of heads in the unit cube, got {loaded.generator.bounds} in {name}. Name others.")
            found[name] = loaded
    return found


def train(fakes: dict[str, LoadedGenerator], o: CriticTraining) -> ShapeCritic:
    """Draw all shapes and train."""
    shape, count = true_shapes(o.heads, TRAINED), o.latents * len(fakes)
    if count > o.heads:
        raise ValueError(f"--heads: expected at least as many true heads as there are fakes, {count}, got {o.heads}. Raise it.")
    seeds = {name: range(CRITIC + i * o.latents, CRITIC + (i + 1) * o.latents) for i, name in enumerate(fakes)}
    with tqdm(total=count + o.heads + o.reference, desc="normal maps", unit="shape") as bar:
        drawn = {name: fake_maps(loaded.generator, seeds[name], on_shape=bar.update) for name, loaded in fakes.items()}
        true, reference = (true_maps(one, Bounds(), bar.update) for one in (shape, true_shapes(o.reference, REFERENCE)))
    print(f"Training the critic on maps of {2 * count:,} shapes and the features on those of {o.heads:,} heads.", flush=True)
    critic = train_critic(true, shape, reference, drawn, o)
    critic.record["fakes"] = [
        {"network": name, "hash": loaded.hash, "images": loaded.nets.cur_nimg, "seeds": [seeds[name][0], seeds[name][-1]]}
        for name, loaded in fakes.items()
    ]
    return critic


def table(record: dict) -> list[str]:
    """Held-out figures, line by line."""
    low, high = record["accuracy_ci95"]
    lines = [f"accuracy on {record['held_out']} held-out shapes: {record['accuracy']:.3f} [{low:.3f}, {high:.3f}]"]
    lines += [f"  Brier score {record['brier']:.4f}"]
    lines += [f"  predicted {b['from']:.1f} to {b['to']:.1f}: {b['n']:5d} shapes, mean {b['predicted']:.3f}, true heads {b['observed']:.3f}"
              for b in record["calibration"]]
    lines += [f"  mean logit {value:+.2f}: {name}" for name, value in record["mean_logits"].items()]
    lines += [f"  shape Fréchet distance {value:.3f}: {name}" for name, value in record["frechet"].items()]
    return [*lines, f"the features' network explains {record['shape_parameters_explained']:.3f} of the shape parameters' variance"]


@click.command(cls=GroupedCommand, help=__doc__)
@option("--fakes", "paths", metavar="FILE", type=click.Path(path_type=Path), multiple=True, required=True, group="Data",
        help="Network whose shapes are fakes; give it several times.")
@options_of(CriticTraining)
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_ASSET, show_default="the bundled asset",
        help="Where to save (.safetensors; a .json record is written beside it).")
@option("--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(paths: tuple[Path, ...], out: Path, dry_run: bool, **settings) -> None:
    options = CriticTraining(**{name: value for name, value in settings.items() if value is not None})
    if dry_run:
        click.echo(json.dumps({"fakes": [str(path) for path in paths], "out": out.name, **asdict(options)}, indent=1))
        return
    torch.set_num_threads(1)
    critic = train(networks(paths), options)
    critic.save(out)
    click.echo("\n".join([*table(critic.record), f"saved to {out}"]))


if __name__ == "__main__":
    main()
