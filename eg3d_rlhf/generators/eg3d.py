"""The EG3D family: tri-planes, a small decoder, volume rendering and super-resolution (Chan et al. 2022).

Outside of training/, only this file accesses the planes, decoder and renderer of a network. Computations on
planes are in eg3d_rlhf/geometry/slab.py.

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

_POINT_CHUNK = 1 << 16  # points whose colours are decoded at once: 25 MB of plane features at 32 channels
_POINTS_OF_EG3D = 10**7  # points that EG3D's gen_samples.py decodes at once


class PlaneField:
    """Fields of ws [N, L, W], from one synthesis of the planes. Differentiable in ws and the network's
    weights.

    Args:
        G: the network, or any object with the same planes, decoder, renderer and rendering_kwargs.
        noise_mode: of the synthesis.
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
        """Return the raw density, see `Field`. Also differentiable in the points."""
        # The reference implementation follows EG3D's code step by step.
        if points.ndim == 3 and implementations.current() == "ref":
            return self._decoded(points.to(self.planes), sigma_only=True)["sigma"].squeeze(2)
        # Interpolation in float16 would lose the precision of the density.
        planes = self._wide(self.planes)
        # Merged planes are a copy without a graph, so they serve only where no gradient is needed.
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
        """Return the raw density at grid points, see `Field`.

        Args:
            impl: 'separable', 'pointwise', or 'auto' (separable if the planes are axis-aligned and the
                lattice is straight).
        Raises: ValueError for an unknown impl, or for 'separable' with planes that are not axis-aligned or
        with a skewed lattice.
        """
        if impl == "auto" and implementations.current() == "ref":
            points = grid.points().to(self.ws).reshape(1, -1, 3).expand(len(self), -1, -1)  # [N, P, 3]
            split = points.split(_POINTS_OF_EG3D, dim=1)
            # The density is a slice of the decoder's output; a view of it would keep the full output in
            # memory.
            parts = [self._decoded(part, sigma_only=True)["sigma"].contiguous() for part in split]
            return torch.cat(parts, dim=1).reshape(len(self), *grid.shape)
        weights = DecoderWeights(*self._G.decoder.sigma_weights())
        return sigma_from_planes(self.planes, self._axes, weights, grid, self.bounds.side, impl)

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Return the colour, see `Field`: the decoder's first three outputs, before super-resolution."""
        parts = [
            # EG3D's sigmoid extends slightly beyond 0..1.
            self._colours(chunk.to(self.planes).expand(len(self), -1, -1)).clamp(0, 1)
            for chunk in points.split(_POINT_CHUNK, dim=-2)  # dim -2: points are [P, 3] or [N, P, 3]
        ]
        return torch.cat(parts, dim=1) if parts else self.planes.new_zeros(len(self), 0, 3)

    def _colours(self, points: torch.Tensor) -> torch.Tensor:
        """Decode colours [N, P, 3] at world points [N, P, 3].

        The fast path computes only the outputs that the raw image shows, not all features.
        """
        if (
            implementations.current() == "ref"
            or self._merged is None
            or not hasattr(self._G.decoder, "weights")
        ):
            return self._decoded(points)["rgb"][..., :3]
        planes = self._wide(self.planes)
        weights = self._G.decoder.weights(planes.dtype)
        rgb = weights._replace(w1=weights.w1[:4], b1=weights.b1[:4])  # rows: density, red, green, blue
        return triplane_decode(planes, self._axes, points, self.bounds.side, rgb, merged=self._merged)[0]

    def _decoded(self, points: torch.Tensor, sigma_only: bool = False) -> dict[str, torch.Tensor]:
        """Apply the full decoder at world points [N, P, 3], as EG3D's code does."""
        # noise on the density is a regulariser of training only
        options = {**self._G.rendering_kwargs, "density_noise": 0}
        return self._G.renderer.run_model(
            self.planes, self._G.decoder, points, None, options, sigma_only=sigma_only
        )

    def render(self, cameras: torch.Tensor, options: RenderOptions = OWN) -> Rendering:
        """Render, see `Field`."""
        kwargs = self._G.rendering_kwargs
        # The coarse and the fine pass of EG3D's importance sampling.
        for key in ("depth_resolution", "depth_resolution_importance"):
            samples = (
                options.samples if options.samples is not None else round(kwargs[key] * options.sample_mult)
            )
            kwargs = {**kwargs, key: samples}
        # Training may change the attribute (neural rendering resolution schedule).
        resolution = options.resolution or self._G.neural_rendering_resolution
        cameras = cameras.to(self.ws.device).expand(len(self), -1)
        out = self._G.render(self.planes, self.ws, cameras, resolution, kwargs, noise_mode=self._noise_mode)
        return Rendering(out["image"], out["image_raw"], out["image_depth"], out["image_opacity"])

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> SeparableDensity | None:
        """Return the separable form, see `SeparableField`."""
        assert len(self) == 1
        # A field without separable form: the caller evaluates points.
        if self._pairs is None:
            return None
        planes = self._wide(self.planes)
        # world to plane units, -1..1 over the cube
        axes = [axis.to(planes.dtype) * (2 / self.bounds.side) for axis in (x, y, z)]
        # Only the density row of the decoder.
        weights = self._weights(planes.dtype)
        maps = [m[0] for m in pair_maps(planes, self._pairs, axes, weights.w0, weights.b0)]
        return SeparableDensity(maps, weights.w_sigma, weights.b_sigma, (len(x), len(y), len(z)))

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density [N, P] and colour [N, P, 3] in 0..1 at world points [N, P, 3], in one pass.

        Differentiable in ws, the network's weights and the points. Only for families with EG3D's decoder.
        """
        planes = self._wide(self.planes)
        weights = self._G.decoder.weights(planes.dtype)
        rgb = weights._replace(w1=weights.w1[:4], b1=weights.b1[:4])
        colour, raw = triplane_decode(planes, self._axes, points.to(planes), self.bounds.side, rgb)
        return raw.squeeze(2), colour.clamp(0, 1)

    @staticmethod
    def _wide(planes: torch.Tensor) -> torch.Tensor:
        """Return planes in float32 at least. Networks may synthesise in float16."""
        return planes if planes.dtype in (torch.float32, torch.float64) else planes.float()

    @property
    def _axes(self) -> torch.Tensor:
        """Return the bases of the planes [K, 3, 3]."""
        return self._G.renderer.plane_axes

    def _weights(self, dtype: torch.dtype) -> DecoderWeights:
        """Return the weights of the decoder's density row in a dtype."""
        return DecoderWeights(*(weight.to(dtype) for weight in self._G.decoder.sigma_weights()))

    @functools.cached_property
    def _pairs(self) -> tuple[tuple[int, int], ...] | None:
        """Return the coordinates that each plane reads; None if the planes are not axis-aligned."""
        pairs = projection_axes(self._axes)
        if pairs is None:
            warnings.warn(
                "field: the planes are not axis-aligned, so each point is decoded by itself (slower).",
                stacklevel=3,
            )
        return pairs

    @functools.cached_property
    def _merged(self) -> MergedPlanes | None:
        """Return the planes in the layout of `triplane_decode`; None if they are not axis-aligned."""
        return None if self._pairs is None else merge_planes(self._wide(self.planes), self._pairs)


class EG3D:
    """A `Generator` around EG3D's network."""

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
        """Return the cube that the planes cover."""
        return bounds_of(self.module)

    @property
    def cameras(self) -> CameraFamily:
        """Return the average radius and pivot of the training cameras, and the depth range of rays.

        Networks whose rendering_kwargs lack these values get the defaults of `CameraFamily`.
        """
        options = self.module.rendering_kwargs
        # The point that the training cameras look at; EG3D's option has three numbers.
        x, y, z = (float(value) for value in options.get("avg_camera_pivot", (0.0, 0.0, 0.0)))
        start, end = (options.get(name, "auto") for name in ("ray_start", "ray_end"))
        # 'auto': where rays cross the bounds
        # Numbers are depths along the ray; 'auto' computes them from the box.
        span = None if "auto" in (start, end) else (float(start), float(end))
        return CameraFamily(options.get("avg_camera_radius", CameraFamily.radius), (x, y, z), span=span)

    @property
    def conditioned(self) -> bool:
        """Return True if the mapping network is conditioned on the camera."""
        return not self.module.rendering_kwargs["c_gen_conditioning_zero"]

    def mapping(
        self,
        z: torch.Tensor,
        c: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """Map latents to ws, see `Generator`."""
        return self.module.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> PlaneField:
        """Synthesise fields, see `Generator`."""
        return self.field_class(self.module, ws, noise_mode)


def bounds_of(G: Any) -> Bounds:
    """Return the cube that a network's planes cover, centred at the origin."""
    return Bounds(float(G.rendering_kwargs["box_warp"]))


register(Family("eg3d", TriPlaneGenerator, DualDiscriminator, EG3D))
