"""What everything downstream asks of a shape: its density, and what a camera sees of it.

A generator's sample is a field, and so is an asset under optimisation. Slabs, meshes, rewards, labelling,
metrics, attribution and reports speak to a `Field` alone and never to the network behind it.

World: x right, y up, z towards the camera of a frontal portrait. Density is raw: the decoder's output before
the ray marcher's softplus(. - 1). Letters: N shapes, P points, D, H, W = grid points along z, y, x, R final
and r rendered pixels per edge.
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

LEVEL = 10.0  # raw density of the surface, as EG3D's shape extraction has it
EMPTY = LEVEL - 1000.0  # raw density where certainly nothing is


@dataclass(frozen=True)
class Bounds:
    """The cube that a field fills; outside it the density means nothing."""

    side: float = 1.0  # world units, > 0
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # world units
    # share of the cube along each face that is no part of a shape: EG3D's tools clear it
    border: float = 30 / 256

    def __post_init__(self) -> None:
        sized = math.isfinite(self.side) and self.side > 0 and 0 <= self.border < 0.5
        if not sized or len(self.centre) != 3 or not all(map(math.isfinite, self.centre)):
            raise ValueError(
                f"Bounds: expected a side > 0, a finite centre and a border of 0 <= border < 0.5, got {self}."
                " Correct them."
            )


@dataclass(frozen=True)
class CameraFamily:
    """Where a generator's cameras stand: on a sphere about the world's origin, all looking at one point."""

    radius: float = camera_model.FFHQ_RADIUS  # distance from the origin, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # point looked at, world units
    focal: float = camera_model.FFHQ_FOCAL  # focal length over image size
    # least and greatest depth that rays sample, world units; None: where they cross the bounds
    span: tuple[float, float] | None = None

    def label(
        self, yaw: float = 0.0, pitch: float = 0.0, n: int = 1, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """Camera labels [n, 25] (16 cam2world, 9 intrinsics); yaw and pitch in radians from frontal. Draws as
        EG3D's pose sampler does.
        """
        pivot = torch.tensor(self.pivot, dtype=torch.float32, device=device)
        half_pi = math.pi / 2
        pose = camera_model.LookAtPoseSampler.sample(
            half_pi + yaw, half_pi + pitch, pivot, radius=self.radius, device=device
        )
        return camera_model.pack_label(
            pose, camera_model.intrinsics_matrix(self.focal, device=device).reshape(1, 3, 3)
        ).expand(n, -1)


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How a camera looks at a field; None keeps what the generator was trained with."""

    resolution: int | None = None  # rendered pixels per edge, before super-resolution
    samples: int | None = None  # samples per ray in each pass
    sample_mult: float = 1.0  # factor on the samples per ray in each pass

    def __post_init__(self) -> None:
        if self.sample_mult <= 0 or any(
            value is not None and value < 1 for value in (self.resolution, self.samples)
        ):
            raise ValueError(f"RenderOptions: expected positive values, got {self}. Correct them.")


OWN = RenderOptions()


class Rendering(NamedTuple):
    """What cameras see of N shapes."""

    image: torch.Tensor  # [N, 3, R, R] in (-1, 1), after super-resolution where there is one
    raw: torch.Tensor  # [N, 3, r, r] in (-1, 1)
    depth: torch.Tensor  # [N, 1, r, r] distance along the unit ray, world units
    opacity: torch.Tensor  # [N, 1, r, r] sum of the ray's weights, 0..1


@runtime_checkable
class Field(Protocol):
    """N shapes. Differentiable in whatever made them, where the family says so.

    A class that names this one as its base has only bounds, level, len, density and colour to write: grids
    and pictures come from them.

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
        """The cube that the shapes fill."""

    @property
    def level(self) -> float:
        """Raw density of the surface."""

    def __len__(self) -> int:
        """N."""

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Raw density [N, P] at world points [P, 3], the same for all shapes, or [N, P, 3]."""

    def density_grid(self, grid: "SlabSpec") -> torch.Tensor:
        """Raw density [N, D, H, W] at the points of a grid; z, y, x rise with the index."""
        raw: torch.Tensor = self.density(grid.points().reshape(-1, 3)).unflatten(1, grid.shape)
        return raw

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Colour [N, P, 3] in 0..1 at world points [P, 3], the same for all shapes, or [N, P, 3]."""

    def render(self, cameras: torch.Tensor, options: RenderOptions = OWN) -> Rendering:
        """What cameras [N or 1, 25] see. Ray jitter is drawn from torch's global generator."""
        return march(self, cameras, options)


@runtime_checkable
class ProductField(Field, Protocol):
    """A field that gives its density on a product of coordinates sooner than at as many points."""

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Raw density [N, X, Y, Z] at the product of world coordinates x [X], y [Y], z [Z]."""


@runtime_checkable
class DecodedField(Protocol):
    """A field that gives density and colour in one pass."""

    def decode(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw density [N, P] and colour [N, P, 3] in 0..1 at world points [N, P, 3] inside the bounds."""


_SAMPLES_AT_ONCE = 1 << 20  # samples of all shapes that `march` decodes together


def march(
    field: Field, cameras: torch.Tensor, options: RenderOptions = OWN, resolution: int = 64, samples: int = 64
) -> Rendering:
    """What cameras [N or 1, 25] see of any field: its density and colour at even steps through its bounds,
    black where nothing is.

    Args: resolution, samples: pixels per edge and samples per ray where the options do not say.
    Without jitter; differentiable in whatever the field is. Where there are many rays they go in parts, and
    the backward pass computes each part once more.
    """
    cam2world, intrinsics = camera_model.unpack_label(cameras.expand(len(field), -1))
    r = options.resolution or resolution
    samples = max(2, round((options.samples or samples) * options.sample_mult))
    origins, directions = camera_model.RaySampler()(cam2world, intrinsics, r)  # [N, M, 3]
    # [N, M, 1]
    near, far = camera_model.ray_limits_box(
        origins - origins.new_tensor(field.bounds.centre), directions, field.bounds.side
    )
    rays = torch.cat([origins, directions, near, far], dim=-1)  # [N, M, 8]
    parts = rays.split(max(1, _SAMPLES_AT_ONCE // (len(field) * samples)), dim=1)
    if len(parts) > 1 and torch.is_grad_enabled():
        marched = [checkpoint(_march_rays, field, part, samples, use_reentrant=False) for part in parts]
    else:
        marched = [_march_rays(field, part, samples) for part in parts]
    rgb, depth, opacity = (
        torch.cat(part, dim=1).transpose(1, 2).unflatten(2, (r, r)) for part in zip(*marched, strict=True)
    )
    hit = (far > near).transpose(1, 2).unflatten(2, (r, r))
    depth = torch.where(hit, depth, far.amax())  # as empty rays: the farthest
    return Rendering(rgb * 2 - 1, rgb * 2 - 1, depth, opacity)


def _march_rays(
    field: Field, rays: torch.Tensor, samples: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Colour [N, M, 3] in 0..1, depth [N, M, 1] and opacity [N, M, 1] of rays [N, M, 8] (origin, direction,
    near, far).
    """
    origins = rays[..., :3]
    directions = rays[..., 3:6]
    near = rays[..., 6:7]
    far = rays[..., 7:]
    depths = (near + torch.linspace(0, 1, samples).to(rays) * (far - near)).unsqueeze(-1)  # [N, M, S, 1]
    points = (origins.unsqueeze(2) + depths * directions.unsqueeze(2)).flatten(1, 2)  # [N, M S, 3]
    raw, colour = (
        field.decode(points)
        if isinstance(field, DecodedField)
        else (field.density(points), field.colour(points))
    )
    # [N, M, S]; a ray that misses sees nothing
    raw = torch.where(far > near, raw.unflatten(1, depths.shape[1:3]), EMPTY)
    marcher = MipRayMarcher2(symmetric=False)
    rgb, depth, weights = marcher(colour.unflatten(1, depths.shape[1:3]), raw.unsqueeze(-1), depths, {})
    return rgb, depth, weights.sum(dim=2)


@contextlib.contextmanager
def fixed_draws(seed: int = 0) -> Iterator[None]:
    """The same random numbers every time, on all devices in use; torch's own state stays."""
    with torch.random.fork_rng(
        devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    ):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def render_each(
    field: Field, cameras: Iterable[torch.Tensor], options: RenderOptions = OWN, seed: int = 0
) -> list[Rendering]:
    """What cameras [N or 1, 25] see of a field, one after the other, each under the same random numbers;
    torch's own state stays.
    """
    renderings = []
    for camera in cameras:
        with fixed_draws(seed):
            renderings.append(field.render(camera, options))
    return renderings
