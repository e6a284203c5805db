"""Train the bundled prior of score distillation: python -m builders.view_prior

The prior is a small U-Net that denoises four views of procedural objects. A prompt describes an object; each
view shows one of two modes of the prompt.

Shapes: A number of objects. Latents of an object are [4 views, 4 channels, 16, 16].
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
from eg3d_rlhf.core.cli import GroupedCommand, options_from_settings
from eg3d_rlhf.generators.assets.views import DISTANCE, evenly_around, network_cameras
from eg3d_rlhf.rewards.box_prompts import PROMPTS
from eg3d_rlhf.rewards.boxes import SIDES, modes
from eg3d_rlhf.tuning.distill.priors.tiny_unet import PIXEL_NOISE, TinyPrior, TinySizes, TinyUNet
from eg3d_rlhf.tuning.distill.schedules_by_step import STEPS
from training.config import Knobs, knob

TRAINING = "Training"
_COLOUR_JITTER = 0.05  # standard deviation of the colours of an object, in latents of -1..1
_VIEWS_SHAPE = (SIDES, 4, 16, 16)  # latents of the views of an object
_AVERAGE = 0.99  # decay of the weights' moving average
# Added to the variance s^2 of the noise in the weight of the loss, 1 / (s^2 + 0.1). Without it, the times
# with the least noise would have by far the largest weight.
_FLOOR = 0.1


@dataclass(frozen=True, kw_only=True)
class PriorTraining(Knobs):
    """Settings for training the prior."""

    steps: int = knob(1500, "Number of training steps.", TRAINING, low=1)
    assets: int = knob(
        24, "Number of objects per training step; each has four views.", TRAINING, low=1, rare=True
    )
    rate: float = knob(
        0.012,
        "Initial learning rate of Adam. It decays to 0 along a cosine.",
        TRAINING,
        low=0,
        rare=True,
    )
    no_prompt: float = knob(
        0.15,
        "Share of objects that are trained with the empty prompt, as guidance needs.",
        TRAINING,
        low=0,
        high=1,
        rare=True,
    )
    seed: int = knob(0, "Random seed of the initial weights and of the training data.", TRAINING, low=0)


def reflect_between_modes(latents: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Reflect latents [A, 4, 4, 16, 16] along the difference between the two modes of their prompts.

    A reflection is orthogonal, so the distribution of normal noise does not change.

    Args:
        latents: latents or noise of the objects.
        prompt: index of each object's prompt, [A].
    """
    # modes() lists two modes per prompt, one after the other.
    difference = (modes()[::2] - modes()[1::2])[prompt][:, None]  # [A, 1, 4, 16, 16]
    direction = difference / difference.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
    return latents - 2 * (latents * direction).sum((2, 3, 4), keepdim=True) * direction


def draw(object_count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample latents of procedural objects from four views, and their prompts.

    Each view shows one of the two modes of the prompt. A random colour is added to an object, and independent
    noise to its pixels. Every second object is the opposite of the previous one: its views show the other
    modes, and its variation is reflected. Both modes are therefore equally frequent.

    Args:
        object_count: A, number of objects.
        generator: random generator.
    Returns: latents [A, 4, 4, 16, 16], and indices of the prompts [A].
    """
    # Two successive objects have the same prompt; an odd number of objects leaves out the last one.
    prompt = torch.randint(len(PROMPTS), ((object_count + 1) // 2,), generator=generator).repeat_interleave(
        2
    )[:object_count]
    mode = torch.randint(2, (object_count, SIDES), generator=generator)
    colour = _COLOUR_JITTER * torch.randn(object_count, 1, 4, 1, 1, generator=generator)
    variation = colour + PIXEL_NOISE * torch.randn(object_count, *_VIEWS_SHAPE, generator=generator)
    # Objects 1, 3, ... become the opposites of objects 0, 2, ...
    mode[1::2] = 1 - mode[: object_count - 1 : 2]
    variation[1::2] = reflect_between_modes(variation[: object_count - 1 : 2], prompt[1::2])
    # Index of a mode in modes(): two modes per prompt.
    return modes()[2 * prompt[:, None] + mode] + variation, prompt


def draw_noise(
    prompt: torch.Tensor, settings: PriorTraining, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample the noise of a training step for objects from `draw`.

    The opposite of an object has the same mask and time, and the reflected noise.

    Args:
        prompt: indices of the prompts [A].
        settings: settings, of which no_prompt is used.
        generator: random generator.
    Returns: mask [A] of objects that are trained with the empty prompt, times [A], and noise [A, 4, 4, 16,
        16].
    """
    object_count = len(prompt)
    is_withheld = torch.rand(object_count, generator=generator) < settings.no_prompt
    t = (torch.rand(object_count, generator=generator) * STEPS).long()
    noise = torch.randn(object_count, *_VIEWS_SHAPE, generator=generator)
    is_withheld[1::2] = is_withheld[: object_count - 1 : 2]
    t[1::2] = t[: object_count - 1 : 2]
    noise[1::2] = reflect_between_modes(noise[: object_count - 1 : 2], prompt[1::2])
    return is_withheld, t, noise


def train(
    settings: PriorTraining, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> TinyPrior:
    """Train a prior, and return it with the moving average of its weights.

    The loss is the squared error of the predicted clean latents x_0, divided by s^2 + 0.1, where s^2 is the
    variance of the noise. Times are uniform.

    Args:
        settings: settings.
        on_step: function that is called after every step with the index of the step, from 0, and the loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = TinyUNet(TinySizes(), [prompt.text for prompt in PROMPTS])
    generator = torch.Generator().manual_seed(settings.seed)
    average_by_name = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    cameras = network_cameras(evenly_around(settings.assets, SIDES, DISTANCE).cameras)
    for step in range(settings.steps):
        x_0, prompt = draw(settings.assets, generator)
        is_withheld, t, noise = draw_noise(prompt, settings, generator)
        # Index len(PROMPTS) is the empty prompt. All views of an object have the same prompt.
        conditioning = torch.where(is_withheld, len(PROMPTS), prompt).repeat_interleave(SIDES)
        x_0 = x_0.flatten(0, 1)  # [4 A, 4, 16, 16]: the network denoises views
        noise = noise.flatten(0, 1)
        t = t.repeat_interleave(SIDES)
        x_t = network.schedule.mix(x_0, noise, t)
        predicted_x_0 = network(x_t, t, network.table(conditioning)[:, None], cameras)
        # s^2 = 1 - alpha, the variance of the noise.
        loss = ((predicted_x_0 - x_0).square() / (1 - network.schedule.alpha(t, x_0) + _FLOOR)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        # The decay is smaller in the first steps, so that the initial weights soon have no influence on the
        # average.
        decay = min(_AVERAGE, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            average_by_name[name].lerp_(tensor, 1 - decay)
        on_step(step, float(loss.detach()))
    network.load_state_dict(average_by_name)
    return TinyPrior(network)


@click.command("python -m builders.view_prior", cls=GroupedCommand)
@command.out(VIEW_PRIOR)
@options_from_settings(PriorTraining)
@command.dry_run
def view_prior(out: Path, dry_run: bool, **flags) -> None:
    """Train the bundled prior of score distillation, a small U-Net that denoises four views of procedural
    objects. This takes a minute on one core.

    \b
    Example:
        python -m builders.view_prior --steps=800 --out=runs/view-prior.safetensors
    """
    # Flags that are not given are None; they keep the defaults.
    settings = PriorTraining(**{name: value for name, value in flags.items() if value is not None})
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: the name must end in .safetensors, got {out.name}. Pass another name.")
    if dry_run:
        click.echo(json.dumps(asdict(settings), indent=1))
        return
    # With one thread, sums have the same order on every machine of one kind.
    torch.set_num_threads(1)
    losses: list[float] = []
    start_time = time.monotonic()
    with command.loss_bar("view prior", losses) as on_step:
        prior = train(settings, lambda step, loss: on_step(step + 1, settings.steps, loss))
    metrics = {"loss": command.final_loss(losses)}
    out.parent.mkdir(parents=True, exist_ok=True)
    prior.save(out, {**asdict(settings), **metrics})
    parameter_count = sum(p.numel() for p in prior.network.parameters())
    click.echo(
        f"{parameter_count} parameters, loss {metrics['loss']:.4f}, {time.monotonic() - start_time:.0f} s,"
        f" saved to {out}"
    )


if __name__ == "__main__":
    view_prior()
