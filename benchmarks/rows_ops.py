"""Rows of the benchmark that measure single ops, at the shapes of the full-size configuration.

Each op is called as call_op(impl, *inputs), so that the further columns of --torch-compile use the same
function.
"""

import functools
from collections.abc import Callable
from functools import partial as part

import torch

from benchmarks.rows import Case, Outcome, Row
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.ray_march import importance_depths, ray_march
from torch_utils.ops.slab_density import slab_density
from torch_utils.ops.triplane_decode import triplane_decode
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

EG3D_PAIRS = ((0, 1), (0, 2), (2, 0))  # coordinates that the planes of released checkpoints read
Call = Callable[..., tuple[torch.Tensor, ...]]  # (impl, *tensors) -> outputs


def op_case(
    device: str,
    tiny: bool,
    make_inputs: Callable[[Callable, bool], tuple[Call, list[torch.Tensor], int]],
    train: bool,
    compile_torch: Callable[[str, bool], bool] = lambda device, train: True,
) -> Case:
    """Make the case of an op: both implementations with the same inputs.

    Args:
        device: device of the inputs.
        tiny: True: tiny inputs.
        make_inputs: function of (normal, tiny) that returns the call of the op, its inputs, and the number of
            inputs, from the first one on, that have gradients. normal(*shape) samples N(0, 1) on the device.
        train: True: forward and backward; False: forward only.
        compile_torch: function of (device, train) that returns True if torch.compile can compile the plain
            torch implementation in reasonable time. Long loops are unrolled, which takes too long.
    """
    rng = torch.Generator().manual_seed(0)  # on the CPU, so that all devices get the same values
    call_op, inputs, differentiable_count = make_inputs(
        lambda *shape: torch.randn(shape, generator=rng).to(device), tiny
    )
    inputs = [
        tensor.requires_grad_(train and index < differentiable_count) for index, tensor in enumerate(inputs)
    ]
    with torch.no_grad():
        # random gradients of the outputs
        cotangents = [
            torch.randn(output.shape, generator=rng).to(output) for output in call_op("ref", *inputs)
        ]

    def run(function: Callable[..., tuple[torch.Tensor, ...]]) -> Outcome:
        if not train:
            with torch.no_grad():
                return Outcome({f"output {index}": output for index, output in enumerate(function(*inputs))})
        outputs = function(*inputs)
        gradients = torch.autograd.grad(outputs, inputs[:differentiable_count], cotangents)
        return Outcome(
            {f"output {index}": output.detach() for index, output in enumerate(outputs)},
            {f"input {index}": gradient for index, gradient in enumerate(gradients)},
        )

    @functools.cache
    def compiled(impl: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        return torch.compile(part(call_op, impl), dynamic=False)

    other_columns = {
        "torch": lambda: run(part(call_op, "torch")),
        "compiled_reference": lambda: run(compiled("ref")),
    }
    if compile_torch(device, train):
        other_columns["compiled_torch"] = lambda: run(compiled("torch"))
    return Case(
        reference=lambda: run(part(call_op, "ref")),
        fast=lambda: run(part(call_op, "auto")),
        others=other_columns,
    )


# Each of the following functions returns the call of an op, its inputs, and the number of inputs with
# gradients, see `op_case`.


def _bias_act(normal, tiny: bool):
    """Return the activation after the backbone's last convolution."""
    channels, resolution = (4, 9) if tiny else (128, 256)
    return (
        lambda impl, x, b: (bias_act(x, b, act="lrelu", clamp=256, impl=impl),),
        [normal(1, channels, resolution, resolution), normal(channels)],
        2,
    )


def _upfirdn2d(normal, tiny: bool, channels: int, side: int, **resampling):
    """Return a low-pass filter with resampling, as the generator applies it to images.

    Args: channels, side: channels and pixels per edge of the input; resampling: arguments of `upfirdn2d`.
    """
    channel_count, resolution = (4, 8 + side % 2) if tiny else (channels, side)
    image = normal(1, channel_count, resolution, resolution)
    low_pass_filter = setup_filter([1, 3, 3, 1], device=image.device)
    return (
        lambda impl, image: (upfirdn2d(image, low_pass_filter, gain=4, impl=impl, **resampling),),
        [image],
        1,
    )


def _slab_density(normal, tiny: bool):
    """Return the density of the published slab, from two feature maps as in released checkpoints."""
    hidden_count, (x, y, z) = (4, (5, 6, 7)) if tiny else (64, (128, 141, 129))
    inputs = [
        normal(x, hidden_count, y, 1),
        normal(x, hidden_count, 1, z),
        normal(hidden_count) / hidden_count**0.5,
        normal(1)[0],
    ]
    return lambda impl, xy, xz, w, b: (slab_density([xy, xz], w, b, (x, y, z), impl=impl),), inputs, 4


def _triplane_decode(normal, tiny: bool, colors: int):
    """Return the decoder in the coarse pass of a rendering.

    The pass has 128 x 128 rays with 48 samples, and planes of 256 texels per edge.
    Args: colors: number of colour features; 0: only the density is computed.
    """
    channels, resolution, ray_count, sample_count, hidden_count = (
        (4, 8, 4, 3, 8) if tiny else (32, 256, 128, 48, 64)
    )
    planes = normal(1, 3, channels, resolution, resolution)
    ray_positions, sample_positions = (
        torch.linspace(-0.5, 0.5, position_count, device=planes.device)
        for position_count in (ray_count, sample_count)
    )
    y, x, z = torch.meshgrid(ray_positions, ray_positions, sample_positions, indexing="ij")
    # [1, P, 3]
    points = torch.stack([x, y, z + normal(*z.shape) * 0.01], dim=-1).reshape(1, -1, 3)
    # decoder weights with a scale that keeps the variance of the activations
    weights = [
        normal(hidden_count, channels) / channels**0.5,
        normal(hidden_count),
        normal(1 + colors, hidden_count) / hidden_count**0.5,
        normal(1 + colors),
    ]

    def decode(impl: str, planes, w0, b0, w1, b1, points):
        features, sigma = triplane_decode(planes, EG3D_PAIRS, points, 1.0, (w0, b0, w1, b1), impl=impl)
        return (features, sigma) if colors else (sigma,)

    return decode, [planes, *weights, points], 5


def _depths(normal, tiny: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ascending coarse depths, and unsorted fine depths near the centre, [rays, samples] each."""
    ray_count, sample_count = (5, 4) if tiny else (128 * 128, 48)
    fine_depths = 2.7 + 0.05 * normal(ray_count, sample_count)
    coarse_depths = torch.linspace(2.25, 3.3, sample_count, device=fine_depths.device) + 0.01 * normal(
        ray_count, sample_count
    )
    return coarse_depths.sort(dim=-1).values, fine_depths


def _ray_march(normal, tiny: bool):
    """Return the final ray marching of a rendering: 128 x 128 rays, 48 + 48 samples."""
    depths = torch.cat(_depths(normal, tiny), dim=-1)  # [rays, 2 samples]
    return (
        lambda impl, densities, depths: ray_march(densities, depths, impl=impl),
        [2 * normal(*depths.shape), depths],
        1,
    )


def _importance_depths(normal, tiny: bool):
    """Return the importance sampling of 48 fine depths from 48 coarse samples on 128 x 128 rays."""
    depths, fine_depths = _depths(normal, tiny)
    # uniform in [0, 1), [rays, samples]
    u = torch.special.ndtr(normal(*fine_depths.shape)).clamp(0, 1 - 1e-6)
    return (
        lambda impl, densities, depths, u: (importance_depths(densities, depths, u, impl=impl),),
        [2 * normal(*u.shape), depths, u],
        0,
    )


def _compiles_in_reasonable_time(device: str, train: bool) -> bool:
    """Return True if the plain torch implementation has no loop over many pieces that would be unrolled."""
    return train or device == "cuda"


def _rows(name: str, make_inputs, seconds: float, has_backward: bool = True, **kwargs) -> list[Row]:
    """Return the rows of an op: forward, and forward + backward if the op has a backward pass.

    Args: seconds: rough duration of the reference's forward pass.
    """
    return [
        Row(
            name=f"op {name}, {'forward + backward' if with_backward else 'forward'}",
            size="full",
            make=part(op_case, make_inputs=make_inputs, train=with_backward, **kwargs),
            seconds=seconds * (3 if with_backward else 1),
        )
        for with_backward in ((False, True) if has_backward else (False,))
    ]


# Enlarging: the tri-plane image is resampled from 128 to 256 texels. Smoothing: the low-pass filter after a
# transposed convolution.
_ENLARGE = part(_upfirdn2d, channels=96, side=128, up=2, padding=(2, 1, 2, 1))
_SMOOTH = part(_upfirdn2d, channels=128, side=257, padding=1)
ROWS = [
    *_rows("bias_act", _bias_act, 0.03),
    *_rows("upfirdn2d, enlarging", _ENLARGE, 0.1),
    *_rows("upfirdn2d, smoothing", _SMOOTH, 0.1),
    *_rows("slab_density", _slab_density, 0.8, compile_torch=lambda device, train: device == "cuda"),
    *_rows(
        "triplane_decode", part(_triplane_decode, colors=32), 0.9, compile_torch=_compiles_in_reasonable_time
    ),
    *_rows(
        "triplane_decode, density only",
        part(_triplane_decode, colors=0),
        0.6,
        compile_torch=_compiles_in_reasonable_time,
    ),
    *_rows("ray_march", _ray_march, 0.1),
    *_rows("importance_depths", _importance_depths, 0.1, has_backward=False),
]
