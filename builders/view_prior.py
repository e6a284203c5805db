"""Train the bundled prior of score distillation, a small U-Net on four views of procedural objects:
python -m builders.view_prior
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from builders import command
from eg3d_rlhf.core.bundled import VIEW_PRIOR
from eg3d_rlhf.core.cli import GroupedCommand, options_of
from eg3d_rlhf.generators.assets.views import DISTANCE, evenly_around, network_cameras
from eg3d_rlhf.rewards.box_prompts import PROMPTS
from eg3d_rlhf.rewards.boxes import SIDES, modes
from eg3d_rlhf.tuning.distill.priors.tiny_unet import PIXEL_NOISE, TinyPrior, TinySizes, TinyUNet
from eg3d_rlhf.tuning.distill.schedules_by_step import STEPS
from training.config import Knobs, knob

TRAINING = "Training"
_COLOUR_JITTER = 0.05  # of the training images, in latents of -1..1
_VIEWS_SHAPE = (SIDES, 4, 16, 16)  # latents of the views of an object
_AVERAGE = 0.99  # decay of the weights' moving average
_FLOOR = 0.1  # added to s^2 in the weight of the loss: keeps the last bit of noise from outweighing the rest


@dataclass(frozen=True, kw_only=True)
class PriorTraining(Knobs):
    """Settings of training the network."""

    steps: int = knob(1500, "Steps.", TRAINING, low=1)
    assets: int = knob(24, "Assets per step, four views each.", TRAINING, low=1, rare=True)
    rate: float = knob(
        0.012, "Peak learning rate; falls to nothing along a cosine.", TRAINING, low=0, rare=True
    )
    no_prompt: float = knob(
        0.15, "Share of assets whose prompt is withheld.", TRAINING, low=0, high=1, rare=True
    )
    seed: int = knob(0, "Of weights and data.", TRAINING, low=0)


def mirrored(values: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Reflect latents [A, 4, 4, 16, 16] along the difference between the two modes of their prompts [A].

    A reflection is orthogonal, so normal noise keeps its distribution.
    """
    apart = (modes()[::2] - modes()[1::2])[prompt][:, None]  # [A, 1, 4, 16, 16]
    apart = apart / apart.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    return values - 2 * (values * apart).sum((2, 3, 4), keepdim=True) * apart


def draw(assets: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample latents [A, 4, 4, 16, 16] of procedural objects seen from four sides, and their prompts [A].

    Each side shows one of the two modes of the prompt. Colours vary by object, pixels independently. Every
    second object is the reverse of the one before, in sides and variation, so that no mode is more frequent.
    """
    prompt = torch.randint(len(PROMPTS), ((assets + 1) // 2,), generator=rng).repeat_interleave(2)[:assets]
    side = torch.randint(2, (assets, SIDES), generator=rng)
    colour = _COLOUR_JITTER * torch.randn(assets, 1, 4, 1, 1, generator=rng)
    varied = colour + PIXEL_NOISE * torch.randn(assets, *_VIEWS_SHAPE, generator=rng)
    side[1::2] = 1 - side[: assets - 1 : 2]
    varied[1::2] = mirrored(varied[: assets - 1 : 2], prompt[1::2])
    return modes()[2 * prompt[:, None] + side] + varied, prompt


def draw_noise(
    prompt: torch.Tensor, settings: PriorTraining, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample for prompts [A] a mask of withheld prompts [A], times [A] and noises [A, 4, 4, 16, 16].

    The reverse of an object gets the same mask and time, and the mirrored noise.
    """
    assets = len(prompt)
    withheld = torch.rand(assets, generator=rng) < settings.no_prompt
    t = (torch.rand(assets, generator=rng) * STEPS).long()
    noise = torch.randn(assets, *_VIEWS_SHAPE, generator=rng)
    withheld[1::2] = withheld[: assets - 1 : 2]
    t[1::2] = t[: assets - 1 : 2]
    noise[1::2] = mirrored(noise[: assets - 1 : 2], prompt[1::2])
    return withheld, t, noise


def train(
    settings: PriorTraining, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> TinyPrior:
    """Train a prior; return it with the moving average of its weights.

    The loss is the squared error of x_0 divided by s^2 + 0.1, at times that are uniform.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = TinyUNet(TinySizes(), [prompt.text for prompt in PROMPTS])
    rng = torch.Generator().manual_seed(settings.seed)
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.rate, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    cameras = network_cameras(evenly_around(settings.assets, SIDES, DISTANCE).cameras)
    for step in range(settings.steps):
        x, prompt = draw(settings.assets, rng)
        withheld, t, noise = draw_noise(prompt, settings, rng)
        conditioning = torch.where(withheld, len(PROMPTS), prompt).repeat_interleave(SIDES)
        x = x.flatten(0, 1)
        noise = noise.flatten(0, 1)
        t = t.repeat_interleave(SIDES)
        clean = network(network.schedule.mix(x, noise, t), t, network.table(conditioning)[:, None], cameras)
        loss = ((clean - x).square() / (1 - network.schedule.alpha(t, x) + _FLOOR)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
        keep = min(_AVERAGE, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            average[name].lerp_(value, 1 - keep)
        on_step(step, float(loss.detach()))
    network.load_state_dict(average)
    return TinyPrior(network)


@click.command("python -m builders.view_prior", cls=GroupedCommand)
@command.out(VIEW_PRIOR)
@options_of(PriorTraining)
@command.dry_run
def view_prior(out: Path, dry_run: bool, **flags) -> None:
    """Train the bundled prior of score distillation: a small U-Net on four views of procedural objects
    (a minute on one core).

    \b
    Example:
        python -m builders.view_prior --steps=800 --out=runs/view-prior.safetensors
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
    with command.loss_bar("view prior", losses) as on_step:
        prior = train(settings, lambda step, loss: on_step(step + 1, settings.steps, loss))
    figures = {"loss": command.last(losses)}
    out.parent.mkdir(parents=True, exist_ok=True)
    prior.save(out, {**asdict(settings), **figures})
    parameters = sum(p.numel() for p in prior.network.parameters())
    click.echo(
        f"{parameters} parameters, loss {figures['loss']:.4f}, {time.monotonic() - started:.0f} s, saved to"
        f" {out}"
    )


if __name__ == "__main__":
    view_prior()
