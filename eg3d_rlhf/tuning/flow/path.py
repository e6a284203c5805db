"""The straight path between data and noise, in the one convention of this package: x_0 is data, t = 1 is noise (TRELLIS, Flux, SD3).

    x_t = (1 - t) x_0 + (s + (1 - s) t) eps        v = (1 - s) eps - x_0,   s = sigma_min

Papers that put data at t = 1 (Circular-DPO, equations 1-4; Lipman et al. 2023) map by t' = 1 - t, v' = -v; the squared errors are the same.
`opposite` maps; a stage whose model is theirs says so by `data_at_one`.
"""

import math
from dataclasses import dataclass

import torch

from eg3d_rlhf.models.sparse import Batch, feats_of, mean_per_sample, spread, with_feats

CONVENTION = "x_0 is data, t = 1 is noise"  # as files of latents state it
SCHEDULES = ("logit-normal", "uniform")


@dataclass(frozen=True, kw_only=True)
class FlowPath:
    """How noise and data are mixed, and which times are trained on."""

    sigma_min: float = 1e-5  # noise left at t = 0
    schedule: str = "logit-normal"  # of the times: sigmoid of a normal, or uniform on 0..1
    mean: float = 1.0  # of that normal
    std: float = 1.0

    def __post_init__(self):
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"FlowPath.sigma_min: expected 0 <= sigma_min < 1, got {self.sigma_min}. Set it.")
        if self.schedule not in SCHEDULES or not (math.isfinite(self.mean) and self.std > 0):
            got = f"{self.schedule!r}, {self.mean}, {self.std}"
            raise ValueError(f"FlowPath: expected schedule {' or '.join(SCHEDULES)}, a finite mean and std > 0, got {got}. Set them.")

    def times(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Times to train on, [n], drawn on the generator's device."""
        if self.schedule == "uniform":
            return torch.rand(n, generator=generator, device=generator.device)
        return torch.sigmoid(self.mean + self.std * torch.randn(n, generator=generator, device=generator.device))

    def mix(self, x_0: Batch, t: torch.Tensor, eps: Batch) -> Batch:
        """x_t at times t [N] in 0..1.

        Raises: ValueError for other times, such as those of a schedule from 0 to 1000.
        """
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"FlowPath.mix(t): expected times from 0 (data) to 1 (noise), got {t.min():g} to {t.max():g}. Rescale them.")
        time = spread(t, x_0)
        return with_feats(x_0, (1 - time) * feats_of(x_0) + (self.sigma_min + (1 - self.sigma_min) * time) * feats_of(eps))

    def velocity(self, x_0: Batch, eps: Batch) -> Batch:
        """v, the same at all times."""
        return with_feats(x_0, (1 - self.sigma_min) * feats_of(eps) - feats_of(x_0))

    def data(self, x_t: Batch, t: torch.Tensor, v: Batch) -> Batch:
        """The x_0 that x_t and v speak of: (1 - s) x_t - (s + (1 - s) t) v."""
        time = spread(t, x_t)
        return with_feats(x_t, (1 - self.sigma_min) * feats_of(x_t) - (self.sigma_min + (1 - self.sigma_min) * time) * feats_of(v))

    def velocity_to(self, x_t: Batch, t: torch.Tensor, x_0: Batch) -> Batch:
        """The v that speaks of x_0 at x_t: inverse of `data`, at times above 0."""
        time = spread(t, x_t)
        return with_feats(x_t, ((1 - self.sigma_min) * feats_of(x_t) - feats_of(x_0)) / (self.sigma_min + (1 - self.sigma_min) * time))

    def noise(self, x_t: Batch, t: torch.Tensor, v: Batch) -> Batch:
        """The eps that x_t and v speak of: x_t + (1 - t) v."""
        return with_feats(x_t, feats_of(x_t) + (1 - spread(t, x_t)) * feats_of(v))

    def errors(self, v: Batch, x_0: Batch, eps: Batch) -> torch.Tensor:
        """Flow-matching error of predicted velocities, mean over everything of a sample -> [N]. Differentiable in: v."""
        return mean_per_sample((feats_of(v) - feats_of(self.velocity(x_0, eps))).square(), v)


def opposite(t: torch.Tensor, v: Batch) -> tuple[torch.Tensor, Batch]:
    """Times and velocities in the convention that has its data at t = 1, from ours, or the other way about."""
    return 1 - t, with_feats(v, -feats_of(v))
