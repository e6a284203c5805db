"""Test samplers with noise: their marginals, their limits, and the densities that they state."""

import math

import pytest
import torch

from eg3d_rlhf.models.sparse import collate, feats_of, with_feats
from eg3d_rlhf.tuning.flow.base.sampling import sample, times
from eg3d_rlhf.tuning.flow.base.stage import FlowPath, Sampling
from eg3d_rlhf.tuning.flow.training.online.steps import (
    KINDS,
    CpsStep,
    ExactStep,
    divergence,
    log_density,
    steps_of,
    without_noise,
)
from tests.tuning.flow.closed_forms import Field, dense, stage_of, tokens, voxels

# of normal data, whose velocity is known
MEAN = 0.7
STD = 0.4
LEVELS = pytest.mark.parametrize("level", [0.0, 0.7, 1.4])


def exact(path: FlowPath, x, t, mean=MEAN, std=STD):
    """Compute the exact velocity E[(1 - s) eps - x_0 | x_t = x] for data N(mean, std^2)."""
    signal = 1 - t
    sigma = path.sigma_min + (1 - path.sigma_min) * t
    # E[x_0] = mean + signal std^2 off, E[eps] = sigma off
    off = (x - signal * mean) / (signal**2 * std**2 + sigma**2)
    return (1 - path.sigma_min) * sigma * off - mean - signal * std**2 * off


def moments(path: FlowPath, level: float, points: list[float], std: float = STD) -> list[tuple[float, float]]:
    """Compute the exact mean and variance after each step.

    A step is linear in x, so its values at 0 and 1 are enough.
    """
    mean = 0.0
    variance = 1.0
    found = []
    for t, until in zip(points[:-1], points[1:], strict=True):
        step = ExactStep(path, t, until, level)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1, 1)
        at_0, at_1 = step.mean(ends, exact(path, ends, t, std=std)).flatten().tolist()
        mean = at_0 + (at_1 - at_0) * mean
        variance = (at_1 - at_0) ** 2 * variance + step.std**2
        found.append((mean, variance))
    return found


@LEVELS
@pytest.mark.parametrize("sigma_min", [0.0, 1e-2])
def test_marginals_are_those_of_the_flow(level, sigma_min):
    """The mean and the variance are right at t = 1/4 and at the end, and their error halves with the length
    of the step.
    """
    path = FlowPath(sigma_min=sigma_min)
    errors = []
    for n in (64, 128):
        found = moments(path, level, [1 - i / n for i in range(n + 1)])
        points = (n * 3 // 4, n)
        wanted = [
            ((1 - t) * MEAN, ((1 - t) * STD) ** 2 + (sigma_min + (1 - sigma_min) * t) ** 2)
            for t in (0.25, 0.0)
        ]
        errors.append(
            [
                abs(a - b)
                for k, one in zip(points, wanted, strict=True)
                for a, b in zip(found[k - 1], one, strict=True)
            ]
        )
    assert max(errors[0]) < 0.02
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 0.6 * coarse or fine < 1e-9


@LEVELS
def test_one_object_is_met_exactly_in_any_number_of_steps(level):
    path = FlowPath(sigma_min=0.0)
    for (mean, variance), t in zip(
        moments(path, level, [1.0, 0.7, 0.1, 0.0], std=0.0), (0.7, 0.1, 0.0), strict=True
    ):
        assert mean == pytest.approx((1 - t) * MEAN, abs=1e-12) and variance == pytest.approx(t**2, abs=1e-12)


def test_small_steps_are_those_of_the_papers():
    """Flow-GRPO: x + [v + g^2 / (2 t) (x + (1 - t) v)] dt + g sqrt(|dt|) z with g = a sqrt(t / (1 - t))."""
    path = FlowPath(sigma_min=0.0)
    t = 0.6
    a = 0.7
    dt = 1e-4
    x = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64)
    v = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64)
    g = a * math.sqrt(t / (1 - t))
    step = ExactStep(path, t, t - dt, a)
    euler = x - dt * (v + g**2 / (2 * t) * (x + (1 - t) * v))
    assert float((step.mean(x, v) - euler).abs().max()) < 1e-3 * dt
    assert step.std == pytest.approx(g * math.sqrt(dt), rel=1e-3)


@pytest.mark.parametrize("sparse", [False, True])
def test_without_noise_it_is_the_flows_own_sampler(sparse):
    path = FlowPath(sigma_min=1e-3)
    sampling = Sampling(steps=4, cfg_strength=0.0, rescale_t=2.0)
    stage = stage_of(Field(lambda x, t, cond: torch.sin(x) - t), sparse, path, sampling)
    x = noise = collate([voxels(1), voxels(2)] if sparse else [dense(1), dense(2)])
    for step in steps_of(path, sampling, 0.0):
        assert step.noise_share == 1 and step.std == 0
        x = step.mean(x, stage.model(x, torch.full([2], step.t), tokens(2)))
    torch.testing.assert_close(feats_of(x), feats_of(sample(stage, noise, tokens(2), None)))


def test_the_first_step_replaces_the_noise_and_the_last_has_none():
    first, *_, last = steps_of(FlowPath(), Sampling(steps=5, rescale_t=1.0), 0.7)
    assert (
        (first.t, last.until) == (1.0, 0.0)
        and first.noise_share == 0
        and first.std == pytest.approx(0.8, rel=1e-4)
    )
    assert last.std < 1.1e-5
    assert [s.t for s in steps_of(FlowPath(), Sampling(steps=3), 0.7)] == times(Sampling(steps=3))[:-1]


@pytest.mark.parametrize("sparse", [False, True])
def test_density_and_divergence_are_the_normals(sparse):
    x = collate([voxels(1, 5), voxels(2, 9)] if sparse else [dense(1), dense(2)])
    mean, other = (
        with_feats(x, torch.randn(feats_of(x).shape, generator=torch.Generator().manual_seed(n)))
        for n in (3, 4)
    )
    normals = [torch.distributions.Normal(feats_of(m).double(), 0.3) for m in (mean, other)]
    rows = [normals[0].log_prob(feats_of(x).double()), torch.distributions.kl_divergence(*normals)]
    split = [v.split(x.lengths.tolist()) if sparse else v.unbind() for v in rows]
    for got, expected in zip((log_density(x, mean, 0.3), divergence(mean, other, 0.3)), split, strict=True):
        torch.testing.assert_close(
            got.double(), torch.stack([one.mean() for one in expected]), rtol=1e-5, atol=1e-5
        )


# The other kinds.


def noise_left(kind: str, level: float, steps: int = 10) -> list[tuple[float, float]]:
    """Return (t, standard deviation of x at t) for one object and a perfect network, that is, of x without (1
    - t) x_0.
    """
    path = FlowPath(sigma_min=0.0)
    points = [1 - i / steps for i in range(steps + 1)]
    variance = 1.0
    found = []
    for t, until in zip(points[:-1], points[1:], strict=True):
        step = KINDS[kind](path, t, until, level)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1, 1)
        low, high = step.mean(ends, ends / t).flatten().tolist()  # v = eps - x_0 of x_0 = 0 and x = t eps
        variance = (high - low) ** 2 * variance + step.std**2
        found.append((until, math.sqrt(variance)))
    return found


def test_closed_forms_hold_exactly_the_noise_of_the_time_and_eulers_steps_do_not():
    for kind, level in (("exact", 0.7), ("exact", 1.0), ("cps", 0.5), ("cps", 0.8)):
        assert all(std == pytest.approx(t, abs=1e-12) for t, std in noise_left(kind, level))
    for kind, level in (("sde", 0.7), ("dance", 0.7)):
        found = noise_left(kind, level)
        assert max(std / t for t, std in found[:-1]) > 1.1 and found[-1][1] > 0.05


def test_cps_is_the_closed_form_with_a_share_of_its_own():
    class Kept(ExactStep):
        noise_share = math.cos(0.8 * math.pi / 2)

    path, x, v = FlowPath(sigma_min=0.01), *torch.randn(2, 3, 2, 2, 2, 2, dtype=torch.float64)
    ours = Kept(path, 0.7, 0.4, 0.8)
    cps = CpsStep(path, 0.7, 0.4, 0.8)
    torch.testing.assert_close(ours.mean(x, v), cps.mean(x, v), rtol=0, atol=0)
    assert ours.std == pytest.approx(cps.std, rel=1e-12)
    euler = without_noise(cps)
    torch.testing.assert_close(euler.mean(x, v), x - 0.3 * v, rtol=0, atol=1e-12)
    torch.testing.assert_close(CpsStep(path, 0.7, 0.4, 0.0).mean(x, v), x - 0.3 * v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_is_finite(kind):
    step = steps_of(FlowPath(sigma_min=0.0), Sampling(steps=4), 0.7, kind)[0]
    x = torch.randn(2, 1, 2, 2, 2)
    assert step.t == 1 and 0 < step.std < 3 and step.mean(x, -x).isfinite().all()
    assert log_density(x, step.mean(x, -x), step.std).isfinite().all()
