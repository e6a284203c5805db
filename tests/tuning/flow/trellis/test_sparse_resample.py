"""Halving and doubling a sparse grid against loops."""

from collections import defaultdict

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis.sparse_conv import SparseResBlock, coarser, downsample, upsample
from tests.tuning.flow.trellis.test_sparse_conv import random_batch


def test_downsampling_divides_the_sum_of_n_by_n_plus_1_in_sorted_order():
    x = random_batch()
    cells = defaultdict(list)
    for coord, row in zip(x.coords.tolist(), x.feats, strict=True):
        cells[coord[0], *(c // 2 for c in coord[1:])].append(row)
    got = downsample(x)
    assert list(map(tuple, got.coords.tolist())) == sorted(cells)
    assert got.coords.dtype == torch.int32 and got.coords.is_contiguous() and got.size == x.size
    torch.testing.assert_close(got.feats, torch.stack([sum(cells[key]) / (len(cells[key]) + 1) for key in sorted(cells)]))


def test_upsampling_gives_every_voxel_its_coarse_voxels_features():
    x = random_batch()
    down = downsample(x)
    places = {tuple(c): row for c, row in zip(down.coords.tolist(), down.feats, strict=True)}
    got = upsample(down, x)
    assert got.coords is x.coords
    want = torch.stack([places[c[0], *(i // 2 for i in c[1:])] for c in x.coords.tolist()])
    torch.testing.assert_close(got.feats, want, rtol=0, atol=0)


def test_what_is_found_of_the_coordinates_is_kept_through_several_halvings():
    x = random_batch()
    twice = downsample(downsample(x))
    again = downsample(downsample(x.with_feats(2 * x.feats)))
    assert again.coords is twice.coords and again.cache is twice.cache
    assert torch.equal(upsample(upsample(twice, downsample(x)), x).coords, x.coords)


def test_gradients_reach_the_features():
    x = random_batch(channels=2)
    feats = x.feats[:9].clone().requires_grad_()
    small = SparseBatch(x.coords[:9].contiguous(), feats, 1)
    assert torch.autograd.gradcheck(lambda f: upsample(downsample(small.with_feats(f)), small).feats, feats)


def test_refuses_voxels_that_are_not_the_halved_ones():
    x = random_batch()
    with pytest.raises(ValueError, match=f"upsample: expected {len(coarser(x).coords)} coarse voxels, got {len(x.coords)}. Give the batch"):
        upsample(x, x)


@pytest.mark.parametrize(("resample", "channels"), [("", 4), ("", 6), ("down", 6)])
def test_a_block_with_dead_convolutions_is_its_skip(resample, channels):
    torch.manual_seed(0)
    x, block = random_batch(channels=4, dtype=torch.float32), SparseResBlock(4, channels, 5, resample=resample)
    for parameter in block.conv2.parameters():
        torch.nn.init.zeros_(parameter)
    got = block(x, torch.randn(2, 5))
    before = downsample(x) if resample else x
    torch.testing.assert_close(got.feats, block.skip_connection(before.feats))
