"""Steps of a sampler that are normal distributions of known density, of four kinds.

The flow dx = v dt, run from t = 1 to 0, has at every t the marginals of

    dx = (v + g^2 / (2 sigma) eps) dt + g dw          eps = x + (1 - t) v, the noise that x and v imply;
                                                      -eps / sigma is the score

for any g(t), with w a Wiener process, since the added drift and the added diffusion cancel in the
Fokker-Planck equation (Song et al. 2021, appendix D; for flows Flow-GRPO, Liu et al. 2025, and DanceGRPO, Xue
et al. 2025). A step from t to u = t - D, with a the level of noise, s the sigma_min of the flow's path, and
sigma_t = s + (1 - s) t:

    sde      Flow-GRPO's Euler step: mean x - D (v + g^2 / (2 sigma_t) eps), std g sqrt(D),
             g^2 = a^2 sigma_t / (1 - t)
    dance    DanceGRPO's Euler step: the same with g = a
    exact    Flow-GRPO's process in closed form, as it is linear for given x_0 and eps:
             x_u = (1 - u) x_0 + sigma_u (k eps + sqrt(1 - k^2) z),
             k^2 = (sigma_u (1 - t) / (sigma_t (1 - u)))^(a^2),  z standard normal
    cps      coefficients-preserving sampling: the same form with k = cos(a pi / 2) at every step

`exact` and `cps` have exactly the noise sigma_u at u, none at 0, and are finite at t = 1; for a = 0 both are
the flow's own Euler step. `sde` and `dance` leave noise in the last step, and have too much noise in between;
in the first step, where g is infinite, published code uses u instead of t. Deviates: the program of cps takes
-m((x - mean)^2), with m the mean over elements, for the logarithm of the density, which makes the ratios of
late steps vanish. Here every kind has its true density, so that a clip has the same meaning for all kinds.

Shapes: N samples, V voxels and C channels, as in models/sparse.py.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from eg3d_rlhf.models.sparse import Batch, count, feats_of, mean_per_sample, with_feats
from eg3d_rlhf.tuning.flow.base.sampling import times
from eg3d_rlhf.tuning.flow.base.stage import FlowPath, Sampling
from eg3d_rlhf.tuning.flow.training.online.settings import STEPS


@dataclass(frozen=True)
class Step(ABC):
    """Step of a sampler from time t to the smaller time `until`; its result has a normal distribution."""

    path: FlowPath
    t: float  # in 0..1; 1 is pure noise
    until: float  # u, below t
    level: float  # a; with 0, the kinds exact and cps are the flow's own Euler step

    @property
    @abstractmethod
    def std(self) -> float:
        """Return the standard deviation of the step's result, the same for all elements of x."""

    @abstractmethod
    def mean(self, x: Batch, v: Batch) -> Batch:
        """Compute the mean of the step's result from x, where the velocity is v. Differentiable in: v."""

    @property
    def length(self) -> float:
        """Return D = t - u."""
        return self.t - self.until


class ExactStep(Step):
    """Step of Flow-GRPO's process in closed form."""

    @property
    def noise_share(self) -> float:
        """Return k in 0..1, the factor with which the old noise eps stays in the result."""
        # a step without noise keeps all of the old noise
        if not self.level:
            return 1.0
        # k^2 to the power 1 / a^2; at t = 1 it is 0, and all noise is new
        odds_ratio = self.path.sigma(self.until) * (1 - self.t) / (self.path.sigma(self.t) * (1 - self.until))
        return odds_ratio ** (self.level**2 / 2)

    @property
    def std(self) -> float:
        """Return sigma_u sqrt(1 - k^2)."""
        return self.path.sigma(self.until) * math.sqrt(1 - self.noise_share**2)

    def mean(self, x: Batch, v: Batch) -> Batch:
        """Compute (1 - u) x_0 + sigma_u k eps, with the x_0 and eps that follow from x and v."""
        sample_times = feats_of(x).new_full([count(x)], self.t)
        x_0 = self.path.data(x, sample_times, v)  # x_0 that follows from x and v
        eps = self.path.noise(x, sample_times, v)  # eps that follows from x and v
        return with_feats(
            x,
            (1 - self.until) * feats_of(x_0) + self.noise_share * self.path.sigma(self.until) * feats_of(eps),
        )


class CpsStep(ExactStep):
    """Step of coefficients-preserving sampling; at level 1 all noise is new."""

    @property
    def noise_share(self) -> float:
        """Return k = cos(a pi / 2) in 0..1, which is the same at every step."""
        return math.cos(self.level * math.pi / 2)

    @property
    def std(self) -> float:
        """Return sigma_u sqrt(1 - k^2)."""
        # the sine directly: 1 - cos^2 would lose digits at small levels
        return self.path.sigma(self.until) * math.sin(self.level * math.pi / 2)


class SdeStep(Step):
    """Flow-GRPO's Euler step."""

    @property
    def diffusion(self) -> float:
        """Return the diffusion coefficient g(t) = a sqrt(sigma_t / (1 - t))."""
        # g is infinite at t = 1, where published code uses u instead
        finite_t = self.t if self.t < 1 else self.until
        return self.level * math.sqrt(self.path.sigma(self.t) / (1 - finite_t))

    @property
    def std(self) -> float:
        """Return g sqrt(D)."""
        return self.diffusion * math.sqrt(self.length)

    def mean(self, x: Batch, v: Batch) -> Batch:
        """Compute x - D (v + g^2 / (2 sigma_t) eps)."""
        # the score is -eps / sigma_t, so this drift cancels the added diffusion on average
        eps = self.path.noise(x, feats_of(x).new_full([count(x)], self.t), v)
        drift = feats_of(v) + self.diffusion**2 / (2 * self.path.sigma(self.t)) * feats_of(eps)
        return with_feats(x, feats_of(x) - self.length * drift)


class DanceStep(SdeStep):
    """DanceGRPO's Euler step."""

    @property
    def diffusion(self) -> float:
        """Return the diffusion coefficient g = a, which is the same at every step."""
        return self.level


# in the order of STEPS: exact, cps, sde, dance
KINDS: dict[str, type[Step]] = dict(zip(STEPS, (ExactStep, CpsStep, SdeStep, DanceStep), strict=True))


def steps_of(path: FlowPath, sampling: Sampling, level: float, step_kind: str = "exact") -> list[Step]:
    """Return all steps of a sampler, from t = 1 to 0.

    Callers replace the last step, to t = 0, by the flow's own step (without_noise), because it adds no noise
    or hardly any. This step has no density.

    Args:
        path: path of the flow.
        sampling: settings of the sampler, with the number of steps and the spacing of times.
        level: level a of the noise.
        step_kind: kind of the steps, one of STEPS.
    """
    step_times = times(sampling)  # descending from 1 to 0
    # each step leads from a time to the next one
    intervals = zip(step_times[:-1], step_times[1:], strict=True)
    return [KINDS[step_kind](path, t, until, level) for t, until in intervals]


def without_noise(step: Step) -> Step:
    """Return the flow's own Euler step between the same times."""
    return ExactStep(step.path, step.t, step.until, 0.0)


def log_density(x: Batch, mean: Batch, std: float) -> torch.Tensor:
    """Compute the logarithm of a normal step's density at x, averaged over the elements of each sample, [N].

    The mean over the elements is taken, as in Flow-GRPO, because with the sum, ratios of densities in
    thousands of dimensions would be 0 or infinite.
    Differentiable in: mean.

    Args:
        x: N samples after the step.
        mean: mean of the step for each sample.
        std: standard deviation of the step.
    """
    # log density of each element by itself, [N, ...] or one row for each voxel
    log_densities = (
        -((feats_of(x) - feats_of(mean)) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    )
    return mean_per_sample(log_densities, x)


def divergence(mean: Batch, other_mean: Batch, std: float) -> torch.Tensor:
    """Compute the KL divergence of two normal steps with the same standard deviation, [N].

    The divergence is |mean - other_mean|^2 / (2 std^2), averaged over the elements of each sample. Here
    std^2 has the length D of the step as a factor. Flow-GRPO's program leaves D out, so its divergence is
    smaller by the factor D. Its weight 0.04 with ten steps (D = 0.1) therefore corresponds to 0.004 here.
    Differentiable in: mean, other_mean.

    Args:
        mean: mean of the first step for each of N samples.
        other_mean: mean of the second step for each sample.
        std: standard deviation of the two steps.
    """
    # the trace and log-determinant terms cancel, as both steps have the same standard deviation
    return mean_per_sample((feats_of(mean) - feats_of(other_mean)).square() / (2 * std**2), mean)
