"""One sample's radiance field, evaluated block by block or at points, with a single synthesis pass.

Letters: X, Y, Z = grid points along x, y, z; P points; K planes; C channels; L, W = layers and width of ws.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eg3d_rlhf.shapes import check_shape
from eg3d_rlhf.sigma.separable import pair_maps, projection_axes, sigma_from_maps
from eg3d_rlhf.sigma.slab import DecoderWeights, sigma_at
from eg3d_rlhf.sigma.spec import SlabSpec
from torch_utils.ops import implementations
from torch_utils.ops.triplane_decode import MergedPlanes, merge_planes, triplane_decode

OUTSIDE = -1000.0  # raw density of a trimmed border, as EG3D's shape extraction sets it
_POINT_CHUNK = 1 << 16  # points coloured at once: 25 MB of plane features at 32 channels


@dataclass(frozen=True)
class SeparableDensity:
    """Raw density on a grid as maps of two coordinates each; see `eg3d_rlhf.sigma.separable`."""

    maps: list[torch.Tensor]  # [X, J, Y, 1], [X, J, 1, Z] and [1, J, Y, Z], those that occur
    w: torch.Tensor  # [J]
    b: torch.Tensor  # []
    shape: tuple[int, int, int]  # X, Y, Z

    @torch.no_grad()
    def part(self, x: slice, y: slice, z: Sequence[slice]) -> torch.Tensor:
        """Raw density [x, y, all of z] at ranges of x and y indices and at one or more ranges of z indices; at least two points each."""
        shape = (x.stop - x.start, y.stop - y.start, sum(run.stop - run.start for run in z))
        maps = []
        for m in self.maps:
            m = m[x] if m.shape[0] > 1 else m
            m = m[:, :, y] if m.shape[2] > 1 else m
            if m.shape[3] > 1:  # slices: a list of indices would be gathered value by value
                m = torch.cat([m[..., run] for run in z], dim=3) if len(z) > 1 else m[..., z[0]]
            maps.append(m)
        return sigma_from_maps(maps, self.w, self.b, shape)


class Field:
    """Density and colour of one latent.

    Args:
        G: a tri-plane generator (`training.triplane.TriPlaneGenerator`).
        ws: [1, L, W] of the sample.
        noise_mode: of the synthesis, 'const', 'random' or 'none'.
    Not differentiable.
    Raises: ValueError when ws holds another number of samples.
    """

    @torch.no_grad()
    def __init__(self, G: Any, ws: torch.Tensor, noise_mode: str = "const"):
        check_shape("Field(ws)", ws, (1, "L", "C"), "Pass the ws of one sample.")
        self._G = G
        self.box_warp = float(G.rendering_kwargs["box_warp"])
        self.planes = G.planes(ws, noise_mode=noise_mode).float()  # [1, K, C, rows, columns]
        self._weights = DecoderWeights(*(weight.to(self.planes.dtype) for weight in G.decoder.sigma_weights()))
        self._pairs = projection_axes(G.renderer.plane_axes)
        if self._pairs is None:
            warnings.warn("Field: the planes are not axis-aligned, so every point is decoded on its own (slower).", stacklevel=2)

    @torch.no_grad()
    def sigma_block(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Raw density [X, Y, Z] on the CPU at the product of world coordinates x [X], y [Y], z [Z]."""
        density = self.separable(x, y, z)
        if density is None:
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1).reshape(-1, 3)
            return self.sigma_at(points).reshape(len(x), len(y), len(z))
        return sigma_from_maps(density.maps, density.w, density.b, density.shape).cpu()

    @torch.no_grad()
    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> SeparableDensity | None:
        """The raw density at the product of world coordinates x [X], y [Y], z [Z] as maps; None where the planes have no such form."""
        if self._pairs is None:
            return None
        axes = [axis.to(self.planes.dtype) * (2 / self.box_warp) for axis in (x, y, z)]
        maps = pair_maps(self.planes[0], self._pairs, axes, self._weights.w0, self._weights.b0)
        return SeparableDensity(maps, self._weights.w_sigma, self._weights.b_sigma, (len(x), len(y), len(z)))

    @torch.no_grad()
    def sigma_at(self, points: torch.Tensor) -> torch.Tensor:
        """Raw density [P] on the CPU at world points [P, 3]."""
        axes = self._G.renderer.plane_axes
        merged = None if implementations.current() == "ref" else self._merged
        return sigma_at(self.planes, axes, self._weights, points.to(self.planes), self.box_warp, merged=merged)[0].cpu()

    @torch.no_grad()
    def rgb_at(self, points: torch.Tensor) -> torch.Tensor:
        """Colour [P, 3] in 0..1 on the CPU at world points [P, 3]: the decoder's first three outputs, before super-resolution."""
        parts = [self._colours(chunk[None].to(self.planes))[0, :, :3].clamp(0, 1).cpu() for chunk in points.split(_POINT_CHUNK)]
        return torch.cat(parts) if parts else torch.zeros(0, 3)

    def _colours(self, points: torch.Tensor) -> torch.Tensor:
        """Colour features [1, P, 3 or more] at world points [1, P, 3]; only what becomes an image is decoded, where that can be had."""
        G = self._G
        if implementations.current() == "ref" or self._merged is None or not hasattr(G.decoder, "weights"):
            options = {**G.rendering_kwargs, "density_noise": 0}
            return G.renderer.run_model(self.planes, G.decoder, points, None, options)["rgb"]
        weights = G.decoder.weights(self.planes.dtype)
        rgb = weights._replace(w1=weights.w1[:4], b1=weights.b1[:4])
        return triplane_decode(self.planes, G.renderer.plane_axes, points, self.box_warp, rgb, merged=self._merged)[0]

    @functools.cached_property
    def _merged(self) -> MergedPlanes | None:
        """The planes as `triplane_decode` reads them; None where they are not axis-aligned."""
        return None if self._pairs is None else merge_planes(self.planes, self._pairs)


class FieldGrid:
    """A field on a cube of grid points, given out in ranges of x: what `extract_mesh_blockwise` and `write_mrc` read.

    Args:
        field: the field.
        resolution: grid points per axis, >= 2, on the corners of the scene cube.
        border: share of the cube's edge that is trimmed from each face, 0 <= border < 0.5; trimmed points hold `OUTSIDE`.
    Raises: ValueError for values outside these ranges.
    """

    def __init__(self, field: Field, resolution: int, border: float = 0.0):
        if not 0 <= border < 0.5:
            raise ValueError(f"FieldGrid: expected a border of 0 <= border < 0.5, got {border:g}. Trim less.")
        self.field, self.resolution = field, resolution
        self.axes: Sequence[torch.Tensor] = SlabSpec.cube(resolution, field.box_warp).axes()
        self._trim = int(border * resolution)
        self.inside = slice(self._trim, resolution - self._trim)  # grid points along each axis that are not trimmed
        if resolution - 2 * self._trim < 2:
            raise ValueError(f"FieldGrid: expected at least 2 points inside the border, got a border of {border:g} on {resolution} points.")

    @property
    def trimmed(self) -> bool:
        """Whether points at the border hold `OUTSIDE`."""
        return self._trim > 0

    def separable(self) -> SeparableDensity | None:
        """The density of the points that are not trimmed, as maps; None where the planes have no such form."""
        return self.field.separable(*(axis[self.inside] for axis in self.axes))

    def __call__(self, x: slice) -> torch.Tensor:
        """Raw density [x, Y, Z] of the grid points with these x indices."""
        low, high = self._trim, self.resolution - self._trim
        start, stop = max(x.start, low), min(x.stop, high)
        if low == 0:
            return self.field.sigma_block(self.axes[0][x], *self.axes[1:])
        block = torch.full((x.stop - x.start, self.resolution, self.resolution), OUTSIDE)
        if start < stop:
            y, z = (axis[low:high] for axis in self.axes[1:])
            block[start - x.start : stop - x.start, low:high, low:high] = self.field.sigma_block(self.axes[0][start:stop], y, z)
        return block
