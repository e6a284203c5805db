"""Defines the noise schedule of the diffusion, its times, and the streams of random numbers of a run.

Shapes: B images; C, H, W channels, rows and columns of latents.
Symbols, as in DDPM (Ho et al. 2020): t an integer time in 0..999; a = sqrt(alphas_cumprod[t]) the signal
level; s = sqrt(1 - alphas_cumprod[t]) the noise level; x a clean latent; e standard normal noise; x_t = a x +
s e the noised latent. In the code, `bar` is alphas_cumprod[t] = a^2, which papers write as alpha with a bar.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from eg3d_rlhf.tuning.distill.schedules_by_step import STEPS, TimeWindow
from training.phases import derive_seed


def make_betas(
    schedule_name: str = "scaled_linear",
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_snr: bool = False,
) -> torch.Tensor:
    """Compute the betas of a noise schedule, [1000] in float32.

    Args:
        schedule_name: name of the schedule as in diffusers: "scaled_linear", in which the square roots of the
            betas are linear in t (Stable Diffusion, MVDream); "linear"; or "squaredcos_cap_v2" (Nichol and
            Dhariwal 2021).
        beta_start: beta at t = 0, for the two linear schedules.
        beta_end: beta at t = 999, for the two linear schedules.
        zero_snr: True to shift and scale the schedule so that x_999 contains no signal (Lin et al. 2023). A
            prior with such a schedule must predict v.
    """
    if schedule_name == "scaled_linear":
        # In float32, as diffusers computes them.
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, STEPS) ** 2
    elif schedule_name == "linear":
        betas = torch.linspace(beta_start, beta_end, STEPS)
    else:
        assert schedule_name == "squaredcos_cap_v2", schedule_name
        # alphas_cumprod is a squared cosine (Nichol and Dhariwal 2021, equation 17), and betas are at most
        # 0.999.
        alpha_bars = [math.cos((i / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(STEPS + 1)]
        betas = torch.tensor(
            [min(1 - bar / last_bar, 0.999) for last_bar, bar in itertools.pairwise(alpha_bars)]
        )
    if zero_snr:
        # sqrt(alphas_cumprod) is shifted so that it ends at 0, and scaled so that it keeps its first value.
        sqrt_bar = (1 - betas).cumprod(0).sqrt()
        bar = ((sqrt_bar - sqrt_bar[-1]) * sqrt_bar[0] / (sqrt_bar[0] - sqrt_bar[-1])) ** 2
        # From alphas_cumprod back to betas: beta_t = 1 - bar_t / bar_(t-1).
        betas = 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])
    return betas


class NoiseSchedule:
    """Conversions between clean latents, noise and noised latents, all [B, C, H, W], at times t [B].

    All computations are in float32 or float64.

    Args:
        alphas_cumprod: [1000], alphas_cumprod of the prior. None: those of the schedule scaled_linear.
    """

    def __init__(self, alphas_cumprod: torch.Tensor | None = None):
        self.alphas_cumprod = (1 - make_betas()).cumprod(0) if alphas_cumprod is None else alphas_cumprod
        assert self.alphas_cumprod.shape == (STEPS,), self.alphas_cumprod.shape

    def alpha(self, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return alphas_cumprod at the times t [B], in the shape [B, 1, 1, 1] and on the device of `like`."""
        # A DDIM chain may end at a time below 0, which counts as 0.
        bar = self.alphas_cumprod.to(like.device)[t.to(like.device).clamp_min(0)]
        # [B] to [B, 1, ...], with as many dimensions as `like`, so that it broadcasts over channels and
        # pixels.
        return bar.view(-1, *[1] * (like.ndim - 1))

    def mix(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Add noise e to clean latents x: x_t = a x + s e."""
        bar = self.alpha(t, x)
        return bar.sqrt() * x + (1 - bar).sqrt() * noise

    def x0(self, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Estimate the clean latents from x_t and a predicted noise e in one step: x_0 = (x_t - s e) / a."""
        bar = self.alpha(t, x_t)
        # At large t, a is nearly 0, so this division amplifies errors of the prediction.
        return (x_t - (1 - bar).sqrt() * noise) / bar.sqrt()

    def velocity(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute v = a e - s x, which a prior with v-prediction predicts (Salimans and Ho 2022)."""
        bar = self.alpha(t, x)
        return bar.sqrt() * noise - (1 - bar).sqrt() * x

    def noise_of_velocity(self, x_t: torch.Tensor, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Convert a predicted v to noise: e = a v + s x_t."""
        bar = self.alpha(t, x_t)
        return bar.sqrt() * v + (1 - bar).sqrt() * x_t

    def noise_of_x0(self, x_t: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Convert predicted clean latents x to noise: e = (x_t - a x) / s."""
        bar = self.alpha(t, x_t)
        return (x_t - bar.sqrt() * x) / (1 - bar).sqrt()

    def weight(self, t: torch.Tensor, weighting: str, like: torch.Tensor) -> torch.Tensor:
        """Compute the weight w(t) of a time in the gradient of score distillation, [B, 1, 1, 1].

        Args:
            t: [B], times.
            weighting: "sds" for s^2 (DreamFusion), "uniform" for 1, or "fantasia3d" for a s^2.
            like: tensor whose device and number of dimensions the result has.
        """
        bar = self.alpha(t, like)
        if weighting == "uniform":
            return torch.ones_like(bar)
        # With the signal scale a and the noise scale s, alpha-bar is a^2, and its complement is s^2.
        return (1 - bar) if weighting == "sds" else bar.sqrt() * (1 - bar)

    def ddim_step(
        self, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, earlier_t: torch.Tensor
    ) -> torch.Tensor:
        """Compute one DDIM step from latents x_t at times t [B] to earlier times earlier_t [B].

        No new noise is added (DDIM, Song et al. 2020, equation 12 with sigma = 0).

        Args:
            x_t: [B, C, H, W], latents at the times t.
            noise: [B, C, H, W], predicted noise of x_t.
            t: [B] integers in 0..999.
            earlier_t: [B] integers in 0..999, times of the result.
        """
        return self.mix(self.x0(x_t, noise, t), noise, earlier_t)

    def ddim_chain(
        self,
        x_t: torch.Tensor,
        times: Sequence[torch.Tensor],
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Move latents through a sequence of decreasing times by DDIM steps.

        Args:
            x_t: [B, C, H, W], latents at the first of the times.
            times: the times, each [B] integers. An image whose time does not change in a step stays
                unchanged.
            predict: function from latents and their times [B] to the predicted noise.
        Returns: [B, C, H, W], latents at the last of the times.
        """
        for t, next_t in itertools.pairwise(times):
            moved_latents = self.ddim_step(x_t, predict(x_t, t), t, next_t)
            # Images of a batch can have different times, so each image is compared on its own, [B, 1, 1, 1].
            is_unchanged = (t == next_t).to(x_t.device).view(-1, *[1] * (x_t.ndim - 1))
            x_t = torch.where(is_unchanged, x_t, moved_latents)
        return x_t


def draw_times(
    window: TimeWindow,
    step: int,
    asset_count: int,
    view_count: int,
    generator: torch.Generator,
    *,
    shared: bool = True,
) -> torch.Tensor:
    """Sample the diffusion times of a step.

    Args:
        window: range of times, which may change with the step.
        step: number of the optimisation step, from 0.
        asset_count: number of assets.
        view_count: number of views of each asset.
        generator: random generator on the CPU.
        shared: True to use one time for all views of an asset. False samples a time for each view, which only
            single-view priors allow.
    Returns: [assets * views] integers; the views of an asset are adjacent.
    """
    low, high = window.at(step)
    # + 1: randint excludes its upper bound, but the window includes its largest time.
    t = torch.randint(
        low, high + 1, (asset_count,) if shared else (asset_count * view_count,), generator=generator
    )
    # The views of an asset are adjacent, so repeat_interleave gives them the same time.
    return t.repeat_interleave(view_count) if shared else t


def ddim_times(
    time_count: int, spacing: Literal["leading", "trailing", "linspace", "floor"] = "leading"
) -> list[int]:
    """Return `time_count` decreasing times in 0..999, from the start to the end of a DDIM chain.

    Args:
        time_count: number of times.
        spacing: "leading", "trailing" or "linspace" as in diffusers, leading with its steps_offset of 1; or
            "floor", which is linspace with times rounded down, as RewardSDS's code does for exploration.
    """
    if spacing == "leading":
        return [i * (STEPS // time_count) + 1 for i in reversed(range(time_count))]
    if spacing == "trailing":
        return [round(STEPS - i * STEPS / time_count) - 1 for i in range(time_count)]
    # time_count - 1 equal intervals between 0 and 999; max() avoids a division by 0 for a single time, which
    # is 0.
    uniform_times = [(STEPS - 1) * i / max(time_count - 1, 1) for i in reversed(range(time_count))]
    assert spacing in ("linspace", "floor"), spacing
    return [round(time) if spacing == "linspace" else int(time) for time in uniform_times]


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Named streams of random numbers of one run.

    The random numbers of a stream in a step depend only on the seed, the name of the stream and the step. A
    resumed run and arms with other methods therefore have the same views, times and noises. The first noises
    are the same for any number of noises.
    """

    seed: int  # seed of the run, or a seed that was derived from it and from the batch of assets

    def generator(self, name: str, step: int) -> torch.Generator:
        """Return a new random generator on the CPU for a stream and a step."""
        return torch.Generator().manual_seed(derive_seed(self.seed, name, step))

    def noises(self, noise_count: int, like: torch.Tensor, step: int) -> torch.Tensor:
        """Sample `noise_count` standard normal noises of the shape of `like`, [count, *like.shape].

        The noise with index k comes from the stream noise/k, so it does not depend on `noise_count`.
        """
        # Generated on the CPU, so that results do not depend on the device.
        generators = [self.generator(f"noise/{k}", step) for k in range(noise_count)]
        return torch.stack([torch.randn(like.shape, generator=rng) for rng in generators]).to(like)
