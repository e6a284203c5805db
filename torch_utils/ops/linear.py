"""Fast linear layers in float32 on a CPU.

torch multiplies float32 matrices with the library MKL, which does not use AVX-512 instructions on some
processors that have them. The library oneDNN, which is also part of torch, uses them.

Shapes: input features (number A), output features (number B).
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils.ops.implementations import current

# Smallest number of multiplications for which the time to look up oneDNN's kernel is negligible
LARGE = 1 << 22


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, impl: str = "auto"
) -> torch.Tensor:
    """Compute a linear layer, x W^T + b.

    Args:
        x: inputs [..., A].
        weight: weight W [B, A].
        bias: bias b [B], or None.
        impl: see `torch_utils.ops.implementations`. "ref" is F.linear; the other implementations agree with
            it up to rounding.

    Returns: outputs [..., B].
    Differentiable in: x, weight, bias.
    """
    if x.numel() * len(weight) < LARGE or not fits(x, weight, impl=impl):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class Linear(nn.Linear):
    """Linear layer with the parameters of nn.Linear that is computed by the function `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def fits(*tensors: torch.Tensor, impl: str = "auto") -> bool:
    """Return True if products of these tensors are computed by oneDNN.

    This is the case for float32 tensors on a CPU with AVX-512, unless `impl` is "ref", autocast is active, or
    torch.compile traces.
    """
    are_supported = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
    # Autocast and torch.compile treat F.linear specially, so they must get that function.
    needs_torch = (
        torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or current(impl, "linear") == "ref"
    )
    return are_supported and not needs_torch and _has_avx512()


@functools.cache
def _has_avx512() -> bool:
    """Return True if oneDNN and AVX-512 are available."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `linear` without gradients, for tensors for which `fits` is True.

    The tensors may have arbitrary strides.
    """
    if x.numel() * len(weight) < LARGE:
        return F.linear(x, weight, bias)
    # oneDNN's linear layer, with "none" as the activation that is fused with it
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """Autograd function of `linear`. The input is stored only if the weight needs a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_rows = grad.flatten(0, -2)  # [..., B] -> [rows, B]
        return (
            linear(grad, weight.t()) if need_x else None,
            # [B, rows] @ [rows, A]; `linear` multiplies by the transpose of its second argument.
            linear(grad_rows.t(), x.flatten(0, -2).t()) if need_weight else None,
            grad_rows.sum(0) if need_bias else None,
        )
