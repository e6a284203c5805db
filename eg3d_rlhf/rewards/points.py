"""Point clouds that rewards read, from the density's level set or a frontal depth map.

The observation `points` covers all sides of a shape, and `lifted-points` the visible side. Both use world
coordinates, so that a shape's size and position matter. `published-points` is the cloud of the published
point rewards: it includes the background, and each sample has its own scale.

Letters: N shapes, P points of a cloud, E candidate places of a point, R pixels per edge; D, H, W = grid
points along z, y, x.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch

from eg3d_rlhf.core.field import CameraFamily, Field, Rendering, RenderOptions
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards import networks, observations
from eg3d_rlhf.rewards.observations import Observation, SigmaSlab
from eg3d_rlhf.rewards.point_networks import HEAD_CROP, build, own_presets, published_presets
from training.rendering.cameras import RaySampler, unpack_label

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator

_FLAT = 1e-6  # densities of two grid points that differ by less count as equal


def lift(depth: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
    """Compute origin + depth * unit direction for every pixel's ray.

    Args: depth: [N, 1, R, R] along the unit ray, world units; cameras: [N or 1, 25].
    Returns: world points [N, R * R, 3], row by row. Differentiable in depth.
    """
    n, _, resolution, _ = depth.shape
    origins, directions = RaySampler()(*unpack_label(cameras.to(depth)), resolution)  # [N, R * R, 3] each
    return origins + depth.reshape(n, -1, 1) * directions


def evenly(total: int, count: int) -> torch.Tensor:
    """Select `count` of `total` points as published: round(linspace(0, total - 1, count)), int64 [count]."""
    return torch.from_numpy(np.linspace(0, total - 1, count).round().astype(np.int64))


def self_scaled(points: torch.Tensor) -> torch.Tensor:
    """Subtract the centroid of points [N, P, 3], and divide by the largest absolute coordinate.

    Differentiable, including the largest coordinate.
    """
    centred = points - points.mean(dim=1, keepdim=True)
    # The factor keeps coordinates inside (-1, 1), as in the published code.
    return centred / centred.abs().flatten(1).max(dim=1).values[:, None, None] * 0.999999


@functools.lru_cache(maxsize=8)
def _ranks(places: int, seed: int) -> torch.Tensor:
    """Return the permutation of 0 ... places - 1 that belongs to the seed, int64 [E]."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(places))


def choose_places(usable: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `count` of the usable places [N, E]. The same seed makes the same choice.

    The seed gives every place a rank, and the usable places with the lowest ranks are chosen. If one place
    changes, at most one point changes. If fewer than `count` places are usable, they are repeated in turn.

    Returns: places int64 [N, count], and whether any place was usable, [N, 1].
    """
    places = usable.shape[1]
    if places < count:
        raise ValueError(
            f"points: expected at least {count} places, got {places}. Increase --resolution, or decrease"
            " --points."
        )
    ranks = _ranks(places, seed).to(usable.device)
    # Unusable places rank after all usable ones; topk returns them sorted.
    best = torch.where(usable, ranks, ranks + places).topk(count, dim=1, largest=False)
    # At least 1, so that the remainder below is defined for shapes without a usable place.
    usable_count = usable.sum(dim=1, keepdim=True).clamp(1, count)  # [N, 1]
    return best.indices.gather(1, torch.arange(count, device=usable.device) % usable_count), usable.any(
        dim=1, keepdim=True
    )


def _slopes(density: torch.Tensor, voxel: float) -> torch.Tensor:
    """Compute the gradient of [N, D, H, W] by central differences, which are one-sided at faces.

    Returns [N, 3, D, H, W], components along x, y, z.
    """
    return torch.stack(torch.gradient(density, spacing=voxel, dim=(3, 2, 1)), dim=1)


def _places(
    shape: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the edges between neighbouring grid points: flat indices of both ends, and the axis (0 x, 1 y, 2
    z).

    Each is int64 [E].
    """
    index = torch.arange(int(np.prod(shape)), device=device).reshape(shape)
    firsts = []
    seconds = []
    axes = []
    for axis, dim in enumerate((2, 1, 0)):
        firsts.append(index.narrow(dim, 0, shape[dim] - 1).flatten())
        seconds.append(index.narrow(dim, 1, shape[dim] - 1).flatten())
        axes.append(torch.full_like(firsts[-1], axis))
    return torch.cat(firsts), torch.cat(seconds), torch.cat(axes)


def level_set(
    density: torch.Tensor, level: float, grid: SlabSpec, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose points where the edges of a grid cross a level, and compute the normals there.

        p = p_a + t (p_b - p_a),  t = (level - s_a) / (s_b - s_a),  normal = -grad s / |grad s|

    Args: density: [N, D, H, W] at the points of a straight grid; count: number of points, see
        `choose_places`.
    Returns: world points [N, count, 3], unit outward normals [N, count, 3], and whether there is any
        crossing, [N, 1]. Points of a shape without a crossing have no meaning.
    Differentiable in density, but not in the choice of edges. Where s_a and s_b are equal to 1e-6, t is
    constant.
    """
    first, second, axis = _places(grid.shape, density.device)
    flat = density.flatten(1)
    usable = (flat[:, first] >= level) != (flat[:, second] >= level)  # [N, E]
    chosen, has_crossing = choose_places(usable, count, seed)  # [N, P]
    a = first[chosen]
    b = second[chosen]
    start = flat.gather(1, a)
    step = flat.gather(1, b) - flat.gather(1, a)
    steep = step.abs() > _FLAT
    # [N, P]
    # The inner where() replaces tiny divisors, because a division by 0 gives NaN gradients even if it is not
    # used.
    t = torch.where(
        steep, (level - start) / torch.where(steep, step, torch.ones_like(step)), torch.full_like(step, 0.5)
    )
    corners = grid.points().reshape(-1, 3).to(density)  # [D * H * W, 3]
    along = torch.nn.functional.one_hot(axis[chosen], 3) * grid.voxel  # [N, P, 3]
    points = corners[a] + t[..., None] * along
    slopes = _slopes(density, grid.voxel).flatten(2)  # [N, 3, D * H * W]
    at_a, at_b = (slopes.gather(2, end[:, None].expand(-1, 3, -1)) for end in (a, b))  # [N, 3, P]
    # Interpolate the gradient between the edge's ends.
    normals = torch.nn.functional.normalize(-torch.lerp(at_a, at_b, t[:, None]), dim=1, eps=_FLAT).transpose(
        1, 2
    )
    return points, normals, has_crossing


def in_box(points: torch.Tensor, side: float, centre: tuple[float, float, float]) -> torch.Tensor:
    """Express world points [..., 3] relative to a box's centre, in halves of its side: -1..1 inside."""
    return (points - torch.tensor(centre).to(points)) / (0.5 * side)


_OPAQUE = 0.5  # least opacity of a pixel whose depth counts as that of a surface


def mirror(observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Mirror clouds [N, 3 or 6, P] left to right with probability one half: x of positions and normals is
    negated.
    """
    signs = torch.ones_like(observations[:, :, :1])
    # Channels 0 and 3 are the x components of position and normal.
    signs[torch.from_numpy(draws < 0.5), ::3] = -1.0
    return observations * signs


def _check_cloud(owner: str, points: int, seed: int) -> None:
    """Raise ValueError unless both are integers in range. Values may come from a reward's file."""
    for name, value, least in (("points", points, 1), ("seed", seed, 0)):
        # bool is a subclass of int.
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{owner}.{name}: expected an integer of at least {least}, got {value!r}. Correct it in the"
                " reward's file."
            )


@observations.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelSetPoints(Observation):
    """Clouds [N, 6, P] of positions on the surface and unit normals; see `level_set`.

    Positions are relative to the box's centre, in halves of its side, so they lie in -1..1. All shapes have
    the same scale and origin. The cloud of a shape without a surface in the box is zero and has no gradient.
    """

    kind: ClassVar[str] = "points"
    spec: SlabSpec = SlabSpec(resolution=64)  # straight grid on whose edges crossings are searched
    points: int = 512  # P
    seed: int = 0  # of the choice of crossings

    def __post_init__(self) -> None:
        _check_cloud("LevelSetPoints", self.points, self.seed)
        if self.spec.lattice != "straight":
            raise ValueError(
                f"LevelSetPoints.spec: expected a straight lattice, got {self.spec.lattice!r}. Use the"
                " lattice 'straight'."
            )

    # The keyword arguments differ from those of the base class.
    @classmethod
    def of(  # type: ignore[override]
        cls,
        generator: "Generator",
        *,
        resolution: int = 64,
        crop: tuple[float, float, float, float, float, float] | None = None,
        points: int = 512,
    ) -> Self:
        """Create the observation of a generator's cube.

        Args: resolution, crop: of the grid, as for a slab; points: number of points on the surface.
        """
        return cls(spec=SigmaSlab.of(generator, resolution=resolution, crop=crop).spec, points=points)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's cloud, [6, P]."""
        return (6, self.points)

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the clouds, see `Observation`."""
        points, normals, has_surface = level_set(
            field.density_grid(self.spec), field.level, self.spec, self.points, self.seed
        )
        # Multiplying by `has_surface` sets clouds without a surface to zero, and their gradients, too.
        cloud = torch.cat([in_box(points, self.spec.box_warp, self.spec.centre), normals], dim=2)
        return (cloud * has_surface[..., None]).transpose(1, 2)

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Mirror clouds with probability one half."""
        return mirror(observations, draws)

    def misfits(self, generator: "Generator") -> list[str]:
        """List differences between this observation's cube and the generator's."""
        return SigmaSlab(self.spec).misfits(generator)


@observations.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LiftedPoints(Observation):
    """Clouds [N, 3, P] from the depth map of a frontal camera: the visible side, in halves of the box's side.

    Pixels with an opacity below one half and points outside the box are left out. P of the others are chosen
    by pixel, in the same way for every shape. The cloud of a shape without such a pixel is zero and has no
    gradient.
    """

    kind: ClassVar[str] = "lifted-points"
    ops: ClassVar[str] = "auto"
    resolution: int = 64  # R
    samples: int = 32  # per ray and pass
    points: int = 512  # P
    seed: int = 0  # of the choice of pixels
    radius: float = CameraFamily.radius  # of the camera, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # point that the camera looks at, world units
    focal: float = CameraFamily.focal  # in units of the image size
    box_side: float = 1.0  # world units
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the box, world units

    def __post_init__(self) -> None:
        _check_cloud(type(self).__name__, self.points, self.seed)
        if self.points > self.resolution**2:
            raise ValueError(
                f"--points: expected at most {self.resolution**2}, the number of pixels of a depth map of"
                f" {self.resolution} x {self.resolution}, got {self.points}. Decrease --points, or increase"
                " --resolution."
            )

    @classmethod
    def of(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int = 64, points: int = 512
    ) -> Self:
        """Create the observation with a generator's camera and box.

        Args: resolution: pixels per edge of the depth map; points: number of pixels that are chosen.
        """
        cameras = generator.cameras
        box = generator.bounds
        return cls(
            resolution=resolution,
            points=points,
            radius=cameras.radius,
            pivot=cameras.pivot,
            focal=cameras.focal,
            box_side=box.side,
            centre=box.centre,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's cloud, [3, P]."""
        return (3, self.points)

    def _seen(self, field: Field) -> tuple[torch.Tensor, Rendering]:
        """Render, and return the world points of all pixels [N, R * R, 3] and the rendering.

        The jitter of the rays is the same in every call.
        """
        camera = CameraFamily(self.radius, self.pivot, self.focal).label()
        with torch.random.fork_rng(
            devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        ):
            torch.manual_seed(0)
            seen = field.render(camera, RenderOptions(resolution=self.resolution, samples=self.samples))
        return lift(seen.depth, camera), seen

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the clouds, see `Observation`."""
        points, seen = self._seen(field)
        points = in_box(points, self.box_side, self.centre)
        usable = (seen.opacity.flatten(1) >= _OPAQUE) & (points.abs() <= 1).all(dim=2)
        chosen, has_pixels = choose_places(usable, self.points, self.seed)
        return (points.gather(1, chosen[..., None].expand(-1, -1, 3)) * has_pixels[..., None]).transpose(1, 2)

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Mirror clouds with probability one half."""
        return mirror(observations, draws)

    def misfits(self, generator: "Generator") -> list[str]:
        """List differences between this observation's camera and box and the generator's."""
        cameras = generator.cameras
        box = generator.bounds
        expected = {
            "radius": cameras.radius,
            "pivot": cameras.pivot,
            "focal": cameras.focal,
            "box_side": box.side,
            "centre": box.centre,
        }
        return [
            f"{name} {getattr(self, name)}, got {value}"
            for name, value in expected.items()
            if getattr(self, name) != value
        ]


@observations.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedPoints(LiftedPoints):
    """Clouds [N, 3, P] as the published point rewards read them.

    Pixels of the complete map are taken at equal distances, and each cloud has its own scale.
    Deviates: the published training takes other pixels each time; this class always takes those of the
        published
    evaluation.
    """

    kind: ClassVar[str] = "published-points"
    resolution: int = 128
    points: int = 2048

    @classmethod
    def of(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int = 128, points: int = 2048
    ) -> Self:
        """Create the observation with a generator's camera, see `LiftedPoints.of`."""
        return super().of(generator, resolution=resolution, points=points)

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the clouds, see `Observation`."""
        points = self._seen(field)[0]
        return self_scaled(points[:, evenly(points.shape[1], self.points)]).transpose(1, 2)

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Scale each axis by 0.95 ... 1.05, and move each coordinate by at most 0.001, at random."""
        scaled = []
        for cloud, number in zip(observations, draws, strict=True):
            # Each sample's number in [0, 1) becomes the seed of its own stream.
            random = np.random.default_rng(int(number * 2**53))
            scale = random.uniform(0.95, 1.05, (3, 1))
            jitter = random.uniform(-0.001, 0.001, tuple(cloud.shape))
            scaled.append(cloud * torch.from_numpy(scale).to(cloud) + torch.from_numpy(jitter).to(cloud))
        return torch.stack(scaled)


networks.register("points", build, own_presets(6, {"resolution": 64, "crop": HEAD_CROP}))
networks.register("lifted-points", build, own_presets(3, {"resolution": 64}))
networks.register("published-points", build, published_presets())
