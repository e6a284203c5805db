"""Shaping, clip and anchors against closed forms and numpy loops."""

import math

import numpy as np
import pytest
import torch

from eg3d_rlhf.tuning.gan.phase import SHAPINGS, ReferenceWins, clip_bounds, density_l1, front_growth
from eg3d_rlhf.tuning.gan.settings import RewardConfig, clip_range
from tests.rejections import raising


class LinearReward:
    """score = the slab's mean; the embedding is the slab's mean and 1; the pairs head compares the means."""

    def embed(self, slab):
        mean = slab.flatten(1).mean(dim=1, keepdim=True)
        return torch.cat([mean, torch.ones_like(mean)], dim=1)

    def score_embedding(self, embedding):
        return embedding[:, 0]

    def score(self, slab):
        return self.score_embedding(self.embed(slab))

    def pair_margin(self, first, second):
        return first[:, 0] - second[:, 0]


def slabs(*means: float) -> torch.Tensor:
    return torch.tensor(means)[:, None, None, None, None].expand(-1, 1, 2, 2, 2).clone()


def shape(name: str, initial: list[float], *means: float, temperature: float | None = None) -> list[float]:
    scores = torch.tensor(initial)
    shaping = SHAPINGS[name](scores, torch.stack([scores, torch.ones_like(scores)], dim=1), temperature)
    shaped, score = shaping(LinearReward(), slabs(*means), torch.arange(len(means)))
    assert score.tolist() == pytest.approx(list(means))
    return shaped.tolist()


@pytest.mark.parametrize(
    ("initial", "scale"),
    [
        ([-2.0, 0.0, 2.0], 1 / 2),  # deviation 2 (n - 1), mean 0
        ([9.0, 10.0, 11.0], 1 / 5),  # deviation 1, floored at half of |mean| = 5
        ([-9.0, -10.0, -11.0], 1 / 5),
        ([-0.001, 0.0, 0.001], 10.0),  # 1 / 0.001, capped at 10
        ([0.0, 0.0, 0.0], 10.0),
    ],
)
def test_standardised(initial, scale):
    mean = sum(initial) / 3
    assert shape("standardised", initial, 4.0, -7.0) == pytest.approx(
        [(4 - mean) * scale, (-7 - mean) * scale], rel=1e-5
    )


@pytest.mark.parametrize(
    ("initial", "temperature", "scale"),
    [
        # a reward that orders nothing: deviation 0.1, and log odds of 0.1 / 4
        ([-0.1, 0.0, 0.1], 4.0, 1 / 4),
        ([-12.0, 0.0, 12.0], 24.0, 1 / 24),  # another, which has learnt its labels by heart
        ([-9.0, -10.0, -11.0], 1.5, 1 / 5),  # one that knows: as without
    ],
)
def test_standardising_never_magnifies_log_odds(initial, temperature, scale):
    mean = sum(initial) / 3
    assert shape("standardised", initial, 3.0, temperature=temperature) == pytest.approx(
        [(3 - mean) * scale], rel=1e-5
    )


def test_softplus_saturates_above_and_is_linear_below():
    got = shape("softplus", [0.0, 1.0], -20.0, 0.0, 0.5, 20.0)
    assert got == pytest.approx([-40.0, -math.log(2), -math.log1p(math.exp(-1)), 0.0], abs=1e-6)
    x = slabs(-30.0, 30.0).requires_grad_()
    SHAPINGS["softplus"](torch.zeros(2), torch.zeros(2, 2), None)(LinearReward(), x, torch.arange(2))[
        0
    ].sum().backward()
    assert x.grad.flatten(1).sum(dim=1).tolist() == pytest.approx([2.0, 0.0], abs=1e-6)


def test_reference_wins_is_the_mean_win_probability_over_cyclic_references():
    references = [0.0, 1.0, 2.0, 3.0, 4.0]
    shaping = ReferenceWins(torch.tensor([[r, 1.0] for r in references]), comparisons=2)
    win = lambda mine, other: 1 / (1 + math.exp(other - mine))  # noqa: E731
    first, _ = shaping(LinearReward(), slabs(1.5, -1.0), torch.arange(2))
    expected = [(win(1.5, 0) + win(1.5, 1)) / 2, (win(-1, 2) + win(-1, 3)) / 2]
    assert first.tolist() == pytest.approx(expected, rel=1e-5)
    # the run's next two: references 4, 0 and 1, 2
    second, _ = shaping(LinearReward(), slabs(1.5, -1.0), 2 + torch.arange(2))
    expected = [(win(1.5, 4) + win(1.5, 0)) / 2, (win(-1, 1) + win(-1, 2)) / 2]
    assert second.tolist() == pytest.approx(expected, rel=1e-5)
    turns = [
        shaping(LinearReward(), slabs(value), torch.tensor([place]))[0]
        for value, place in ((-1.0, 3), (1.5, 2))
    ]
    assert torch.cat(turns[::-1]).tolist() == second.tolist(), "neither order nor rounds matter"


def test_clip_bounds():
    initial = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    assert clip_bounds("-10,10", initial) == (-10.0, 10.0)
    assert clip_bounds("none", initial) == (-math.inf, math.inf)
    assert clip_bounds("iqr", initial) == pytest.approx((1 - 1.5 * 2, 3 + 1.5 * 2))
    values = np.random.RandomState(0).randn(128).astype(np.float32)
    low, high = np.quantile(values, [0.25, 0.75])
    expected = (low - 1.5 * (high - low), high + 1.5 * (high - low))
    assert clip_bounds("iqr", torch.from_numpy(values)) == pytest.approx(expected, rel=1e-5)


def test_a_bound_may_be_a_quantile_of_the_untuned_scores():
    initial = torch.tensor([4.0, 0.0, 3.0, 1.0, 2.0])
    assert clip_bounds("-10,q0.55", initial) == pytest.approx((-10.0, 2.2))
    assert clip_bounds("q0.25,q0.75", initial) == pytest.approx((1.0, 3.0))
    assert clip_bounds("-inf,q1", initial) == (-math.inf, 4.0)
    clip_range("3,q0.5")  # which may be right: the scores are not known yet
    with raising("--reward-clip", "3,q0.5"):
        clip_bounds("3,q0.5", initial)


@pytest.mark.parametrize(
    "spec",
    [
        "5,1",
        "1,1",
        "1",
        "1,2,3",
        "a,b",
        "",
        "nan,1",
        "1,nan",
        "-10,q55",
        "-10,q",
        "-10,qq0.5",
        "q0.6,q0.5",
        "-10,qnan",
        "-10,q-0.1",
    ],
)
def test_clip_mistakes(spec):
    with raising("--reward-clip", repr(spec), "LOW,HIGH"):
        clip_range(spec)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"consistency_gate": -0.1}, (">= 0", "-0.1")),
        ({"consistency_gate": 1.1}, ("<= 1", "1.1")),
        ({"consistency_gate": math.nan}, ("consistency_gate", "nan")),
        ({"consistency_gate": 0.1, "lambda_sigma": 0.0}, ("--lambda-sigma",)),  # nothing to gate
        ({"consistency_gate": 0.1, "reward_clip": "none"}, ("--reward-clip",)),  # nothing above
    ],
)
def test_gate_mistakes(config, names):
    with raising("gate", *names):
        RewardConfig(**config)


def test_density_l1_is_the_mean_absolute_difference():
    random = np.random.RandomState(0)
    a, b = random.randn(2, 3, 4, 5, 6).astype(np.float32)
    expected = [np.mean([abs(p - q) for p, q in zip(a[i].flat, b[i].flat, strict=True)]) for i in range(3)]
    np.testing.assert_allclose(
        density_l1(torch.from_numpy(a), torch.from_numpy(b)).numpy(), expected, rtol=1e-5
    )
    assert density_l1(torch.from_numpy(a), torch.from_numpy(a)).tolist() == [0, 0, 0]


def front_growth_loop(sigma: np.ndarray, reference: np.ndarray, level: float) -> float:
    """Walk every ray from the camera (largest z) until the reference reaches the level."""
    depth, height, width = sigma.shape
    growth = 0.0
    count = 0
    for y in range(height):
        for x in range(width):
            for z in reversed(range(depth)):
                if reference[z, y, x] >= level:
                    break
                growth += max(float(sigma[z, y, x]) - float(reference[z, y, x]), 0.0)
                count += 1
    return growth / max(count, 1)


@pytest.mark.parametrize("level", [10.0, -5.0, 1000.0])
def test_front_growth_counts_voxels_before_the_reference_surface(level):
    random = np.random.RandomState(1)
    sigma, reference = (random.randn(2, 3, 6, 5, 4) * 8).astype(np.float32)
    expected = [front_growth_loop(sigma[i], reference[i], level) for i in range(3)]
    got = front_growth(torch.from_numpy(sigma), torch.from_numpy(reference), level).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5)
