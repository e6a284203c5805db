"""Integrated Gradients: closed forms, completeness, and the step count that rises by itself."""

import pytest
import torch

from eg3d_rlhf.evaluation.attribution.shapley import BOUND, integrated_gradients

pytest.importorskip("captum")
SHAPE = (1, 3, 4, 5)


def slabs(seed=0):
    return torch.rand([2, *SHAPE], generator=torch.Generator().manual_seed(seed)).unbind(0)


def difference(score, original, tuned):
    return float(score(tuned[None]) - score(original[None]))


def test_linear_reward():
    original, tuned = slabs()
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    score = lambda x: (x * weight).flatten(1).sum(dim=1)  # noqa: E731
    found = integrated_gradients(score, original, tuned, difference(score, original, tuned))
    torch.testing.assert_close(found.voxels.float(), (weight * (tuned - original))[0], atol=1e-5, rtol=1e-4)
    assert found.complete and found.tried == ((32, found.tried[0][1]),)


def test_quadratic_reward_is_exact():
    original, tuned = slabs(2)
    score = lambda x: x.square().flatten(1).sum(dim=1)  # noqa: E731
    found = integrated_gradients(score, original, tuned, difference(score, original, tuned), steps=2)
    torch.testing.assert_close(found.voxels.float(), (tuned.square() - original.square())[0], atol=1e-5, rtol=1e-4)


def test_steps_rise_until_the_gap_is_small():
    original, tuned = torch.zeros(SHAPE), torch.ones(SHAPE)
    score = lambda x: torch.sigmoid(400 * (x.flatten(1).mean(dim=1) - 0.503))  # noqa: E731  # a step that few points see
    found = integrated_gradients(score, original, tuned, difference(score, original, tuned), steps=4)
    steps = [s for s, _ in found.tried]
    assert steps[0] == 4 and len(steps) > 2 and all(b == 2 * a for a, b in zip(steps, steps[1:], strict=False))
    assert found.complete and found.tried[0][1] > BOUND >= found.tried[-1][1]


def test_what_stays_incomplete_says_so():
    original, tuned = torch.zeros(SHAPE), torch.ones(SHAPE)
    score = lambda x: torch.sigmoid(4000 * (x.flatten(1).mean(dim=1) - 0.503))  # noqa: E731
    found = integrated_gradients(score, original, tuned, difference(score, original, tuned), steps=4, most_steps=8)
    assert not found.complete and [s for s, _ in found.tried] == [4, 8]


def test_batches_do_not_matter():
    original, tuned = slabs(3)
    score = lambda x: x.pow(3).flatten(1).sum(dim=1)  # noqa: E731
    d = difference(score, original, tuned)
    one, two = (integrated_gradients(score, original, tuned, d, batch=b).voxels for b in (3, 64))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_wrong_step_count_is_named():
    with pytest.raises(ValueError, match="--steps"):
        integrated_gradients(lambda x: x.flatten(1).sum(dim=1), *slabs(), 1.0, steps=1)
