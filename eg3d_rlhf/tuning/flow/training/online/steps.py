"""A sampler whose steps are normals of known density, of four kinds.

The flow dx = v dt, run from t = 1 to 0, has at every t the marginals of

    dx = (v + g^2 / (2 sigma) eps) dt + g dw          eps = x + (1 - t) v, the noise that x and v speak of;
                                                      -eps / sigma is the score

for any g(t), since the added drift and the added diffusion cancel in the Fokker-Planck equation
(Song et al. 2021, appendix D; for flows Flow-GRPO, and DanceGRPO, Xue et al. 2025). A step from t to
u = t - D, with a the level of noise and sigma_t = s + (1 - s) t:

    sde      Flow-GRPO's Euler step: mean x - D (v + g^2 / (2 sigma_t) eps), deviation g sqrt(D),
             g^2 = a^2 sigma_t / (1 - t)
    dance    DanceGRPO's: the same with g = a
    exact    Flow-GRPO's process in closed form, as it is linear for given x_0 and eps:
             x_u = (1 - u) x_0 + sigma_u (k eps + sqrt(1 - k^2) z),
             k^2 = (sigma_u (1 - t) / (sigma_t (1 - u)))^(a^2),  z standard normal
    cps      coefficients-preserving sampling: the same form with k = cos(a pi / 2) at every step

`exact` and `cps` have exactly the noise sigma_u at u, none at 0, and are finite at t = 1; for a = 0 both are
the flow's own Euler step. `sde` and `dance` leave noise in the last step, and hold too much in between; in
the first, where g is infinite, published code puts u in the place of t. Deviates: of cps, whose program takes
-m((x - mean)^2) for the density, which makes late steps' ratios vanish: here every kind has its true density,
so that a clip means the same.

Shape letters as in sparse.py.
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
    """One step, from time t to `until`."""

    path: FlowPath
    t: float
    until: float
    level: float  # a; 0: the flow's own Euler step

    @property
    @abstractmethod
    def std(self) -> float:
        """Standard deviation of the step, the same for all that is in x."""

    @abstractmethod
    def mean(self, x: Batch, v: Batch) -> Batch:
        """Mean of the step from x with the velocity v there. Differentiable in: v."""

    @property
    def length(self) -> float:
        return self.t - self.until


class ExactStep(Step):
    """Flow-GRPO's process in closed form."""

    @property
    def kept(self) -> float:
        """k, the share of the old noise."""
        if not self.level:
            return 1.0
        share = self.path.sigma(self.until) * (1 - self.t) / (self.path.sigma(self.t) * (1 - self.until))
        return share ** (self.level**2 / 2)

    @property
    def std(self) -> float:
        return self.path.sigma(self.until) * math.sqrt(1 - self.kept**2)

    def mean(self, x: Batch, v: Batch) -> Batch:
        at = feats_of(x).new_full([count(x)], self.t)
        data = self.path.data(x, at, v)
        noise = self.path.noise(x, at, v)
        return with_feats(
            x, (1 - self.until) * feats_of(data) + self.kept * self.path.sigma(self.until) * feats_of(noise)
        )


class CpsStep(ExactStep):
    """Coefficients-preserving sampling; level 1 keeps nothing."""

    @property
    def kept(self) -> float:
        return math.cos(self.level * math.pi / 2)

    @property
    def std(self) -> float:
        return self.path.sigma(self.until) * math.sin(self.level * math.pi / 2)


class SdeStep(Step):
    """Flow-GRPO's Euler step."""

    @property
    def diffusion(self) -> float:
        """g."""
        at = self.t if self.t < 1 else self.until
        return self.level * math.sqrt(self.path.sigma(self.t) / (1 - at))

    @property
    def std(self) -> float:
        return self.diffusion * math.sqrt(self.length)

    def mean(self, x: Batch, v: Batch) -> Batch:
        noise = self.path.noise(x, feats_of(x).new_full([count(x)], self.t), v)
        drift = feats_of(v) + self.diffusion**2 / (2 * self.path.sigma(self.t)) * feats_of(noise)
        return with_feats(x, feats_of(x) - self.length * drift)


class DanceStep(SdeStep):
    """DanceGRPO's."""

    @property
    def diffusion(self) -> float:
        return self.level


KINDS: dict[str, type[Step]] = dict(zip(STEPS, (ExactStep, CpsStep, SdeStep, DanceStep), strict=True))


def steps_of(path: FlowPath, sampling: Sampling, level: float, kind: str = "exact") -> list[Step]:
    """All steps of a sampler. The last one, to t = 0, adds no noise worth the name and is taken by its mean:
    it has no density.
    """
    points = times(sampling)
    return [KINDS[kind](path, t, until, level) for t, until in zip(points[:-1], points[1:], strict=True)]


def without_noise(step: Step) -> Step:
    """The flow's own Euler step from and to the same times."""
    return ExactStep(step.path, step.t, step.until, 0.0)


def log_density(x: Batch, mean: Batch, std: float) -> torch.Tensor:
    """Of a normal step at x, mean over everything of a sample -> [N]; times how much that is, it is the
    logarithm of the density.

    The mean, as Flow-GRPO takes it: ratios of densities of thousands of numbers would be 0 or infinite.
    Differentiable in: mean.
    """
    values = (
        -((feats_of(x) - feats_of(mean)) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    )
    return mean_per_sample(values, x)


def divergence(mean: Batch, other: Batch, std: float) -> torch.Tensor:
    """KL divergence of two normal steps of one deviation, |mean - other|^2 / (2 std^2), mean over everything
    of a sample -> [N].

    Flow-GRPO's own leaves the step's length out of std^2, and is that much smaller: its weight .04 at ten
    steps is .004 here.
    Differentiable in: mean, other.
    """
    return mean_per_sample((feats_of(mean) - feats_of(other)).square() / (2 * std**2), mean)
