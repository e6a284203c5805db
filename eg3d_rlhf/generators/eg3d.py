"""The EG3D family: tri-planes, a small decoder, volume rendering and super-resolution (Chan et al. 2022).

Outside of training/, only this module accesses the planes, decoder and renderer of a network. Computations on
planes are in eg3d_rlhf/geometry/slab.py.

Shapes: N is the number of samples, K of planes, C of channels, L of style vectors of a sample, W is w_dim, P
is the number of points, and X, Y and Z are numbers of grid points along x, y and z.
"""

import functools
import warnings
from typing import Any

import torch

from eg3d_rlhf.core.field import DEFAULT_OPTIONS, LEVEL, Bounds, CameraFamily, Rendering, RenderOptions
from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import SURFACE_LEVEL, Family, register
from eg3d_rlhf.geometry.plane_maps import grid_maps
from eg3d_rlhf.geometry.slab import DecoderWeights, SeparableDensity, sigma_at, sigma_from_planes
from torch_utils.ops import implementations
from torch_utils.ops.triplane_decode import (
    Blend,
    MergedPlanes,
    merge_planes,
    projection_axes,
    triplane_decode,
)
from training.discriminator import DualDiscriminator
from training.triplane import TriPlaneGenerator

# Number of points whose colours are decoded in one call: 25 MB of plane features with 32 channels.
_POINT_CHUNK = 1 << 16
_POINTS_OF_EG3D = 10**7  # number of points that EG3D's gen_samples.py decodes in one call


class PlaneField:
    """N shapes of an EG3D network, as a `Field`. Differentiable in ws and the network's weights.

    The constructor synthesises the planes once.

    Args:
        G: the network, or any object with the same attributes planes, decoder, renderer and rendering_kwargs.
        ws: style vectors [N, L, W].
        noise_mode: noise of the synthesis network, 'const', 'random' or 'none', as in StyleGAN.
    """

    def __init__(self, G: Any, ws: torch.Tensor, noise_mode: str = "const"):
        check_shape("field(ws)", ws, ("N", "L", "C"), "Pass ws as the method `mapping` returns them.")
        self._G = G
        self.ws = ws
        self._noise_mode = noise_mode
        self.bounds = bounds_of(G)
        self.level = level_of(G)
        self.planes = G.planes(ws, noise_mode=noise_mode)  # [N, K, C, rows, columns]

    def __len__(self) -> int:
        return len(self.ws)

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density [N, P], see `Field`. Differentiable in the points, too."""
        # The reference implementation ("ref") follows EG3D's code step by step.
        if points.ndim == 3 and implementations.current() == "ref":
            return self._decoded(points.to(self.planes), sigma_only=True)["sigma"].squeeze(2)
        # Interpolation in float16 would lose the precision of the density.
        wide_planes = self._wide(self.planes)
        # Merged planes are a copy in another memory layout. They are not used if gradients are recorded.
        merged_planes = (
            None if implementations.current() == "ref" or torch.is_grad_enabled() else self._merged
        )
        return sigma_at(
            wide_planes,
            self._axes,
            self._weights(wide_planes.dtype),
            points.to(wide_planes),
            self.bounds.side,
            merged=merged_planes,
            blend=self._blend,
        )

    def density_grid(self, grid: SlabSpec, impl: str = "auto") -> torch.Tensor:
        """Return the raw density [N, D, H, W] at grid points, see `Field`.

        Args:
            grid: specification of the grid.
            impl: 'separable' (each plane is interpolated on its own axes), 'pointwise' (each point is decoded
                by itself), or 'auto' (separable if the planes are axis-aligned and the lattice of the grid is
                straight, see `SlabSpec`).
        Raises: ValueError for 'separable' with planes that are not axis-aligned or with a skewed lattice.
        """
        if impl == "auto" and implementations.current() == "ref":
            points = grid.points().to(self.ws).reshape(1, -1, 3).expand(len(self), -1, -1)  # [N, P, 3]
            point_chunks = points.split(_POINTS_OF_EG3D, dim=1)
            # The density is a view into the decoder's full output. `contiguous` copies it, so that the full
            # output can be freed.
            densities = [
                self._decoded(point_chunk, sigma_only=True)["sigma"].contiguous()
                for point_chunk in point_chunks
            ]
            return torch.cat(densities, dim=1).reshape(len(self), *grid.shape)
        decoder_weights = DecoderWeights(*self._G.decoder.sigma_weights())
        return sigma_from_planes(
            self.planes, self._axes, decoder_weights, grid, self.bounds.side, impl, self._blend
        )

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Return the colour [N, P, 3] in 0..1, see `Field`.

        The colour is the first three outputs of the decoder, before super-resolution.
        """
        colours = [
            # EG3D's sigmoid exceeds 0..1 slightly.
            self._colours(point_chunk.to(self.planes).expand(len(self), -1, -1)).clamp(0, 1)
            for point_chunk in points.split(_POINT_CHUNK, dim=-2)  # axis P of [P, 3] or [N, P, 3]
        ]
        return torch.cat(colours, dim=1) if colours else self.planes.new_zeros(len(self), 0, 3)

    def _colours(self, points: torch.Tensor) -> torch.Tensor:
        """Decode colours [N, P, 3] at world points [N, P, 3].

        If possible, only the density and the three colours are computed, not the other features.
        """
        if (
            implementations.current() == "ref"
            or self._merged is None
            or not hasattr(self._G.decoder, "weights")
        ):
            return self._decoded(points)["rgb"][..., :3]
        wide_planes = self._wide(self.planes)
        decoder_weights = self._G.decoder.weights(wide_planes.dtype)
        # The first four rows of the output layer are density, red, green and blue.
        rgb_weights = decoder_weights._replace(w1=decoder_weights.w1[:4], b1=decoder_weights.b1[:4])
        colours, _ = triplane_decode(
            wide_planes,
            self._axes,
            points,
            self.bounds.side,
            rgb_weights,
            merged=self._merged,
            blend=self._blend,
        )
        return colours

    def _decoded(self, points: torch.Tensor, sigma_only: bool = False) -> dict[str, torch.Tensor]:
        """Apply the full decoder at world points [N, P, 3], as EG3D's code does.

        Returns: a dict with the raw density 'sigma' [N, P, 1] and, unless sigma_only, the features 'rgb'
            [N, P, F], of which the first three are the colour.
        """
        # Noise on the density is a regulariser of training, so it is turned off here.
        rendering_options = {**self._G.rendering_kwargs, "density_noise": 0}
        return self._G.renderer.run_model(
            self.planes, self._G.decoder, points, None, rendering_options, sigma_only=sigma_only
        )

    def render(self, cameras: torch.Tensor, options: RenderOptions = DEFAULT_OPTIONS) -> Rendering:
        """Render the shapes from cameras, see `Field`."""
        rendering_options = self._G.rendering_kwargs
        # Numbers of samples per ray in the coarse pass and in the importance pass.
        for option_name in ("depth_resolution", "depth_resolution_importance"):
            sample_count = (
                options.samples
                if options.samples is not None
                else round(rendering_options[option_name] * options.sample_mult)
            )
            rendering_options = {**rendering_options, option_name: sample_count}
        # The attribute is read at each call, because the schedule of training changes it.
        resolution = options.resolution or self._G.neural_rendering_resolution
        cameras = cameras.to(self.ws.device).expand(len(self), -1)
        render_by_name = self._G.render(
            self.planes, self.ws, cameras, resolution, rendering_options, noise_mode=self._noise_mode
        )
        return Rendering(
            render_by_name["image"],
            render_by_name["image_raw"],
            render_by_name["image_depth"],
            render_by_name["image_opacity"],
        )

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> SeparableDensity | None:
        """Return the density on a grid as a sum over planes before the nonlinearity, see `SeparableField`.

        The field must have exactly one shape (N = 1).

        Args: x, y, z: world coordinates [X], [Y] and [Z] of the grid.
        Returns: the sum over planes, or None if the planes are not axis-aligned. In that case the caller
            evaluates the points one by one.
        """
        assert len(self) == 1
        if self._pairs is None:
            return None
        wide_planes = self._wide(self.planes)
        world_coordinates = [axis.to(wide_planes.dtype) for axis in (x, y, z)]
        # The weights of the decoder's density output alone.
        decoder_weights = self._weights(wide_planes.dtype)
        plane_maps = grid_maps(
            wide_planes,
            self._pairs,
            world_coordinates,
            decoder_weights.w0,
            decoder_weights.b0,
            self.bounds.side,
            self._blend,
        )
        return SeparableDensity(
            plane_maps.sample(0),
            decoder_weights.w_sigma,
            decoder_weights.b_sigma,
            (len(x), len(y), len(z)),
        )

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the raw density [N, P] and the colour [N, P, 3] in 0..1 at points, from one decoder pass.

        Differentiable in ws, the network's weights and the points. The network must have EG3D's decoder.

        Args: points: world points [N, P, 3].
        """
        wide_planes = self._wide(self.planes)
        decoder_weights = self._G.decoder.weights(wide_planes.dtype)
        # The first four rows of the output layer are density, red, green and blue.
        rgb_weights = decoder_weights._replace(w1=decoder_weights.w1[:4], b1=decoder_weights.b1[:4])
        colour, raw_density = triplane_decode(
            wide_planes, self._axes, points.to(wide_planes), self.bounds.side, rgb_weights, blend=self._blend
        )
        return raw_density.squeeze(2), colour.clamp(0, 1)

    @staticmethod
    def _wide(planes: torch.Tensor) -> torch.Tensor:
        """Convert planes of lower precision to float32. Networks may synthesise planes in float16."""
        return planes if planes.dtype in (torch.float32, torch.float64) else planes.float()

    @property
    def _axes(self) -> torch.Tensor:
        """Return the bases of the planes [K, 3, 3]."""
        return self._G.renderer.plane_axes

    @property
    def _blend(self) -> Blend | None:
        """Return the z coordinates between the slices of the xy plane, or None if it has no slices."""
        return self._G.renderer.blend

    def _weights(self, dtype: torch.dtype) -> DecoderWeights:
        """Return the decoder weights that the density depends on, converted to a dtype."""
        return DecoderWeights(*(weight.to(dtype) for weight in self._G.decoder.sigma_weights()))

    @functools.cached_property
    def _pairs(self) -> tuple[tuple[int, int], ...] | None:
        """Return the pair of world axes (0, 1 or 2) that each plane spans.

        If the planes are not axis-aligned, the result is None, and a warning is issued.
        """
        axis_pairs = projection_axes(self._axes)
        if axis_pairs is None:
            warnings.warn(
                "field: the planes are not axis-aligned, so each point is decoded by itself, which is"
                " slower.",
                # The warning names the caller of the method that reads this property.
                stacklevel=3,
            )
        return axis_pairs

    @functools.cached_property
    def _merged(self) -> MergedPlanes | None:
        """Return the planes in the memory layout of `triplane_decode`; None if they are not axis-aligned."""
        return None if self._pairs is None else merge_planes(self._wide(self.planes), self._pairs)


class EG3D:
    """A `Generator` around a network of EG3D."""

    architecture = "eg3d"
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
    def level(self) -> float:
        """Return the raw density at the surface: the network's own if `set_level` has set it, else LEVEL."""
        return level_of(self.module)

    @property
    def cameras(self) -> CameraFamily:
        """Return a camera family with the average radius, pivot and depth range of the training cameras.

        A value that is missing in the network's rendering_kwargs has the default of `CameraFamily`.
        """
        rendering_options = self.module.rendering_kwargs
        pivot_x, pivot_y, pivot_z = (
            float(coordinate) for coordinate in rendering_options.get("avg_camera_pivot", (0.0, 0.0, 0.0))
        )
        ray_start, ray_end = (
            rendering_options.get(option_name, "auto") for option_name in ("ray_start", "ray_end")
        )
        # The two options are depths along the ray, or 'auto' for the depths where the ray crosses the bounds.
        depth_range = None if "auto" in (ray_start, ray_end) else (float(ray_start), float(ray_end))
        return CameraFamily(
            rendering_options.get("avg_camera_radius", CameraFamily.radius),
            (pivot_x, pivot_y, pivot_z),
            span=depth_range,
        )

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
        """Map latents to style vectors ws, see `Generator`."""
        return self.module.mapping(z, c, truncation_psi=truncation_psi, truncation_cutoff=truncation_cutoff)

    def field(self, ws: torch.Tensor, noise_mode: str = "const") -> PlaneField:
        """Synthesise shapes, see `Generator`."""
        return self.field_class(self.module, ws, noise_mode)


def bounds_of(G: Any) -> Bounds:
    """Return the cube that a network's planes cover, centred at the origin."""
    return Bounds(float(G.rendering_kwargs["box_warp"]))


def level_of(G: Any) -> float:
    """Return the raw density at the surface of a network's shapes."""
    return float(G.rendering_kwargs.get(SURFACE_LEVEL, LEVEL))


register(Family("eg3d", TriPlaneGenerator, DualDiscriminator, EG3D))
