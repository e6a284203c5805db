"""Train the bundled prior of score distillation: a small U-Net on four views of procedural objects (a minute on one core).

\b
Example:
    python tools/train_view_prior.py --steps=800 --out=runs/view-prior.safetensors
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

import _repository  # noqa: F401
import click
import torch
from tqdm import tqdm

from eg3d_rlhf.core.bundled import VIEW_PRIOR
from eg3d_rlhf.core.cli import GroupedCommand, option, options_of
from eg3d_rlhf.tuning.distill.priors.tiny_unet import PriorTraining, train


@click.command(cls=GroupedCommand, help=__doc__)
@option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), default=VIEW_PRIOR, show_default="the bundled file",
        help="Where to save it, as .safetensors.")
@options_of(PriorTraining)
@option("--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
def main(out: Path, dry_run: bool, **flags) -> None:
    settings = PriorTraining(**{name: value for name, value in flags.items() if value is not None})
    if out.suffix != ".safetensors":
        raise click.UsageError(f"--out: expected a name ending in .safetensors, got {out.name}. Rename it.")
    if dry_run:
        click.echo(json.dumps(asdict(settings), indent=1))
        return
    torch.set_num_threads(1)  # sums come out the same on every machine of one kind
    losses, started = [], time.monotonic()
    with tqdm(total=settings.steps, unit="step") as bar:

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            bar.update(step + 1 - bar.n)

        prior = train(settings, on_step)
    last = losses[-max(len(losses) // 20, 1) :]
    found = {"loss": sum(last) / len(last)}
    out.parent.mkdir(parents=True, exist_ok=True)
    prior.save(out, {**asdict(settings), **found})
    parameters = sum(p.numel() for p in prior.network.parameters())
    click.echo(f"{parameters} parameters, loss {found['loss']:.4f}, {time.monotonic() - started:.0f} s, saved to {out}")


if __name__ == "__main__":
    main()
