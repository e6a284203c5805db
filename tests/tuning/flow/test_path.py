"""The path between data and noise: its ends, its derivative, its times, and the other convention, which maps onto it exactly."""

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, feats_of, mean_per_sample, spread, with_feats
from eg3d_rlhf.tuning.flow.generate import trajectory
from eg3d_rlhf.tuning.flow.stage import FlowPath, opposite
from tests.tuning.flow import closed_forms


def batches() -> list[tuple]:
    """x_0 and eps in float64, dense and on voxels."""
    g = torch.Generator().manual_seed(0)
    dense = [torch.randn(3, 2, 4, 4, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    sparse = SparseBatch.join([closed_forms.voxels(i, 4 + i) for i in range(3)]).to(torch.float64)
    return [tuple(dense), (sparse, sparse.with_feats(torch.randn(sparse.feats.shape, generator=g, dtype=torch.float64)))]


@pytest.mark.parametrize("x_0, eps", batches())
@pytest.mark.parametrize("sigma_min", [0.0, 1e-5, 0.1])
def test_ends_derivative_and_data(x_0, eps, sigma_min):
    path, n = FlowPath(sigma_min=sigma_min), torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(feats_of(path.mix(x_0, n, eps)), feats_of(eps))
    torch.testing.assert_close(feats_of(path.mix(x_0, 0 * n, eps)), feats_of(x_0) + sigma_min * feats_of(eps))
    t, v = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), path.velocity(x_0, eps)
    ahead, behind = (feats_of(path.mix(x_0, t + h, eps)) for h in (1e-3, -1e-3))
    torch.testing.assert_close((ahead - behind) / 2e-3, feats_of(v))  # exact: the path is straight
    torch.testing.assert_close(feats_of(path.data(path.mix(x_0, t, eps), t, v)), feats_of(x_0))


@pytest.mark.parametrize("x_0, eps", batches())
def test_the_papers_convention_maps_exactly(x_0, eps):
    """Circular-DPO, equations 1-4: x(t') = (1 - t') x0' + t' x1' with x0' noise and x1' data, target x1' - x0'."""
    path, t = FlowPath(sigma_min=0.0), torch.tensor([3, 512, 1001], dtype=torch.float64) / 1024  # 1 - t has no rounding
    wide = spread(t, x_0)
    guess = with_feats(x_0, torch.sin(feats_of(x_0)))
    paper_t, paper_guess = opposite(t, guess)
    paper_wide = spread(paper_t, x_0)
    noise, data = feats_of(eps), feats_of(x_0)
    paper_x, paper_target = (1 - paper_wide) * noise + paper_wide * data, data - noise
    assert torch.equal(paper_t, 1 - t) and torch.equal(1 - paper_wide, wide)
    assert torch.equal(feats_of(path.mix(x_0, t, eps)), paper_x)
    assert torch.equal(feats_of(path.velocity(x_0, eps)), -paper_target)
    assert torch.equal(feats_of(paper_guess), -feats_of(guess))
    per_sample = mean_per_sample((feats_of(paper_guess) - paper_target).square(), x_0)
    assert torch.equal(path.errors(guess, x_0, eps), per_sample)
    back_t, back = opposite(paper_t, paper_guess)
    assert torch.equal(back_t, t) and torch.equal(feats_of(back), feats_of(guess))


def test_a_model_of_the_other_convention_samples_the_same():
    """Their Euler runs from 0 up: x += (t'_next - t') v'(x, t')."""
    paper = closed_forms.Field(lambda x, t, cond: (1 + t) * x - t * t)
    stage = closed_forms.stage_of(paper, data_at_one=True)
    noise, x = closed_forms.dense(1)[None], closed_forms.dense(1)[None]
    for i in range(8):
        x = x + (1 / 8) * paper.function(x, torch.tensor(i / 8), None)
    *_, (got, _) = trajectory(stage, noise, closed_forms.tokens(1), None)
    torch.testing.assert_close(got, x)
    assert torch.cat([t for t, _, _ in paper.calls]).tolist() == [i / 8 for i in range(8)]


def test_times_follow_their_schedules():
    z = torch.logit(FlowPath().times(20_000, torch.Generator().manual_seed(0)))
    assert abs(z.mean() - 1) < 0.03 and abs(z.std() - 1) < 0.03
    z = torch.logit(FlowPath(mean=-0.5, std=2.0).times(20_000, torch.Generator().manual_seed(0)))
    assert abs(z.mean() + 0.5) < 0.06 and abs(z.std() - 2) < 0.06
    t = FlowPath(schedule="uniform").times(20_000, torch.Generator().manual_seed(0))
    assert abs(t.mean() - 0.5) < 0.01 and abs(t.var() - 1 / 12) < 0.003 and 0 <= t.min() and t.max() < 1
    again = FlowPath(schedule="uniform").times(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(t, again)


def test_errors_reach_the_velocity_alone():
    path, (x_0, eps) = FlowPath(), batches()[0]
    v = torch.zeros_like(x_0, requires_grad=True)
    path.errors(v, x_0, eps).sum().backward()
    torch.testing.assert_close(v.grad, -2 * path.velocity(x_0, eps) / x_0[0].numel())


@pytest.mark.parametrize("t", [torch.tensor([0.5, 1000.0, 0.1]), torch.tensor([-0.1, 0.5, 0.5]), torch.tensor([float("nan"), 0.5, 0.5])])
def test_times_of_another_range_are_refused(t):
    with pytest.raises(ValueError, match=r"FlowPath.mix\(t\): expected times from 0 \(data\) to 1 \(noise\), got .* Rescale them"):
        FlowPath().mix(torch.zeros(3, 1, 2, 2, 2), t, torch.zeros(3, 1, 2, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sigma_min": 1.0}, "sigma_min < 1, got 1.0"), ({"schedule": "cosine"}, "logit-normal or uniform"), ({"std": 0.0}, "std > 0")],
)
def test_settings_that_make_no_path_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FlowPath(**options)
