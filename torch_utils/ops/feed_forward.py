"""Linear, GELU (tanh form), linear, some rows at a time: hidden features stay in cache, and are made again in the backward pass.

Shape letters: A features in and out, B hidden features.
"""

import torch
import torch.nn.functional as F

from torch_utils.ops.implementations import once
from torch_utils.ops.linear import fits, product

LARGE = 1 << 20  # hidden numbers from which on they are made in parts
PART = 1 << 20  # hidden numbers at a time


def feed_forward(
    x: torch.Tensor, weight_1: torch.Tensor, bias_1: torch.Tensor, weight_2: torch.Tensor, bias_2: torch.Tensor, *,
    impl: str = "auto", skip: bool = False,
) -> torch.Tensor:
    """W_2 gelu(W_1 x + b_1) + b_2: x [..., A], weight_1 [B, A], weight_2 [A, B] -> [..., A].

    Args: impl: see `torch_utils.ops.implementations`; skip: return zeros, where nobody reads the result and
        gradients are still wanted.
    Differentiable in: x, weights and biases (once).
    """
    if x.numel() // x.shape[-1] * len(weight_1) < LARGE or not fits(x, weight_1, weight_2, impl=impl):
        return F.linear(F.gelu(F.linear(x, weight_1, bias_1), approximate="tanh"), weight_2, bias_2)
    return _FeedForward.apply(x, weight_1, bias_1, weight_2, bias_2, skip)


class _FeedForward(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx, x, weight_1, bias_1, weight_2, bias_2, skip):
        ctx.save_for_backward(x, weight_1, bias_1, weight_2)
        if skip:
            return x.new_zeros([]).expand_as(x)
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
        parameters = (weight_1, bias_1, weight_2, weight_2[:, 0])  # the last as the second bias
        trained = [torch.zeros_like(p) if need else None for p, need in zip(parameters, needed, strict=True)]
        to_weight_1, to_bias_1, to_weight_2, to_bias_2 = trained
        for rows, g, to in zip(*_parts(len(weight_1), x, grad.contiguous(), x if to_x is None else to_x), strict=True):
            hidden = product(rows, weight_1, bias_1)
            if to_weight_2 is not None:
                to_weight_2 += product(g.t(), F.gelu(hidden, approximate="tanh").t())
            to_hidden = product(g, weight_2.t())
            torch.ops.aten.gelu_backward.grad_input(to_hidden, hidden, approximate="tanh", grad_input=to_hidden)
            if to_x is not None:
                to.copy_(product(to_hidden, weight_1.t()))
            if to_weight_1 is not None:
                to_weight_1 += product(to_hidden.t(), rows.t())
            for total, part in ((to_bias_1, to_hidden), (to_bias_2, g)):
                if total is not None:
                    total += part.sum(0)
        return to_x, *trained, None


def _parts(hidden: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Views of rows that lie behind each other, so many that their hidden features are PART numbers."""
    return [x.view(-1, x.shape[-1]).split(max(PART // hidden, 1)) for x in tensors]
