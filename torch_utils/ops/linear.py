"""Products with weight matrices in float32 on a CPU.

torch multiplies float32 matrices by MKL, which does not use AVX-512 on some processors that have it. oneDNN,
which torch ships as well, uses it.

Shape letters: A features in, B features out.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils.ops.implementations import current

LARGE = 1 << 22  # multiplications from which on the time to look up oneDNN's kernel is negligible


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, impl: str = "auto"
) -> torch.Tensor:
    """Compute x W^T + b.

    Args:
        x: [..., A]; weight: [B, A]; bias: [B].
        impl: see `torch_utils.ops.implementations`. "ref" is F.linear, with which the others agree up to
            rounding.
    Returns: [..., B].
    Differentiable in: x, weight, bias.
    """
    if x.numel() * len(weight) < LARGE or not fits(x, weight, impl=impl):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear that uses `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def fits(*tensors: torch.Tensor, impl: str = "auto") -> bool:
    """Return whether products of these tensors use oneDNN: float32 on a CPU that has AVX-512."""
    supported = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
    # Autocast and torch.compile have to see F.linear itself.
    other = (
        torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or current(impl, "linear") == "ref"
    )
    return supported and not other and _wide()


@functools.cache
def _wide() -> bool:
    """Return whether oneDNN and AVX-512 are available."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `linear` without gradients, for tensors that `fits` has accepted. Strides may be arbitrary."""
    if x.numel() * len(weight) < LARGE:
        return F.linear(x, weight, bias)
    # oneDNN's linear layer with the fused activation "none".
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """`linear` with gradients. It keeps its input only if the weight is trained."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # [..., B] -> [rows, B]
        return (
            linear(grad, weight.t()) if need_x else None,
            # [B, rows] @ [rows, A]; `linear` multiplies by the transpose of its second argument.
            linear(rows.t(), x.flatten(0, -2).t()) if need_weight else None,
            rows.sum(0) if need_bias else None,
        )
