"""The strided 3x3 convolution, its transpose and their gradients against torch."""

import pytest
import torch
import torch.nn.functional as F

from tests.torch_utils.compilers import needs_cpp
from torch_utils.ops.conv3x3 import conv3x3_down, conv3x3_up

pytestmark = needs_cpp


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "size",
    [(1, 16, 32, 4, 5), (2, 48, 16, 7, 3), (3, 32, 64, 40, 33), (2, 96, 80, 9, 13), (1, 512, 432, 3, 4)],
)
@pytest.mark.parametrize("up", [False, True])
def test_values_and_derivatives_of_two_orders(size, up):
    """The gradient of a function of the gradients, as R1 takes it."""
    n, ins, outs, h, w = size
    kernels = randn(outs, ins, 3, 3, seed=1) / ins**0.5
    x = randn(n, outs, h, w, seed=2) if up else randn(n, ins, 2 * h + 1, 2 * w + 1, seed=2)
    results = []
    for dtype in (torch.float32, torch.float64):
        image = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = kernels.to(dtype).requires_grad_()
        if dtype == torch.float32:
            y = (conv3x3_up if up else conv3x3_down)(image, weight, impl="compiled")
        else:
            y = (F.conv_transpose2d if up else F.conv2d)(image, weight, stride=2)
        first = torch.autograd.grad(y.sin().sum(), [image, weight], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [image, weight])
        results.append([y, *first, *second])
    for value, truth in zip(*results, strict=True):
        assert value.shape == truth.shape
        assert (value.double() - truth).abs().max() < 5e-6 * truth.abs().max()


def test_what_does_not_fit_goes_to_torch():
    with pytest.raises(ValueError, match="conv3x3_strided"):
        conv3x3_down(randn(1, 16, 8, 9), randn(16, 16, 3, 3), impl="compiled")  # an even side
    with pytest.raises(ValueError, match="conv3x3_strided"):
        conv3x3_up(randn(1, 8, 8, 9), randn(8, 16, 3, 3), impl="compiled")  # half a vector of channels
    x = randn(1, 8, 66, 70)
    w = randn(16, 8, 3, 3)
    assert torch.equal(conv3x3_down(x, w), F.conv2d(x, w, stride=2))


def test_no_gradient_is_made_that_nobody_asks_for():
    x = randn(1, 16, 9, 9).requires_grad_()
    w = randn(16, 16, 3, 3)
    conv3x3_down(x, w, impl="compiled").sum().backward()
    assert x.grad is not None and w.grad is None
