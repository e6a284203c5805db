"""The smallest problem with an exact answer: 256 images of 4 x 4 are optimised directly against a mixture
of Gaussians.

Modes are permutations of one another and the null condition is symmetric in them: otherwise Adam or guidance
alone prefers one.
Letters: B = 256 images, one view each.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior
from eg3d_rlhf.tuning.distill.gradients import distillation_loss
from eg3d_rlhf.tuning.distill.guidance.sds import Sds
from eg3d_rlhf.tuning.distill.guidance.settings import SdsSettings
from eg3d_rlhf.tuning.distill.priors.gmm import GmmPrior
from eg3d_rlhf.tuning.distill.schedule import Streams, draw_times
from eg3d_rlhf.tuning.distill.schedules_by_step import TimeWindow

B = 256
PROMPT = "thing"
ROWS = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(1, 1, 4, 1).expand(1, 1, 4, 4)  # norm 4
STD = 0.2
BROAD = 0.6


def some(assets: int = 4, views: int = 1, step: int = 3):
    """Arguments of a guidance: images, times, prompts, no cameras, the step."""
    draws = torch.Generator().manual_seed(0)
    t = torch.randint(100, 900, (assets,), generator=draws).repeat_interleave(views)
    return torch.randn(assets * views, 1, 4, 4, generator=draws), t, [PROMPT] * (assets * views), None, step


def prior(modes: int = 2, std: float = STD, broad: float = BROAD) -> GmmPrior:
    """One or two narrow modes for the prompt; the null condition has them broad. Embeddings are logits of
    narrow and broad components.
    """
    means = torch.cat([ROWS, ROWS.transpose(2, 3)][:modes]).contiguous()
    on = torch.ones(modes)
    off = torch.full((modes,), -9.0)
    stds = torch.tensor([std] * modes + [broad] * modes)
    return GmmPrior(
        means.repeat(2, 1, 1, 1), stds, {PROMPT: torch.cat([on, off]), "": torch.cat([off, on])}, scale=2.0
    )


@dataclass
class Outcome:
    """Figures of one run."""

    share: float  # of images nearest to the first mode
    rms: float  # root mean square distance per entry to the nearest mode, whose entries are 1 and -1
    log_p: float  # median, in nats, against that of the mode itself
    near: float  # share within 3 nats of the mode
    x: torch.Tensor

    def __str__(self):
        return (
            f"share {self.share:.3f} rms {self.rms:.3f} log p {self.log_p:.2f} within 3 nats {self.near:.3f}"
        )


def optimise(
    guidance,
    made: DiffusionPrior,
    *,
    steps: int = 1200,
    lr: float = 0.02,
    seed: int = 0,
    window: TimeWindow | None = None,
    prompts: Sequence[str] = (PROMPT,) * B,
    measure: Callable | None = None,
):
    """Adam from small noise.

    Args: measure: makes the figures of images and prior; by default an `Outcome`.
    """
    window = window or TimeWindow()
    streams = Streams(seed=seed)
    x = (
        0.1 * torch.randn(len(prompts), *made.latent_shape, generator=streams.generator("start", 0))
    ).requires_grad_()
    adam = torch.optim.Adam([x], lr=lr)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - 0.9 * step / steps)
    for step in range(steps):
        t = draw_times(window, step, len(prompts) // made.views, made.views, streams.generator("t", step))
        adam.zero_grad()
        (distillation_loss(x, guidance(x.detach(), t, list(prompts), None, step)) * len(prompts)).backward()
        adam.step()
        rate.step()
    return (measure or measure_outcome)(x.detach(), made)


def measure_outcome(x: torch.Tensor, made: GmmPrior) -> Outcome:
    """Return the figures of images [B, 1, 4, 4]."""
    cond = made.embed([PROMPT] * len(x))
    index, rms = made.nearest(x)
    modes = len(made.means) // 2
    peak = made.log_prob(made.means[:1], cond[:1])
    log_p = made.log_prob(x, cond) - peak
    return Outcome(
        float((index % modes == 0).float().mean()),
        float(rms.square().mean().sqrt()),
        float(log_p.median()),
        float((log_p > -3).float().mean()),
        x,
    )


class Towards:
    """A reward of images: minus the squared distance to the first mode, or its inverse, or noise of its
    own.
    """

    modality = "image"
    views = 1
    differentiable = True

    def __init__(self, made: GmmPrior, kind: str = "good", seed: int = 0):
        self.target = made.means[0]
        self.kind = kind
        self.scale = made.scale
        self.draws = torch.Generator().manual_seed(1000 + seed)

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if self.kind == "random":
            return torch.randn(len(pixels), generator=self.draws)
        distance = (self.scale * (2 * pixels - 1) - self.target).square().mean((1, 2, 3))
        return -distance if self.kind == "good" else distance


class Along:
    """A linear reward: the mean entry of the latents, times a factor."""

    modality = "image"
    views = 1
    differentiable = True

    def __init__(self, made: GmmPrior, factor: float = 1.0):
        self.factor = factor
        self.scale = made.scale

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.factor * (self.scale * (2 * pixels - 1)).mean((1, 2, 3))


class Prefers:
    """A judge that returns which image a reward scores higher; with `silent` it does not answer."""

    def __init__(self, reward, silent: bool = False):
        self.reward = reward
        self.silent = silent

    def judge(self, prompts, pairs, shuffle_order=True) -> list[int]:
        if self.silent:
            return [-1] * len(pairs)
        first, second = (self.reward.score(torch.cat(side), prompts) for side in zip(*pairs, strict=True))
        return (second > first).long().tolist()


def gain(end: Outcome) -> float:
    """Return the mean shift of images along `Along`, in standard deviations of the mode."""
    return float(end.x.mean()) * 4 / STD  # the mean of 16 entries has a quarter of their standard deviation


BRIEF = {"steps": 400, "lr": 0.05}


@functools.cache
def sds_outcome(modes: int = 2, samples: int = 1) -> Outcome:
    """Return the outcome of score distillation without a reward."""
    made = prior(modes)
    return optimise(Sds(made, SdsSettings(samples=samples), views=1, streams=Streams(seed=1)), made, **BRIEF)
