"""Attention over voxels against a masked softmax over all rows, written out."""

import pytest
import torch

from eg3d_rlhf.flow.sparse import SparseBatch, SparseSample
from eg3d_rlhf.flow.trellis.blocks import SparseLayout, samples, windows

H, D = 2, 4


def batch(lengths=(7, 7, 12, 1, 9), grid=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    places = torch.cartesian_prod(*[torch.arange(grid)] * 3).int()
    chosen = [places[torch.randperm(len(places), generator=g)[:n]] for n in lengths]
    return SparseBatch.join([SparseSample(c, torch.zeros(len(c), 1)) for c in chosen])


def heads(rows, seed, n=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, H, D, generator=g, dtype=torch.float64) for _ in range(n)]


def oracle(q, k, v, together):
    """softmax over those rows that `together` [rows of q, rows of k] joins."""
    logits = torch.einsum("ahd,bhd->hab", q, k) / D**0.5
    return torch.einsum("hab,bhd->ahd", logits.masked_fill(~together, -torch.inf).softmax(-1), v)


def same_window(x, window, shift):
    group = torch.cat([x.coords[:, :1], (x.coords[:, 1:] + shift) // window], 1)
    return (group[:, None] == group[None]).all(-1)


@pytest.mark.parametrize(("window", "shift"), [(None, 0), (4, 0), (4, 2), (2, 1), (8, 4), (64, 0)])
def test_self_attention_joins_voxels_of_a_sample_or_window(window, shift):
    x = batch()
    q, k, v = (h.requires_grad_() for h in heads(len(x.coords), 1))
    together = same_window(x, window or 64, shift)
    out = SparseLayout(x, window, shift).self_attention(q, k, v)
    want = oracle(q, k, v, together)
    torch.testing.assert_close(out, want)
    cotangent = heads(len(x.coords), 2, 1)[0]
    for got, expected in zip(torch.autograd.grad(out, (q, k, v), cotangent), torch.autograd.grad(want, (q, k, v), cotangent), strict=True):
        torch.testing.assert_close(got, expected)


def test_cross_attention_reads_the_tokens_of_its_sample():
    x, tokens = batch(), 5
    q = heads(len(x.coords), 1, 1)[0]
    k, v = (h.view(x.size, tokens, H, D) for h in heads(x.size * tokens, 2, 2))
    own = x.sample[:, None] == torch.arange(x.size).repeat_interleave(tokens)
    want = oracle(q, k.flatten(0, 1), v.flatten(0, 1), own)
    torch.testing.assert_close(SparseLayout(x).cross_attention(q, k, v), want)


def test_groups_of_one_length_go_together_and_are_found_once():
    x = batch()
    assert samples(x).runs == ((2, 7), (1, 12), (1, 1), (1, 9))
    assert windows(x, 4) is windows(x.with_feats(x.feats + 1), 4) is not windows(x, 4, 2)
    found = windows(x, 4)
    assert sum(found.sizes) == len(x.coords) and len({length for _, length in found.runs}) == len(found.runs)
    assert torch.equal(found.order[found.inverse], torch.arange(len(x.coords)))


def test_keeps_no_matrix_of_weights():
    x = batch((300, 200), grid=8)
    q, k, v = (h.float().requires_grad_() for h in heads(500, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        SparseLayout(x).self_attention(q, k, v).sum().backward()
    assert max(kept) <= 500 * H * D


def test_a_value_per_sample_reaches_its_voxels():
    x = batch((2, 3))
    assert SparseLayout(x).per_token(torch.tensor([[1.0], [2.0]])).flatten().tolist() == [1, 1, 2, 2, 2]
