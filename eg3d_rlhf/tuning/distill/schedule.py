"""Schedules of noise and of times, and the streams of random draws.

Letters: B pictures, C, H, W of latents. a = sqrt(alphas_cumprod[t]), s = sqrt(1 - alphas_cumprod[t]); x_t = a
x + s e.
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
    """Betas [1000], float32: scaled_linear (in their roots; Stable Diffusion, MVDream), linear, or
    squaredcos_cap_v2.

    zero_snr: shifted and scaled so that no signal is left at t = 999 (Lin et al. 2023); such a prior must
    predict v.
    """
    if kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, STEPS) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, STEPS)
    else:
        assert kind == "squaredcos_cap_v2", kind
        left = [math.cos((i / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(STEPS + 1)]
        betas = torch.tensor([min(1 - after / before, 0.999) for before, after in itertools.pairwise(left)])
    if zero_snr:
        root = (1 - betas).cumprod(0).sqrt()
        bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
    return betas


class NoiseSchedule:
    """Mixing and unmixing of pictures [B, C, H, W] and noise at integer times t [B], in float32 or better."""

    def __init__(self, alphas_cumprod: torch.Tensor | None = None):
        """Args: alphas_cumprod: [1000], a prior's; None: scaled-linear."""
        self.alphas_cumprod = (1 - betas_of()).cumprod(0) if alphas_cumprod is None else alphas_cumprod
        assert self.alphas_cumprod.shape == (STEPS,), self.alphas_cumprod.shape

    def alpha(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """alphas_cumprod at t [B], [B, 1, 1, 1] beside `like`. A time before 0 is the end of a chain: as at
        0.
        """
        bar = self.alphas_cumprod.to(like.device)[t.to(like.device).clamp_min(0)]
        return bar.view(-1, *[1] * (like.ndim - 1))

    def mix(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bar = self.alpha(t, x)
        return bar.sqrt() * x + (1 - bar).sqrt() * noise

    def x0(self, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The picture that x_t and a predicted noise speak of, (x_t - s e) / a."""
        bar = self.alpha(t, x_t)
        return (x_t - (1 - bar).sqrt() * noise) / bar.sqrt()

    def velocity(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v = a e - s x, what a v-prediction prior learns."""
        bar = self.alpha(t, x)
        return bar.sqrt() * noise - (1 - bar).sqrt() * x

    def noise_of_velocity(self, x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """e = a v + s x_t."""
        bar = self.alpha(t, x_t)
        return bar.sqrt() * v + (1 - bar).sqrt() * x_t

    def noise_of_x0(self, x_t: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """e = (x_t - a x) / s."""
        bar = self.alpha(t, x_t)
        return (x_t - bar.sqrt() * x) / (1 - bar).sqrt()

    def weight(self, t: torch.Tensor, kind: str, like: torch.Tensor) -> torch.Tensor:
        """w(t) [B, 1, 1, 1]: s^2 (sds), 1 (uniform), or a s^2 (fantasia3d)."""
        bar = self.alpha(t, like)
        if kind == "uniform":
            return torch.ones_like(bar)
        return (1 - bar) if kind == "sds" else bar.sqrt() * (1 - bar)

    def ddim_step(
        self, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, before: torch.Tensor
    ) -> torch.Tensor:
        """From time t [B] to an earlier one, without new noise (Song et al. 2020, eta 0)."""
        return self.mix(self.x0(x_t, noise, t), noise, before)

    def ddim_chain(
        self,
        x_t: torch.Tensor,
        times: Sequence[torch.Tensor],
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Through all times [B] in their order, the last without a prediction; a picture whose time does not
        change stays as it is.
        """
        for now, after in itertools.pairwise(times):
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
    """Draw times [assets * views] from the window of a step: one per asset, the same for its views, or one
    per view (single-view priors only).
    """
    low, high = window.at(step)
    t = torch.randint(low, high + 1, (assets,) if shared else (assets * views,), generator=generator)
    return t.repeat_interleave(views) if shared else t


def ddim_times(n: int, spacing: Literal["leading", "trailing", "linspace", "floor"] = "leading") -> list[int]:
    """n falling times of 0..999.

    leading, trailing, linspace: as diffusers rounds them, leading with an offset of 1; floor: linspace
    rounded down, as RewardSDS explores.
    """
    if spacing == "leading":
        return [i * (STEPS // n) + 1 for i in reversed(range(n))]
    if spacing == "trailing":
        return [round(STEPS - i * STEPS / n) - 1 for i in range(n)]
    even = [(STEPS - 1) * i / max(n - 1, 1) for i in reversed(range(n))]
    assert spacing in ("linspace", "floor"), spacing
    return [round(time) if spacing == "linspace" else int(time) for time in even]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The draws of one run by name: each stream has a generator of its own, derived from (seed, stream,
    step).

    A resumed run, another method's arm and another number of noises then see the same views, times and first
    noise.
    """

    seed: int

    def generator(self, name: str, step: int) -> torch.Generator:
        """A fresh generator on the CPU; the same name and step give the same draws."""
        return torch.Generator().manual_seed(derive_seed(self.seed, name, step))

    def noises(self, count: int, like: torch.Tensor, step: int) -> torch.Tensor:
        """[count, *like.shape] standard normal; noise k is that of stream noise/k, whatever the count."""
        draws = [self.generator(f"noise/{k}", step) for k in range(count)]
        return torch.stack([torch.randn(like.shape, generator=rng) for rng in draws]).to(like)
