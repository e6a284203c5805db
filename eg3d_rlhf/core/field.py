"""Interface to a batch of 3D shapes: density, colour, and renders from cameras.

A `Field` is a batch of N shapes. The samples of a generator implement it, and so do the assets that score
distillation optimises. Sigma slabs (cropped density grids), meshes, rewards, labelling, metrics, attribution
and reports use this interface alone. They never call the network that produced the shapes.

World axes: x points right, y points up, z points towards the camera of a frontal portrait. Density is raw:
the decoder's output before the ray marcher applies softplus(sigma_raw - 1).

Shapes: N is the number of shapes, P of points, D, H and W of grid points along z, y and x. R is the number of
pixels per edge of the final image, r the number of rendered pixels per edge before super-resolution. A render
has M = r * r rays with S samples on each.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch.utils.checkpoint import checkpoint

from training.rendering import cameras as camera_model
from training.rendering.renderer import MipRayMarcher2

if TYPE_CHECKING:
    from eg3d_rlhf.core.spec import SlabSpec

LEVEL = 10.0  # raw density at the surface; EG3D's shape extraction (gen_samples.py) uses the same level
# Raw density of space that is certainly empty. EG3D's gen_samples.py clears the border of a grid to -1000.
EMPTY = LEVEL - 1000.0


@dataclass(frozen=True)
class Bounds:
    """Axis-aligned cube that contains the shapes of a field. The density outside this cube has no meaning.

    Raises: ValueError if a value is outside the range that the comment on its field states.
    """

    side: float = 1.0  # edge length, world units, > 0
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # x, y, z in world units
    # Thickness of the empty layer at each face, as a fraction of the edge, in [0, 0.5). EG3D's shape
    # extraction clears 30 of 256 grid points at each face.
    border: float = 30 / 256

    def __post_init__(self) -> None:
        if not (math.isfinite(self.side) and self.side > 0):
            raise ValueError(
                f"Bounds: expected a finite side > 0, got {self.side}. Pass the edge of the cube."
            )
        if not 0 <= self.border < 0.5:
            raise ValueError(
                f"Bounds: expected 0 <= border < 0.5, got {self.border}. Pass 0 for shapes that fill the"
                " cube."
            )
        if len(self.centre) != 3 or not all(map(math.isfinite, self.centre)):
            raise ValueError(
                f"Bounds: expected three finite coordinates of the centre, got {self.centre}. Pass (x, y, z)"
                " in world units."
            )


@dataclass(frozen=True)
class CameraFamily:
    """Cameras of a generator, which lie on a sphere about the world's origin and look at one point."""

    radius: float = camera_model.FFHQ_RADIUS  # distance from the origin, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the point that all cameras look at, world units
    focal: float = camera_model.FFHQ_FOCAL  # focal length divided by the image size (pixels)
    # (nearest, farthest) depth of the samples on a ray, world units. None: the depths at which the ray enters
    # and leaves the bounds of the field.
    span: tuple[float, float] | None = None

    def label(
        self, yaw: float = 0.0, pitch: float = 0.0, n: int = 1, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """Return camera labels [n, 25]: 16 numbers of cam2world, then 9 of the intrinsics.

        The method advances torch's global random generator, because EG3D's pose sampler does.

        Args:
            yaw, pitch: angles of the camera in radians; 0 and 0 give a frontal view.
            n: number of equal labels.
            device: device of the result.
        """
        pivot = torch.tensor(self.pivot, dtype=torch.float32, device=device)
        # In EG3D's convention a frontal camera has both angles at pi / 2.
        half_pi = math.pi / 2
        # [1, 4, 4]. The sampler's standard deviations are 0 by default, so the angles are exact.
        pose = camera_model.LookAtPoseSampler.sample(
            half_pi + yaw, half_pi + pitch, pivot, radius=self.radius, device=device
        )
        return camera_model.pack_label(
            pose, camera_model.intrinsics_matrix(self.focal, device=device).reshape(1, 3, 3)
        ).expand(n, -1)


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """Settings of a render. A setting that is None has the value that the generator was trained with.

    EG3D renders in two passes: even samples along a ray, then importance samples.

    Raises: ValueError for values that are not positive.
    """

    resolution: int | None = None  # rendered pixels per edge before super-resolution, >= 1
    samples: int | None = None  # samples per ray in each of the two passes, >= 1
    sample_mult: float = 1.0  # factor on the samples per ray in each pass, > 0

    def __post_init__(self) -> None:
        if self.sample_mult <= 0:
            raise ValueError(
                f"RenderOptions: expected sample_mult > 0, got sample_mult={self.sample_mult}. Pass 1 to keep"
                f" the generator's number of samples."
            )
        for option_name in ("resolution", "samples"):
            option_value = getattr(self, option_name)
            if option_value is not None and option_value < 1:
                raise ValueError(
                    f"RenderOptions: expected {option_name} >= 1, got {option_name}={option_value}. Pass None"
                    " to use the generator's value."
                )


DEFAULT_OPTIONS = RenderOptions()  # every setting as the generator was trained


class Rendering(NamedTuple):
    """Images, depth and opacity of N rendered shapes."""

    image: torch.Tensor  # [N, 3, R, R] in (-1, 1), after super-resolution if the generator has one
    raw: torch.Tensor  # [N, 3, r, r] in (-1, 1), before super-resolution
    depth: torch.Tensor  # [N, 1, r, r] distance from the camera along the ray, world units
    opacity: torch.Tensor  # [N, 1, r, r] sum of the ray marcher's weights on the ray, 0..1


@runtime_checkable
class Field(Protocol):
    """A batch of N shapes.

    A subclass has to implement only bounds, level, __len__, density and colour. The inherited methods
    density_grid and render call these five. Each implementation documents whether it is differentiable in the
    parameters of its shapes.

    A ball of radius 0.3:

    >>> class Balls(Field):
    ...     bounds, level = Bounds(), LEVEL
    ...
    ...     def __len__(self) -> int:
    ...         return 1
    ...
    ...     def density(self, points):
    ...         return LEVEL + 100 * (0.3 - points.norm(dim=-1))[None]
    ...
    ...     def colour(self, points):
    ...         return torch.full((1, len(points), 3), 0.5)
    >>> bool((Balls().density(torch.zeros(1, 3)) > LEVEL).all())  # the centre lies inside the surface
    True
    """

    @property
    def bounds(self) -> Bounds:
        """Return the cube that contains the shapes."""

    @property
    def level(self) -> float:
        """Return the raw density at the surface."""

    def __len__(self) -> int:
        """Return N, the number of shapes."""

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density [N, P] at points in world units.

        Args: points: [P, 3] if all shapes share the points, else [N, P, 3].
        """

    def density_grid(self, grid: "SlabSpec") -> torch.Tensor:
        """Return the raw density [N, D, H, W] at the points of a grid.

        The coordinates z, y and x increase along D, H and W.
        """
        # [D, H, W, 3] -> [D H W, 3] -> [N, D H W] -> [N, D, H, W]
        raw_density: torch.Tensor = self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)
        return raw_density

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Return the colour [N, P, 3] in 0..1 at points in world units.

        Args: points: [P, 3] if all shapes share the points, else [N, P, 3].
        """

    def render(self, cameras: torch.Tensor, options: RenderOptions = DEFAULT_OPTIONS) -> Rendering:
        """Render the shapes by ray marching.

        An implementation may jitter the samples along rays with torch's global random generator.

        Args:
            cameras: camera labels, [N, 25], or [1, 25] for one camera that all shapes share.
            options: settings of the render.
        """
        return march(self, cameras, options)


@runtime_checkable
class ProductField(Field, Protocol):
    """A field that evaluates its density faster on a grid of x, y and z than point by point."""

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return the raw density [N, X, Y, Z] at all combinations of world coordinates.

        Args: x: coordinates [X]; y: coordinates [Y]; z: coordinates [Z].
        """


@runtime_checkable
class DecodedField(Protocol):
    """A field that returns density and colour from one pass of its decoder."""

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density [N, P] and colour [N, P, 3] in 0..1 at points [N, P, 3] inside the bounds."""


# Largest number of samples in one call of the decoder, which bounds the memory of `march`.
_SAMPLES_AT_ONCE = 1 << 20


def march(
    field: Field,
    cameras: torch.Tensor,
    render_options: RenderOptions = DEFAULT_OPTIONS,
    resolution: int = 64,
    sample_count: int = 64,
) -> Rendering:
    """Render any field by ray marching, with even steps through its bounds and without jitter.

    Space outside the bounds is empty, and empty space is black. The render is differentiable in the
    parameters of the field.

    Args:
        field: shapes to render, [N].
        cameras: camera labels, [N, 25], or [1, 25] for one camera that all shapes share.
        render_options: settings of the render.
        resolution: pixels per edge if `options.resolution` is None.
        sample_count: samples per ray if `options.samples` is None; `options.sample_mult` multiplies them.
    """
    cam2world, intrinsics = camera_model.unpack_label(cameras.expand(len(field), -1))
    # A field has no super-resolution, so the final image has the rendered resolution: R = r.
    rendered_resolution = render_options.resolution or resolution
    # The marcher integrates over the intervals between samples, so it needs at least two samples.
    sample_count = max(2, round((render_options.samples or sample_count) * render_options.sample_mult))
    origins, directions = camera_model.RaySampler()(cam2world, intrinsics, rendered_resolution)  # [N, M, 3]
    # [N, M, 1] each. `ray_limits_box` takes a cube about the origin, so the rays are shifted first.
    near, far = camera_model.ray_limits_box(
        origins - origins.new_tensor(field.bounds.centre), directions, field.bounds.side
    )
    rays = torch.cat([origins, directions, near, far], dim=-1)  # [N, M, 8]
    # The rays are split into chunks, which bounds the memory of one pass. The gradient checkpoint frees the
    # samples of a chunk after its forward pass and computes them again in the backward pass.
    ray_chunks = rays.split(max(1, _SAMPLES_AT_ONCE // (len(field) * sample_count)), dim=1)
    if len(ray_chunks) > 1 and torch.is_grad_enabled():
        chunk_results = [
            checkpoint(_march_rays, field, ray_chunk, sample_count, use_reentrant=False)
            for ray_chunk in ray_chunks
        ]
    else:
        chunk_results = [_march_rays(field, ray_chunk, sample_count) for ray_chunk in ray_chunks]
    # `chunk_results` holds (colour, depth, opacity) of each chunk. zip(*...) groups the chunks of each of the
    # three. [N, M, C] -> [N, C, M] -> [N, C, r, r] for colour (C = 3), depth and opacity (C = 1)
    rgb, depth, opacity = (
        torch.cat(tensors, dim=1).transpose(1, 2).unflatten(2, (rendered_resolution, rendered_resolution))
        for tensors in zip(*chunk_results, strict=True)
    )
    # [N, 1, r, r]. `ray_limits_box` returns near >= far for a ray that misses the cube.
    is_hit = (far > near).transpose(1, 2).unflatten(2, (rendered_resolution, rendered_resolution))
    # A ray that misses gets the farthest depth, the same value that MipRayMarcher2 gives an empty ray.
    depth = torch.where(is_hit, depth, far.amax())
    # The marcher returns colour in 0..1; images of EG3D are in -1..1.
    image = rgb * 2 - 1
    return Rendering(image, image, depth, opacity)


def _march_rays(
    field: Field, rays: torch.Tensor, sample_count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """March along rays. Return their colour [N, M, 3] in 0..1, depth [N, M, 1] and opacity [N, M, 1].

    Args:
        field: shapes to render, [N].
        rays: rays [N, M, 8]. The entries of a ray are its origin (3), its direction (3), its near limit and
            its far limit, in world units.
        sample_count: number of samples on each ray.
    """
    origins = rays[..., :3]  # [N, M, 3]
    directions = rays[..., 3:6]  # [N, M, 3]
    near = rays[..., 6:7]  # [N, M, 1]
    far = rays[..., 7:]  # [N, M, 1]
    depths = (near + torch.linspace(0, 1, sample_count).to(rays) * (far - near)).unsqueeze(-1)  # [N, M, S, 1]
    # Positions of all samples of a shape, on one axis, as `Field.density` expects them.
    sample_positions = (origins.unsqueeze(2) + depths * directions.unsqueeze(2)).flatten(1, 2)  # [N, M S, 3]
    # A field that can decode density and colour together saves one pass of its decoder.
    raw_density, colour = (
        field.decode(sample_positions)
        if isinstance(field, DecodedField)
        else (field.density(sample_positions), field.colour(sample_positions))
    )
    # [N, M, S]. The samples of a ray that misses the bounds count as empty space.
    raw_density = torch.where(far > near, raw_density.unflatten(1, depths.shape[1:3]), EMPTY)
    # `symmetric` would mirror the density at the plane x = 0; a field is used as it is. The empty dict holds
    # rendering options, of which this call needs none.
    marcher = MipRayMarcher2(symmetric=False)
    rgb, depth, interval_weights = marcher(
        colour.unflatten(1, depths.shape[1:3]), raw_density.unsqueeze(-1), depths, {}
    )
    return rgb, depth, interval_weights.sum(dim=2)


@contextlib.contextmanager
def fixed_draws(seed: int = 0) -> Iterator[None]:
    """Make torch draw the same random numbers in the block each time.

    This covers the generators of the CPU and, if CUDA is initialised, of all CUDA devices. Their states are
    restored after the block.

    Args: seed: seed of torch's global generators in the block.
    """
    # Forking the state of CUDA devices would initialise CUDA in a process that does not use it.
    with torch.random.fork_rng(
        devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    ):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def render_each(
    field: Field,
    cameras: Iterable[torch.Tensor],
    render_options: RenderOptions = DEFAULT_OPTIONS,
    seed: int = 0,
) -> list[Rendering]:
    """Render a field from several cameras, and use the same random numbers for each of them.

    The state of torch's random generator is restored. Not differentiable.

    Args:
        field: shapes to render, [N].
        cameras: camera labels, each [N, 25] or [1, 25].
        render_options: settings of the renders.
        seed: seed of the random numbers.
    Returns: one rendering for each camera.
    """
    renderings = []
    # One camera at a time, so that each render consumes the same random numbers.
    for camera in cameras:
        with fixed_draws(seed):
            renderings.append(field.render(camera, render_options))
    return renderings
