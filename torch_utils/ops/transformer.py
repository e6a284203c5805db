"""Transformer layers for long sequences on a CPU, computed in tiles and recomputed in the backward pass.

A tile is a part of the rows of a matrix whose results fit into the processor's cache. Self-attention (Vaswani
et al. 2017) computes the scores of one attention head for a tile of queries at a time. If gains are given,
the queries and keys of an attention head are normalised when this head is processed, so that normalised
copies of all heads are never in memory together. The feed-forward layer (linear layer, GELU in its tanh
approximation, linear layer) is computed for a tile of rows at a time.

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
        k_gain: gain [H, D] of the keys, which are normalised in the same way; None does not normalise them.
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
    """Return True if `self_attention` processes queries, keys and values qkv [N, T, 3, H, D] in tiles."""
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
        attended_values = torch.empty_like(qkv[:, :, 0])  # [N, T, H, D]
        for n, h in _heads(qkv):
            q, k, v = (_head(qkv[n, :, i, h], gain, h)[0] for i, gain in enumerate((q_gain, k_gain, None)))
            # q has fewer elements than the scores, so q is scaled and not the scores.
            q = q * q.shape[-1] ** -0.5
            v = v.t()  # `product` multiplies by the transpose of its second argument
            for query_tile, attended_tile in zip(*_tiles(q, attended_values[n, :, h]), strict=True):
                scores = product(query_tile, k)  # [tile, T]
                attended_tile.copy_(product(torch.softmax(scores, -1, out=scores), v))
        return attended_values

    @staticmethod
    # torch's fused attention, which "ref" uses, has no second derivative on a CPU, either.
    @once(
        "self_attention",
        'For a second derivative, use implementation("ref") inside of'
        " torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    )
    def backward(ctx, grad):
        qkv, *gains = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        grad_gains = [
            torch.zeros_like(gain) if is_needed else None
            for gain, is_needed in zip(gains, ctx.needs_input_grad[1:3], strict=True)
        ]
        for n, h in _heads(qkv):
            (q, *q_unit_and_length), (k, *k_unit_and_length), (v, *_) = (
                _head(qkv[n, :, i, h], gain, h) for i, gain in enumerate((*gains, None))
            )
            scale = q.shape[-1] ** -0.5
            result_grad = grad[n, :, h].contiguous()
            q = q * scale
            # The gradients of k and v are transposed, [D, T], so that the products below need no copies.
            grad_q = torch.empty_like(q)
            grad_k = torch.zeros_like(k.t()).contiguous()
            grad_v = torch.zeros_like(v.t()).contiguous()
            for query_tile, grad_tile, grad_query_tile in zip(*_tiles(q, result_grad, grad_q), strict=True):
                # The attention weights p [tile, T] of the tile are computed again.
                p = product(query_tile, k)
                torch.softmax(p, -1, out=p)
                grad_v += product(grad_tile.t(), p.t())  # [D, T]
                grad_p = product(grad_tile, v)
                torch._softmax_backward_data(grad_p, p, -1, p.dtype, grad_input=grad_p)
                grad_query_tile.copy_(product(grad_p, k.t()))
                grad_k += product(query_tile.t(), grad_p.t())
            # The forward pass multiplies the queries by the scale, so
            # their gradient is multiplied by it, too.
            grad_q *= scale
            for i, (head_grad, gain, (unit_vectors, vector_lengths)) in enumerate(
                ((grad_q, gains[0], q_unit_and_length), (grad_k.t(), gains[1], k_unit_and_length))
            ):
                if gain is not None:
                    # The gradient of x / |x| is the incoming gradient without its
                    # component along x, over |x|.
                    if (grad_gain := grad_gains[i]) is not None:
                        grad_gain[h] += (head_grad * unit_vectors).sum(0)
                    head_grad = head_grad * gain[h]
                    head_grad = (
                        head_grad - unit_vectors * (head_grad * unit_vectors).sum(-1, keepdim=True)
                    ) / vector_lengths
                grad_qkv[n, :, i, h] = head_grad
            grad_qkv[n, :, 2, h] = grad_v.t()
        return grad_qkv, *grad_gains, None


def _heads(qkv: torch.Tensor) -> list[tuple[int, int]]:
    """Return the index pairs (sample, attention head) of all attention heads of qkv [N, T, 3, H, D]."""
    return [(n, h) for n in range(qkv.shape[0]) for h in range(qkv.shape[3])]


def _head(
    x: torch.Tensor, gain: torch.Tensor | None, h: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise the queries, keys or values x [T, D] of one attention head.

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
    vector_lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    unit_vectors = x / vector_lengths
    return unit_vectors * gain[h], unit_vectors, vector_lengths


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
        grad_x = torch.empty_like(x) if need_x else None
        # weight_2[:, 0] has the shape of the second bias, which is not stored.
        parameters = (weight_1, bias_1, weight_2, weight_2[:, 0])
        grad_parameters = [
            torch.zeros_like(parameter) if is_needed else None
            for parameter, is_needed in zip(parameters, need_parameters, strict=True)
        ]
        grad_weight_1, grad_bias_1, grad_weight_2, grad_bias_2 = grad_parameters
        # Without a gradient of x, x itself is split in its place, and the tiles are not used.
        tiles = _parts(len(weight_1), x, grad.contiguous(), x if grad_x is None else grad_x)
        for x_tile, grad_tile, grad_x_tile in zip(*tiles, strict=True):
            hidden = product(x_tile, weight_1, bias_1)  # [tile, B]
            if grad_weight_2 is not None:
                grad_weight_2 += product(grad_tile.t(), F.gelu(hidden, approximate="tanh").t())
            grad_hidden = product(grad_tile, weight_2.t())
            # In place: the gradient of the activation replaces that of its result.
            torch.ops.aten.gelu_backward.grad_input(
                grad_hidden, hidden, approximate="tanh", grad_input=grad_hidden
            )
            if grad_x is not None:
                grad_x_tile.copy_(product(grad_hidden, weight_1.t()))
            if grad_weight_1 is not None:
                grad_weight_1 += product(grad_hidden.t(), x_tile.t())
            if grad_bias_1 is not None:
                grad_bias_1 += grad_hidden.sum(0)
            if grad_bias_2 is not None:
                grad_bias_2 += grad_tile.sum(0)
        return grad_x, *grad_parameters, None


def _parts(hidden_count: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Split the rows of tensors [..., A] into tiles [rows, A] with at most PART hidden values each.

    Args:
        hidden_count: number of hidden features B.
        tensors: tensors of the same shape; the tiles are views.
    """
    return [x.view(-1, x.shape[-1]).split(max(PART // hidden_count, 1)) for x in tensors]
