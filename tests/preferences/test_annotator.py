"""The simulated annotator of heads: the ground truth scores 1, every defect costs, and labels flip at the
requested rate.
"""

import functools

import numpy as np
import pytest
import torch
from scipy import ndimage

from eg3d_rlhf.preferences.annotator import (
    DEFECTS,
    LAPSES,
    WEIGHTS,
    defects,
    label_pairs,
    solve_temperature,
    utility,
)
from eg3d_rlhf.preferences.pair_strategies.blocks import blocks_of_pairs
from tests.rejections import raising
from training.heads.people import LATENT, heads_from_latents
from training.heads.people_damage import damaged_distance
from training.heads.people_mesh import grid_points, head_grid

N = 32


@functools.cache
def _ground_truth(number: int) -> np.ndarray:
    z = np.random.RandomState(number).randn(1, LATENT)
    return head_grid(heads_from_latents(z)[0], N).astype(np.float32)


@pytest.fixture(params=[3, 4])
def ground_truth(request):
    return _ground_truth(request.param)


def _ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    return np.linalg.norm(grid_points(N) - np.array(centre), axis=-1).astype(np.float32) - radius


def _damaged(ground_truth: np.ndarray, amount: float) -> np.ndarray:
    """The scan without its back, as the family's damage has it, or a part of the way there."""
    quality = torch.zeros(1, 18)
    quality[0, 0], quality[0, 1] = 2.0, -2.0
    points = torch.from_numpy(grid_points(N).reshape(1, -1, 3)).float()
    scan = (
        damaged_distance(points, torch.from_numpy(ground_truth.reshape(1, -1)), quality)
        .reshape(ground_truth.shape)
        .numpy()
    )
    return np.where(grid_points(N)[..., 1] < 0.35 - 0.7 * amount, ground_truth, scan)


def _rough(ground_truth: np.ndarray, amount: float) -> np.ndarray:
    x, y, z = np.moveaxis(grid_points(N), -1, 0)
    return (ground_truth + amount * 0.012 * np.sin(90 * x) * np.sin(95 * y + 1) * np.sin(85 * z + 2)).astype(
        np.float32
    )


DAMAGE = {  # by amount in 0..1; what must cost
    "missing": _damaged,
    "extra": lambda ground_truth, amount: np.minimum(
        ground_truth, _ball((0.0, -0.1, -0.22), 0.05 + 0.07 * amount)
    ),
    "floaters": lambda ground_truth, amount: np.minimum(
        ground_truth, _ball((0.38, 0.38, -0.38), 0.03 + 0.04 * amount)
    ),
    "roughness": _rough,
    "face": lambda ground_truth, amount: np.maximum(
        ground_truth, grid_points(N)[..., 2].astype(np.float32) - 0.2 + 0.08 * amount
    ),
}


def test_the_ground_truth_has_utility_one(ground_truth):
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert utility(ground_truth, ground_truth).total == pytest.approx(1) and set(
        defects(ground_truth, ground_truth).values()
    ) == {0.0}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_costs_through_its_own_part_and_more_of_it_costs_more(ground_truth, defect):
    judged = [
        utility(ground_truth, ground_truth),
        *(utility(DAMAGE[defect](ground_truth, amount), ground_truth) for amount in (0.3, 0.65, 1.0)),
    ]
    for values in (
        [evaluation.total for evaluation in judged],
        [evaluation.parts[defect] for evaluation in judged],
    ):
        assert all(a > b for a, b in zip(values, values[1:], strict=False)), values


@pytest.mark.parametrize("sigma", [0.375, 0.5, 1.0])  # voxels of 32: .75, 1 and 2 of 64
def test_a_head_that_is_smoother_than_the_ground_truth_loses(ground_truth, sigma):
    smooth = utility(ndimage.gaussian_filter(ground_truth, sigma), ground_truth)
    assert smooth.total < 0.98 and smooth.defects["roughness"] > 0 and smooth.defects["face"] > 0


def test_a_missing_back_costs_more_than_smoothing_can_win(ground_truth):
    damaged = _damaged(ground_truth, 1.0)
    assert utility(damaged, ground_truth).total < 0.75
    assert (
        utility(ndimage.gaussian_filter(damaged, 0.5), ground_truth).total
        < utility(damaged, ground_truth).total + 0.02
    )


def test_only_the_level_set_matters_not_the_steepness(ground_truth):
    scan = _rough(ground_truth, 0.5)
    assert utility(600 * scan, ground_truth).total == pytest.approx(
        utility(scan, ground_truth).total, abs=1e-5
    )


def test_mirroring_changes_nothing(ground_truth):
    scan = _damaged(ground_truth, 1.0)
    assert utility(scan[::-1], ground_truth[::-1]).total == pytest.approx(
        utility(scan, ground_truth).total, abs=1e-6
    )


@pytest.mark.parametrize("value", [5.0, 0.0, float("nan"), float("inf"), float("-inf")])
def test_no_surface_is_worse_than_any_damaged_head_and_never_nan(value, ground_truth):
    empty = utility(np.full((N,) * 3, value), ground_truth)
    assert np.isfinite(empty.total) and empty.total < utility(_damaged(ground_truth, 1.0), ground_truth).total
    assert 0 < utility(np.random.RandomState(0).randn(N, N, N), ground_truth).total < 0.5


@pytest.mark.parametrize("rate", [0.05, 0.12, 0.25])
def test_labels_flip_as_often_as_asked(rate):
    rng = np.random.default_rng(2)
    utilities = rng.normal(0.5, 0.1, 20_000)
    pairs = rng.permutation(20_000).reshape(-1, 2)
    temperature = solve_temperature(utilities, pairs, rate)
    labels = label_pairs(utilities, pairs, temperature, np.random.default_rng(3))
    assert np.mean([not label.clean for label in labels]) == pytest.approx(
        rate, abs=4 * np.sqrt(rate / 10_000)
    )
    for label, pair in zip(labels[:200], pairs[:200], strict=True):
        assert {label.winner, label.loser} == set(pair.tolist())
        assert label.clean == (utilities[label.winner] >= utilities[label.loser])


def test_the_clearest_pair_is_mistaken_now_and_then():
    labels = label_pairs([0.0, 1.0], [(0, 1)] * 5000, 0.01, np.random.default_rng(0))
    assert np.mean([not label.clean for label in labels]) == pytest.approx(LAPSES, abs=0.01)


def test_no_noise_at_temperature_zero_and_same_labels_from_the_same_seed():
    utilities = np.arange(40.0)
    pairs = np.arange(40).reshape(-1, 2)
    assert solve_temperature(utilities, pairs, 0.0) == 0.0
    assert all(
        label.clean and label.winner > label.loser
        for label in label_pairs(utilities, pairs, 0.0, np.random.default_rng(1))
    )
    first, second = (label_pairs(utilities, pairs, 9.0, np.random.default_rng(5)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("count", "block", "samples"), [(56, 8, 16), (40, 8, 16), (20, 2, 40)])
def test_blocks_hold_all_their_pairs_and_share_no_sample(count, block, samples):
    pairs = blocks_of_pairs(count, block, np.random.default_rng(0))
    assert pairs.shape == (count, 2) and len({tuple(sorted(pair)) for pair in pairs.tolist()}) == count
    assert set(pairs.ravel()) == set(range(samples))
    partners = {int(a): {int(b) for pair in pairs if a in pair for b in pair} for a in pairs[0]}
    assert all(len(seen) <= block for seen in partners.values())


def test_ties_alone_are_named():
    with raising("ties"):
        solve_temperature([1.0, 1.0], [(0, 1)])
