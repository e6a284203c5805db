"""How noise is mixed into pictures, which times are drawn, quantities that change with the step, and where
random draws come from.

Letters: B pictures, C, H, W of latents. a = sqrt(alphas_cumprod[t]), s = sqrt(1 - alphas_cumprod[t]); x_t = a
x + s e.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from training.phases import derive_seed

STEPS = 1000
WEIGHTINGS = ("sds", "uniform", "fantasia3d")


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


@dataclass(frozen=True)
class Ramp:
    """A number that may change with the step: for windows of time, weights of rewards and regularisers.

    A constant; [v0, v1, s1] from step 0; [s0, v0, v1, s1]; or [s0, v0, v1, s1, v2, s2, ...]. Linear between
    steps, held outside.
    """

    spec: float | tuple[float, ...]
    log: bool = False  # linear in the logarithm

    def __post_init__(self):
        numbers = (self.spec,) if isinstance(self.spec, (int, float)) else tuple(self.spec)
        knots = (
            [step for step, _ in self.knots()]
            if len(numbers) in (1, 3) or (len(numbers) >= 4 and len(numbers) % 2 == 0)
            else []
        )
        if (
            not knots
            or not all(math.isfinite(n) for n in numbers)
            or any(b <= a for a, b in itertools.pairwise(knots))
        ):
            raise ValueError(
                "Ramp: expected a number, [v0, v1, s1] or [s0, v0, v1, s1, v2, s2, ...] with rising steps s,"
                f" got {self.spec}. Correct it."
            )

    def knots(self) -> list[tuple[float, float]]:
        if isinstance(self.spec, (int, float)):
            return [(0, self.spec)]
        start, first, *rest = self.spec if len(self.spec) > 3 else (0, *self.spec)
        return [(start, first), *zip(rest[1::2], rest[::2], strict=True)]

    def __call__(self, step: int) -> float:
        knots = self.knots()
        (s0, v0), (s1, v1) = (
            (knots[0], knots[0])
            if len(knots) == 1
            else next(
                (pair for pair in itertools.pairwise(knots) if step < pair[1][0]), (knots[-2], knots[-1])
            )
        )
        share = 0.0 if s0 == s1 else max(min(1.0, (step - s0) / (s1 - s0)), 0.0)
        return (
            math.exp(math.log(v0) + (math.log(v1) - math.log(v0)) * share)
            if self.log
            else v0 + (v1 - v0) * share
        )


@dataclass(frozen=True, kw_only=True)
class TimeWindow:
    """From which times t is drawn; the shares of 1000 are cut to integers, both ends count."""

    low: Ramp = Ramp(0.02)
    high: Ramp = Ramp(0.98)
    # steps of the run: then t falls from high to low with the root of the step, and nothing is drawn (HiFA)
    sqrt_anneal: int | None = None

    def __post_init__(self):
        ends = [ramp(int(step)) for ramp in (self.low, self.high) for step, _ in ramp.knots()]
        if not all(0 <= end < 1 for end in ends):
            raise ValueError(f"TimeWindow: expected shares from 0 to below 1, got {ends}. Correct them.")

    def at(self, step: int) -> tuple[int, int]:
        low = self.low(step)
        high = self.high(step)
        if self.sqrt_anneal is not None:
            low = high = high - (high - low) * math.sqrt(min(step / self.sqrt_anneal, 1.0))
        low = int(STEPS * low)
        high = int(STEPS * high)
        if low > high:
            raise ValueError(
                f"TimeWindow: expected low <= high, got {low} and {high} at step {step}. Correct the ramps."
            )
        return low, high

    def draw(
        self, step: int, assets: int, views: int, generator: torch.Generator, *, shared: bool = True
    ) -> torch.Tensor:
        """Times [assets * views]: one per asset, the same for its views, or one per view (single-view priors
        only).
        """
        low, high = self.at(step)
        t = torch.randint(low, high + 1, (assets,) if shared else (assets * views,), generator=generator)
        return t.repeat_interleave(views) if shared else t


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
