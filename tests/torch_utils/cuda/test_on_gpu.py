"""The CUDA ops on a device: against their definitions in float64 there, and their gradients against finite
differences.
"""

import functools

import pytest
import torch

from tests.torch_utils.compilers import require
from torch_utils import build, cuda_check
from torch_utils.ops.bias_act import activation_funcs, bias_act
from torch_utils.ops.ray_march import importance_depths, ray_march
from torch_utils.ops.slab_density import slab_density
from torch_utils.ops.triplane_decode import DecoderWeights, triplane_decode
from torch_utils.ops.upfirdn2d import upfirdn2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
DEVICE = "cuda"
PAIRS = ((0, 1), (0, 2), (2, 1))
OPS = build.ops("cuda")


@pytest.fixture(autouse=True)
def built():
    """Without a compiler there is nothing to test; an op that does not build or is switched
    off is a failure.
    """
    require("cuda")


def normal(*shape, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


def slab(dtype, x, y, z, units, scale=2.0):
    sizes = (x, units, y, 1), (x, units, 1, z), (1, units, y, z), (units,), ()
    return [normal(*size, dtype=dtype, scale=scale, seed=i).requires_grad_() for i, size in enumerate(sizes)]


def decoder(dtype, n, k, h, w, channels, p, units, colours):
    sizes = (n, k, channels, h, w), (units, channels), (units,), (1 + colours, units), (1 + colours,)
    points = normal(n, p, 3, dtype=dtype, scale=0.6, seed=9)
    return [
        normal(*size, dtype=dtype, scale=0.4, seed=i).requires_grad_() for i, size in enumerate(sizes)
    ], points


def decode(points, impl):
    return lambda planes, *weights: triplane_decode(
        planes, PAIRS[: planes.shape[1]], points, 2.0, DecoderWeights(*weights), impl=impl
    )


def agree(function, inputs, outputs_tolerance=1e-5, gradients_tolerance=1e-4):
    """Outputs and gradients of function(impl)(*inputs): float32 compiled against float64 ref, relative to the
    largest.
    """
    results = []
    for impl, dtype in (("compiled", torch.float32), ("ref", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs]
        outputs = function(impl)(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [o for o in outputs if o.numel()]
        cotangents = [normal(*o.shape, dtype=dtype, seed=77) for o in outputs]
        results.append(
            (outputs, torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], cotangents))
        )
    (outputs, grads), (wanted, wanted_grads) = results
    for tolerance, compared, expected in (
        (outputs_tolerance, outputs, wanted),
        (gradients_tolerance, grads, wanted_grads),
    ):
        for actual, right in zip(compared, expected, strict=True):
            assert (actual.double() - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("op", build.ops("cuda"))
def test_the_self_check_passes(op, monkeypatch):
    monkeypatch.setattr(cuda_check, "_results", {})
    assert build.available(op, "cuda") and cuda_check.passes(op, torch.device("cuda"))


@pytest.mark.parametrize("size", [(128, 141, 129, 64), (9, 37, 35, 18), (2, 2, 3, 1)], ids=str)
def test_slab_density(size):
    def function(impl):
        return lambda *t: slab_density(t[:3], t[3], t[4], size[:3], impl=impl)

    if size[0] == 128:  # the definition would take 600 MB per tensor in float64: a narrower decoder
        size = (*size[:3], 16)
    agree(function, slab(torch.float64, *size))


def test_slab_density_repeats_bit_for_bit():
    inputs = slab(torch.float32, 40, 45, 70, 20)
    runs = [
        torch.autograd.grad(
            slab_density(inputs[:3], *inputs[3:], (40, 45, 70), impl="compiled").sum(), inputs
        )
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(
    "size",
    [
        (2, 3, 64, 48, 32, 5000, 64, 32),
        (2, 3, 64, 64, 32, 5000, 64, 0),
        (1, 2, 17, 9, 16, 333, 32, 16),
        (3, 3, 7, 9, 13, 50, 17, 3),
    ],
    ids=str,
)
def test_triplane_decode(size):
    inputs, points = decoder(torch.float64, *size)
    agree(
        lambda impl: decode(points.float() if impl == "compiled" else points.float().double(), impl), inputs
    )


@pytest.mark.parametrize("rays,samples", [(4096, 96), (17, 33), (3, 512), (5, 2)])
def test_ray_march(rays, samples):
    # the same order, and ties, in both precisions
    depths = (2.0 + normal(rays, samples, scale=0.3, seed=1).abs()).float().double()
    densities = normal(rays, samples, scale=4.0).float().double().requires_grad_()
    agree(lambda impl: lambda d, t: ray_march(d, t, impl=impl), [densities, depths])


@pytest.mark.parametrize("samples", [48, 7, 3])
def test_importance_depths(samples):
    densities = normal(999, samples, scale=4.0).float()
    depths = (2.0 + normal(999, samples, seed=1).abs()).float().sort(dim=1).values
    u = torch.rand(999, 48, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3))
    actual = importance_depths(densities, depths, u, impl="compiled")
    wanted = importance_depths(densities.double(), depths.double(), u.double(), impl="ref")
    # a draw at an edge of the histogram may fall on its other side
    assert (actual - wanted).abs().quantile(0.999) < 1e-4


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("act", list(activation_funcs))
def test_bias_act(act, layout):
    x = normal(3, 17, 33, 21, scale=2.0).to(memory_format=layout).requires_grad_()
    agree(
        lambda impl: lambda x, b: bias_act(x, b, act=act, gain=1.5, clamp=2.0, impl=impl),
        [x, normal(17, seed=1).requires_grad_()],
    )


def test_bias_act_gradgradcheck():
    inputs = [normal(2, 3, 4, 5).requires_grad_(), normal(3, seed=1).requires_grad_()]
    for act in ("lrelu", "swish"):
        compiled = functools.partial(bias_act, act=act, impl="compiled")
        assert torch.autograd.gradcheck(compiled, inputs)
        assert torch.autograd.gradgradcheck(compiled, inputs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "up,down,padding", [(1, 1, 2), (2, 1, (2, 1, 2, 1)), (1, 2, 1), ((3, 1), (1, 2), (4, -1, 0, 6))]
)
@pytest.mark.parametrize("taps", [(4, 3), (9,)])
def test_upfirdn2d(taps, up, down, padding, layout):
    x = normal(2, 5, 67, 70).to(memory_format=layout).requires_grad_()
    f = normal(*taps, seed=1).float().double()
    agree(lambda impl: lambda x: upfirdn2d(x, f.to(x.dtype), up, down, padding, gain=1.5, impl=impl), [x])


def test_upfirdn2d_gradgradcheck():
    f = normal(4, 3, seed=1)
    x = normal(1, 2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: upfirdn2d(x, f, 2, 1, 2, impl="compiled"), [x])
    assert torch.autograd.gradgradcheck(lambda x: upfirdn2d(x, f, 2, 1, 2, impl="compiled"), [x])


def test_an_op_runs_on_the_current_stream():
    inputs = [t.detach() for t in slab(torch.float32, 40, 45, 70, 20)]
    wanted = slab_density(inputs[:3], *inputs[3:], (40, 45, 70), impl="compiled")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):  # fails for work on any other stream
        captured = slab_density(inputs[:3], *inputs[3:], (40, 45, 70), impl="compiled")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, wanted)
