"""The mathematics of GRPO on flows: a sampler whose steps are normals of known density, and what is minimised of them.

Sources: Shao et al. 2024 (DeepSeekMath), equation 3; for flows Liu et al. 2025 (Flow-GRPO).

The flow dx = v dt, run from t = 1 to 0, has at every t the marginals of

    dx = (v + g^2 / (2 sigma) eps) dt + g dw          eps = x + (1 - t) v, the noise that x and v speak of; -eps / sigma is the score

for any g(t), since the added drift and the added diffusion cancel in the Fokker-Planck equation (Song et al. 2021, appendix D; for flows
Flow-GRPO, and DanceGRPO, Xue et al. 2025). Flow-GRPO's g^2 = a^2 sigma / (1 - t) is used, a being the level of
noise. It is infinite at t = 1; but for given x_0 the process is linear, and a step from t to u < t has the closed form

    x_u = (1 - u) x_0 + sigma_u (k eps + sqrt(1 - k^2) z)       k^2 = (sigma_u (1 - t) / (sigma_t (1 - u)))^(a^2),  z standard normal

with sigma_t = s + (1 - s) t as in stage.py. Deviates: the papers take Euler's step, which this is the exact form of where x_0 and eps do
not change within the step. Both agree for small steps; this one is finite at t = 1 (k = 0: fresh noise), leaves no noise at t = 0, and
is Euler's step of the flow itself for a = 0.

Shape letters as in sparse.py; G groups, K samples of a group, N samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.models.sparse import Batch, count, feats_of, mean_per_sample, with_feats
from eg3d_rlhf.tuning.flow.generate import times
from eg3d_rlhf.tuning.flow.stage import FlowPath, Sampling
from training.phases import derive_seed

USES = ("reward", "shuffled", "inverted")  # of rewards: as they are, and two controls
TINY = 1e-4  # added to a group's deviation


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / (std + TINY) within each group, [G, K] -> [G, K]; 0 in a group whose rewards are all alike.

    >>> advantages(torch.tensor([[1.0, 3.0], [2.0, 2.0]])).round(decimals=2)
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    std, mean = torch.std_mean(rewards.double(), 1, correction=0, keepdim=True)
    return ((rewards - mean) / (std + TINY)).float()


def as_used(rewards: torch.Tensor, use: str, seeds: Sequence[int]) -> torch.Tensor:
    """Rewards [G, K] for a run or for one of its controls: "shuffled" gives each sample that of another of its group, so that they say
    nothing; "inverted" turns them over. Args: seeds: of every group."""
    if use == "inverted":
        return -rewards
    if use == "shuffled":
        order = [torch.randperm(rewards.shape[1], generator=torch.Generator().manual_seed(derive_seed("shuffled", seed))) for seed in seeds]
        return rewards.gather(1, torch.stack(order))
    return rewards


def clipped_loss(log_p: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - c, 1 + c) A), r = exp(log_p - old), all [N] -> [N]. Differentiable in: log_p."""
    ratio = torch.exp(log_p - old)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def clipped(log_p: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Which samples the clip takes the gradient from, [N] bool."""
    ratio = torch.exp(log_p.detach() - old)
    return ((ratio > 1 + clip_range) & (advantage > 0)) | ((ratio < 1 - clip_range) & (advantage < 0))


# The sampler that draws.


@dataclass(frozen=True)
class SdeStep:
    """One step, from time t to `until`."""

    path: FlowPath
    t: float
    until: float
    level: float  # a

    @property
    def kept(self) -> float:
        """k, the share of the old noise."""
        if not self.level:
            return 1.0
        share = self._sigma(self.until) * (1 - self.t) / (self._sigma(self.t) * (1 - self.until))
        return share ** (self.level**2 / 2)

    @property
    def std(self) -> float:
        """Standard deviation of the step, the same for all that is in x."""
        return self._sigma(self.until) * math.sqrt(1 - self.kept**2)

    def _sigma(self, t: float) -> float:
        return self.path.sigma_min + (1 - self.path.sigma_min) * t

    def mean(self, x: Batch, v: Batch) -> Batch:
        """Mean of the step from x with the velocity v there. Differentiable in: v."""
        at = feats_of(x).new_full([count(x)], self.t)
        data, noise = self.path.data(x, at, v), self.path.noise(x, at, v)
        return with_feats(x, (1 - self.until) * feats_of(data) + self.kept * self._sigma(self.until) * feats_of(noise))


def sde_steps(path: FlowPath, sampling: Sampling, level: float) -> list[SdeStep]:
    """All steps of a sampler. The last one, to t = 0, adds no noise worth the name and is taken by its mean: it has no density."""
    points = times(sampling)
    return [SdeStep(path, t, until, level) for t, until in zip(points[:-1], points[1:], strict=True)]


def log_density(x: Batch, mean: Batch, std: float) -> torch.Tensor:
    """Of a normal step at x, mean over everything of a sample -> [N]; times how much that is, it is the logarithm of the density.

    The mean, as Flow-GRPO takes it: ratios of densities of thousands of numbers would be 0 or infinite. Differentiable in: mean.
    """
    values = -((feats_of(x) - feats_of(mean)) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return mean_per_sample(values, x)


def divergence(mean: Batch, other: Batch, std: float) -> torch.Tensor:
    """KL divergence of two normal steps of one deviation, |mean - other|^2 / (2 std^2), mean over everything of a sample -> [N].

    Differentiable in: mean, other.
    """
    return mean_per_sample((feats_of(mean) - feats_of(other)).square() / (2 * std**2), mean)
