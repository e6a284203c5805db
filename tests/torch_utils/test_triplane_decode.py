"""Look-up and decoder of scattered points: a numpy loop as oracle, the implementations against each other,
and gradients.
"""

import math

import numpy as np
import pytest
import torch

from tests.rejections import raising
from tests.torch_utils.compilers import needs_cpp
from torch_utils import build
from torch_utils.ops.triplane_decode import DecoderWeights, merge_planes, projection_axes, triplane_decode
from training.rendering.renderer import generate_planes

LAYOUTS = ("eg3d", "fixed")
FAST = ["torch", pytest.param("compiled", marks=needs_cpp)]


def case(
    seed=0,
    n=2,
    channels=5,
    size=(7, 7),
    points=83,
    units=9,
    colours=3,
    dtype=torch.float32,
    spread=1.4,
    requires_grad=False,
):
    """planes, points in and around a cube of side 1.6, box_warp, weights."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_(requires_grad)

    weights = DecoderWeights(draw(units, channels), draw(units), draw(1 + colours, units), draw(1 + colours))
    where = (torch.rand(n, points, 3, generator=g, dtype=dtype) * 2 - 1) * spread
    return draw(n, 3, channels, *size), where, 1.6, weights


def decode(inputs, layout="eg3d", impl="auto", **kwargs):
    planes, points, box_warp, weights = inputs
    return triplane_decode(
        planes, generate_planes(layout).to(planes), points, box_warp, weights, impl=impl, **kwargs
    )


BLEND = (-0.25, 0.4)  # world units


def texel(image, row, column):
    """image [C, H, W] at whole texels, zero outside."""
    inside = 0 <= row < image.shape[1] and 0 <= column < image.shape[2]
    return image[:, row, column] if inside else np.zeros(image.shape[0])


def loop(inputs, layout, blend=None):
    """The definition, point by point, in numpy."""
    planes, points, box_warp, weights = inputs
    planes = planes.detach().double().numpy()
    depths = points.double().numpy()[..., 2]
    points = points.double().numpy() * 2 / box_warp
    w0, b0, w1, b1 = (w.detach().double().numpy() for w in weights)
    out = np.zeros((*points.shape[:2], len(b1)))
    for n, p in np.ndindex(*points.shape[:2]):
        feature = 0
        for k, (across, along) in enumerate(projection_axes(generate_planes(layout))):
            image = planes[n, k]
            y, x = (
                (points[n, p, axis] + 1) * size / 2 - 0.5
                for axis, size in ((along, image.shape[1]), (across, image.shape[2]))
            )
            row = math.floor(y)
            column = math.floor(x)
            channel_weights = np.ones(len(image))
            if blend is not None and k == 0:
                in_front = min(max((depths[n, p] - blend[0]) / (blend[1] - blend[0]), 0), 1)
                channel_weights[: len(image) // 2] = in_front
                channel_weights[len(image) // 2 :] = 1 - in_front
            for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = channel_weights * abs(1 - r - (y - row)) * abs(1 - c - (x - column))
                feature = feature + weight * texel(image, row + r, column + c) / 3
        out[n, p] = w1 @ np.log1p(np.exp(w0 @ feature + b0)) + b1
    return 1 / (1 + np.exp(-out[..., 1:])) * 1.002 - 0.001, out[..., :1]


@pytest.mark.parametrize("impl", ["ref", *FAST])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(7, 7), (5, 8)])
@pytest.mark.parametrize("blend", [None, BLEND])
def test_agrees_with_a_loop_over_points(impl, layout, size, blend):
    inputs = case(size=size, dtype=torch.float64)
    actual_values = decode(inputs, layout, impl, blend=blend)
    for actual, expected in zip(actual_values, loop(inputs, layout, blend), strict=True):
        np.testing.assert_allclose(actual.detach(), expected, atol=1e-12)


SIZES = [
    {},
    {"n": 1, "channels": 32, "size": (16, 16), "points": 300, "units": 64, "colours": 32},
    {"channels": 17, "units": 33, "colours": 1},
    {"n": 3, "channels": 16, "units": 32, "colours": 16, "points": 1},
    {"channels": 1, "units": 1, "colours": 2, "size": (1, 1)},
    {"channels": 48, "units": 80, "colours": 47, "points": 130, "size": (9, 4)},
    {"colours": 0, "channels": 32, "units": 64},
    {"n": 2, "points": 3000, "channels": 8, "colours": 8},
]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("blend", [None, BLEND])
def test_agrees_with_the_reference_in_single_precision(impl, layout, sizes, blend):
    inputs = case(**sizes, requires_grad=True)
    fast = decode(inputs, layout, impl, blend=blend)
    expected = decode(inputs, layout, "ref", blend=blend)
    scale = expected[1].abs().max().clamp_min(1)
    for actual, value in zip(fast, expected, strict=True):
        assert actual.shape == value.shape
        torch.testing.assert_close(actual / scale, value / scale, atol=1e-5, rtol=0)
    cotangents = [torch.randn(value.shape, generator=torch.Generator().manual_seed(5)) for value in expected]
    leaves = (inputs[0], *inputs[3])
    pairs = zip(
        torch.autograd.grad(fast, leaves, cotangents),
        torch.autograd.grad(expected, leaves, cotangents),
        strict=True,
    )
    for actual, value in pairs:
        assert (actual - value).abs().max() <= 1e-4 * value.abs().max()


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("colours", [0, 2])
@pytest.mark.parametrize("blend", [None, BLEND])
def test_gradients_of_the_compiled_op(layout, colours, blend):
    sizes = {"points": 7, "size": (4, 4), "channels": 3, "units": 4, "colours": colours}
    planes, points, box_warp, weights = case(**sizes, dtype=torch.float64, requires_grad=True)

    def run(planes, *weights):
        inputs = (planes, points, box_warp, DecoderWeights(*weights))
        return decode(inputs, layout, "compiled", blend=blend)[0 if colours else 1]

    assert torch.autograd.gradcheck(run, (planes, *weights))
    assert torch.autograd.gradgradcheck(run, (planes, *weights), fast_mode=True)


@pytest.mark.parametrize("impl", ["auto", *FAST])
def test_bilinear_look_up_at_and_beyond_the_borders(impl):
    """Edges of texels and of the planes, the half texel beyond them where features fade out, far away, and
    not a number.
    """
    if impl != "auto":
        planes, _, box_warp, weights = case(n=1, size=(4, 4), dtype=torch.float64)
        steps = torch.tensor(
            [
                -1e30,
                -7,
                -1.2501,
                -1.25,
                -1.125,
                -1,
                -0.75,
                -0.3,
                0,
                0.25,
                0.75,
                0.8,
                1 - 1e-9,
                1,
                1.25,
                9,
                1e30,
            ]
        ).double()
        points = torch.cartesian_prod(steps, steps, steps)[None] * (box_warp / 2)
        for layout in LAYOUTS:
            inputs = (planes, points, box_warp, weights)
            for actual, expected in zip(
                decode(inputs, layout, impl), decode(inputs, layout, "ref"), strict=True
            ):
                torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    else:
        planes, points, box_warp, weights = case()
        points[0, 3, 0] = math.nan  # every plane of the layout reads x: as a point outside
        far = points.clone()
        far[0, 3] = 100
        sigma, expected = (decode((planes, where, box_warp, weights))[1] for where in (points, far))
        torch.testing.assert_close(sigma, expected)


@pytest.mark.parametrize("impl", FAST)
def test_not_a_number_in_the_planes_or_weights_is_not_hidden(impl):
    planes, points, box_warp, weights = case(spread=0.3)
    with_nan = planes.clone()
    with_nan[:, 0] = math.nan
    assert decode((with_nan, points, box_warp, weights), impl=impl)[1].isnan().all()
    b0 = weights.b0.clone()
    b0[2] = math.nan
    assert decode((planes, points, box_warp, weights._replace(b0=b0)), impl=impl)[1].isnan().all()


@pytest.mark.parametrize("impl", FAST)
def test_inputs_need_not_be_contiguous(impl):
    planes, points, box_warp, weights = case()
    expected = decode((planes, points, box_warp, weights), impl=impl)
    turned_planes = planes.permute(4, 1, 0, 3, 2).contiguous()
    turned_points = points.transpose(0, 2).contiguous()
    strided = turned_planes.permute(2, 1, 4, 3, 0), turned_points.transpose(0, 2), box_warp
    strided_weights = DecoderWeights(
        *(w.t().contiguous().t() if w.ndim == 2 else w.repeat_interleave(2)[::2] for w in weights)
    )
    for actual, value in zip(decode((*strided, strided_weights), impl=impl), expected, strict=True):
        torch.testing.assert_close(actual, value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", FAST)
def test_merged_planes_can_be_shared(impl):
    inputs = case()
    merged = merge_planes(inputs[0], projection_axes(generate_planes("eg3d")))
    assert merged.sums.shape == (2, 2, 7, 7, 5)
    assert merged.pairs == ((0, 1), (0, 2)) and merged.plane_count == 3
    torch.testing.assert_close(
        decode(inputs, impl=impl, merged=merged), decode(inputs, impl=impl), atol=0, rtol=0
    )
    # not square: nothing to merge
    assert merge_planes(case(size=(5, 8))[0], ((0, 1), (0, 2), (2, 0))).sums.shape == (2, 3, 5, 8, 5)


@needs_cpp
def test_a_sparse_upstream_gradient_is_exact():
    inputs = case(points=700, requires_grad=True)
    cotangents = [torch.zeros(2, 700, 3), torch.zeros(2, 700, 1)]
    cotangents[0][1, 400], cotangents[1][0, 650] = 1.0, -2.0
    leaves = (inputs[0], *inputs[3])
    actual, expected = (
        torch.autograd.grad(decode(inputs, impl=impl), leaves, cotangents) for impl in ("compiled", "ref")
    )
    for gradient, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, value, atol=1e-6, rtol=1e-5)


@needs_cpp
def test_results_repeat_and_do_not_depend_on_the_number_of_threads_beyond_rounding():
    inputs = case(n=3, points=2500, requires_grad=True)
    leaves = (inputs[0], *inputs[3])
    before = torch.get_num_threads()

    def gradients(threads):
        torch.set_num_threads(threads)
        try:
            features, sigma = decode(inputs, impl="compiled")
            return torch.autograd.grad(features.square().sum() + sigma.sum(), leaves)
        finally:
            torch.set_num_threads(before)

    single = gradients(1)
    four = gradients(4)
    again = gradients(4)
    for a, b, c in zip(single, four, again, strict=True):
        assert torch.equal(b, c)
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_gradients_for_points_go_through_plain_torch():
    planes, points, box_warp, weights = case(points=6, dtype=torch.float64, spread=0.7)
    run = lambda points: decode((planes, points, box_warp, weights))  # noqa: E731
    assert torch.autograd.gradcheck(run, points.requires_grad_())
    with raising("triplane_decode", 'impl="compiled"'):
        decode((planes, points, box_warp, weights), impl="compiled")


def test_planes_that_are_not_aligned_are_looked_up_one_by_one():
    planes, points, box_warp, weights = case(dtype=torch.float64)
    axes = torch.linalg.qr(
        torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    )[0]
    actual, expected = (
        triplane_decode(planes, axes, points, box_warp, weights, impl=impl) for impl in ("auto", "ref")
    )
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual[1], decode((planes, points, box_warp, weights))[1])


def test_half_precision_and_no_points():
    planes, points, box_warp, weights = case()
    half = planes.bfloat16(), points.bfloat16(), box_warp, DecoderWeights(*(w.bfloat16() for w in weights))
    assert decode(half)[1].dtype == torch.bfloat16
    torch.testing.assert_close(
        decode(half)[0].float(), decode((planes, points, box_warp, weights))[0], atol=0.1, rtol=0.1
    )
    assert decode((planes, points[:, :0], box_warp, weights))[0].shape == (2, 0, 3)


@needs_cpp
@pytest.mark.parametrize("colours", [0, 3])
def test_is_registered_as_torch_expects(colours):
    assert build.available("triplane_decode", "cpu")
    planes, points, _, weights = case(n=1, points=20, colours=colours)
    leaves = [
        t.requires_grad_() for t in (merge_planes(planes, ((0, 1), (0, 2), (2, 1))).sums.detach(), *weights)
    ]
    torch.library.opcheck(
        torch.ops.eg3d_rlhf.triplane_decode, (leaves[0], [0, 1, 0, 2, 2, 1], points, *leaves[1:])
    )
    with torch.no_grad():
        grads = torch.randn(1, 20, colours), torch.randn(1, 20, 1)
        torch.library.opcheck(
            torch.ops.eg3d_rlhf.triplane_decode_backward,
            (*grads, leaves[0], [0, 1, 0, 2, 2, 1], points, *leaves[1:]),
        )


def test_compiles_whole():
    planes, points, _, weights = case(requires_grad=True)
    pairs = projection_axes(generate_planes("fixed"))

    def run(planes, *weights):
        features, sigma = triplane_decode(planes, pairs, points, 1.6, DecoderWeights(*weights))
        return features.sum() + (2 * sigma).sum()

    leaves = planes, *weights
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        *(torch.autograd.grad(function(*leaves), leaves) for function in (compiled, run))
    )
