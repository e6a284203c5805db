"""Batches of voxels: the result of a sample does not depend on the other samples of the batch."""

import pytest
import torch

from eg3d_rlhf.models.sparse import (
    SparseBatch,
    SparseSample,
    collate,
    count,
    feats_of,
    mean_per_sample,
    separate,
    spread,
    with_feats,
)
from tests.rejections import raising
from tests.tuning.flow.closed_forms import dense, voxels


def errors(a, b):
    return mean_per_sample((feats_of(a) - feats_of(b)).square(), a)


SAMPLES = [voxels(i, v) for i, v in enumerate((1, 40, 7, 23))]


def test_joining_and_parting_are_inverse():
    batch = collate(SAMPLES)
    assert count(batch) == 4 and batch.lengths.tolist() == [1, 40, 7, 23] and batch.coords.is_contiguous()
    for a, b in zip(separate(batch), SAMPLES, strict=True):
        assert torch.equal(a.coords, b.coords) and torch.equal(a.feats, b.feats)
    grids = [dense(i) for i in range(3)]
    assert count(collate(grids)) == 3
    assert all(torch.equal(a, b) for a, b in zip(separate(collate(grids)), grids, strict=True))


def test_errors_of_a_sample_do_not_depend_on_the_others():
    """Errors are bitwise the same in every batch and at every position."""
    noisy = [SparseSample(s.coords, s.feats + 0.1 * torch.randn_like(s.feats)) for s in SAMPLES]
    together = errors(collate(SAMPLES), collate(noisy))
    for i, (a, b) in enumerate(zip(SAMPLES, noisy, strict=True)):
        alone = errors(collate([a]), collate([b]))
        assert torch.equal(together[i : i + 1], alone)
        torch.testing.assert_close(alone[0], (a.feats - b.feats).square().mean())
    reversed_batch = errors(collate(SAMPLES[::-1]), collate(noisy[::-1]))
    assert torch.equal(reversed_batch.flip(0), together)


def test_a_large_sample_does_not_outweigh_a_small_one():
    batch = collate([voxels(0, 2), voxels(1, 60)])
    other = batch.with_feats(batch.feats + torch.tensor([3.0, 1.0])[batch.sample, None])
    torch.testing.assert_close(errors(batch, other), torch.tensor([9.0, 1.0]))


def test_gradients_stay_within_their_sample():
    batch = collate(SAMPLES)
    feats = batch.feats.double().requires_grad_()
    (mean_per_sample(feats.square(), batch)[2]).backward()
    assert (feats.grad[batch.sample != 2] == 0).all() and (feats.grad[batch.sample == 2] != 0).all()
    assert torch.autograd.gradcheck(lambda f: mean_per_sample(f.square(), batch), (feats,))


def test_many_voxels_add_up_without_drift():
    n = 64**3
    coords = torch.cartesian_prod(*[torch.arange(64)] * 3).int()
    batch = collate([SparseSample(coords, torch.full((n, 1), 0.1))])
    assert mean_per_sample(batch.feats, batch).item() == pytest.approx(0.1, rel=1e-7)


def test_one_value_per_sample_spreads_over_its_rows():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    batch = collate(SAMPLES)
    assert torch.equal(spread(values, batch)[:, 0], values.repeat_interleave(torch.tensor([1, 40, 7, 23])))
    assert spread(values, torch.zeros(4, 2, 3, 3, 3)).shape == (4, 1, 1, 1, 1)


def test_other_features_share_what_the_coordinates_decide():
    batch = collate(SAMPLES)
    other = with_feats(batch, feats_of(batch).new_zeros(71, 5))
    assert other.cache is batch.cache and other.coords is batch.coords
    half = batch.to(torch.bfloat16)
    assert (
        half.feats.dtype == torch.bfloat16 and half.coords.dtype == torch.int32 and half.cache is batch.cache
    )


def test_shapes_that_do_not_fit_are_rejected():
    with raising("coords", "[v, 3]", "[4, 2]"):
        SparseSample(torch.zeros(4, 2), torch.zeros(4, 1))
    with raising("SparseSample.feats", "[4, C]", "[3, 1]"):
        SparseSample(torch.zeros(4, 3), torch.zeros(3, 1))
    with raising("SparseBatch.feats", "[4, C]", "[3, 1]"):
        SparseBatch(torch.zeros(4, 4, dtype=torch.int32), torch.zeros(3, 1), 1)
    with raising("coords", "contiguous"):
        SparseBatch(torch.zeros(4, 4, dtype=torch.int32).T, torch.zeros(4, 1), 1)
    with raising("collate", "none"):
        collate([])
    with raising("'SparseSample'", "'Tensor'"):
        collate([SAMPLES[0], dense(0)])
