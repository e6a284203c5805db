"""The sampler against flows with closed forms; the recorded trajectories are in
tests/compat/test_flow_losses.py.
"""

import math

import pytest
import torch

from eg3d_rlhf.tuning.flow.base.sampling import guides, sample, times, trajectory
from eg3d_rlhf.tuning.flow.base.stage import FlowPath, Sampling
from tests.rejections import raising
from tests.tuning.flow.closed_forms import PLAIN, Field, PerChannel, dense, stage_of, tokens, voxels


def plain(steps: int, **options) -> Sampling:
    return Sampling(**{"steps": steps, "cfg_strength": 0.0, "rescale_t": 1.0, **options})


def noise(n: int = 2) -> torch.Tensor:
    return torch.stack([dense(i) for i in range(n)])


@pytest.mark.parametrize("r", [1.0, 3.0, 0.5])
def test_times_run_from_one_to_zero_and_rescale(r):
    points = times(Sampling(steps=10, rescale_t=r))
    assert points[0] == 1 and points[-1] == 0 and len(points) == 11
    assert points == sorted(points, reverse=True)
    for i, t in enumerate(points):
        even = 1 - i / 10
        assert t == pytest.approx(r * even / (1 + (r - 1) * even), abs=1e-15)


def test_ends_are_exact_for_every_shift():
    """So that no step falls out of an interval that ends at 1: r / (1 + (r - 1)) is above 1 for r = 1/3, 1/5,
    0.1 and others.
    """
    shifts = [i / 7 for i in range(1, 60)] + [1 / i for i in range(1, 30)] + [0.1, 0.3, 3.3]
    for single in (False, True):
        points = [times(Sampling(steps=4, rescale_t=r, single=single)) for r in shifts]
        assert all((first, last) == (1.0, 0.0) for first, *_, last in points)
        assert all(
            guides(Sampling(cfg_interval=(0.0, 1.0), time_scale=scale), t)
            for each in points
            for t in each
            for scale in (None, 9.0)
        )


def test_ends_of_the_interval_count_as_the_programs_count_them():
    """Theirs compare float32 of 1000 t', t' = 1 - t; some make t' in float32, too, where 500 is 500.00006 at
    r = 2 in 9 steps.
    """
    for steps, r, low, high in ((5, 1.0, 200, 600), (10, 1.5, 0, 500), (30, 5.0, 0, 500)):
        sampling = Sampling(
            steps=steps, rescale_t=r, cfg_interval=(1 - high / 1000, 1 - low / 1000), time_scale=1000.0
        )
        even = [i / steps for i in range(steps)]
        wanted = [low <= round(1000 * s / (1 + (r - 1) * (1 - s)), 9) <= high for s in even]
        assert [guides(sampling, t) for t in times(sampling)[:-1]] == wanted
    half = {"steps": 9, "rescale_t": 2.0, "cfg_interval": (0.5, 1.0), "time_scale": 1000.0}
    told = [
        guides(sampling, times(sampling)[6]) for sampling in (Sampling(**half), Sampling(**half, single=True))
    ]
    assert told == [True, False]


@pytest.mark.parametrize("steps, r", [(1, 1.0), (7, 3.0)])
def test_data_that_is_one_point_is_reached_in_any_number_of_steps(steps, r):
    """v = eps - mu with eps read off x_t: straight lines, on which Euler makes no error."""
    path = FlowPath(sigma_min=1e-3)
    mu = dense(9)
    s = path.sigma_min

    def velocity(x, t, cond):
        eps = (x - (1 - t) * mu) / (s + (1 - s) * t)
        return (1 - s) * eps - mu

    stage = stage_of(Field(velocity), path=path)
    for _, estimate in trajectory(stage, noise(), tokens(2), None, plain(steps, rescale_t=r)):
        torch.testing.assert_close(estimate, mu.expand_as(estimate), atol=1e-5, rtol=1e-5)
    end = sample(stage, noise(), tokens(2), None, plain(steps, rescale_t=r))
    torch.testing.assert_close(end, mu + s * noise(), atol=1e-5, rtol=1e-5)


def test_linear_velocity_multiplies():
    """v = a x: each step multiplies by 1 - a dt, in the limit by exp(-a)."""
    a = 0.8
    x = noise()
    stage = stage_of(Field(lambda x, t, cond: a * x))
    for steps, r in ((5, 1.0), (6, 3.0)):
        points = times(plain(steps, rescale_t=r))
        factor = math.prod(1 - a * (t - until) for t, until in zip(points, points[1:], strict=False))
        torch.testing.assert_close(sample(stage, x, tokens(2), None, plain(steps, rescale_t=r)), factor * x)
    torch.testing.assert_close(
        sample(stage, x, tokens(2), None, plain(4000)), math.exp(-a) * x, rtol=2e-4, atol=2e-4
    )


def test_gaussian_data_is_reached_at_first_order():
    """Data N(0, d^2): the best velocity is x (t - (1 - t) d^2) / ((1 - t)^2 d^2 + t^2), and it carries noise
    to d times itself.
    """
    d = 0.4
    stage = stage_of(Field(lambda x, t, cond: x * (t - (1 - t) * d * d) / ((1 - t) ** 2 * d * d + t * t)))
    gaps = [
        (sample(stage, noise(), tokens(2), None, plain(steps)) - d * noise()).abs().max().item()
        for steps in (100, 200, 400)
    ]
    assert gaps[0] < 0.05
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1) and gaps[1] / gaps[2] == pytest.approx(2, rel=0.1)


def test_guidance_acts_within_its_interval_both_ends_included():
    """v = mean of the condition: the displacement is a sum over the steps, whose times are 1,
    3/4, 1/2, 1/4.
    """
    field = Field(lambda x, t, cond: 0 * x + cond.mean((1, 2))[:, None, None, None, None])
    cond = tokens(2)
    no_cond = tokens(2, seed=5)
    w = 1.5
    c = cond.mean((1, 2))
    n = no_cond.mean((1, 2))
    end = sample(stage_of(field), noise(), cond, no_cond, plain(4, cfg_strength=w, cfg_interval=(0.5, 0.75)))
    moved = 0.25 * (c + c + 2 * ((1 + w) * c - w * n))
    torch.testing.assert_close(end, noise() - moved[:, None, None, None, None])
    empty = [t[0].item() for t, said, _ in field.calls if torch.equal(said, no_cond)]
    assert empty == [0.75, 0.5] and len(field.calls) == 6


def test_a_batch_samples_as_its_parts_do():
    stage = stage_of(PerChannel(), sparse=True, sampling=plain(3, cfg_strength=2.0))
    parts = [voxels(i, 5 + 9 * i) for i in range(3)]
    seeds = [4, 5, 6]
    places = [p.coords for p in parts]
    together = sample(stage, stage.noise(seeds, places), tokens(3), tokens(3, 1))
    for i, one in enumerate(together.samples()):
        alone = sample(
            stage,
            stage.noise(seeds[i : i + 1], places[i : i + 1]),
            tokens(3)[i : i + 1],
            tokens(3, 1)[i : i + 1],
        )
        torch.testing.assert_close(one.feats, alone.feats)
        assert torch.equal(one.coords, places[i])


def test_no_gradient_eval_mode_and_modes_given_back():
    field = Field(lambda x, t, cond: 0.1 * x)
    field.part = torch.nn.Dropout()
    field.frozen = torch.nn.Dropout().eval()
    x = noise().requires_grad_()
    end = sample(stage_of(field), x, tokens(2), None)
    assert not end.requires_grad and not any(training for _, _, training in field.calls)
    assert field.training and field.part.training and not field.frozen.training
    broken = Field(lambda x, t, cond: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(stage_of(broken), noise(), tokens(2), None)
    assert broken.training


def test_trajectory_is_what_sample_does():
    stage = stage_of(PerChannel())
    seen = list(trajectory(stage, noise(), tokens(2), None))
    assert torch.equal(seen[-1][0], sample(stage, noise(), tokens(2), None))
    assert len(seen) == PLAIN.steps
    assert seen[0][0].grad_fn is None and torch.is_grad_enabled()


def test_errors_name_the_values():
    stage = stage_of(Field(lambda x, t, cond: x / 0))
    with raising("sample", "'structure'"):
        sample(stage, noise(), tokens(2), None)


def test_guidance_is_taken_back_to_the_width_without_it():
    """At share 1 the guided x_0 has the plain one's standard deviation, at 0 nothing changes to the last bit,
    between lies between.
    """
    path = FlowPath(sigma_min=1e-3)
    stage = stage_of(
        Field(lambda x, t, cond: x * (1 + cond.mean((1, 2)).view(-1, *[1] * (x.ndim - 1)))), path=path
    )
    cond = tokens(2)
    null = torch.zeros_like(tokens(2))
    widths = {}
    for share in (0.0, 0.5, 1.0):
        guided = plain(2, cfg_strength=4.0, cfg_interval=(0.0, 1.0), cfg_rescale=share)
        _, estimate = next(trajectory(stage, noise(), cond, null, guided))
        widths[share] = estimate.flatten(1).std(1, correction=0)
    at = torch.ones(2)
    before = path.data(noise(), at, stage.velocity(noise(), at, cond)).flatten(1).std(1, correction=0)
    torch.testing.assert_close(widths[1.0], before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(widths[0.5], (widths[0.0] + widths[1.0]) / 2, rtol=1e-4, atol=1e-5)
    assert ((widths[0.0] - widths[1.0]).abs() > 1e-3).all()
    torch.testing.assert_close(path.velocity_to(noise(), at, path.data(noise(), at, noise())), noise())


def test_a_network_that_reads_it_is_told_how_long_a_step_is():
    """dx/dt = a x: told the step, a network can answer with the mean velocity on the way
    and needs one step.
    """
    a = 0.8
    told = []

    def mean(module, x, t, cond, step):
        told.append(step.tolist())
        return x * (1 - math.exp(-a * float(step[0]))) / float(step[0])

    stage = stage_of(Field(lambda x, t, cond: a * x))
    with raising("'structure'", "shortcut"):
        sample(stage, noise(), tokens(2), None, plain(4, shortcut=True))
    stage.call_step = mean
    for steps in (1, 4):
        torch.testing.assert_close(
            sample(stage, noise(), tokens(2), None, plain(steps, shortcut=True)), math.exp(-a) * noise()
        )
    assert told == [[1.0, 1.0]] + [[0.25, 0.25]] * 4
    sample(stage, noise(), tokens(2), None, plain(3))
    assert len(told) == 5  # not told where it is not asked for
