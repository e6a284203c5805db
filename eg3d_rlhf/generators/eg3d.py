"""EG3D's family: tri-planes, a small decoder, volume rendering and super-resolution (Chan et al. 2022).

Outside training/ this file alone asks a network for its planes, decoder and renderer; arithmetic on planes is
in eg3d_rlhf/sigma.

Letters: N samples, K planes, C channels, L layers of ws, W w_dim, P points, X, Y, Z = grid points along x, y,
z.
"""

import functools
import warnings
from typing import Any

import torch

from eg3d_rlhf.core.field import LEVEL, OWN, Bounds, CameraFamily, Rendering, RenderOptions
from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Family, register
from eg3d_rlhf.geometry.slab import DecoderWeights, SeparableDensity, pair_maps, sigma_at, sigma_from_planes
from torch_utils.ops import implementations
from torch_utils.ops.triplane_decode import MergedPlanes, merge_planes, projection_axes, triplane_decode
from training.discriminator import DualDiscriminator
from training.triplane import TriPlaneGenerator

_POINT_CHUNK = 1 << 16  # points coloured at once: 25 MB of plane features at 32 channels
_POINTS_OF_EG3D = 10**7  # points that EG3D decodes at once


class PlaneField:
    """The fields of ws [N, L, W], from one synthesis. Differentiable in ws and the network's weights.

    Args: G: the network, or anything with its planes, decoder, renderer and rendering_kwargs; noise_mode: of
        the synthesis.
    """

    level = LEVEL

    def __init__(self, G: Any, ws: torch.Tensor, noise_mode: str = "const"):
        check_shape("field(ws)", ws, ("N", "L", "C"), "Pass the output of mapping.")
        self._G = G
        self.ws = ws
        self._noise_mode = noise_mode
        self.bounds = bounds_of(G)
        self.planes = G.planes(ws, noise_mode=noise_mode)  # [N, K, C, rows, columns]

    def __len__(self) -> int:
        return len(self.ws)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`. Differentiable in the points, too."""
        if points.ndim == 3 and implementations.current() == "ref":
            return self._decoded(points.to(self.planes), sigma_only=True)["sigma"].squeeze(2)
        planes = self._wide(self.planes)
        merged = None if implementations.current() == "ref" or torch.is_grad_enabled() else self._merged
        return sigma_at(
            planes,
            self._axes,
            self._weights(planes.dtype),
            points.to(planes),
            self.bounds.side,
            merged=merged,
        )

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """See `Field`.

        Args: impl: 'separable', 'pointwise', or 'auto' (separable where the planes are axis-aligned and the
            lattice is straight).
        Raises: ValueError for an unknown impl, or 'separable' with planes that are not axis-aligned or a
            skewed lattice.
        """
        if impl == "auto" and implementations.current() == "ref":
            points = grid.points().to(self.ws).reshape(1, -1, 3).expand(len(self), -1, -1)  # [N, P, 3]
            split = points.split(_POINTS_OF_EG3D, dim=1)
            # a view would keep all outputs
            parts = [self._decoded(part, sigma_only=True)["sigma"].contiguous() for part in split]
            return torch.cat(parts, dim=1).reshape(len(self), *grid.shape)
        weights = DecoderWeights(*self._G.decoder.sigma_weights())
        return sigma_from_planes(self.planes, self._axes, weights, grid, self.bounds.side, impl)

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """See `Field`: the decoder's first three outputs, before super-resolution."""
        parts = [
            self._colours(chunk.to(self.planes).expand(len(self), -1, -1)).clamp(0, 1)
            for chunk in points.split(_POINT_CHUNK, dim=-2)
        ]
        return torch.cat(parts, dim=1) if parts else self.planes.new_zeros(len(self), 0, 3)

    def _colours(self, points: torch.Tensor) -> torch.Tensor:
        """Colours [N, P, 3] at world points [N, P, 3]; only what becomes an image is decoded, where that can
        be had.
        """
        if (
            implementations.current() == "ref"
            or self._merged is None
            or not hasattr(self._G.decoder, "weights")
        ):
            return self._decoded(points)["rgb"][..., :3]
        planes = self._wide(self.planes)
        weights = self._G.decoder.weights(planes.dtype)
        rgb = weights._replace(w1=weights.w1[:4], b1=weights.b1[:4])
        return triplane_decode(planes, self._axes, points, self.bounds.side, rgb, merged=self._merged)[0]

    def _decoded(self, points: torch.Tensor, sigma_only: bool = False) -> dict[str, torch.Tensor]:
        """The whole decoder at world points [N, P, 3], as EG3D's own code asks it."""
        options = {**self._G.rendering_kwargs, "density_noise": 0}
        return self._G.renderer.run_model(
            self.planes, self._G.decoder, points, None, options, sigma_only=sigma_only
        )

    def render(self, cameras: torch.Tensor, options: RenderOptions = OWN) -> Rendering:
        """See `Field`."""
        kwargs = self._G.rendering_kwargs
        for key in ("depth_resolution", "depth_resolution_importance"):
            samples = (
                options.samples if options.samples is not None else round(kwargs[key] * options.sample_mult)
            )
            kwargs = {**kwargs, key: samples}
        resolution = options.resolution or self._G.neural_rendering_resolution
        cameras = cameras.to(self.ws.device).expand(len(self), -1)
        out = self._G.render(self.planes, self.ws, cameras, resolution, kwargs, noise_mode=self._noise_mode)
        return Rendering(out["image"], out["image_raw"], out["image_depth"], out["image_opacity"])

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> SeparableDensity | None:
        """See `SeparableField`."""
        assert len(self) == 1
        if self._pairs is None:
            return None
        planes = self._wide(self.planes)
        axes = [axis.to(planes.dtype) * (2 / self.bounds.side) for axis in (x, y, z)]
        weights = self._weights(planes.dtype)
        maps = [m[0] for m in pair_maps(planes, self._pairs, axes, weights.w0, weights.b0)]
        return SeparableDensity(maps, weights.w_sigma, weights.b_sigma, (len(x), len(y), len(z)))

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw density [N, P] and colour [N, P, 3] in 0..1 at world points [N, P, 3] of their own, in one
        pass.

        Differentiable in ws, the weights of the network and the points. Only for families with EG3D's
        decoder.
        """
        planes = self._wide(self.planes)
        weights = self._G.decoder.weights(planes.dtype)
        rgb = weights._replace(w1=weights.w1[:4], b1=weights.b1[:4])
        colour, raw = triplane_decode(planes, self._axes, points.to(planes), self.bounds.side, rgb)
        return raw.squeeze(2), colour.clamp(0, 1)

    @staticmethod
    def _wide(planes: torch.Tensor) -> torch.Tensor:
        return planes if planes.dtype in (torch.float32, torch.float64) else planes.float()

    @property
    def _axes(self) -> torch.Tensor:
        return self._G.renderer.plane_axes

    def _weights(self, dtype: torch.dtype) -> DecoderWeights:
        return DecoderWeights(*(weight.to(dtype) for weight in self._G.decoder.sigma_weights()))

    @functools.cached_property
    def _pairs(self) -> tuple[tuple[int, int], ...] | None:
        """Coordinates that each plane reads; None where the planes are not axis-aligned."""
        pairs = projection_axes(self._axes)
        if pairs is None:
            warnings.warn(
                "field: the planes are not axis-aligned, so every point is decoded on its own (slower).",
                stacklevel=3,
            )
        return pairs

    @functools.cached_property
    def _merged(self) -> MergedPlanes | None:
        """The planes as `triplane_decode` reads them; None where they are not axis-aligned."""
        return None if self._pairs is None else merge_planes(self._wide(self.planes), self._pairs)


class EG3D:
    """`Generator` around EG3D's network."""

    architecture = "eg3d"
    level = LEVEL
    field_class = PlaneField

    def __init__(self, module: TriPlaneGenerator):
        self.module = module
        self.z_dim = module.z_dim
        self.w_dim = module.w_dim
        self.num_ws = module.num_ws
        self.img_resolution = module.img_resolution

    @property
    def bounds(self) -> Bounds:
        """The cube that the planes span."""
        return bounds_of(self.module)

    @property
    def cameras(self) -> CameraFamily:
        """Average radius and pivot of the training cameras, where the network knows them, and the range of
        its rays.
        """
        options = self.module.rendering_kwargs
        x, y, z = (float(value) for value in options.get("avg_camera_pivot", (0.0, 0.0, 0.0)))
        start, end = (options.get(name, "auto") for name in ("ray_start", "ray_end"))
        span = None if "auto" in (start, end) else (float(start), float(end))
        return CameraFamily(options.get("avg_camera_radius", CameraFamily.radius), (x, y, z), span=span)

    @property
    def conditioned(self) -> bool:
        """Whether the mapping reads the camera."""
        return not self.module.rendering_kwargs["c_gen_conditioning_zero"]

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """See `Generator`."""
        return self.module.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> PlaneField:
        """See `Generator`."""
        return self.field_class(self.module, ws, noise_mode)


def bounds_of(G: Any) -> Bounds:
    """The cube that a network's planes span, centred at the origin."""
    return Bounds(float(G.rendering_kwargs["box_warp"]))


register(Family("eg3d", TriPlaneGenerator, DualDiscriminator, EG3D))
