"""triplane_decode's CUDA kernels, run on the CPU, against F.grid_sample and the decoder's
formula in float64.
"""

import pytest
import torch
from torch.nn import functional as F

from tests.torch_utils.cuda.emulation import assert_close, emulate, needs_compiler

pytestmark = needs_compiler
AXES = [0, 1, 0, 2, 2, 1]  # (width, height) axis of each plane


def inputs(dtype, n=2, k=3, h=7, w=9, c=32, p=150, j=20, d=32):
    torch.manual_seed(2)
    planes = torch.randn(n, k, h, w, c, dtype=dtype)
    points = 2.4 * torch.rand(n, p, 3, dtype=dtype) - 1.2  # some of them outside
    weights = [torch.randn(s, dtype=dtype) / 4 for s in ((j, c), (j,), (1 + d, j), (1 + d,))]
    return planes, points, *weights, torch.randn(n, p, d, dtype=dtype), torch.randn(n, p, 1, dtype=dtype)


def expected(planes, points, w0, b0, w1, b1, grad_features, grad_sigma):
    """Outputs and gradients in float64 by autograd."""
    leaves = planes, w0, b0, w1, b1 = [t.double().requires_grad_() for t in (planes, w0, b0, w1, b1)]
    features = 0
    for k in range(planes.shape[1]):
        grid = points.double()[:, None, :, AXES[2 * k : 2 * k + 2]]
        features = features + F.grid_sample(planes[:, k].permute(0, 3, 1, 2), grid, align_corners=False)[
            :, :, 0
        ].transpose(1, 2)
    out = F.linear(F.softplus(F.linear(features, w0, b0)), w1, b1)
    outputs = [torch.sigmoid(out[..., 1:]) * 1.002 - 0.001, out[..., :1]]
    return [
        *(o.detach() for o in outputs),
        *torch.autograd.grad(outputs, leaves, [grad_features.double(), grad_sigma.double()]),
    ]


def emulated(folder, planes, points, w0, b0, w1, b1, grad_features, grad_sigma, order=0):
    n, k, h, w, c = planes.shape
    p = points.shape[1]
    rows, j = w1.shape
    dtype = planes.dtype
    tensors = [planes, points, w0, b0, w1, b1, grad_features, grad_sigma]
    arguments = [dtype.itemsize, n, k, h, w, c, p, j, rows - 1, torch.tensor(AXES[: 2 * k]), *tensors]
    shapes = [(n, p, rows - 1), (n, p, 1), *(t.shape for t in (planes, w0, b0, w1, b1))]
    return emulate("triplane_decode", folder, arguments, shapes, dtype, order)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(dict(), marks=pytest.mark.long),
        pytest.param(dict(d=0), marks=pytest.mark.long),
        dict(c=16, d=16, j=32, k=2, p=33),
        dict(c=16, d=0, j=5, n=1),
        dict(c=13, d=3, j=17, p=1),
        pytest.param(dict(c=30, d=7, j=16, n=3, p=90), marks=pytest.mark.long),
        pytest.param(dict(n=1, p=700, j=3, h=1, w=2), marks=pytest.mark.long),
        dict(n=1, p=40, c=30, d=7, j=3, h=1, w=2),
    ],
    ids=str,
)
def test_forward_and_backward(tmp_path, sizes):
    case = inputs(torch.float32, **sizes)
    for actual, wanted in zip(emulated(tmp_path, *case), expected(*case), strict=True):
        if wanted.numel():
            assert_close(actual, wanted, 5e-6)


def test_float64(tmp_path):
    case = inputs(torch.float64, c=10, j=18, d=9)
    for actual, wanted in zip(emulated(tmp_path, *case), expected(*case), strict=True):
        assert_close(actual, wanted, 1e-12)


def test_the_order_of_threads_changes_the_gradient_of_the_planes_by_rounding_only(tmp_path):
    case = inputs(torch.float32, c=16, d=16, p=60)
    ascending = emulated(tmp_path, *case)
    descending = emulated(tmp_path, *case, order=1)
    for i, (first, second) in enumerate(zip(ascending, descending, strict=True)):
        assert_close(first, second, 1e-6) if i == 2 else torch.testing.assert_close(
            first, second, rtol=0, atol=0
        )


@pytest.mark.parametrize("coordinate", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_points_that_are_nowhere_read_and_write_nothing(tmp_path, coordinate):
    case = inputs(torch.float32, n=1, p=5, c=8, d=8)
    case[1][0, 2] = coordinate
    inside = [0, 1, 3, 4]
    features, sigma, grad_planes, *_ = emulated(tmp_path, *case)
    wanted = expected(case[0], case[1][:, inside], *case[2:6], *(g[:, inside] for g in case[6:]))
    for actual, right in zip((features[:, inside], sigma[:, inside], grad_planes), wanted, strict=False):
        assert_close(actual, right, 5e-6)
