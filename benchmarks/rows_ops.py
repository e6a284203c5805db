"""Rows: the ops alone, at the shapes of the full-size configuration, forward and forward + backward.

Each op is called as `call(impl, *tensors)`, so that the further columns of --torch-compile can be made from
the same function.
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
    make: Callable[[Callable, bool], tuple[Call, list[torch.Tensor], int]],
    train: bool,
    compile_torch: Callable[[str, bool], bool] = lambda device, train: True,
) -> Case:
    """Both implementations on the same tensors.

    Args:
        make: (normal, tiny) -> the call, its tensors, and how many of these, from the first on, take
            gradients; normal(*shape) draws N(0, 1) on the device.
        compile_torch: (device, train) -> whether the torch path is a straight line there; torch.compile
            unrolls a loop over many pieces, and needs longer for that than anyone would wait.
    """
    rng = torch.Generator().manual_seed(0)
    call, tensors, leaves = make(lambda *shape: torch.randn(shape, generator=rng).to(device), tiny)
    tensors = [t.requires_grad_(train and i < leaves) for i, t in enumerate(tensors)]
    with torch.no_grad():
        cotangents = [torch.randn(out.shape, generator=rng).to(out) for out in call("ref", *tensors)]

    def run(function: Callable[..., tuple[torch.Tensor, ...]]) -> Outcome:
        if not train:
            with torch.no_grad():
                return Outcome({f"output {i}": out for i, out in enumerate(function(*tensors))})
        outputs = function(*tensors)
        gradients = torch.autograd.grad(outputs, tensors[:leaves], cotangents)
        return Outcome(
            {f"output {i}": out.detach() for i, out in enumerate(outputs)},
            {f"input {i}": gradient for i, gradient in enumerate(gradients)},
        )

    @functools.cache
    def compiled(impl: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        return torch.compile(part(call, impl), dynamic=False)

    others = {"torch": lambda: run(part(call, "torch")), "compiled_reference": lambda: run(compiled("ref"))}
    if compile_torch(device, train):
        others["compiled_torch"] = lambda: run(compiled("torch"))
    return Case(
        reference=lambda: run(part(call, "ref")),
        fast=lambda: run(part(call, "auto")),
        others=others,
    )


def _bias_act(normal, tiny: bool):
    """The activation after the backbone's last convolution."""
    c, r = (4, 9) if tiny else (128, 256)
    return (
        lambda impl, x, b: (bias_act(x, b, act="lrelu", clamp=256, impl=impl),),
        [normal(1, c, r, r), normal(c)],
        2,
    )


def _upfirdn2d(normal, tiny: bool, channels: int, side: int, **resampling):
    """One of the two ways in which images meet the low-pass filter."""
    c, r = (4, 8 + side % 2) if tiny else (channels, side)
    x = normal(1, c, r, r)
    f = setup_filter([1, 3, 3, 1], device=x.device)
    return lambda impl, x: (upfirdn2d(x, f, gain=4, impl=impl, **resampling),), [x], 1


def _slab_density(normal, tiny: bool):
    """The published slab from the two maps of released checkpoints."""
    j, (x, y, z) = (4, (5, 6, 7)) if tiny else (64, (128, 141, 129))
    tensors = [normal(x, j, y, 1), normal(x, j, 1, z), normal(j) / j**0.5, normal(1)[0]]
    return lambda impl, xy, xz, w, b: (slab_density([xy, xz], w, b, (x, y, z), impl=impl),), tensors, 4


def _triplane_decode(normal, tiny: bool, colors: int):
    """The coarse pass of a rendering: 128 x 128 rays through the box with 48 samples each, planes of 256
    texels.
    """
    c, r, rays, samples, j = (4, 8, 4, 3, 8) if tiny else (32, 256, 128, 48, 64)
    planes = normal(1, 3, c, r, r)
    side, along = (torch.linspace(-0.5, 0.5, n, device=planes.device) for n in (rays, samples))
    y, x, z = torch.meshgrid(side, side, along, indexing="ij")
    points = torch.stack([x, y, z + normal(*z.shape) * 0.01], dim=-1).reshape(1, -1, 3)
    weights = [normal(j, c) / c**0.5, normal(j), normal(1 + colors, j) / j**0.5, normal(1 + colors)]

    def call(impl: str, planes, w0, b0, w1, b1, points):
        features, sigma = triplane_decode(planes, EG3D_PAIRS, points, 1.0, (w0, b0, w1, b1), impl=impl)
        return (features, sigma) if colors else (sigma,)

    return call, [planes, *weights, points], 5


def _depths(normal, tiny: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending depths [B, S] of a coarse pass through the box, and as many about the middle in any order."""
    b, s = (5, 4) if tiny else (128 * 128, 48)
    middle = 2.7 + 0.05 * normal(b, s)
    coarse = torch.linspace(2.25, 3.3, s, device=middle.device) + 0.01 * normal(b, s)
    return coarse.sort(dim=-1).values, middle


def _ray_march(normal, tiny: bool):
    """The final march of a rendering: 128 x 128 rays, 48 + 48 samples."""
    depths = torch.cat(_depths(normal, tiny), dim=-1)
    return (
        lambda impl, densities, depths: ray_march(densities, depths, impl=impl),
        [2 * normal(*depths.shape), depths],
        1,
    )


def _importance_depths(normal, tiny: bool):
    """48 fine depths from 48 coarse samples on each of 128 x 128 rays."""
    depths, other = _depths(normal, tiny)
    u = torch.special.ndtr(normal(*other.shape)).clamp(0, 1 - 1e-6)
    return (
        lambda impl, densities, depths, u: (importance_depths(densities, depths, u, impl=impl),),
        [2 * normal(*u.shape), depths, u],
        0,
    )


def _one_piece(device: str, train: bool) -> bool:
    return train or device == "cuda"


def _rows(name: str, make, seconds: float, train: bool = True, **kwargs) -> list[Row]:
    return [
        Row(
            name=f"op {name}, {'forward + backward' if backward else 'forward'}",
            size="full",
            make=part(op_case, make=make, train=backward, **kwargs),
            seconds=seconds * (3 if backward else 1),
        )
        for backward in ((False, True) if train else (False,))
    ]


# The tri-plane image on its way from 128 to 256 texels, 2x per axis; the low-pass filter after a transposed
# convolution.
_ENLARGE = part(_upfirdn2d, channels=96, side=128, up=2, padding=(2, 1, 2, 1))
_SMOOTH = part(_upfirdn2d, channels=128, side=257, padding=1)
ROWS = [
    *_rows("bias_act", _bias_act, 0.03),
    *_rows("upfirdn2d, enlarging", _ENLARGE, 0.1),
    *_rows("upfirdn2d, smoothing", _SMOOTH, 0.1),
    *_rows("slab_density", _slab_density, 0.8, compile_torch=lambda device, train: device == "cuda"),
    *_rows("triplane_decode", part(_triplane_decode, colors=32), 0.9, compile_torch=_one_piece),
    *_rows("triplane_decode, density only", part(_triplane_decode, colors=0), 0.6, compile_torch=_one_piece),
    *_rows("ray_march", _ray_march, 0.1),
    *_rows("importance_depths", _importance_depths, 0.1, train=False),
]
