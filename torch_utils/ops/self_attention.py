"""Attention of a sequence to itself, from the one matrix that holds queries, keys and values, some queries at a time.

Scores are made per head for a tile of queries, so that they stay in cache, and again in the backward pass. Queries and keys are normalised
on the way, so that no copy of them is kept.

Shape letters: N samples, T tokens, H heads, D channels of a head.
"""

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import once
from torch_utils.ops.linear import fits, product

LARGE = 512  # tokens from which on tiles pay
TILE = 1 << 19  # scores at a time


def self_attention(
    qkv: torch.Tensor, q_gain: torch.Tensor | None = None, k_gain: torch.Tensor | None = None, result: torch.Tensor | None = None, *,
    impl: str = "auto",
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v of qkv [N, T, 3, H, D] -> [N, T, H, D].

    Args:
        q_gain, k_gain: [H, D]: queries and keys are first x / |x| * gain; None leaves them.
        result: what this would return, where it is known: it is not computed again. Gradients are those of the formula.
        impl: see `torch_utils.ops.implementations`; "ref" is torch's fused attention, with which the others agree to rounding.
    Differentiable in: qkv, q_gain, k_gain (once, where tiles are used).
    """
    if tiled(qkv, impl):
        return _SelfAttention.apply(qkv.contiguous(), q_gain, k_gain, (result,))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # [N, H, T, D]
    q, k = (x if gain is None else F.normalize(x, dim=-1) * gain[:, None] for x, gain in ((q, q_gain), (k, k_gain)))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def tiled(qkv: torch.Tensor, impl: str = "auto") -> bool:
    """Whether attention to this is computed in tiles."""
    return qkv.shape[1] >= LARGE and fits(qkv, impl=impl)


class _SelfAttention(torch.autograd.Function):
    """Keeps qkv alone."""

    @staticmethod
    def forward(ctx, qkv, q_gain, k_gain, known):
        ctx.save_for_backward(qkv, q_gain, k_gain)
        if known[0] is not None:
            return known[0].detach()
        out = torch.empty_like(qkv[:, :, 0])
        for n, h in _heads(qkv):
            q, k, v = (_head(qkv[n, :, i, h], gain, h)[0] for i, gain in enumerate((q_gain, k_gain, None)))
            q, v = q * q.shape[-1] ** -0.5, v.t()
            for rows, to in zip(*_tiles(q, out[n, :, h]), strict=True):
                scores = product(rows, k)
                to.copy_(product(torch.softmax(scores, -1, out=scores), v))
        return out

    @staticmethod
    @once("self_attention")
    def backward(ctx, grad):
        qkv, *gains = ctx.saved_tensors
        to_qkv = torch.empty_like(qkv)
        to_gains = [torch.zeros_like(g) if need else None for g, need in zip(gains, ctx.needs_input_grad[1:3], strict=True)]
        for n, h in _heads(qkv):
            (q, *of_q), (k, *of_k), (v, *_) = (_head(qkv[n, :, i, h], gain, h) for i, gain in enumerate((*gains, None)))
            scale, g = q.shape[-1] ** -0.5, grad[n, :, h].contiguous()
            q = q * scale
            to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k.t()).contiguous(), torch.zeros_like(v.t()).contiguous()
            for rows, one, to in zip(*_tiles(q, g, to_q), strict=True):
                p = product(rows, k)
                torch.softmax(p, -1, out=p)
                to_v += product(one.t(), p.t())  # [D, T]
                to_p = product(one, v)
                torch._softmax_backward_data(to_p, p, -1, p.dtype, grad_input=to_p)
                to.copy_(product(to_p, k.t()))
                to_k += product(rows.t(), to_p.t())
            to_q *= scale
            for i, (x, gain, (unit, length)) in enumerate(((to_q, gains[0], of_q), (to_k.t(), gains[1], of_k))):
                if gain is not None:  # x / |x|: what points along x does not count
                    if to_gains[i] is not None:
                        to_gains[i][h] += (x * unit).sum(0)
                    x = x * gain[h]
                    x = (x - unit * (x * unit).sum(-1, keepdim=True)) / length
                to_qkv[n, :, i, h] = x
            to_qkv[n, :, 2, h] = to_v.t()
        return to_qkv, *to_gains, None


def _heads(qkv: torch.Tensor) -> list[tuple[int, int]]:
    """(sample, head), all of them."""
    return [(n, h) for n in range(qkv.shape[0]) for h in range(qkv.shape[3])]


def _head(x: torch.Tensor, gain: torch.Tensor | None, h: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, D] -> x / |x| * gain, x / |x|, |x|; without gain x, and nothing of use."""
    x = x.contiguous()
    if gain is None:
        return x, x, x
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    unit = x / length
    return unit * gain[h], unit, length


def _tiles(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Rows of tensors [T, D], so many that they have TILE scores."""
    return [x.split(max(TILE // len(x), 16)) for x in tensors]
