"""Shapley values and Integrated Gradients of rewards with known answers, error bars, and the rejection of
what does not add up.
"""

import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch

from eg3d_rlhf.evaluation.attribution.settings import BOUND
from eg3d_rlhf.evaluation.attribution.shapley import (
    Attribution,
    CoalitionValues,
    all_coalitions,
    check_gap,
    exact,
    exact_from_table,
    integrated_gradients,
    occlusion,
    shapley,
)
from tests.rejections import raising

REGIONS = 6
SHAPE = (5, 6, 7)


class Game:
    """A pair of slabs in random regions, and the sum of each region."""

    def __init__(self, seed, regions=REGIONS):
        g = torch.Generator().manual_seed(seed)
        self.regions = regions
        self.labels = torch.randperm(math.prod(SHAPE), generator=g).reshape(SHAPE) % regions
        self.original, self.tuned = torch.rand([2, 1, *SHAPE], generator=g)
        self.weights = torch.rand(SHAPE, generator=g) - 0.5
        self.calls = []

    def sums(self, slabs):
        """[B, R] weighted sum of each region."""
        weighted = (slabs[:, 0] * self.weights).flatten(1).double()
        return torch.zeros(len(slabs), self.regions, dtype=torch.float64).index_add_(
            1, self.labels.flatten(), weighted
        )

    def values(self, score, batch=16):
        def counted(slabs):
            self.calls.append(len(slabs))
            return score(slabs)

        return CoalitionValues(counted, self.original, self.tuned, self.labels, self.regions, batch)

    @property
    def change(self):
        return (self.sums(self.tuned[None]) - self.sums(self.original[None]))[0].numpy()


def by_orders(table, regions):
    """The definition: the mean of marginal contributions over all orders."""
    out = np.zeros(regions)
    for order in itertools.permutations(range(regions)):
        key = 0
        for i in order:
            out[i] += table[key | 1 << i] - table[key]
            key |= 1 << i
    return out / math.factorial(regions)


@pytest.mark.parametrize("regions", [1, 2, 5])
def test_any_game_equals_the_definition(regions):
    table = np.random.default_rng(regions).standard_normal(1 << regions)
    np.testing.assert_allclose(exact_from_table(table), by_orders(table, regions), atol=1e-12)


@pytest.mark.parametrize("method", ["exact", "antithetic"])
def test_planted_defect_comes_first(method):
    first = 0
    for trial in range(100):
        game = Game(100 + trial)
        planted = trial % REGIONS
        inside = game.labels == planted
        game.tuned = game.original + 0.05 * torch.rand(
            1, *SHAPE, generator=torch.Generator().manual_seed(trial)
        )
        game.tuned = torch.where(inside, game.original + 0.5, game.tuned)  # a bump that the reward dislikes

        def score(slabs, inside=inside, game=game):
            bump = (slabs[:, 0] - game.original[0])[:, inside].mean(dim=1)
            return game.sums(slabs).sum(dim=1).tanh() - 4 * bump.square()

        values = game.values(score)
        result = shapley(values, REGIONS, values.difference(), method, 16, trial)
        first += int(np.abs(result.values).argmax() == planted)
    assert first >= 95


@pytest.mark.parametrize("method", ["permutation", "antithetic"])
def test_sampled_values_lie_within_their_errors(method):
    distances = []
    bits = 1 << torch.arange(REGIONS)
    for trial in range(40):
        table = np.random.default_rng(trial).standard_normal(1 << REGIONS)
        truth = exact_from_table(table)

        def value(coalitions, table=table):
            return torch.from_numpy(table[(coalitions * bits).sum(dim=1).numpy()])

        result = shapley(value, REGIONS, table[-1] - table[0], method, 64, trial)
        assert abs(result.gap) < 1e-12
        distances.append((result.values - truth) / result.errors)
    # about 95 % of a t distribution with 31 degrees or more
    inside = np.mean(np.abs(np.concatenate(distances)) < 2)
    assert 0.92 < inside < 0.98


def test_antithetic_pairs_are_exact_for_pairwise_games():
    game = Game(3)
    values = game.values(lambda slabs: (s := game.sums(slabs)).sum(dim=1) + s[:, 0] * s[:, 2])
    result = shapley(values, REGIONS, values.difference(), "antithetic", 4, 0)
    np.testing.assert_allclose(result.values, exact(values, REGIONS), atol=1e-6)
    np.testing.assert_allclose(result.errors, 0, atol=1e-6)


def test_values_are_cached_and_batches_bounded():
    game = Game(4)
    values = game.values(lambda slabs: game.sums(slabs).sum(dim=1), batch=5)
    exact(values, REGIONS)
    assert sum(game.calls) == values.evaluations == 2**REGIONS and max(game.calls) == 5
    occlusion(values, REGIONS)
    assert values.evaluations == 2**REGIONS


def test_mixed_slabs_are_the_definition():
    game = Game(5)
    seen = {}
    values = game.values(lambda slabs: slabs.flatten(1).sum(dim=1), batch=7)
    coalitions = all_coalitions(REGIONS)
    keys = values.keys(coalitions)
    for start in range(0, len(keys), 7):
        seen.update(zip(keys[start : start + 7], values.compose_slabs(keys[start : start + 7]), strict=True))
    for key, coalition in zip(keys, coalitions, strict=True):
        assert torch.equal(seen[key], torch.where(coalition[game.labels], game.tuned, game.original))


def test_unchanged_regions_cost_nothing():
    game = Game(6)
    game.tuned = torch.where(game.labels == 2, game.original, game.tuned)
    values = game.values(lambda slabs: game.sums(slabs).sum(dim=1))
    result = exact(values, REGIONS)
    assert result[2] == 0 and values.evaluations == 2 ** (REGIONS - 1)


def test_gap_above_the_bound_is_rejected():
    fine = Attribution(method="exact", values=np.array([1.0, 2.0]), gap=1e-7, difference=3.0)
    check_gap([fine], [7], 0.01)
    wrong = Attribution(method="exact", values=np.array([1.0, 2.0]), gap=0.5, difference=2.5)
    with raising("--gap-bound", "0.2", "seed 8"):
        check_gap([fine, wrong], [7, 8], 0.01)


def test_a_leaking_score_shows_in_the_gap():
    """The difference is computed apart from the coalitions: a mask that misses voxels cannot add up."""
    game = Game(8)
    values = game.values(lambda slabs: game.sums(slabs).sum(dim=1))
    values.voxels[0] = values.voxels[0][1:]
    result = shapley(values, REGIONS, values.difference())
    assert result.relative_gap > 1e-3


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("exact", 64, 17), ("--method=exact", "16", "17")),
        (("antithetic", 5, 4), ("--permutations", "even", "5")),
        (("permutation", 1, 4), ("--permutations", "2", "1")),
    ],
)
def test_wrong_settings_are_named(arguments, names):
    method, samples, regions = arguments
    with raising(*names):
        shapley(lambda c: torch.zeros(len(c), dtype=torch.float64), regions, 0.0, method, samples)


captum = pytest.mark.skipif(
    importlib.util.find_spec("captum") is None,
    reason="captum is not installed: pip install 'eg3d-rlhf[attribution]'",
)
SLAB = (1, 3, 4, 5)


def slabs(seed=0):
    return torch.rand([2, *SLAB], generator=torch.Generator().manual_seed(seed)).unbind(0)


def difference(score, original, tuned):
    return float(score(tuned[None]) - score(original[None]))


@captum
def test_quadratic_reward_is_exact():
    original, tuned = slabs(2)
    score = lambda x: x.square().flatten(1).sum(dim=1)  # noqa: E731
    result = integrated_gradients(score, original, tuned, difference(score, original, tuned), step_count=2)
    torch.testing.assert_close(
        result.voxels.float(), (tuned.square() - original.square())[0], atol=1e-5, rtol=1e-4
    )


@captum
def test_steps_rise_until_the_gap_is_small():
    original = torch.zeros(SLAB)
    tuned = torch.ones(SLAB)

    def score(x):  # a step that few points see
        return torch.sigmoid(400 * (x.flatten(1).mean(dim=1) - 0.503))

    result = integrated_gradients(score, original, tuned, difference(score, original, tuned), step_count=4)
    steps = [s for s, _ in result.tried]
    assert (
        steps[0] == 4 and len(steps) > 2 and all(b == 2 * a for a, b in zip(steps, steps[1:], strict=False))
    )
    assert result.complete and result.tried[0][1] > BOUND >= result.tried[-1][1]


@captum
def test_what_stays_incomplete_says_so():
    original = torch.zeros(SLAB)
    tuned = torch.ones(SLAB)
    score = lambda x: torch.sigmoid(4000 * (x.flatten(1).mean(dim=1) - 0.503))  # noqa: E731
    result = integrated_gradients(
        score, original, tuned, difference(score, original, tuned), step_count=4, max_step_count=8
    )
    assert not result.complete and [s for s, _ in result.tried] == [4, 8]
