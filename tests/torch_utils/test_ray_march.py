"""Ray marching on scalars: a numpy loop as oracle, the implementations against each other, gradients, and the
importance pass.
"""

import math

import numpy as np
import pytest
import torch

from tests.rejections import raising
from tests.torch_utils.compilers import needs_cpp
from torch_utils import build
from torch_utils.ops.ray_march import importance_depths, ray_march

BOTH = ["ref", pytest.param("compiled", marks=needs_cpp)]


def case(rays=19, samples=12, dtype=torch.float32, seed=0, ties=True):
    """densities, depths in any order, some of them equal."""
    g = torch.Generator().manual_seed(seed)
    densities = torch.randn(rays, samples, generator=g, dtype=dtype) * 4 + 1
    depths = torch.rand(rays, samples, generator=g, dtype=dtype) + 2.25
    if ties:
        depths[::2] = (depths[::2] * 16).round() / 16
    return densities, depths


def loop(densities, depths):
    """The definition, ray by ray, in numpy."""
    weights = np.zeros(densities.shape)
    depth_sum = np.zeros(len(densities))
    total = np.zeros(len(densities))
    for b in range(len(densities)):
        order = np.argsort(depths[b], kind="stable")
        s = densities[b][order]
        d = depths[b][order]
        through = 1.0
        for k in range(len(s) - 1):
            alpha = 1 - math.exp(-math.log1p(math.exp((s[k] + s[k + 1]) / 2 - 1)) * (d[k + 1] - d[k]))
            w = alpha * through
            through *= 1 - alpha + 1e-10
            weights[b, order[k]] += w / 2
            weights[b, order[k + 1]] += w / 2
            depth_sum[b] += w * (d[k] + d[k + 1]) / 2
            total[b] += w
    return weights, depth_sum, total


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("samples", [2, 3, 7, 96, 200])
def test_agrees_with_a_loop_over_samples(impl, samples):
    densities, depths = case(samples=samples, dtype=torch.float64)
    for actual, expected in zip(
        ray_march(densities, depths, impl=impl), loop(densities.numpy(), depths.numpy()), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-13, rtol=1e-12)


@needs_cpp
@pytest.mark.parametrize(
    ("rays", "samples"), [(1, 2), (16, 3), (17, 28), (33, 96), (5, 129), (40, 200), (3000, 8)]
)
def test_agrees_with_the_reference_in_single_precision(rays, samples):
    densities, depths = case(rays, samples)
    densities.requires_grad_()
    fast = ray_march(densities, depths, impl="compiled")
    expected = ray_march(densities, depths, impl="ref")
    torch.testing.assert_close(fast, expected, atol=1e-5, rtol=1e-6)
    cotangents = [torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) for value in expected]
    actual, value = (torch.autograd.grad(out, densities, cotangents)[0] for out in (fast, expected))
    assert (actual - value).abs().max() <= 1e-4 * value.abs().max()


@needs_cpp
def test_order_does_not_matter_and_ties_keep_theirs():
    densities, depths = case(samples=40, dtype=torch.float64, ties=False)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    weights, *sums = ray_march(densities, depths, impl="compiled")
    shuffled, *shuffled_sums = ray_march(densities[:, order], depths[:, order], impl="compiled")
    torch.testing.assert_close(shuffled, weights[:, order], atol=0, rtol=0)
    torch.testing.assert_close(shuffled_sums, sums, atol=0, rtol=0)
    equal = torch.full_like(depths, 2.5)
    equal[:, -5:] = 3.0
    expected = ray_march(densities, equal, impl="ref")
    torch.testing.assert_close(ray_march(densities, equal, impl="compiled"), expected)


@pytest.mark.parametrize("impl", BOTH)
def test_nearly_empty_rays_keep_their_relative_precision(impl):
    """The depth of such pixels is a quotient of two tiny sums."""
    densities = torch.full((20, 30), -7.0)
    depths = torch.linspace(2.0, 20.0, 30).expand(20, 30)
    _, depth_sum, total = ray_march(densities, depths, impl=impl)
    expected = ray_march(densities.double(), depths.double(), impl="ref")
    torch.testing.assert_close(total.double(), expected[2], rtol=1e-3, atol=0)
    torch.testing.assert_close((depth_sum / total).double(), expected[1] / expected[2], rtol=1e-3, atol=0)


@needs_cpp
def test_extreme_and_missing_numbers():
    densities, depths = case(6, 9)
    densities[0], densities[1], densities[2] = 1e30, -1e30, 300.0
    fast = ray_march(densities, depths, impl="compiled")
    expected = ray_march(densities, depths, impl="ref")
    torch.testing.assert_close(fast, expected, atol=1e-6, rtol=1e-5)
    densities[3, 4] = math.nan
    assert ray_march(densities, depths, impl="compiled")[2].isnan().tolist() == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


@needs_cpp
@pytest.mark.parametrize("samples", [2, 5, 18])
def test_gradients_of_the_compiled_op(samples):
    densities, depths = case(3, samples, torch.float64)
    run = lambda densities: ray_march(densities, depths, impl="compiled")  # noqa: E731
    assert torch.autograd.gradcheck(run, densities.requires_grad_())
    assert torch.autograd.gradgradcheck(run, densities)


def test_gradients_for_depths_go_through_plain_torch():
    densities, depths = (t.requires_grad_() for t in case(3, 6, torch.float64, ties=False))
    assert torch.autograd.gradcheck(ray_march, (densities, depths))
    with raising("ray_march", 'impl="compiled"'):
        ray_march(densities, depths, impl="compiled")


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("samples", "fine"), [(2, 5), (3, 4), (4, 6), (16, 12), (48, 48), (200, 7)])
def test_importance_depths_agree_with_the_reference(dtype, samples, fine):
    densities, depths = case(37, samples, dtype)
    depths = depths.sort(dim=1)[0]
    u = torch.rand(37, fine, generator=torch.Generator().manual_seed(3), dtype=dtype)
    u[0, 0] = 0
    actual, expected = (importance_depths(densities, depths, u, impl=impl) for impl in ("compiled", "ref"))
    torch.testing.assert_close(actual, expected, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    assert not importance_depths(densities.requires_grad_(), depths, u).requires_grad


@pytest.mark.parametrize("impl", BOTH)
def test_importance_depths_gather_where_the_weight_is(impl):
    depths = torch.linspace(2.0, 3.0, 48).expand(30, 48).contiguous()
    densities = torch.full((30, 48), -20.0)
    densities[:, 24:26] = 400.0
    fine = importance_depths(
        densities, depths, torch.rand(30, 64, generator=torch.Generator().manual_seed(0)), impl=impl
    )
    assert ((fine - depths[0, 24]).abs() < 0.06).float().mean() > 0.6
    assert fine.min() >= 2.0 and fine.max() <= 3.0


@needs_cpp
def test_inputs_need_not_be_contiguous():
    densities, depths = case(samples=10)
    expected = ray_march(densities, depths, impl="compiled")
    strided = [t.t().contiguous().t() for t in (densities, depths)]
    torch.testing.assert_close(ray_march(*strided, impl="compiled"), expected, atol=0, rtol=0)
    grad = torch.autograd.grad(
        ray_march(strided[0].requires_grad_(), strided[1])[0].t().contiguous().t().square().sum(), strided[0]
    )[0]
    assert grad.shape == densities.shape and grad.isfinite().all()


@needs_cpp
def test_is_registered_as_torch_expects():
    assert build.available("ray_march", "cpu")
    densities, depths = case()
    torch.library.opcheck(torch.ops.eg3d_rlhf.ray_march, (densities.clone().requires_grad_(), depths))
    grads = torch.randn_like(densities), torch.randn(len(densities)), torch.randn(len(densities))
    torch.library.opcheck(torch.ops.eg3d_rlhf.ray_march_backward, (*grads, densities, depths))
    torch.library.opcheck(
        torch.ops.eg3d_rlhf.importance_depths, (densities, depths.sort()[0], torch.rand(len(densities), 5))
    )


def test_compiles_whole():
    densities, depths = case()
    u = torch.rand(len(densities), 4)

    def run(densities):
        weights, depth_sum, total = ray_march(densities, depths)
        return (
            weights.square().sum() + (depth_sum * total).sum() + importance_depths(densities, depths, u).sum()
        )

    leaf = densities.requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(function(leaf), leaf) for function in (compiled, run)))
