"""Raw density of feature planes on a grid of world points, and the self-normalised slab that a reward reads.

Two implementations of one function: `separable` (2-D maps, see separable.py) and `pointwise` (every point on its own: the oracle, and the
only way for planes that are not axis-aligned and for a skewed lattice).

Letters: N batch, L layers of ws, K planes, C channels, J hidden units, D, H, W = grid points along z, y, x, P = points.
"""

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from eg3d_rlhf.core.separable import pair_maps
from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.core.spec import SlabSpec
from torch_utils.ops import implementations
from torch_utils.ops.slab_density import slab_density
from torch_utils.ops.triplane_decode import DecoderWeights as BothLayers
from torch_utils.ops.triplane_decode import MergedPlanes, projection_axes, triplane_decode

_IMPLS = ("auto", "separable", "pointwise")
_POINT_CHUNK = 1 << 17  # points decoded at once where no gradient is asked for


class DecoderWeights(NamedTuple):
    """Effective weights of the density row of the decoder: w_sigma @ softplus(w0 @ features + b0) + b_sigma."""

    w0: torch.Tensor  # [J, C]
    b0: torch.Tensor  # [J]
    w_sigma: torch.Tensor  # [J]
    b_sigma: torch.Tensor  # []


def sigma_from_planes(
    planes: torch.Tensor, plane_axes: torch.Tensor, weights: DecoderWeights, spec: SlabSpec, box_warp: float = 1.0, impl: str = "auto"
) -> torch.Tensor:
    """Raw density at the points of `spec` from planes that are already there.

    Features are bilinear samples (zeros outside, align_corners=False) of the K planes at world * 2/box_warp, averaged over the planes
    (eg3d.md, section 4).

    Args: planes [N, K, C, rows, columns]; plane_axes [K, 3, 3]; box_warp: side of the cube that the planes span, world units.
    Returns: sigma_raw [N, D, H, W].
    Differentiable in planes and weights.
    Raises: ValueError, for an unknown impl, or 'separable' with planes that are not axis-aligned or a skewed lattice.
    """
    if impl not in _IMPLS:
        raise ValueError(f"density_grid: expected impl in {_IMPLS}, got {impl!r}. Use 'auto'.")
    check_shape("sigma_from_planes(plane_axes)", plane_axes, ("K", 3, 3), "Pass G.renderer.plane_axes.")
    check_shape("sigma_from_planes(planes)", planes, ("N", plane_axes.shape[0], "C", "H", "W"), "Pass the output of G.planes.")
    if planes.dtype not in (torch.float32, torch.float64):
        planes = planes.float()
    weights = DecoderWeights(*(weight.to(planes.dtype) for weight in weights))
    straight = spec.lattice == "straight"
    if impl == "separable" and not straight:
        raise ValueError(f"density_grid: expected a straight lattice for impl='separable', got {spec.lattice!r}. Use impl='auto'.")
    pairs = projection_axes(plane_axes) if straight and impl != "pointwise" else None
    if pairs is not None:
        axes = [axis.to(planes.dtype) * (2 / box_warp) for axis in spec.axes()]
        depth, height, width = spec.shape
        maps = pair_maps(planes, pairs, axes, weights.w0, weights.b0)
        last = (weights.w_sigma, weights.b_sigma)
        if all(m.shape[1] == width for m in maps):  # every map has an x axis: the samples lie one behind the other along x
            sigma = slab_density([m.flatten(0, 1) for m in maps], *last, (len(planes) * width, height, depth))
            return sigma.unflatten(0, (len(planes), width)).permute(0, 3, 2, 1).contiguous()
        volumes = [slab_density([m[n] for m in maps], *last, (width, height, depth)).permute(2, 1, 0) for n in range(len(planes))]
        return torch.stack(volumes)  # [N, D, H, W], contiguous
    if impl == "separable":
        raise ValueError(
            f"density_grid: expected axis-aligned planes for impl='separable', got plane_axes {plane_axes.tolist()}. Use impl='auto'."
        )
    if impl == "auto" and straight:
        _warn_not_separable()
    points = spec.points().to(planes)  # [D, H, W, 3], components x, y, z
    way = "ref" if impl == "pointwise" else "auto"
    return sigma_at(planes, plane_axes, weights, points.reshape(-1, 3), box_warp, way).unflatten(1, spec.shape)


@cache
def _warn_not_separable() -> None:
    """Once per process."""
    warnings.warn("density_grid: the planes are not axis-aligned, so every point is decoded on its own (slower).", stacklevel=4)


def sigma_at(
    planes: torch.Tensor, plane_axes: torch.Tensor, weights: DecoderWeights, points: torch.Tensor, box_warp: float = 1.0,
    impl: str = "auto", merged: MergedPlanes | None = None,
) -> torch.Tensor:
    """Raw density at arbitrary points.

    Args: planes [N, K, C, rows, columns]; plane_axes [K, 3, 3]; points [P, 3] world coordinates; impl and merged: see
    `torch_utils.ops.triplane_decode`, which does the work where the planes are axis-aligned.
    Returns: sigma_raw [N, P].
    Differentiable in planes, weights and points.
    """
    ref = implementations.current(impl, "sigma_at") == "ref"
    pairs = None if ref else projection_axes(plane_axes) if merged is None else merged.pairs
    if pairs is None:
        inputs = (planes, points, *weights)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _decode_points(planes, plane_axes, weights, points, box_warp)
        return torch.cat([_decode_points(planes, plane_axes, weights, part, box_warp) for part in points.split(_POINT_CHUNK)], dim=1)
    both = BothLayers(weights.w0, weights.b0, weights.w_sigma[None], weights.b_sigma[None])
    points = points.expand(len(planes), -1, -1)
    return triplane_decode(planes, pairs if merged is None else plane_axes, points, box_warp, both, impl, merged)[1].squeeze(2)


def plane_features(planes: torch.Tensor, plane_axes: torch.Tensor, points: torch.Tensor, box_warp: float) -> torch.Tensor:
    """Features [N, C, P] at points [P, 3]: bilinear samples of every plane, averaged over the planes."""
    inverse = torch.linalg.inv(plane_axes).to(points)
    grid = (points * (2 / box_warp) @ inverse)[..., :2]  # [K, P, 2], (width, height)
    grid = grid[None, :, None].expand(planes.shape[0], -1, -1, -1, -1)  # [N, K, 1, P, 2]
    sampled = F.grid_sample(planes.flatten(0, 1), grid.flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.squeeze(2).unflatten(0, planes.shape[:2]).mean(dim=1)  # [N, C, P]


def _decode_points(
    planes: torch.Tensor, plane_axes: torch.Tensor, weights: DecoderWeights, points: torch.Tensor, box_warp: float
) -> torch.Tensor:
    """[N, P], all points at once: the slow, obvious form of everything in this file."""
    features = plane_features(planes, plane_axes, points, box_warp).transpose(1, 2)  # [N, P, C]
    return F.softplus(F.linear(features, weights.w0, weights.b0)) @ weights.w_sigma + weights.b_sigma


def normalise_slab(sigma: torch.Tensor, value_max: float = 100.0) -> torch.Tensor:
    """Each sample on its own scale: (sigma - min) / (max - min) * value_max, so that it spans [0, value_max].

    Args: sigma [N, ...] with at least one further axis; value_max > 0.
    Returns: the same shape. A constant sample gives zeros with zero gradient.
    Differentiable in sigma, the minimum and maximum included; tied extremes share the gradient evenly.
    Raises: ValueError for a tensor without a batch axis, or an empty sample.
    Deviates: the authors' division is unguarded and gives NaN for a constant slab.
    """
    if sigma.ndim < 2 or sigma[:1].numel() == 0:
        raise ValueError(f"normalise_slab: expected non-empty samples [N, D, H, W], got {list(sigma.shape)}. Add the batch axis.")
    dims = tuple(range(1, sigma.ndim))
    low, high = sigma.amin(dim=dims, keepdim=True), sigma.amax(dim=dims, keepdim=True)
    span = high - low
    constant = span == 0
    scaled = (sigma - low) / torch.where(constant, torch.ones_like(span), span) * value_max
    return torch.where(constant, torch.zeros_like(scaled), scaled)
