"""Submanifold convolution against a dense one, and what it saves for the backward pass."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.models.trellis import sparse_conv
from eg3d_rlhf.models.trellis.sparse_conv import (
    SparseResBlock,
    SubmanifoldConv,
    coarser,
    downsample,
    neighbours,
    submanifold_conv,
    upsample,
)
from tests.rejections import raising

R = 6


def random_batch(channels=3, share=0.4, size=2, seed=0, dtype=torch.float64):
    """Make random voxels of a grid of R^3, the rows of each sample in random order."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(size):
        coords = (torch.rand(R, R, R, generator=g) < share).nonzero()
        coords = coords[torch.randperm(len(coords), generator=g)]
        samples.append(
            SparseSample(coords.int(), torch.randn(len(coords), channels, generator=g, dtype=dtype))
        )
    return SparseBatch.join(samples)


def kernel(channels=3, out=4, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out, 3, 3, 3, channels, generator=g, dtype=dtype), torch.randn(
        out, generator=g, dtype=dtype
    )


def dense_oracle(x, weight, bias):
    """Compute conv3d of the dense volumes and read it at the voxels."""
    place = x.coords.long().unbind(1)
    volume = x.feats.new_zeros(x.size, R, R, R, x.feats.shape[1]).index_put(place, x.feats)
    out = F.conv3d(volume.permute(0, 4, 1, 2, 3), weight.permute(0, 4, 1, 2, 3), bias, padding=1)
    return out.permute(0, 2, 3, 4, 1)[place]


@pytest.mark.parametrize("share", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("numbers", [15, 10_000])
def test_equals_a_dense_convolution_with_its_gradients(share, numbers, monkeypatch):
    monkeypatch.setattr(sparse_conv, "MAX_GATHERED_VALUES", numbers)
    x = random_batch(share=share)
    weight, bias = kernel()
    inputs = [v.requires_grad_() for v in (x.feats.clone(), weight, bias)]
    out = submanifold_conv(x.with_feats(inputs[0]), *inputs[1:]).feats
    want = dense_oracle(x.with_feats(inputs[0]), *inputs[1:])
    torch.testing.assert_close(out, want)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    for got, expected in zip(
        torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(want, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_features_of_halved_voxels_are_those_of_every_voxel_in_them(share):
    x = random_batch(share=share)
    weight, bias = kernel()
    row = coarser(x).row
    features = torch.randn(
        len(coarser(x).coords),
        weight.shape[-1],
        generator=torch.Generator().manual_seed(3),
        dtype=weight.dtype,
    )
    inputs = [v.requires_grad_() for v in (features, weight, bias)]
    out = submanifold_conv(x, *inputs[1:], coarse_feats=inputs[0]).feats
    want = submanifold_conv(x.with_feats(inputs[0][row]), *inputs[1:]).feats
    torch.testing.assert_close(out, want)
    for got, expected in zip(
        *(torch.autograd.grad(y.square().sum(), inputs) for y in (out, want)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_opposite_borders_of_the_grid_are_no_neighbours():
    corners = torch.cartesian_prod(*[torch.tensor([0, R - 1])] * 3).int()
    x = SparseBatch.join([SparseSample(corners, torch.ones(8, 1, dtype=torch.float64))])
    pairs = neighbours(x)
    assert [len(written) for written, _ in pairs] == [0] * 13 + [8] + [0] * 13


def test_unsupported_inputs_are_rejected():
    weight, bias = kernel()
    twice = SparseBatch(torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.float64), 1)
    with raising("twice"):
        submanifold_conv(twice, weight, bias)
    below = SparseBatch(
        torch.tensor([[0, -1, 0, 0]], dtype=torch.int32), torch.zeros(1, 3, dtype=torch.float64), 1
    )
    with raising("-1"):
        submanifold_conv(below, weight, bias)
    with raising("weight", "[B, 3, 3, 3, 3]", "[4, 3, 3, 3, 2]"):
        submanifold_conv(random_batch(), weight[..., :2], bias)
    with raising("auto", "torch", "spconv", "'dense'"):
        SubmanifoldConv(3, 4, backend="dense")


def test_spconv_is_rejected_if_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(sparse_conv, "has_spconv", lambda: False)
    with raising("spconv", "'torch'"):
        SubmanifoldConv(3, 4, backend="spconv")


# Halving and doubling a sparse grid against loops.


def test_downsampling_divides_the_sum_of_n_by_n_plus_1_in_sorted_order():
    x = random_batch()
    cells = defaultdict(list)
    for coord, row in zip(x.coords.tolist(), x.feats, strict=True):
        cells[coord[0], *(c // 2 for c in coord[1:])].append(row)
    got = downsample(x)
    assert list(map(tuple, got.coords.tolist())) == sorted(cells)
    assert got.coords.dtype == torch.int32 and got.coords.is_contiguous() and got.size == x.size
    torch.testing.assert_close(
        got.feats, torch.stack([sum(cells[key]) / (len(cells[key]) + 1) for key in sorted(cells)])
    )


def test_gradients_reach_the_features():
    x = random_batch(channels=2)
    feats = x.feats[:9].clone().requires_grad_()
    small = SparseBatch(x.coords[:9].contiguous(), feats, 1)
    assert torch.autograd.gradcheck(lambda f: upsample(downsample(small.with_feats(f)), small).feats, feats)


@pytest.mark.parametrize(("resample", "channels"), [("", 4), ("", 6), ("down", 6)])
def test_a_block_with_dead_convolutions_is_its_skip(resample, channels):
    torch.manual_seed(0)
    x = random_batch(channels=4, dtype=torch.float32)
    block = SparseResBlock(4, channels, 5, resample=resample)
    for parameter in block.conv2.parameters():
        torch.nn.init.zeros_(parameter)
    got = block(x, torch.randn(2, 5))
    before = downsample(x) if resample else x
    torch.testing.assert_close(got.feats, block.skip_connection(before.feats))
