"""ray_march's and importance_depths' CUDA kernels, run on the CPU, against their definitions in float64."""

import pytest
import torch

from tests.torch_utils.cuda.emulation import assert_close, emulate, needs_compiler
from torch_utils.ops.ray_march import interval_weights, invert_density, ray_march_ref, smooth_weights

pytestmark = needs_compiler


def inputs(dtype, rays, samples, fine=37, ties=False):
    torch.manual_seed(1)
    depths = 2.0 + torch.rand(rays, samples, dtype=dtype)
    if ties:
        depths[:, ::3] = depths[:, :1]
    densities = 4 * torch.randn(rays, samples, dtype=dtype)
    cotangents = (
        torch.randn(rays, samples, dtype=dtype),
        torch.randn(rays, dtype=dtype),
        torch.randn(rays, dtype=dtype),
    )
    return densities, depths, *cotangents, torch.rand(rays, fine, dtype=dtype)


def expected(densities, depths, grad_weights, grad_depth, grad_total):
    """Outputs, and the gradient of the densities, in float64 by autograd."""
    densities = densities.double().requires_grad_()
    outputs = ray_march_ref(densities, depths.double())
    grad = torch.autograd.grad(
        outputs, densities, [g.double() for g in (grad_weights, grad_depth, grad_total)]
    )
    return [*(o.detach() for o in outputs), *grad]


def emulated(folder, densities, depths, *rest, order=0):
    rays, samples = densities.shape
    fine = rest[-1].shape[1]
    dtype = densities.dtype
    shapes = [(rays, samples), (rays,), (rays,), (rays, samples), (rays, fine)]
    arguments = [dtype.itemsize, rays, samples, fine, densities, depths, *rest]
    return emulate("ray_march", folder, arguments, shapes, dtype, order)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("rays,samples", [(5, 96), (3, 33), (4, 32), (9, 7), (2, 2), (1, 512)])
def test_forward_and_backward(tmp_path, rays, samples, dtype, tolerance):
    case = inputs(dtype, rays, samples)
    for actual, wanted in zip(emulated(tmp_path, *case), expected(*case[:-1]), strict=False):
        assert_close(actual, wanted, tolerance)


def test_equal_depths_keep_their_order(tmp_path):
    case = inputs(torch.float64, 4, 45, ties=True)
    for actual, wanted in zip(emulated(tmp_path, *case), expected(*case[:-1]), strict=False):
        assert_close(actual, wanted, 1e-13)


def test_opaque_intervals(tmp_path):
    """Check gradients behind an interval that lets nothing through: they come from a recurrence,
    not from a division by zero.
    """
    densities, depths, *rest = inputs(torch.float32, 4, 40)
    densities[:, ::5] = 3000.0
    for actual, wanted in zip(
        emulated(tmp_path, densities, depths, *rest), expected(densities, depths, *rest[:-1]), strict=False
    ):
        assert_close(actual, wanted, 1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("samples", [48, 35, 4, 3, 2])
def test_importance_depths(tmp_path, samples, dtype, tolerance):
    densities, depths, *rest = inputs(dtype, 5, samples, fine=50)
    depths = depths.sort(dim=1).values
    weights, mids = interval_weights(densities.double(), depths.double())
    wanted = invert_density(mids, smooth_weights(weights), rest[-1].double())
    assert_close(emulated(tmp_path, densities, depths, *rest)[-1], wanted, tolerance)


def test_the_order_of_threads_does_not_change_a_bit(tmp_path):
    case = inputs(torch.float32, 6, 70)
    for ascending, descending in zip(
        emulated(tmp_path, *case), emulated(tmp_path, *case, order=1), strict=True
    ):
        assert torch.equal(ascending, descending)


def test_a_depth_that_is_not_a_number_stays_within_its_ray(tmp_path):
    densities, depths, *rest = inputs(torch.float32, 3, 40)
    depths[1, ::2] = float("nan")
    results = emulated(tmp_path, densities, depths, *rest)
    clean = expected(*(t[[0, 2]] for t in (densities, depths, *rest[:-1])))
    for actual, wanted in zip(results, clean, strict=False):
        assert_close(actual[[0, 2]], wanted, 5e-6)
