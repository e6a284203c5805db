"""Defines schedules of noise and times of the diffusion, and the streams of random numbers.

Letters: B images, C, H, W of latents. a = sqrt(alphas_cumprod[t]), s = sqrt(1 - alphas_cumprod[t]); x_t = a x
+ s e with standard normal noise e.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from eg3d_rlhf.tuning.distill.schedules_by_step import STEPS, TimeWindow
from training.phases import derive_seed


def betas_of(
    kind: str = "scaled_linear", *, start: float = 0.00085, end: float = 0.012, zero_snr: bool = False
) -> torch.Tensor:
    """Compute betas [1000], float32: scaled_linear (linear in their square roots; Stable Diffusion, MVDream),
    linear, or squaredcos_cap_v2.

    Args:
        kind: of schedule.
        start: first beta of the linear schedules.
        end: last beta of the linear schedules.
        zero_snr: shift and scale so that no signal is left at t = 999 (Lin et al. 2023). Such a prior must
            predict v.
    """
    if kind == "scaled_linear":
        # In float32, as diffusers computes them.
        betas = torch.linspace(start**0.5, end**0.5, STEPS) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, STEPS)
    else:
        assert kind == "squaredcos_cap_v2", kind
        # alphas_cumprod as a squared cosine (Nichol and Dhariwal 2021); its betas are limited to 0.999.
        signal = [math.cos((i / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(STEPS + 1)]
        betas = torch.tensor([min(1 - after / before, 0.999) for before, after in itertools.pairwise(signal)])
    if zero_snr:
        # sqrt(alphas_cumprod) is shifted to end at 0, and scaled to keep its first value.
        root = (1 - betas).cumprod(0).sqrt()
        bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        # alphas_cumprod back to betas: beta_t = 1 - bar_t / bar_(t-1).
        betas = 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
    return betas


class NoiseSchedule:
    """Conversions between images [B, C, H, W], noise and noised images at integer times t [B]. All
    computations are in float32 or better.
    """

    def __init__(self, alphas_cumprod: torch.Tensor | None = None):
        """Use a prior's alphas_cumprod [1000]; None: scaled_linear."""
        self.alphas_cumprod = (1 - betas_of()).cumprod(0) if alphas_cumprod is None else alphas_cumprod
        assert self.alphas_cumprod.shape == (STEPS,), self.alphas_cumprod.shape

    def alpha(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return alphas_cumprod at t [B] as [B, 1, 1, 1] on the device of `like`. A time below 0, the end of
        a DDIM chain, counts as 0.
        """
        # [B] to [B, 1, ...] with as many dimensions as `like`, so that it broadcasts over channels and
        # pixels.
        bar = self.alphas_cumprod.to(like.device)[t.to(like.device).clamp_min(0)]
        return bar.view(-1, *[1] * (like.ndim - 1))

    def mix(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Noise an image: x_t = a x + s e."""
        bar = self.alpha(t, x)
        return bar.sqrt() * x + (1 - bar).sqrt() * noise

    def x0(self, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Estimate the image from x_t and a predicted noise in one step: (x_t - s e) / a."""
        bar = self.alpha(t, x_t)
        # At large t the division by a, near 0, amplifies errors of the prediction.
        return (x_t - (1 - bar).sqrt() * noise) / bar.sqrt()

    def velocity(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute v = a e - s x, the target of a v-prediction prior (Salimans and Ho 2022)."""
        bar = self.alpha(t, x)
        return bar.sqrt() * noise - (1 - bar).sqrt() * x

    def noise_of_velocity(self, x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Convert a predicted v to noise: e = a v + s x_t."""
        bar = self.alpha(t, x_t)
        return bar.sqrt() * v + (1 - bar).sqrt() * x_t

    def noise_of_x0(self, x_t: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Convert a predicted image to noise: e = (x_t - a x) / s."""
        bar = self.alpha(t, x_t)
        return (x_t - bar.sqrt() * x) / (1 - bar).sqrt()

    def weight(self, t: torch.Tensor, kind: str, like: torch.Tensor) -> torch.Tensor:
        """Compute the weight w(t) [B, 1, 1, 1]: s^2 (sds), 1 (uniform), or a s^2 (fantasia3d)."""
        bar = self.alpha(t, like)
        if kind == "uniform":
            return torch.ones_like(bar)
        # In the letters of this module, bar stands for a^2.
        return (1 - bar) if kind == "sds" else bar.sqrt() * (1 - bar)

    def ddim_step(
        self, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, before: torch.Tensor
    ) -> torch.Tensor:
        """Move from time t [B] to an earlier one without new noise (DDIM, Song et al. 2020, eta 0)."""
        return self.mix(self.x0(x_t, noise, t), noise, before)

    def ddim_chain(
        self,
        x_t: torch.Tensor,
        times: Sequence[torch.Tensor],
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Move through all times [B] in order; at the last one there is no prediction. An image whose time
        does not change stays the same.
        """
        for now, after in itertools.pairwise(times):
            # A comparison per image: in one batch, images can have different times.
            moved = self.ddim_step(x_t, predict(x_t, now), now, after)
            x_t = torch.where((now == after).to(x_t.device).view(-1, *[1] * (x_t.ndim - 1)), x_t, moved)
        return x_t


def draw_times(
    window: TimeWindow,
    step: int,
    assets: int,
    views: int,
    generator: torch.Generator,
    *,
    shared: bool = True,
) -> torch.Tensor:
    """Sample times [assets * views] from the window of a step: one per asset for all its views, or one per
    view (for single-view priors only).
    """
    low, high = window.at(step)
    # randint excludes its upper bound, and both ends of the window count.
    t = torch.randint(low, high + 1, (assets,) if shared else (assets * views,), generator=generator)
    # The views of an asset are adjacent, so repeat_interleave gives them the same time.
    return t.repeat_interleave(views) if shared else t


def ddim_times(n: int, spacing: Literal["leading", "trailing", "linspace", "floor"] = "leading") -> list[int]:
    """Return n decreasing times of 0..999.

    leading, trailing and linspace are rounded as in diffusers, leading with an offset of 1. The last option
    rounds linspace down, as RewardSDS does for exploration.
    """
    if spacing == "leading":
        return [i * (STEPS // n) + 1 for i in reversed(range(n))]
    if spacing == "trailing":
        return [round(STEPS - i * STEPS / n) - 1 for i in range(n)]
    # n - 1 equal intervals between 0 and 999; a single time is 0.
    even = [(STEPS - 1) * i / max(n - 1, 1) for i in reversed(range(n))]
    assert spacing in ("linspace", "floor"), spacing
    return [round(time) if spacing == "linspace" else int(time) for time in even]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Random streams of one run by name. Each has its own generator, derived from (seed, stream, step).

    A resumed run, an arm of another method, or another number of noises therefore has the same views, times
    and first noise.
    """

    seed: int  # of the run, or derived from the run's seed and the batch

    def generator(self, name: str, step: int) -> torch.Generator:
        """Return a new generator on the CPU. The same name and step give the same random numbers."""
        return torch.Generator().manual_seed(derive_seed(self.seed, name, step))

    def noises(self, count: int, like: torch.Tensor, step: int) -> torch.Tensor:
        """Sample standard normal noise [count, *like.shape]. Noise k comes from stream noise/k, for any
        count.
        """
        # Generated on the CPU, so that results do not depend on the device.
        generators = [self.generator(f"noise/{k}", step) for k in range(count)]
        return torch.stack([torch.randn(like.shape, generator=rng) for rng in generators]).to(like)
