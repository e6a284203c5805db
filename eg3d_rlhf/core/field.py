"""Interface to a batch of 3D shapes: density, colour, and renders from cameras.

A `Field` is a batch of N shapes. The samples of a generator implement it, and so do the assets that score
distillation optimises. Sigma slabs (cropped density grids), meshes, rewards, labelling, metrics, attribution
and reports use this interface alone. They never call the network that produced the shapes.

World axes: x points right, y points up, z points towards the camera of a frontal portrait. Density is raw:
the decoder's output before the ray marcher applies softplus(sigma_raw - 1).

Letters: N shapes, P points, D, H, W = grid points along z, y, x, R = pixels per edge of the final image, r =
rendered pixels per edge before super-resolution, M = r * r rays, S samples along a ray.
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
    """The cube that contains the shapes of a field. The density outside it has no meaning.

    Raises: ValueError for a value outside its range.
    """

    side: float = 1.0  # world units, > 0
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # world units
    # Fraction of the cube, at each face, that belongs to no shape. EG3D's shape extraction clears it.
    border: float = 30 / 256

    def __post_init__(self) -> None:
        sized = math.isfinite(self.side) and self.side > 0 and 0 <= self.border < 0.5
        if not sized or len(self.centre) != 3 or not all(map(math.isfinite, self.centre)):
            raise ValueError(
                "Bounds: expected side > 0, three finite coordinates of the centre and 0 <= border < 0.5,"
                f" got {self}. Correct these values."
            )


@dataclass(frozen=True)
class CameraFamily:
    """Cameras of a generator: they stand on a sphere about the world's origin and look at one point."""

    radius: float = camera_model.FFHQ_RADIUS  # distance from the origin, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the point that all cameras look at, world units
    focal: float = camera_model.FFHQ_FOCAL  # focal length divided by the image size (pixels)
    # Nearest and farthest depth that rays sample, world units. None: where rays enter and leave bounds.
    span: tuple[float, float] | None = None

    def label(
        self, yaw: float = 0.0, pitch: float = 0.0, n: int = 1, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """Return camera labels [n, 25]: 16 numbers of cam2world, then 9 of the intrinsics.

        Args: yaw, pitch: radians, 0 for a frontal view.
        The function consumes torch's global random numbers, as EG3D's pose sampler does.
        """
        pivot = torch.tensor(self.pivot, dtype=torch.float32, device=device)
        # In EG3D's convention a frontal camera has both angles at pi / 2.
        half_pi = math.pi / 2
        # [1, 4, 4]; without standard deviations the pose is exact, but random numbers are consumed.
        pose = camera_model.LookAtPoseSampler.sample(
            half_pi + yaw, half_pi + pitch, pivot, radius=self.radius, device=device
        )
        return camera_model.pack_label(
            pose, camera_model.intrinsics_matrix(self.focal, device=device).reshape(1, 3, 3)
        ).expand(n, -1)


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """Settings of a render. None keeps the value that the generator was trained with.

    Raises: ValueError for values that are not positive.
    """

    resolution: int | None = None  # rendered pixels per edge, before super-resolution
    samples: int | None = None  # samples per ray in each pass
    sample_mult: float = 1.0  # factor on the samples per ray in each pass

    def __post_init__(self) -> None:
        if self.sample_mult <= 0 or any(
            value is not None and value < 1 for value in (self.resolution, self.samples)
        ):
            raise ValueError(
                f"RenderOptions: expected positive values, got {self}. Set each to a positive number or None."
            )


OWN = RenderOptions()


class Rendering(NamedTuple):
    """Renders of N shapes. The unit ray of a depth has length 1 in world units."""

    image: torch.Tensor  # [N, 3, R, R] in (-1, 1), after super-resolution if the generator has one
    raw: torch.Tensor  # [N, 3, r, r] in (-1, 1), before super-resolution
    depth: torch.Tensor  # [N, 1, r, r] distance along the unit ray, world units
    opacity: torch.Tensor  # [N, 1, r, r] sum of the ray's weights, 0..1


@runtime_checkable
class Field(Protocol):
    """A batch of N shapes. Differentiable in the parameters of the shapes where the implementation says so.

    A subclass has to implement only bounds, level, __len__, density and colour. The methods density_grid and
    render have an implementation here that uses these.

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
    >>> bool((Balls().density(torch.zeros(1, 3)) > LEVEL).all())  # the middle is solid
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
        """Return the raw density [N, P] at world points: [P, 3] (the same for all shapes) or [N, P, 3]."""

    def density_grid(self, grid: "SlabSpec") -> torch.Tensor:
        """Return the raw density [N, D, H, W] at the points of a grid. z, y and x increase with the index."""
        # [D, H, W, 3] -> [D H W, 3] -> [N, D H W] -> [N, D, H, W]
        raw: torch.Tensor = self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)
        return raw

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Return the colour [N, P, 3] in 0..1 at world points: [P, 3] (shared by all shapes) or [N, P, 3]."""

    def render(self, cameras: torch.Tensor, options: RenderOptions = OWN) -> Rendering:
        """Render the shapes from cameras [N or 1, 25].

        An implementation may jitter the samples along rays with torch's global random generator.
        """
        return march(self, cameras, options)


@runtime_checkable
class ProductField(Field, Protocol):
    """A field that evaluates its density faster on a product of coordinates than at the same points one by
    one.
    """

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return the raw density [N, X, Y, Z] at the product of world coordinates x [X], y [Y], z [Z]."""


@runtime_checkable
class DecodedField(Protocol):
    """A field that returns density and colour from one pass of its decoder."""

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw density [N, P] and colour [N, P, 3] in 0..1 at points [N, P, 3] inside the bounds."""


_SAMPLES_AT_ONCE = 1 << 20  # samples of all shapes in one call of the decoder; limits the memory of `march`


def march(
    field: Field, cameras: torch.Tensor, options: RenderOptions = OWN, resolution: int = 64, samples: int = 64
) -> Rendering:
    """Render any field by ray marching: evaluate density and colour at even steps through its bounds.

    Space outside the bounds is empty, and empty space is black.

    Args:
        cameras: [N or 1, 25].
        resolution, samples: pixels per edge and samples per ray, used where `options` leaves them at None.
    There is no jitter. Differentiable in the parameters of the field.
    """
    cam2world, intrinsics = camera_model.unpack_label(cameras.expand(len(field), -1))
    # A field has no super-resolution: R = r.
    r = options.resolution or resolution
    samples = max(2, round((options.samples or samples) * options.sample_mult))
    origins, directions = camera_model.RaySampler()(cam2world, intrinsics, r)  # [N, M, 3]
    # [N, M, 1] each. `ray_limits_box` takes a cube about the origin, so the rays are shifted first.
    near, far = camera_model.ray_limits_box(
        origins - origins.new_tensor(field.bounds.centre), directions, field.bounds.side
    )
    rays = torch.cat([origins, directions, near, far], dim=-1)  # [N, M, 8]
    # Parts of the rays bound the memory of one pass. The gradient checkpoint frees the samples of a part
    # after its forward pass and computes them again in the backward pass.
    parts = rays.split(max(1, _SAMPLES_AT_ONCE // (len(field) * samples)), dim=1)
    if len(parts) > 1 and torch.is_grad_enabled():
        marched = [checkpoint(_march_rays, field, part, samples, use_reentrant=False) for part in parts]
    else:
        marched = [_march_rays(field, part, samples) for part in parts]
    # [N, M, C] -> [N, C, M] -> [N, C, r, r] for colour (C = 3), depth and opacity (C = 1)
    rgb, depth, opacity = (
        torch.cat(part, dim=1).transpose(1, 2).unflatten(2, (r, r)) for part in zip(*marched, strict=True)
    )
    # [N, 1, r, r]. `ray_limits_box` returns near >= far for a ray that misses the cube.
    hit = (far > near).transpose(1, 2).unflatten(2, (r, r))
    # A ray that misses gets the farthest depth, the same value that MipRayMarcher2 gives an empty ray.
    depth = torch.where(hit, depth, far.amax())
    # The marcher returns colour in 0..1; images of EG3D are in -1..1.
    return Rendering(rgb * 2 - 1, rgb * 2 - 1, depth, opacity)


def _march_rays(
    field: Field, rays: torch.Tensor, samples: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return colour [N, M, 3] in 0..1, depth [N, M, 1] and opacity [N, M, 1] of rays.

    Args: rays: [N, M, 8]: origin (3), direction (3), near and far limit.
    """
    # [N, M, 3] twice, then [N, M, 1] twice
    origins = rays[..., :3]
    directions = rays[..., 3:6]
    near = rays[..., 6:7]
    far = rays[..., 7:]
    depths = (near + torch.linspace(0, 1, samples).to(rays) * (far - near)).unsqueeze(-1)  # [N, M, S, 1]
    # Sample positions along each ray, all rays of a shape in one list.
    points = (origins.unsqueeze(2) + depths * directions.unsqueeze(2)).flatten(1, 2)  # [N, M S, 3]
    # One pass where the field can decode both together.
    raw, colour = (
        field.decode(points)
        if isinstance(field, DecodedField)
        else (field.density(points), field.colour(points))
    )
    # [N, M, S]. The samples of a ray that misses the bounds count as empty space.
    raw = torch.where(far > near, raw.unflatten(1, depths.shape[1:3]), EMPTY)
    # No mirror plane: the density of the field is used as it is.
    marcher = MipRayMarcher2(symmetric=False)
    rgb, depth, weights = marcher(colour.unflatten(1, depths.shape[1:3]), raw.unsqueeze(-1), depths, {})
    return rgb, depth, weights.sum(dim=2)


@contextlib.contextmanager
def fixed_draws(seed: int = 0) -> Iterator[None]:
    """Make torch draw the same random numbers in the block each time. Torch's own random state is restored.

    Covers the CPU and, if CUDA is in use, all of its devices.
    """
    # Forking the state of CUDA devices would initialise CUDA in a process that does not use it.
    with torch.random.fork_rng(
        devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    ):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def render_each(
    field: Field, cameras: Iterable[torch.Tensor], options: RenderOptions = OWN, seed: int = 0
) -> list[Rendering]:
    """Render a field from several cameras, each under the same random numbers.

    Args: cameras: each [N or 1, 25]. Torch's own random state is restored.
    """
    renderings = []
    # One camera at a time, so that each render consumes the same random numbers.
    for camera in cameras:
        with fixed_draws(seed):
            renderings.append(field.render(camera, options))
    return renderings
