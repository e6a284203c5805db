"""slab_density's CUDA kernels, run on the CPU, against the formula in float64."""

import pytest
import torch

from tests.torch_utils.cuda.emulation import assert_close, emulate, needs_compiler

pytestmark = needs_compiler


def inputs(dtype, x, y, z, units, present=("xy", "xz", "yz"), scale=2.0):
    torch.manual_seed(0)
    shapes = {"xy": (x, units, y), "xz": (x, units, z), "yz": (units, y, z)}
    maps = {
        name: scale * torch.randn(shape, dtype=dtype) if name in present else None
        for name, shape in shapes.items()
    }
    return (
        maps,
        torch.randn(units, dtype=dtype),
        torch.randn((), dtype=dtype),
        torch.randn(x, y, z, dtype=dtype),
    )


def expected(maps, w, b, grad):
    """sigma and the gradients of w and the maps, in float64 by autograd."""
    leaves = {name: m.double().requires_grad_() for name, m in maps.items() if m is not None}
    w = w.double().requires_grad_()
    view = {"xy": lambda m: m[:, :, :, None], "xz": lambda m: m[:, :, None], "yz": lambda m: m[None]}
    hidden = sum(view[name](m) for name, m in leaves.items())  # [X, J, Y, Z]
    hidden = hidden.expand(grad.shape[0], len(w), *grad.shape[1:])
    sigma = (
        torch.einsum("j,xjyz->xyz", w, torch.nn.functional.softplus(hidden, threshold=1000.0)) + b.double()
    )
    return [sigma.detach(), *torch.autograd.grad(sigma, [w, *leaves.values()], grad.double())]


def emulated(folder, maps, w, b, grad, order=0):
    x, y, z = grad.shape
    dtype = grad.dtype
    arguments = [dtype.itemsize, x, y, z, len(w), maps["xy"], maps["xz"], maps["yz"], w, b, grad]
    shapes = [grad.shape, w.shape, *(m.shape for m in maps.values() if m is not None)]
    return emulate("slab_density", folder, arguments, shapes, dtype, order)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize(
    "size",
    [
        pytest.param((9, 9, 35, 5), marks=pytest.mark.long),
        pytest.param((3, 37, 4, 18), marks=pytest.mark.long),
        (1, 1, 1, 1),
        (4, 8, 32, 3),
        (9, 3, 33, 5),  # two tiles of x, z and units
        (2, 33, 2, 17),  # two tiles of y, and more units than a block loads at a time
    ],
)
def test_forward_and_backward(tmp_path, size, dtype, tolerance):
    case = inputs(dtype, *size)
    for actual, wanted in zip(emulated(tmp_path, *case), expected(*case), strict=True):
        assert_close(actual, wanted, tolerance)


@pytest.mark.parametrize("present", [("xy", "xz"), ("yz",), ("xz", "yz")])
def test_absent_maps(tmp_path, present):
    case = inputs(torch.float32, 2, 7, 33, 3, present)
    for actual, wanted in zip(emulated(tmp_path, *case), expected(*case), strict=True):
        assert_close(actual, wanted, 2e-6)


@pytest.mark.parametrize("name", ["xy", "xz", "yz"])
def test_values_whose_exponential_overflows(tmp_path, name):
    maps, w, b, grad = inputs(torch.float32, 2, 9, 33, 2)
    maps[name].flatten()[::7] = 120.0
    maps[name].flatten()[3::11] = -150.0
    for actual, wanted in zip(emulated(tmp_path, maps, w, b, grad), expected(maps, w, b, grad), strict=True):
        assert_close(actual, wanted, 2e-6)


def test_the_order_of_threads_does_not_change_a_bit(tmp_path):
    case = inputs(torch.float32, 3, 9, 33, 3)
    for ascending, descending in zip(
        emulated(tmp_path, *case), emulated(tmp_path, *case, order=1), strict=True
    ):
        assert torch.equal(ascending, descending)
