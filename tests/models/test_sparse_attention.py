"""Attention over voxels, against a masked softmax over all rows."""

import math

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, SparseSample
from eg3d_rlhf.models.trellis.blocks import SparseLayout, curve_windows, windows

H = 2
D = 4


def batch(lengths=(7, 7, 12, 1, 9), grid=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(*[torch.arange(grid)] * 3).int()
    chosen = [places[torch.randperm(len(places), generator=g)[:n]] for n in lengths]
    return SparseBatch.join([SparseSample(c, torch.zeros(len(c), 1)) for c in chosen])


def heads(rows, seed, n=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, H, D, generator=g, dtype=torch.float64) for _ in range(n)]


def oracle(q, k, v, together):
    """Compute a softmax over those rows that `together` [rows of q, rows of k] connects."""
    logits = torch.einsum("ahd,bhd->hab", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hab,bhd->ahd", logits.masked_fill(~together, -torch.inf).softmax(-1), v)


def same_window(x, window, shift):
    group = torch.cat([x.coords[:, :1], (x.coords[:, 1:] + shift) // window], 1)
    return (group[:, None] == group[None]).all(-1)


def along_curve(x, window, shift=0, start=0):
    """Return which rows each row attends to, computed bit by bit and window by window."""

    def code(row):
        return int(
            "".join(
                "".join(bits)
                for bits in zip(*(f"{int(c) + shift:010b}" for c in x.coords[row, 1:]), strict=True)
            ),
            2,
        )

    together = torch.zeros(len(x.coords), len(x.coords), dtype=torch.bool)
    for sample in range(x.size):
        rows = sorted((r for r in range(len(x.coords)) if int(x.sample[r]) == sample), key=code)
        n = len(rows)
        parts = math.ceil(len(rows) / window)
        for i in range(parts):
            kept = (
                range(math.floor(i * n / parts + start), math.floor((i + 1) * n / parts + start))
                if parts > 1
                else range(n)
            )
            left = math.floor((i + 0.5) * n / parts + start - window / 2)
            seen = range(left, left + window) if parts > 1 else range(n)
            for p in kept:
                together[rows[p % n], [rows[q % n] for q in seen]] = True
    return together


@pytest.mark.parametrize(("window", "shift"), [(None, 0), (4, 0), (4, 2), (2, 1), (8, 4), (64, 0)])
def test_self_attention_joins_voxels_of_a_sample_or_window(window, shift):
    x = batch()
    assert_attends(
        x, None if window is None else windows(x, window, shift), same_window(x, window or 64, shift)
    )


@pytest.mark.parametrize(
    ("window", "shift", "start"), [(4, 0, 0), (4, 16, 0), (4, 0, 2), (5, 3, 1), (12, 0, 0), (64, 16, 0)]
)
def test_windows_along_the_curve_overlap_and_each_voxel_keeps_one_result(window, shift, start):
    x = batch()
    assert_attends(x, curve_windows(x, window, shift, start), along_curve(x, window, shift, start))
    assert curve_windows(x, window, shift, start) is curve_windows(
        x.with_feats(x.feats + 1), window, shift, start
    )


def assert_attends(x, groups, together):
    """Check results and gradients of self-attention within these groups."""
    q, k, v = (h.requires_grad_() for h in heads(len(x.coords), 1))
    out = SparseLayout(x, groups).self_attention(q, k, v)
    want = oracle(q, k, v, together)
    torch.testing.assert_close(out, want)
    cotangent = heads(len(x.coords), 2, 1)[0]
    for got, expected in zip(
        torch.autograd.grad(out, (q, k, v), cotangent),
        torch.autograd.grad(want, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_cross_attention_reads_the_tokens_of_its_sample():
    x = batch()
    tokens = 5
    q = heads(len(x.coords), 1, 1)[0]
    k, v = (h.view(x.size, tokens, H, D) for h in heads(x.size * tokens, 2, 2))
    same_sample = x.sample[:, None] == torch.arange(x.size).repeat_interleave(tokens)
    want = oracle(q, k.flatten(0, 1), v.flatten(0, 1), same_sample)
    torch.testing.assert_close(SparseLayout(x).cross_attention(q, k, v), want)


def test_keeps_no_matrix_of_weights():
    x = batch((300, 200), grid=8)
    q, k, v = (h.float().requires_grad_() for h in heads(500, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        SparseLayout(x).self_attention(q, k, v).sum().backward()
    assert max(kept) <= 500 * H * D
