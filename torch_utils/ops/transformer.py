"""Transformer layers for long sequences on a CPU, computed in tiles and recomputed in the backward pass.

A tile is a part of the rows of a matrix whose results fit into the processor's cache. Self-attention (Vaswani
et al. 2017) computes the scores of one attention head for a tile of queries at a time. If gains
are given, the queries and keys of an attention head are normalised when this head is processed, so that
normalised copies of all heads are never in memory together. The feed-forward layer (linear layer,
GELU in its tanh approximation, linear layer) is computed for a tile of rows at a time.

Shapes: N samples, T tokens, H attention heads, D channels of an attention head; input and output features
(number A), hidden features (number B).
"""

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import once
from torch_utils.ops.linear import fits, product

LARGE = 512  # smallest number of tokens for which tiles are faster
TILE = 1 << 19  # approximate number of attention scores of a tile


def self_attention(
    qkv: torch.Tensor,
    q_gain: torch.Tensor | None = None,
    k_gain: torch.Tensor | None = None,
    known_result: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Compute self-attention, softmax(q k^T / sqrt(D)) v.

    Args:
        qkv: queries q, keys k and values v, [N, T, 3, H, D].
        q_gain: gain [H, D] of the queries, which are first replaced by q / |q| * gain; None does not
            normalise them.
        k_gain: gain [H, D] of the keys, in the same way.
        known_result: result [N, T, H, D], if it was computed before. It is returned without computing it
            again, and has the gradients of the formula. None computes the result.
        impl: see `torch_utils.ops.implementations`. "ref" is torch's fused attention; the other
            implementations agree with it up to rounding.

    Returns: the attended values [N, T, H, D].
    Differentiable in: qkv, q_gain, k_gain (only once, if tiles are used).
    """
    if tiled(qkv, impl):
        return _SelfAttention.apply(qkv.contiguous(), q_gain, k_gain, (known_result,))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # [N, T, H, D] -> [N, H, T, D]
    q, k = (
        x if gain is None else F.normalize(x, dim=-1) * gain[:, None]
        for x, gain in ((q, q_gain), (k, k_gain))
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def tiled(qkv: torch.Tensor, impl: str = "auto") -> bool:
    """Return True if `self_attention` computes qkv [N, T, 3, H, D] in tiles."""
    return qkv.shape[1] >= LARGE and fits(qkv, impl=impl)


class _SelfAttention(torch.autograd.Function):
    """Autograd function of the tiled self-attention.

    It stores only qkv and the gains for the backward pass.
    """

    @staticmethod
    def forward(ctx, qkv, q_gain, k_gain, result_in_tuple):
        ctx.save_for_backward(qkv, q_gain, k_gain)
        # The tuple hides the result from autograd, which would
        # otherwise treat it as an input with a gradient.
        if result_in_tuple[0] is not None:
            return result_in_tuple[0].detach()
        attended = torch.empty_like(qkv[:, :, 0])  # [N, T, H, D]
        for n, h in _heads(qkv):
            q, k, v = (_head(qkv[n, :, i, h], gain, h)[0] for i, gain in enumerate((q_gain, k_gain, None)))
            q = (
                q * q.shape[-1] ** -0.5
            )  # q has fewer elements than the scores, so it is scaled and not the scores
            v = v.t()  # `product` multiplies by the transpose of its second argument
            for query_tile, attended_tile in zip(*_tiles(q, attended[n, :, h]), strict=True):
                scores = product(query_tile, k)  # [tile, T]
                attended_tile.copy_(product(torch.softmax(scores, -1, out=scores), v))
        return attended

    @staticmethod
    @once("self_attention")
    def backward(ctx, grad):
        qkv, *gains = ctx.saved_tensors
        # A name that begins with to_ is a gradient: to_x is the gradient with respect to x.
        to_qkv = torch.empty_like(qkv)
        to_gains = [
            torch.zeros_like(gain) if is_needed else None
            for gain, is_needed in zip(gains, ctx.needs_input_grad[1:3], strict=True)
        ]
        for n, h in _heads(qkv):
            (q, *of_q), (k, *of_k), (v, *_) = (
                _head(qkv[n, :, i, h], gain, h) for i, gain in enumerate((*gains, None))
            )
            scale = q.shape[-1] ** -0.5
            g = grad[n, :, h].contiguous()
            q = q * scale
            # The gradients of k and v are transposed, [D, T], so that the products below need no copies.
            to_q = torch.empty_like(q)
            to_k = torch.zeros_like(k.t()).contiguous()
            to_v = torch.zeros_like(v.t()).contiguous()
            for query_tile, grad_tile, to_query_tile in zip(*_tiles(q, g, to_q), strict=True):
                # The attention weights p [tile, T] of the tile are computed again.
                p = product(query_tile, k)
                torch.softmax(p, -1, out=p)
                to_v += product(grad_tile.t(), p.t())  # [D, T]
                to_p = product(grad_tile, v)
                torch._softmax_backward_data(to_p, p, -1, p.dtype, grad_input=to_p)
                to_query_tile.copy_(product(to_p, k.t()))
                to_k += product(query_tile.t(), to_p.t())
            # The forward pass multiplies the queries by the scale, so
            # their gradient is multiplied by it, too.
            to_q *= scale
            for i, (x, gain, (unit, length)) in enumerate(
                ((to_q, gains[0], of_q), (to_k.t(), gains[1], of_k))
            ):
                if gain is not None:
                    # The gradient of x / |x| is the incoming gradient without its
                    # component along x, over |x|.
                    if (to_gain := to_gains[i]) is not None:
                        to_gain[h] += (x * unit).sum(0)
                    x = x * gain[h]
                    x = (x - unit * (x * unit).sum(-1, keepdim=True)) / length
                to_qkv[n, :, i, h] = x
            to_qkv[n, :, 2, h] = to_v.t()
        return to_qkv, *to_gains, None


def _heads(qkv: torch.Tensor) -> list[tuple[int, int]]:
    """Return the index pairs (sample, attention head) of all attention heads of qkv [N, T, 3, H, D]."""
    return [(n, h) for n in range(qkv.shape[0]) for h in range(qkv.shape[3])]


def _head(
    x: torch.Tensor, gain: torch.Tensor | None, h: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise the queries, keys or values x [T, D] of one head.

    Args:
        x: vectors of the head.
        gain: gain [H, D] of all heads, or None for vectors that are not normalised.
        h: index of the head.

    Returns: x / |x| * gain, x / |x| and |x|. Without a gain, x is returned three times.
    """
    x = x.contiguous()
    if gain is None:
        return x, x, x
    # F.normalize, which the reference implementation uses, has the same lower bound.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    unit = x / length
    return unit * gain[h], unit, length


def _tiles(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Split the rows of tensors [T, D] into tiles with about TILE attention scores each."""
    # Each of the T rows of a tensor has T scores.
    return [x.split(max(TILE // len(x), 16)) for x in tensors]


LARGE_HIDDEN = 1 << 20  # smallest number of hidden values for which tiles are used
PART = 1 << 20  # largest number of hidden values of a tile


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
    """Compute a feed-forward layer, W_2 gelu(W_1 x + b_1) + b_2.

    Args:
        x: inputs [..., A].
        weight_1: weight W_1 [B, A] of the first linear layer.
        bias_1: bias b_1 [B].
        weight_2: weight W_2 [A, B] of the second linear layer.
        bias_2: bias b_2 [A].
        impl: see `torch_utils.ops.implementations`.
        skip: True returns zeros if tiles are used, for callers that need only the gradients of the result.

    Returns: outputs [..., A].
    Differentiable in: x, weights and biases (only once, if tiles are used).
    """
    if x.numel() // x.shape[-1] * len(weight_1) < LARGE_HIDDEN or not fits(x, weight_1, weight_2, impl=impl):
        return F.linear(F.gelu(F.linear(x, weight_1, bias_1), approximate="tanh"), weight_2, bias_2)
    return _FeedForward.apply(x, weight_1, bias_1, weight_2, bias_2, skip)


class _FeedForward(torch.autograd.Function):
    """Autograd function of the tiled feed-forward layer.

    It stores only its arguments for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight_1, bias_1, weight_2, bias_2, skip):
        ctx.save_for_backward(x, weight_1, bias_1, weight_2)
        # The backward pass computes hidden values again, so it does not need the result.
        if skip:
            return x.new_zeros([]).expand_as(x)  # takes the memory of one number
        outputs = torch.empty_like(x)
        for x_tile, output_tile in zip(*_parts(len(weight_1), x, outputs), strict=True):
            hidden = product(x_tile, weight_1, bias_1)
            output_tile.copy_(product(F.gelu(hidden, approximate="tanh"), weight_2, bias_2))
        return outputs

    @staticmethod
    @once("feed_forward")
    def backward(ctx, grad):
        x, weight_1, bias_1, weight_2 = ctx.saved_tensors
        need_x, *need_parameters, _ = ctx.needs_input_grad
        # A name that begins with to_ is a gradient: to_x is the gradient with respect to x.
        to_x = torch.empty_like(x) if need_x else None
        # weight_2[:, 0] has the shape of the second bias, which is not stored.
        parameters = (weight_1, bias_1, weight_2, weight_2[:, 0])
        to_parameters = [
            torch.zeros_like(parameter) if is_needed else None
            for parameter, is_needed in zip(parameters, need_parameters, strict=True)
        ]
        to_weight_1, to_bias_1, to_weight_2, to_bias_2 = to_parameters
        # Without a gradient of x, x itself is split in its place, and the tiles are not used.
        tiles = _parts(len(weight_1), x, grad.contiguous(), x if to_x is None else to_x)
        for x_tile, grad_tile, to_x_tile in zip(*tiles, strict=True):
            hidden = product(x_tile, weight_1, bias_1)  # [tile, B]
            if to_weight_2 is not None:
                to_weight_2 += product(grad_tile.t(), F.gelu(hidden, approximate="tanh").t())
            to_hidden = product(grad_tile, weight_2.t())
            # In place: the gradient of the activation replaces that of its result.
            torch.ops.aten.gelu_backward.grad_input(
                to_hidden, hidden, approximate="tanh", grad_input=to_hidden
            )
            if to_x is not None:
                to_x_tile.copy_(product(to_hidden, weight_1.t()))
            if to_weight_1 is not None:
                to_weight_1 += product(to_hidden.t(), x_tile.t())
            if to_bias_1 is not None:
                to_bias_1 += to_hidden.sum(0)
            if to_bias_2 is not None:
                to_bias_2 += grad_tile.sum(0)
        return to_x, *to_parameters, None


def _parts(hidden: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Split the rows of tensors [..., A] into tiles [rows, A] with at most PART hidden values each.

    Args:
        hidden: number of hidden features B.
        tensors: tensors of the same shape; the tiles are views.
    """
    return [x.view(-1, x.shape[-1]).split(max(PART // hidden, 1)) for x in tensors]
