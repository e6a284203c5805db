"""Raw density and colour of points by EG3D's tri-planes and decoder (Chan et al. 2022), in one op.

    f = 1/K sum_k bilinear(plane_k, (width, height) coordinates of the point on plane k)
        zeros outside, align_corners=False
    h = softplus(w0 f + b0),   out = w1 h + b1,   sigma_raw = out[0],
    features = sigmoid(out[1:]) * 1.002 - 0.001

f are the features of a point, w0, b0, w1 and b1 the weights and biases of the two layers of the decoder.
Planes that depend on the same pair of coordinates are added first. This is exact, because the interpolation
is linear. Released EG3D checkpoints project onto (x, y), (x, z) and (z, x), so the third plane is transposed
and added to the second one.

With the argument `blend` = (low, high), the first plane, which must depend on x and y, has two slices. The
first C // 2 of its channels are multiplied by f(z) and the others by 1 - f(z), where

    f(z) = clamp((z - low) / (high - low), 0, 1)

so that one half of its channels counts in front of z = high, and the other half behind z = low. All other
planes are unchanged. Without slices, the features of a face are also visible at the back of the head, since
they do not depend on z.

Shapes: N samples, K planes (K' after the addition), C channels of a plane, H x W pixels of a plane, P points,
J hidden units, D colour features (0: only the density is computed).
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from torch_utils.ops import grid_sample_gradfix
from torch_utils.ops.implementations import alike, choose, define

# World axes (width axis, height axis) of each plane, where 0 = x, 1 = y, 2 = z
Pairs = tuple[tuple[int, int], ...]
# z coordinates in world units: where the first plane's slice at the back ends and the one in front begins.
Blend = tuple[float, float]

# Number of points that the torch implementation computes at once without gradients: 4 MB with 64 hidden units
_POINT_CHUNK = 1 << 14
# As in EG3D, colours may be slightly outside 0..1.
_SCALE = 1 + 2 * 0.001
_SHIFT = 0.001

# Largest sizes that fit into the shared memory of the CUDA kernels in float32.
_CUDA_CHANNELS = 32
_CUDA_PLANES = 8
_CUDA_UNITS = 128


class MergedPlanes(NamedTuple):
    """Result of `merge_planes`: the planes, after those with the same pair of coordinates were added."""

    sums: torch.Tensor  # planes [N, K', H, W, C]
    pairs: Pairs  # world axes of the K' planes
    plane_count: int  # K, number of planes before the addition


class DecoderWeights(NamedTuple):
    """Weights of the decoder, multiplied by the gains of StyleGAN's equalised learning rate."""

    w0: torch.Tensor  # [J, C]
    b0: torch.Tensor  # [J]
    w1: torch.Tensor  # [1 + D, J], with the density's row first
    b1: torch.Tensor  # [1 + D]

    def density_only(self) -> "DecoderWeights":
        """Return the weights of the same decoder without its colours, D = 0."""
        return DecoderWeights(self.w0, self.b0, self.w1[:1], self.b1[:1])


def projection_axes(plane_axes: torch.Tensor) -> Pairs | None:
    """Return the world axes that belong to the width and the height of each plane.

    Args:
        plane_axes: bases of the planes, [K, 3, 3]. The (width, height) coordinates of a point on plane k are
            the first two components of coordinates @ inverse(plane_axes[k]).

    Returns: (width axis, height axis) of each plane, where 0 = x, 1 = y, 2 = z. None if a plane is not
        parallel to two world axes.
    """
    pairs = []
    # In float64 the inverse of a permutation matrix is exact.
    for inverse_basis in torch.linalg.inv(plane_axes.detach().double().cpu()):
        projection_columns = inverse_basis[:, :2]  # [3, 2]
        # World axis of each column, provided that the column is a unit vector.
        axes = projection_columns.argmax(dim=0)
        # The plane is parallel to two world axes if the columns are different unit vectors.
        unit_vectors = F.one_hot(axes, 3).T.to(projection_columns)
        if axes[0] == axes[1] or not torch.allclose(projection_columns, unit_vectors, rtol=0, atol=1e-6):
            return None
        pairs.append((int(axes[0]), int(axes[1])))
    return tuple(pairs)


def project_onto_planes(plane_axes: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """Compute the (width, height) coordinates of points on every plane.

    They are the first two components of coordinates @ inverse(plane).

    Args:
        plane_axes: bases of the planes, [K, 3, 3].
        coordinates: points [N, P, 3].

    Returns: coordinates [N*K, P, 2]; the index of the plane varies fastest.
    """
    n, p, _ = coordinates.shape
    inverse_bases = torch.linalg.inv(plane_axes.to(coordinates))  # [K, 3, 3]
    plane_coordinates = coordinates.unsqueeze(1) @ inverse_bases.unsqueeze(0)  # [N, K, P, 3]
    return plane_coordinates[..., :2].reshape(n * plane_axes.shape[0], p, 2)


def front_weights(z: torch.Tensor, blend: Blend) -> torch.Tensor:
    """Compute the weight f(z) in 0..1 of the slice in front, see the module. Differentiable in z.

    Args:
        z: z coordinates of any shape, in world units.
        blend: z coordinates at which the weight is 0 and 1, in world units.
    """
    low, high = blend
    return ((z - low) / (high - low)).clamp(0, 1)


def weigh_slices(first_plane: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply the two slices of the first plane by their weights.

    Args:
        first_plane: features of the first plane, [N, C, ...].
        weights: weight of the slice in front, [N, ...] or broadcast against it; see `front_weights`.

    Returns: features [N, C, ...].
    """
    front_count = first_plane.shape[1] // 2  # channels of the slice in front
    weights = weights.unsqueeze(1)  # one weight for all channels of a slice
    return torch.cat(
        [first_plane[:, :front_count] * weights, first_plane[:, front_count:] * (1 - weights)], dim=1
    )


def sample_planes_channels_first(
    plane_axes: torch.Tensor,
    plane_features: torch.Tensor,
    coordinates: torch.Tensor,
    box_warp: float,
    blend: Blend | None = None,
) -> torch.Tensor:
    """Interpolate the features of each plane at points bilinearly. Features outside the box are 0.

    Args:
        plane_axes: bases of the planes, [K, 3, 3].
        plane_features: features of the planes, [N, K, C, H, W].
        coordinates: points [N, P, 3] in world units.
        box_warp: side of the box in world units.
        blend: z coordinates between the two slices of the first plane; None: the plane has no slices.

    Returns: features [N, K, C, P]. Differentiable in plane_features and coordinates.
    """
    n, k, c, h, w = plane_features.shape
    # World units -> -1..1, the range of grid_sample.
    grid = project_onto_planes(plane_axes, (2 / box_warp) * coordinates).unsqueeze(1)  # [N*K, 1, P, 2]
    features = F.grid_sample(
        plane_features.reshape(n * k, c, h, w),
        grid.to(plane_features),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    ).reshape(n, k, c, -1)
    if blend is None:
        return features
    first_plane = weigh_slices(features[:, 0], front_weights(coordinates[..., 2], blend).to(features))
    return torch.cat([first_plane.unsqueeze(1), features[:, 1:]], dim=1)


def merge_planes(planes: torch.Tensor, pairs: Pairs) -> MergedPlanes:
    """Add planes that depend on the same pair of coordinates, and put their channels last.

    The result can be used for several sets of points. Differentiable in planes, to any order.

    Args:
        planes: planes [N, K, C, H, W].
        pairs: world axes of the planes, see `projection_axes`. If H == W, a plane whose axes have the
            opposite order of an earlier plane's axes is transposed.
    """
    is_square = planes.shape[3] == planes.shape[4]
    sum_by_axes: dict[tuple[int, int], torch.Tensor] = {}  # by (width axis, height axis)
    # One plane [N, H, W, C] after the other
    for (width, height), plane in zip(pairs, planes.permute(0, 3, 4, 1, 2).unbind(3), strict=True):
        if is_square and (height, width) in sum_by_axes:
            # A plane is [N, H, W, C] here, so this exchanges rows and columns.
            width, height, plane = height, width, plane.transpose(1, 2)
        sum_by_axes[width, height] = (
            sum_by_axes[width, height] + plane if (width, height) in sum_by_axes else plane
        )
    return MergedPlanes(
        torch.stack(list(sum_by_axes.values()), dim=1).contiguous(), tuple(sum_by_axes), len(pairs)
    )


def triplane_decode(
    planes: torch.Tensor,
    plane_axes: torch.Tensor | Pairs,
    points: torch.Tensor,
    box_warp: float,
    weights: DecoderWeights,
    impl: str = "auto",
    merged: MergedPlanes | None = None,
    blend: Blend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the colour features and the raw density at points.

    Args:
        planes: planes [N, K, C, H, W].
        plane_axes: bases of the planes [K, 3, 3], or the result of `projection_axes`, which torch.compile
            needs.
        points: points [N, P, 3] in world units.
        box_warp: side of the cube that the planes cover, in world units.
        weights: weights of the decoder, in the dtype of the planes. With D = 0 no colours are computed.
        impl: see `torch_utils.ops.implementations`. The compiled op supports planes that are parallel to two
            world axes, in float32 or float64, and points that need no gradient.
        merged: result of `merge_planes` for the same planes; None computes it.
        blend: z coordinates in world units between the two slices of the first plane, see the module; None:
            the plane has no slices. On CUDA, planes with slices are computed by plain torch.

    Returns: colour features [N, P, D] in -0.001..1.001, and sigma_raw [N, P, 1].
    Differentiable in planes and weights, twice; in points once (computed by plain torch).
    Raises: ValueError for an unknown `impl`, or for "compiled" if the compiled op cannot be used.
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
    # The world axes are taken from the argument or from `merged` if
    # possible, because computing them waits for a GPU.
    pairs = plane_axes if not isinstance(plane_axes, torch.Tensor) else None
    if pairs is None and merged is None:
        assert isinstance(plane_axes, torch.Tensor)
        pairs = projection_axes(plane_axes)
    are_aligned = merged is not None or pairs is not None
    # The compiled op has no gradient with respect to points.
    has_fixed_points = not (points.requires_grad and torch.is_grad_enabled())
    is_supported = (
        are_aligned
        and has_fixed_points
        and alike(points, planes, *weights)
        and (planes.device.type != "cuda" or (blend is None and _fits_cuda(planes, weights)))
    )
    implementation_name = choose("triplane_decode", impl, "triplane_decode", planes.device.type, is_supported)
    if implementation_name == "ref" or not are_aligned:
        if not isinstance(plane_axes, torch.Tensor):
            # Bases of which `projection_axes` returns these pairs. The axes have the sum 3, so 3 - width -
            # height is the third axis.
            basis_order = torch.tensor(
                [(width, height, 3 - width - height) for width, height in plane_axes], device=points.device
            )
            plane_axes = torch.eye(3, dtype=points.dtype, device=points.device)[basis_order]
        return triplane_decode_ref(planes, plane_axes, points, box_warp, weights, blend)
    if not merged:
        assert pairs is not None  # since planes are aligned
        merged = merge_planes(planes, pairs)
    # The compiled op and plain torch weigh the first plane after planes were added to each other. No layout
    # has a second plane of x and y.
    assert blend is None or set(merged.pairs[0]) == {0, 1}
    plane_points = (points * (2 / box_warp)).contiguous()  # world units -> [-1, 1] on the planes
    # The division by K turns the sum over planes into the mean, before the first layer, which is linear.
    weights = weights._replace(w0=weights.w0 / merged.plane_count)
    # Points are in plane units from here on, and so is the blend.
    plane_blend = None if blend is None else (blend[0] * (2 / box_warp), blend[1] * (2 / box_warp))
    if implementation_name == "torch":
        # In contrast to the compiled op, points may have another dtype than the planes.
        return _decode_torch(merged.sums, merged.pairs, plane_blend, plane_points.to(planes), *weights)
    axes = [axis for pair in merged.pairs for axis in pair]  # ops take no nested lists
    op_inputs = (merged.sums, axes, plane_points, *(weight.contiguous() for weight in weights))
    if plane_blend is None:
        return torch.ops.eg3d_rlhf.triplane_decode(*op_inputs)
    return torch.ops.eg3d_rlhf.triplane_decode_sliced(*op_inputs, *plane_blend)


def _fits_cuda(planes: torch.Tensor, weights: DecoderWeights) -> bool:
    """Return True if the CUDA kernels support these sizes.

    The kernels add the gradients of the planes atomically, in an order that varies. The result is therefore
    False if gradients are enabled and torch must be deterministic.
    """
    if torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled():
        return False
    unit_count, channel_count = weights.w0.shape
    has_few_channels = (
        channel_count <= _CUDA_CHANNELS
        and len(weights.b1) - 1 <= _CUDA_CHANNELS
        and planes.shape[1] <= _CUDA_PLANES
    )
    # The limit is _CUDA_UNITS numbers of 4 bytes, so half as many units are possible in float64.
    return has_few_channels and unit_count * planes.element_size() <= _CUDA_UNITS * 4


def triplane_decode_ref(
    planes: torch.Tensor,
    plane_axes: torch.Tensor,
    points: torch.Tensor,
    box_warp: float,
    weights: DecoderWeights,
    blend: Blend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the definition of `triplane_decode`: interpolate each plane separately, and decode the mean."""
    w0, b0, w1, b1 = weights
    # [N, K, C, P] -> mean over planes [N, C, P] -> [N, P, C]
    plane_features = sample_planes_channels_first(plane_axes, planes, points, box_warp, blend)
    features = plane_features.mean(dim=1).transpose(1, 2)
    decoder_outputs = F.linear(F.softplus(F.linear(features, w0, b0)), w1, b1)
    return torch.sigmoid(decoder_outputs[..., 1:]) * _SCALE - _SHIFT, decoder_outputs[..., :1]


def _decode_torch(
    merged_planes: torch.Tensor,
    pairs: Pairs,
    blend: Blend | None,
    points: torch.Tensor,
    *weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `triplane_decode` of merged planes in plain torch.

    Args:
        merged_planes: planes [N, K', H, W, C].
        pairs: world axes of the planes.
        blend: z coordinates between the two slices of the first plane, in plane units; None: no slices.
        points: points [N, P, 3], -1..1 on the planes.
        weights: w0, b0, w1 and b1 of the decoder; w0 is divided by the number of planes K.
    """
    # Chunks limit the memory on a CPU. With gradients they would not,
    # because all chunks are stored for the backward pass.
    if points.device.type != "cpu" or (
        torch.is_grad_enabled() and any(t.requires_grad for t in (merged_planes, points, *weights))
    ):
        return _decode_torch_chunk(merged_planes, pairs, blend, points, *weights)
    chunk_results = [
        _decode_torch_chunk(merged_planes, pairs, blend, chunk, *weights)
        for chunk in points.split(_POINT_CHUNK, dim=1)
    ]
    features, sigma = (torch.cat(chunks, dim=1) for chunks in zip(*chunk_results, strict=True))
    return features, sigma


def _decode_torch_chunk(
    merged_planes, pairs, blend, points, w0, b0, w1, b1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `_decode_torch` for all points at once. The arguments are those of `_decode_torch`."""
    # torch's grid_sample has a gradient with respect to points. grid_sample_gradfix has a second derivative
    # with respect to planes.
    use_gradfix = not points.requires_grad
    feature_sum: Any = None
    for k, pair in enumerate(pairs):
        plane = merged_planes[:, k].permute(0, 3, 1, 2)  # [N, C, H, W], channels last in memory
        grid = points[:, None, :, list(pair)]  # [N, 1, P, 2]
        plane_features = (
            grid_sample_gradfix.grid_sample(plane, grid)
            if use_gradfix
            else F.grid_sample(plane, grid, align_corners=False)
        )
        if blend is not None and k == 0:
            # [N, P] -> [N, 1, P], as the points of the grid
            plane_features = weigh_slices(plane_features, front_weights(points[..., 2], blend).unsqueeze(1))
        # w0 is divided by the number of planes, so the features are added.
        feature_sum = plane_features if feature_sum is None else feature_sum + plane_features
    decoder_outputs = F.linear(F.softplus(F.linear(feature_sum.squeeze(2).transpose(1, 2), w0, b0)), w1, b1)
    return torch.sigmoid(decoder_outputs[..., 1:]) * _SCALE - _SHIFT, decoder_outputs[..., :1]


def _save(ctx, inputs, output) -> None:
    planes, axes, *tensors_and_blend = inputs
    # The op of planes with slices has two further arguments, the numbers of the blend.
    tensors = [argument for argument in tensors_and_blend if isinstance(argument, torch.Tensor)]
    ctx.save_for_backward(planes, *tensors)
    ctx.axes = axes
    ctx.blend = tuple(tensors_and_blend[len(tensors) :]) or None


def _gradients(ctx, grad_features, grad_sigma):
    """Return the gradients of planes and weights, and None for the axes, the points and the blend."""
    planes, points, *weights = ctx.saved_tensors
    # Gradients are enabled here only if this gradient will be differentiated again. torch then computes it.
    if torch.is_grad_enabled():
        # The op stores the pairs as a flat list.
        pairs = tuple(zip(ctx.axes[::2], ctx.axes[1::2], strict=True))
        # Points are detached, because the op has no gradient with respect to them.
        inputs = [t for t in (planes, *weights) if t.requires_grad]
        decoder_outputs = _decode_torch_chunk(planes, pairs, ctx.blend, points.detach(), *weights)
        grads_in_order = iter(
            torch.autograd.grad(
                decoder_outputs, inputs, (grad_features, grad_sigma), create_graph=True, allow_unused=True
            )
        )
        grad_planes, *grad_weights = (
            next(grads_in_order) if t.requires_grad else None for t in (planes, *weights)
        )
    else:
        op_inputs = (
            grad_features.contiguous(),
            grad_sigma.contiguous(),
            planes,
            ctx.axes,
            points,
            *weights,
        )
        if ctx.blend is None:
            grads = torch.ops.eg3d_rlhf.triplane_decode_backward(*op_inputs)
        else:
            grads = torch.ops.eg3d_rlhf.triplane_decode_sliced_backward(*op_inputs, *ctx.blend)
        grad_planes, *grad_weights = grads
    return grad_planes, None, None, *grad_weights, *(() if ctx.blend is None else (None, None))


def _fake_forward(planes, axes, points, w0, b0, w1, b1, *blend):
    """Return empty results of the shapes of the op, for torch.compile."""
    # [N, P, D] and [N, P, 1]; the first row of w1 is that of the density.
    return tuple(points.new_empty(*points.shape[:2], n) for n in (w1.shape[0] - 1, 1))


def _fake_backward(grad_features, grad_sigma, planes, axes, points, *weights_and_blend):
    """Return empty gradients of the planes and the four weights, for torch.compile."""
    return tuple(torch.empty_like(t) for t in (planes, *weights_and_blend[:4]))


_WEIGHTS = "Tensor w0, Tensor b0, Tensor w1, Tensor b1"
# The op of planes with slices is a further op, because the CUDA kernels implement the first one alone.
for _name, _blend in (("triplane_decode", ""), ("triplane_decode_sliced", ", float low, float high")):
    define(
        f"{_name}(Tensor planes, int[] axes, Tensor points, {_WEIGHTS}{_blend}) -> (Tensor, Tensor)",
        _fake_forward,
        _gradients,
        _save,
    )
    define(
        f"{_name}_backward(Tensor grad_features, Tensor grad_sigma, Tensor planes, int[] axes, Tensor"
        f" points, {_WEIGHTS}{_blend}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fake_backward,
    )
