"""What everything downstream asks of a shape: its density, and what a camera sees of it.

A generator's sample is a field, and so is an asset under optimisation. Slabs, meshes, rewards, labelling, metrics, attribution and reports
speak to a `Field` alone and never to the network behind it.

World: x right, y up, z towards the camera of a frontal portrait. Density is raw: the decoder's output before the ray marcher's
softplus(. - 1). Letters: N shapes, P points, D, H, W = grid points along z, y, x, R final and r rendered pixels per edge.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch

from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, LookAtPoseSampler, intrinsics_matrix, pack_label

if TYPE_CHECKING:
    from eg3d_rlhf.core.separable import SeparableDensity
    from eg3d_rlhf.core.spec import SlabSpec

LEVEL = 10.0  # raw density of the surface, as EG3D's shape extraction has it
NOISE_MODES = ("const", "random", "none")


@dataclass(frozen=True)
class Bounds:
    """The cube that a field fills; outside it the density means nothing."""

    side: float = 1.0  # world units, > 0
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # world units
    border: float = 30 / 256  # share of the cube along each face that is no part of a shape: EG3D's tools clear it

    def __post_init__(self) -> None:
        sized = math.isfinite(self.side) and self.side > 0 and 0 <= self.border < 0.5
        if not sized or len(self.centre) != 3 or not all(map(math.isfinite, self.centre)):
            raise ValueError(f"Bounds: expected a side > 0, a finite centre and a border of 0 <= border < 0.5, got {self}. Correct them.")


@dataclass(frozen=True)
class CameraFamily:
    """Where a generator's cameras stand: on a sphere about the world's origin, all looking at one point."""

    radius: float = FFHQ_RADIUS  # distance from the origin, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # point looked at, world units
    focal: float = FFHQ_FOCAL  # focal length over image size
    span: tuple[float, float] | None = None  # least and greatest depth that rays sample, world units; None: where they cross the bounds

    def label(self, yaw: float = 0.0, pitch: float = 0.0, n: int = 1, device: str | torch.device = "cpu") -> torch.Tensor:
        """Camera labels [n, 25] (16 cam2world, 9 intrinsics); yaw and pitch in radians from frontal. Draws as EG3D's pose sampler does."""
        pivot, half_pi = torch.tensor(self.pivot, dtype=torch.float32, device=device), math.pi / 2
        pose = LookAtPoseSampler.sample(half_pi + yaw, half_pi + pitch, pivot, radius=self.radius, device=device)
        return pack_label(pose, intrinsics_matrix(self.focal, device=device).reshape(1, 3, 3)).expand(n, -1)


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How a camera looks at a field; None keeps what the generator was trained with."""

    resolution: int | None = None  # rendered pixels per edge, before super-resolution
    samples: int | None = None  # samples per ray in each pass
    sample_mult: float = 1.0  # factor on the samples per ray in each pass

    def __post_init__(self) -> None:
        if self.sample_mult <= 0 or any(value is not None and value < 1 for value in (self.resolution, self.samples)):
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
    """N shapes. Differentiable in whatever made them, where the family says so."""

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

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Colour [N, P, 3] in 0..1 at world points [P, 3]."""

    def render(self, cameras: torch.Tensor, options: RenderOptions = OWN) -> Rendering:
        """What cameras [N or 1, 25] see. Ray jitter is drawn from torch's global generator."""


@runtime_checkable
class SeparableField(Field, Protocol):
    """A field of axis-aligned planes: its density on a grid is a sum of maps of two coordinates each, which meshing exploits."""

    def separable(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> "SeparableDensity | None":
        """The maps of one shape (N = 1) at the product of world coordinates x [X], y [Y], z [Z]; None where there is no such form."""


@runtime_checkable
class ProductField(Field, Protocol):
    """A field that gives its density on a product of coordinates sooner than at as many points."""

    def density_product(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Raw density [N, X, Y, Z] at the product of world coordinates x [X], y [Y], z [Z]."""


@contextlib.contextmanager
def fixed_draws(seed: int = 0) -> Iterator[None]:
    """The same random numbers every time, on all devices in use; torch's own state stays."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def render_each(field: Field, cameras: Iterable[torch.Tensor], options: RenderOptions = OWN, seed: int = 0) -> list[Rendering]:
    """What cameras [N or 1, 25] see of a field, one after the other, each under the same random numbers; torch's own state stays."""
    renderings = []
    for camera in cameras:
        with fixed_draws(seed):
            renderings.append(field.render(camera, options))
    return renderings
