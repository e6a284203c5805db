"""Raw density and colour of scattered points: tri-plane look-up and the two-layer decoder in one op.

    f = 1/K sum_k bilinear(plane_k, (width, height) coordinates of the point on plane k)
        zeros outside, align_corners=False
    h = softplus(w0 f + b0),   out = w1 h + b1,   sigma_raw = out[0],
    features = sigmoid(out[1:]) * 1.002 - 0.001

Planes that read the same pair of coordinates are added up first. This is exact, because the look-up is
linear. Released EG3D checkpoints project onto (x, y), (x, z), (z, x); the third plane is read as the second
one, transposed.

Shapes: N batch, K planes, C plane channels, H x W plane size, P points, J hidden units,
D colour features (0: only the density is computed).
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from torch_utils.ops import grid_sample_gradfix
from torch_utils.ops.implementations import alike, choose, define

Pairs = tuple[tuple[int, int], ...]  # per plane (width axis, height axis), 0 = x, 1 = y, 2 = z

# Points of the torch path that are computed together if no gradient is needed: 4 MB with 64 hidden units.
_POINT_CHUNK = 1 << 14
# Colours reach slightly beyond 0..1, as in EG3D.
_SCALE = 1 + 2 * 0.001
_SHIFT = 0.001

# Largest sizes that fit into the shared memory of the CUDA kernels in float32.
_CUDA_CHANNELS = 32
_CUDA_PLANES = 8
_CUDA_UNITS = 128


class MergedPlanes(NamedTuple):
    """Planes in the form of the fast paths, made by `merge_planes`."""

    sums: torch.Tensor  # [N, K', H, W, C]; planes with the same pair of coordinates are added up
    pairs: Pairs  # coordinates of the K' planes
    planes: int  # K, number of planes before they were added up


class DecoderWeights(NamedTuple):
    """Effective weights of the decoder, with learning-rate gains applied."""

    w0: torch.Tensor  # [J, C]
    b0: torch.Tensor  # [J]
    w1: torch.Tensor  # [1 + D, J], with the density's row first
    b1: torch.Tensor  # [1 + D]

    def density_only(self) -> "DecoderWeights":
        """Return the same decoder without its colours, D = 0."""
        return DecoderWeights(self.w0, self.b0, self.w1[:1], self.b1[:1])


def projection_axes(plane_axes: torch.Tensor) -> Pairs | None:
    """Return the world axes that each plane reads along its width and its height.

    Args:
        plane_axes: [K, 3, 3]. Plane k reads the first two components of coords @ inverse(plane_axes[k]) as
            (width, height).
    Returns: (width axis, height axis) per plane, 0 = x, 1 = y, 2 = z. None if a plane is not axis-aligned;
        there is then no separable form.
    """
    pairs = []
    # float64 on the CPU: the inverse of a permutation should come out exactly.
    for matrix in torch.linalg.inv(plane_axes.detach().double().cpu()):
        columns = matrix[:, :2]  # [3, 2]
        axes = columns.argmax(dim=0)
        # Axis-aligned: each column is a unit vector, and the two differ.
        unit = F.one_hot(axes, 3).T.to(columns)
        if axes[0] == axes[1] or not torch.allclose(columns, unit, rtol=0, atol=1e-6):
            return None
        pairs.append((int(axes[0]), int(axes[1])))
    return tuple(pairs)


def project_onto_planes(planes: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """Return the (width, height) coordinates of points on every plane.

    They are the first two components of coordinates @ inverse(plane).

    Args:
        planes: [K, 3, 3].
        coordinates: [N, P, 3].
    Returns: [N*K, P, 2], with the plane index running fastest.
    """
    n, p, _ = coordinates.shape
    inverse = torch.linalg.inv(planes.to(coordinates))  # [K, 3, 3]
    projected = coordinates.unsqueeze(1) @ inverse.unsqueeze(0)  # [N, K, P, 3]
    return projected[..., :2].reshape(n * planes.shape[0], p, 2)


def sample_planes_channels_first(
    plane_axes: torch.Tensor, plane_features: torch.Tensor, coordinates: torch.Tensor, box_warp: float
) -> torch.Tensor:
    """Read plane features at points bilinearly, with zeros outside the box, each plane separately.

    Args:
        plane_axes: [K, 3, 3].
        plane_features: [N, K, C, H, W].
        coordinates: [N, P, 3], world units.
        box_warp: side of the box, world units.
    Returns: [N, K, C, P]. Differentiable in plane_features and coordinates.
    """
    n, k, c, h, w = plane_features.shape
    grid = project_onto_planes(plane_axes, (2 / box_warp) * coordinates).unsqueeze(1)  # [N*K, 1, P, 2]
    features = F.grid_sample(
        plane_features.reshape(n * k, c, h, w),
        grid.to(plane_features),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return features.reshape(n, k, c, -1)


def merge_planes(planes: torch.Tensor, pairs: Pairs) -> MergedPlanes:
    """Add up planes that read the same pair of coordinates, and put channels last.

    Several look-ups into the same planes can share the result.

    Args:
        planes: [N, K, C, H, W].
        pairs: see `projection_axes`. A plane that reads a pair in the other order is transposed, if H == W.
    Differentiable in planes, to any order.
    """
    square = planes.shape[3] == planes.shape[4]
    sums: dict[tuple[int, int], torch.Tensor] = {}
    # One at a time, with channels last, [N, H, W, C].
    for (width, height), plane in zip(pairs, planes.permute(0, 3, 4, 1, 2).unbind(3), strict=True):
        if square and (height, width) in sums:
            width, height, plane = height, width, plane.transpose(1, 2)
        sums[width, height] = sums[width, height] + plane if (width, height) in sums else plane
    return MergedPlanes(torch.stack(list(sums.values()), dim=1).contiguous(), tuple(sums), len(pairs))


def triplane_decode(
    planes: torch.Tensor,
    plane_axes: torch.Tensor | Pairs,
    points: torch.Tensor,
    box_warp: float,
    weights: DecoderWeights,
    impl: str = "auto",
    merged: MergedPlanes | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute colour features and raw density at points.

    Args:
        planes: [N, K, C, H, W].
        plane_axes: [K, 3, 3], or the result of `projection_axes` (which torch.compile needs).
        points: [N, P, 3], world units.
        box_warp: side of the cube that the planes span, world units.
        weights: weights of the decoder, in the dtype of the planes. With D = 0 no colours are computed.
        impl: see `torch_utils.ops.implementations`. The compiled op takes axis-aligned planes in float32 or
            float64, and points that need no gradient.
        merged: result of `merge_planes` for the same planes, if several calls share it.
    Returns: features [N, P, D] in (-0.001, 1.001), sigma_raw [N, P, 1].
    Differentiable in planes and weights, twice; in points once (through plain torch).
    Raises: ValueError for an unknown `impl`.
    """
    weights = DecoderWeights(*weights)
    assert (
        planes.ndim == 5
        and points.shape[2:] == (3,)
        and len(points) == len(planes)
        and planes.shape[2] == weights.w0.shape[1]
    )
    assert (
        weights.b0.shape == weights.w0.shape[:1] == weights.w1.shape[1:]
        and weights.b1.shape == weights.w1.shape[:1]
    )
    # Pairs may come from the caller, from `merged`, or from the
    # axes, in this order: the last one waits for a GPU.
    pairs = plane_axes if not isinstance(plane_axes, torch.Tensor) else None
    if pairs is None and merged is None:
        assert isinstance(plane_axes, torch.Tensor)
        pairs = projection_axes(plane_axes)
    aligned = merged is not None or pairs is not None
    # The compiled op has no gradient for points.
    fixed = not (points.requires_grad and torch.is_grad_enabled())
    applies = (
        aligned
        and fixed
        and alike(points, planes, *weights)
        and (planes.device.type != "cuda" or _fits_cuda(planes, weights))
    )
    chosen = choose("triplane_decode", impl, "triplane_decode", planes.device.type, applies)
    if chosen == "ref" or not aligned:
        if not isinstance(plane_axes, torch.Tensor):
            # Make a basis whose `projection_axes` are these pairs; 3 - width - height is the remaining axis.
            order = torch.tensor(
                [(width, height, 3 - width - height) for width, height in plane_axes], device=points.device
            )
            plane_axes = torch.eye(3, dtype=points.dtype, device=points.device)[order]
        return triplane_decode_ref(planes, plane_axes, points, box_warp, weights)
    if not merged:
        assert pairs is not None  # since planes are aligned
        merged = merge_planes(planes, pairs)
    scaled = (points * (2 / box_warp)).contiguous()  # world units -> [-1, 1] on the planes
    # The division by K turns the sum over planes into the mean, before the first layer, which is linear.
    weights = weights._replace(w0=weights.w0 / merged.planes)
    # The compiled op requires equal dtypes, see `applies`; here points are converted.
    if chosen == "torch":
        return _decode_torch(merged.sums, merged.pairs, scaled.to(planes), *weights)
    axes = [axis for pair in merged.pairs for axis in pair]
    return torch.ops.eg3d_rlhf.triplane_decode(
        merged.sums, axes, scaled, *(weight.contiguous() for weight in weights)
    )


def _fits_cuda(planes: torch.Tensor, weights: DecoderWeights) -> bool:
    """Return whether the CUDA kernels cover these sizes.

    They add up plane gradients atomically, so they do not apply if torch was asked for deterministic results.
    """
    # Without gradients nothing is added up, and results are deterministic anyway.
    if torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled():
        return False
    units, channels = weights.w0.shape
    few = (
        channels <= _CUDA_CHANNELS
        and len(weights.b1) - 1 <= _CUDA_CHANNELS
        and planes.shape[1] <= _CUDA_PLANES
    )
    # In bytes: half as many units fit in float64.
    return few and units * planes.element_size() <= _CUDA_UNITS * 4


def triplane_decode_ref(
    planes: torch.Tensor,
    plane_axes: torch.Tensor,
    points: torch.Tensor,
    box_warp: float,
    weights: DecoderWeights,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the definition, all points at once: read each plane separately and decode the mean."""
    w0, b0, w1, b1 = weights
    # [N, K, C, P] -> mean over planes [N, C, P] -> [N, P, C]
    features = sample_planes_channels_first(plane_axes, planes, points, box_warp).mean(dim=1).transpose(1, 2)
    out = F.linear(F.softplus(F.linear(features, w0, b0)), w1, b1)
    return torch.sigmoid(out[..., 1:]) * _SCALE - _SHIFT, out[..., :1]


def _decode_torch(
    sums: torch.Tensor, pairs: Pairs, points: torch.Tensor, *weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `triplane_decode` of merged planes in torch.

    Args:
        sums: [N, K', H, W, C].
        pairs: coordinates of the planes.
        points: [N, P, 3] in plane units.
        weights: of the decoder; w0 contains the mean over planes.
    """
    # Chunks bound the memory on a CPU. With gradients, all of
    # them would be kept for the backward pass anyway.
    if points.device.type != "cpu" or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (sums, points, *weights))
    ):
        return _decode_torch_chunk(sums, pairs, points, *weights)
    parts = [_decode_torch_chunk(sums, pairs, part, *weights) for part in points.split(_POINT_CHUNK, dim=1)]
    features, sigma = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return features, sigma


def _decode_torch_chunk(sums, pairs, points, w0, b0, w1, b1) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `_decode_torch` for all points at once."""
    # torch's own grid_sample has a gradient for points; ours has a second one for planes instead.
    twice = not points.requires_grad
    sampled: Any = None
    for k, pair in enumerate(pairs):
        plane = sums[:, k].permute(0, 3, 1, 2)  # [N, C, H, W], channels last in memory
        grid = points[:, None, :, list(pair)]  # [N, 1, P, 2]
        part = (
            grid_sample_gradfix.grid_sample(plane, grid)
            if twice
            else F.grid_sample(plane, grid, align_corners=False)
        )
        # The mean over planes is in w0, so the features are added up.
        sampled = part if sampled is None else sampled + part
    out = F.linear(F.softplus(F.linear(sampled.squeeze(2).transpose(1, 2), w0, b0)), w1, b1)
    return torch.sigmoid(out[..., 1:]) * _SCALE - _SHIFT, out[..., :1]


def _save(ctx, inputs, output) -> None:
    planes, axes, *rest = inputs
    ctx.save_for_backward(planes, *rest)
    ctx.axes = axes


def _gradients(ctx, grad_features, grad_sigma):
    """Return the gradients for planes and weights."""
    planes, points, *weights = ctx.saved_tensors
    # Gradients are enabled here only if this gradient is to be differentiated again; torch then computes it.
    if torch.is_grad_enabled():
        pairs = tuple(zip(ctx.axes[::2], ctx.axes[1::2], strict=True))
        # Points are detached: the op has no gradient for them, in this derivative either.
        inputs = [t for t in (planes, *weights) if t.requires_grad]
        outputs = _decode_torch_chunk(planes, pairs, points.detach(), *weights)
        grads_in_order = iter(
            torch.autograd.grad(
                outputs, inputs, (grad_features, grad_sigma), create_graph=True, allow_unused=True
            )
        )
        grad_planes, *grad_weights = (
            next(grads_in_order) if t.requires_grad else None for t in (planes, *weights)
        )
    else:
        grads = (grad_features.contiguous(), grad_sigma.contiguous())
        grad_planes, *grad_weights = torch.ops.eg3d_rlhf.triplane_decode_backward(
            *grads, planes, ctx.axes, points, *weights
        )
    return grad_planes, None, None, *grad_weights


_WEIGHTS = "Tensor w0, Tensor b0, Tensor w1, Tensor b1"
define(
    f"triplane_decode(Tensor planes, int[] axes, Tensor points, {_WEIGHTS}) -> (Tensor, Tensor)",
    lambda planes, axes, points, w0, b0, w1, b1: tuple(
        points.new_empty(*points.shape[:2], n) for n in (w1.shape[0] - 1, 1)
    ),
    _gradients,
    _save,
)
define(
    "triplane_decode_backward(Tensor grad_features, Tensor grad_sigma, Tensor planes, int[] axes, Tensor"
    f" points, {_WEIGHTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad_features, grad_sigma, planes, axes, points, *weights: tuple(
        torch.empty_like(t) for t in (planes, *weights)
    ),
)
