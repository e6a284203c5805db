"""Multiply and add in one pass."""

import torch


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c without a temporary for the product.

    Args:
        a, b, c: tensors of one dtype that broadcast against each other.
    Returns: the broadcast shape. Differentiable in a, b and c, to any order.
    """
    return torch.addcmul(c, a, b)
