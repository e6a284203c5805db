"""Transformer layers that are computed in tiles, which stay in the cache, and recomputed in the backward
pass.

Self-attention reads one matrix of queries, keys and values. Scores are computed per head for a tile of
queries, and queries and keys are normalised on the way, so that no copy of them is stored. The feed-forward
layer (linear, GELU in tanh form, linear) is computed for some rows at a time.

Shape letters: N samples, T tokens, H heads, D channels of a head; A features in and out, B hidden features.
"""

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import once
from torch_utils.ops.linear import fits, product

LARGE = 512  # tokens from which on tiles are faster
TILE = 1 << 19  # scores of a tile


def self_attention(
    qkv: torch.Tensor,
    q_gain: torch.Tensor | None = None,
    k_gain: torch.Tensor | None = None,
    result: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Compute softmax(q k^T / sqrt(D)) v of qkv [N, T, 3, H, D]; returns [N, T, H, D].

    Args:
        qkv: queries, keys and values.
        q_gain, k_gain: [H, D]. Queries and keys are first replaced by x / |x| * gain; None leaves them.
        result: the result, if it is known. It is then not computed again; gradients are those of the formula.
        impl: see `torch_utils.ops.implementations`. "ref" is torch's fused attention, with which the others
            agree up to rounding.
    Differentiable in: qkv, q_gain, k_gain (once, if tiles are used).
    """
    if tiled(qkv, impl):
        return _SelfAttention.apply(qkv.contiguous(), q_gain, k_gain, (result,))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # [N, T, H, D] -> [N, H, T, D]
    q, k = (
        x if gain is None else F.normalize(x, dim=-1) * gain[:, None]
        for x, gain in ((q, q_gain), (k, k_gain))
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def tiled(qkv: torch.Tensor, impl: str = "auto") -> bool:
    """Return whether attention of this qkv is computed in tiles."""
    return qkv.shape[1] >= LARGE and fits(qkv, impl=impl)


class _SelfAttention(torch.autograd.Function):
    """Tiled self-attention. It keeps only qkv for the backward pass."""

    @staticmethod
    def forward(ctx, qkv, q_gain, k_gain, known):
        ctx.save_for_backward(qkv, q_gain, k_gain)
        # `known` is a tuple, which hides the tensor from autograd: it is no input.
        if known[0] is not None:
            return known[0].detach()
        out = torch.empty_like(qkv[:, :, 0])  # [N, T, H, D]
        for n, h in _heads(qkv):
            q, k, v = (_head(qkv[n, :, i, h], gain, h)[0] for i, gain in enumerate((q_gain, k_gain, None)))
            q = q * q.shape[-1] ** -0.5  # scaled before the product, which is smaller than its result
            v = v.t()  # `product` multiplies by the transpose of its second argument
            for rows, to in zip(*_tiles(q, out[n, :, h]), strict=True):
                scores = product(rows, k)  # [tile, T]
                to.copy_(product(torch.softmax(scores, -1, out=scores), v))
        return out

    @staticmethod
    @once("self_attention")
    def backward(ctx, grad):
        qkv, *gains = ctx.saved_tensors
        # to_x: gradient with respect to x.
        to_qkv = torch.empty_like(qkv)
        to_gains = [
            torch.zeros_like(g) if need else None
            for g, need in zip(gains, ctx.needs_input_grad[1:3], strict=True)
        ]
        for n, h in _heads(qkv):
            (q, *of_q), (k, *of_k), (v, *_) = (
                _head(qkv[n, :, i, h], gain, h) for i, gain in enumerate((*gains, None))
            )
            scale = q.shape[-1] ** -0.5
            g = grad[n, :, h].contiguous()
            q = q * scale
            # Gradients of k and v are kept transposed, [D, T]: the products then need no copies.
            to_q = torch.empty_like(q)
            to_k = torch.zeros_like(k.t()).contiguous()
            to_v = torch.zeros_like(v.t()).contiguous()
            for rows, grad_rows, to in zip(*_tiles(q, g, to_q), strict=True):
                # The attention of the tile is computed again instead of stored: [tile, T].
                p = product(rows, k)
                torch.softmax(p, -1, out=p)
                to_v += product(grad_rows.t(), p.t())  # [D, T]
                to_p = product(grad_rows, v)
                torch._softmax_backward_data(to_p, p, -1, p.dtype, grad_input=to_p)
                to.copy_(product(to_p, k.t()))
                to_k += product(rows.t(), to_p.t())
            # Queries were multiplied by the scale before the product, so their gradient is as well.
            to_q *= scale
            for i, (x, gain, (unit, length)) in enumerate(
                ((to_q, gains[0], of_q), (to_k.t(), gains[1], of_k))
            ):
                if gain is not None:
                    # Gradient of x / |x|: the component along x is removed.
                    if (to_gain := to_gains[i]) is not None:
                        to_gain[h] += (x * unit).sum(0)
                    x = x * gain[h]
                    x = (x - unit * (x * unit).sum(-1, keepdim=True)) / length
                to_qkv[n, :, i, h] = x
            to_qkv[n, :, 2, h] = to_v.t()
        return to_qkv, *to_gains, None


def _heads(qkv: torch.Tensor) -> list[tuple[int, int]]:
    """Return all pairs (sample, head)."""
    return [(n, h) for n in range(qkv.shape[0]) for h in range(qkv.shape[3])]


def _head(
    x: torch.Tensor, gain: torch.Tensor | None, h: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x / |x| * gain, x / |x| and |x| for x [T, D]; without gain, x three times."""
    x = x.contiguous()
    if gain is None:
        return x, x, x
    # The bound is that of F.normalize, which the reference uses.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    unit = x / length
    return unit * gain[h], unit, length


def _tiles(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return tiles of the rows of tensors [T, D], about TILE scores each."""
    return [x.split(max(TILE // len(x), 16)) for x in tensors]


LARGE_HIDDEN = 1 << 20  # hidden values from which on they are computed in parts
PART = 1 << 20  # hidden values of a part


def feed_forward(
    x: torch.Tensor,
    weight_1: torch.Tensor,
    bias_1: torch.Tensor,
    weight_2: torch.Tensor,
    bias_2: torch.Tensor,
    *,
    impl: str = "auto",
    skip: bool = False,
) -> torch.Tensor:
    """Compute W_2 gelu(W_1 x + b_1) + b_2.

    Args:
        x: [..., A]; weight_1: [B, A]; weight_2: [A, B].
        impl: see `torch_utils.ops.implementations`.
        skip: return zeros. For callers that do not use the result, but need the gradients.
    Returns: [..., A].
    Differentiable in: x, weights and biases (once).
    """
    if x.numel() // x.shape[-1] * len(weight_1) < LARGE_HIDDEN or not fits(x, weight_1, weight_2, impl=impl):
        return F.linear(F.gelu(F.linear(x, weight_1, bias_1), approximate="tanh"), weight_2, bias_2)
    return _FeedForward.apply(x, weight_1, bias_1, weight_2, bias_2, skip)


class _FeedForward(torch.autograd.Function):
    """Feed-forward layer in parts. It keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight_1, bias_1, weight_2, bias_2, skip):
        ctx.save_for_backward(x, weight_1, bias_1, weight_2)
        # The backward pass computes hidden values again, so it does not need the result.
        if skip:
            return x.new_zeros([]).expand_as(x)  # one number in memory
        out = torch.empty_like(x)
        for rows, to in zip(*_parts(len(weight_1), x, out), strict=True):
            hidden = product(rows, weight_1, bias_1)
            to.copy_(product(F.gelu(hidden, approximate="tanh"), weight_2, bias_2))
        return out

    @staticmethod
    @once("feed_forward")
    def backward(ctx, grad):
        x, weight_1, bias_1, weight_2 = ctx.saved_tensors
        need_x, *needed, _ = ctx.needs_input_grad
        to_x = torch.empty_like(x) if need_x else None
        # weight_2[:, 0] has the shape of the second bias, which is not saved.
        parameters = (weight_1, bias_1, weight_2, weight_2[:, 0])
        trained = [torch.zeros_like(p) if need else None for p, need in zip(parameters, needed, strict=True)]
        to_weight_1, to_bias_1, to_weight_2, to_bias_2 = trained
        for rows, g, to in zip(
            *_parts(len(weight_1), x, grad.contiguous(), x if to_x is None else to_x), strict=True
        ):
            hidden = product(rows, weight_1, bias_1)  # [part, B]
            if to_weight_2 is not None:
                to_weight_2 += product(g.t(), F.gelu(hidden, approximate="tanh").t())
            to_hidden = product(g, weight_2.t())
            # In place: the gradient of the activation replaces that of its result.
            torch.ops.aten.gelu_backward.grad_input(
                to_hidden, hidden, approximate="tanh", grad_input=to_hidden
            )
            if to_x is not None:
                to.copy_(product(to_hidden, weight_1.t()))
            if to_weight_1 is not None:
                to_weight_1 += product(to_hidden.t(), rows.t())
            for total, part in ((to_bias_1, to_hidden), (to_bias_2, g)):
                if total is not None:
                    total += part.sum(0)
        return to_x, *trained, None


def _parts(hidden: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Return views of consecutive rows of tensors, each with at most PART hidden values."""
    return [x.view(-1, x.shape[-1]).split(max(PART // hidden, 1)) for x in tensors]
