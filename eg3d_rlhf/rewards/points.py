"""What point rewards read: a cloud of points on the level set of the density itself, or lifted from the depth
map of a frontal camera.

`points` sees all sides of a shape and `lifted-points` one, both in world coordinates, so that size and place
count. `published-points` is the cloud of the published point rewards: the background is in it, and each
sample has a scale of its own.

Letters: N shapes, P points of a cloud, E places that a point may come from, R pixels per edge; D, H, W = grid
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

_FLAT = 1e-6  # densities of two grid points that differ less count as equal


def lift(depth: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
    """Origin + depth * unit direction of every pixel's ray.

    Args: depth [N, 1, R, R] along the unit ray, world units; cameras [N or 1, 25].
    Returns: world points [N, R * R, 3], row by row. Differentiable in depth.
    """
    n, _, resolution, _ = depth.shape
    origins, directions = RaySampler()(*unpack_label(cameras.to(depth)), resolution)  # [N, R * R, 3] each
    return origins + depth.reshape(n, -1, 1) * directions


def evenly(total: int, count: int) -> torch.Tensor:
    """The published choice of `count` of `total` points:
    round(linspace(0, total - 1, count)), int64 [count].
    """
    return torch.from_numpy(np.linspace(0, total - 1, count).round().astype(np.int64))


def self_scaled(points: torch.Tensor) -> torch.Tensor:
    """The published normalisation of [N, P, 3]: minus the centroid, over the largest absolute coordinate
    (its gradient included).
    """
    centred = points - points.mean(dim=1, keepdim=True)
    return centred / centred.abs().flatten(1).max(dim=1).values[:, None, None] * 0.999999


@functools.lru_cache(maxsize=8)
def _ranks(places: int, seed: int) -> torch.Tensor:
    """A permutation of 0 ... places - 1 that the seed decides, int64 [E]."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(places))


def draw(usable: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `count` places of those that are usable [N, E], the same ones for the same seed.

    Every place has a rank that the seed decides, and the lowest are taken: where one place changes, at most
    one point does. Where there are fewer than `count`, they are repeated in turn.

    Returns: places int64 [N, count], and whether there was any, [N, 1].
    """
    places = usable.shape[1]
    if places < count:
        raise ValueError(
            f"draw: expected at least {count} places, got {places}. Raise the resolution, or take fewer"
            " --points."
        )
    ranks = _ranks(places, seed).to(usable.device)
    best = torch.where(usable, ranks, ranks + places).topk(count, dim=1, largest=False)  # sorted
    held = usable.sum(dim=1, keepdim=True).clamp(1, count)  # [N, 1]
    return best.indices.gather(1, torch.arange(count, device=usable.device) % held), usable.any(
        dim=1, keepdim=True
    )


def _slopes(density: torch.Tensor, voxel: float) -> torch.Tensor:
    """Gradient of [N, D, H, W] by central differences, one-sided at faces: [N, 3, D, H, W], components along
    x, y, z.
    """
    return torch.stack(torch.gradient(density, spacing=voxel, dim=(3, 2, 1)), dim=1)


def _places(
    shape: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The edges between neighbouring grid points: flat indices of both ends and the axis (0 x, 1 y, 2 z),
    int64 [E] each.
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
    """Points where a grid's edges cross a level, and normals there.

        p = p_a + t (p_b - p_a),  t = (level - s_a) / (s_b - s_a),  normal = -grad s / |grad s|

    Args: density [N, D, H, W] at the points of a straight grid; count: points drawn, see `draw`.
    Returns: world points [N, count, 3], unit outward normals [N, count, 3], and whether there is any crossing
    [N, 1]; where there is none, the points mean nothing.
    Differentiable in density, not in which edges cross. Where s_a and s_b are equal to 1e-6, t is constant.
    """
    first, second, axis = _places(grid.shape, density.device)
    flat = density.flatten(1)
    usable = (flat[:, first] >= level) != (flat[:, second] >= level)  # [N, E]
    chosen, held = draw(usable, count, seed)  # [N, P]
    a = first[chosen]
    b = second[chosen]
    start = flat.gather(1, a)
    step = flat.gather(1, b) - flat.gather(1, a)
    steep = step.abs() > _FLAT
    # [N, P]
    t = torch.where(
        steep, (level - start) / torch.where(steep, step, torch.ones_like(step)), torch.full_like(step, 0.5)
    )
    corners = grid.points().reshape(-1, 3).to(density)  # [D * H * W, 3]
    along = torch.nn.functional.one_hot(axis[chosen], 3) * grid.voxel  # [N, P, 3]
    points = corners[a] + t[..., None] * along
    slopes = _slopes(density, grid.voxel).flatten(2)  # [N, 3, D * H * W]
    at_a, at_b = (slopes.gather(2, end[:, None].expand(-1, 3, -1)) for end in (a, b))  # [N, 3, P]
    normals = torch.nn.functional.normalize(-torch.lerp(at_a, at_b, t[:, None]), dim=1, eps=_FLAT).transpose(
        1, 2
    )
    return points, normals, held


def in_box(points: torch.Tensor, side: float, centre: tuple[float, float, float]) -> torch.Tensor:
    """World points [..., 3] in halves of a box's side from its centre: -1..1 inside it."""
    return (points - torch.tensor(centre).to(points)) / (0.5 * side)


_OPAQUE = 0.5  # least opacity of a pixel whose depth is a surface's


def mirror(observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Left and right of clouds [N, 3 or 6, P] exchanged with probability one half: x of positions and normals
    changes its sign.
    """
    signs = torch.ones_like(observed[:, :, :1])
    signs[torch.from_numpy(draws < 0.5), ::3] = -1.0
    return observed * signs


def _check_cloud(who: str, points: int, seed: int) -> None:
    """Of a reward's file, too."""
    for name, value, least in (("points", points, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{who}.{name}: expected an integer of at least {least}, got {value!r}. Correct it."
            )


@observations.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelSetPoints(Observation):
    """Clouds [N, 6, P]: positions on the surface over half the box's side, and unit normals; see
    `clouds.level_set`.

    Positions are relative to the box's centre and in -1..1 whatever the shape: scale and place are the same
    for all. A shape without a surface in the box is all zeros and has no gradient.
    """

    kind: ClassVar[str] = "points"
    spec: SlabSpec = SlabSpec(resolution=64)  # grid on whose edges the level is looked for; straight
    points: int = 512  # P
    seed: int = 0  # of which crossings are taken

    def __post_init__(self) -> None:
        _check_cloud("LevelSetPoints", self.points, self.seed)
        if self.spec.lattice != "straight":
            raise ValueError(
                f"LevelSetPoints.spec: expected a straight lattice, got {self.spec.lattice!r}. Use"
                " 'straight'."
            )

    # its keywords are its own
    @classmethod
    def of(  # type: ignore[override]
        cls,
        generator: "Generator",
        *,
        resolution: int = 64,
        crop: tuple[float, float, float, float, float, float] | None = None,
        points: int = 512,
    ) -> Self:
        """Args: resolution, crop: of the grid, as a slab's; points: drawn on the surface."""
        return cls(spec=SigmaSlab.of(generator, resolution=resolution, crop=crop).spec, points=points)

    @property
    def shape(self) -> tuple[int, ...]:
        return (6, self.points)

    def observe(self, field: Field) -> torch.Tensor:
        points, normals, held = level_set(
            field.density_grid(self.spec), field.level, self.spec, self.points, self.seed
        )
        cloud = torch.cat([in_box(points, self.spec.box_warp, self.spec.centre), normals], dim=2)
        return (cloud * held[..., None]).transpose(1, 2)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        return mirror(observed, draws)

    def misfits(self, generator: "Generator") -> list[str]:
        """The scene cube must be the generator's."""
        return SigmaSlab(self.spec).misfits(generator)


@observations.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LiftedPoints(Observation):
    """Clouds [N, 3, P] lifted from the depth map of a frontal camera: one side of the shape, in halves of the
    box's side.

    Pixels of opacity under one half and points outside the box are left out; of the rest P are drawn, the
    same pixels wherever they are seen. A shape of which nothing is seen is all zeros and has no gradient.
    """

    kind: ClassVar[str] = "lifted-points"
    ops: ClassVar[str] = "auto"
    resolution: int = 64  # R
    samples: int = 32  # per ray and pass
    points: int = 512  # P
    seed: int = 0  # of which pixels are taken
    radius: float = CameraFamily.radius  # of the camera, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # point looked at, world units
    focal: float = CameraFamily.focal  # focal length over image size
    box_side: float = 1.0  # world units
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the box, world units

    def __post_init__(self) -> None:
        _check_cloud(type(self).__name__, self.points, self.seed)
        if self.points > self.resolution**2:
            raise ValueError(
                f"--points: expected at most the {self.resolution**2} pixels of a depth map of"
                f" {self.resolution}, got {self.points}. Take fewer, or raise --resolution."
            )

    @classmethod
    def of(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int = 64, points: int = 512
    ) -> Self:
        """Args: resolution: pixels per edge of the depth map; points: drawn of its pixels."""
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
        return (3, self.points)

    def _seen(self, field: Field) -> tuple[torch.Tensor, Rendering]:
        """World points of all pixels [N, R * R, 3], and the rendering; the rays' jitter is the same every
        time.
        """
        camera = CameraFamily(self.radius, self.pivot, self.focal).label()
        with torch.random.fork_rng(
            devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        ):
            torch.manual_seed(0)
            seen = field.render(camera, RenderOptions(resolution=self.resolution, samples=self.samples))
        return lift(seen.depth, camera), seen

    def observe(self, field: Field) -> torch.Tensor:
        points, seen = self._seen(field)
        points = in_box(points, self.box_side, self.centre)
        usable = (seen.opacity.flatten(1) >= _OPAQUE) & (points.abs() <= 1).all(dim=2)
        chosen, held = draw(usable, self.points, self.seed)
        return (points.gather(1, chosen[..., None].expand(-1, -1, 3)) * held[..., None]).transpose(1, 2)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        return mirror(observed, draws)

    def misfits(self, generator: "Generator") -> list[str]:
        """The camera must stand where the generator's do, and the box must be its own."""
        cameras = generator.cameras
        box = generator.bounds
        theirs = {
            "radius": cameras.radius,
            "pivot": cameras.pivot,
            "focal": cameras.focal,
            "box_side": box.side,
            "centre": box.centre,
        }
        return [
            f"{name} {getattr(self, name)}, got {value}"
            for name, value in theirs.items()
            if getattr(self, name) != value
        ]


@observations.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedPoints(LiftedPoints):
    """Clouds [N, 3, P] as the published point rewards read them: every so many pixels of the whole map, each
    cloud on its own scale.

    Deviates: the published training draws other pixels each time; here the pixels are those of its
    evaluation.
    """

    kind: ClassVar[str] = "published-points"
    resolution: int = 128
    points: int = 2048

    @classmethod
    def of(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int = 128, points: int = 2048
    ) -> Self:
        """See `LiftedPoints.of`."""
        return super().of(generator, resolution=resolution, points=points)

    def observe(self, field: Field) -> torch.Tensor:
        points = self._seen(field)[0]
        return self_scaled(points[:, evenly(points.shape[1], self.points)]).transpose(1, 2)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Each axis is scaled by 0.95 ... 1.05, and each coordinate moved by at most 0.001."""
        scaled = []
        for cloud, number in zip(observed, draws, strict=True):
            random = np.random.default_rng(int(number * 2**53))
            scale = random.uniform(0.95, 1.05, (3, 1))
            jitter = random.uniform(-0.001, 0.001, tuple(cloud.shape))
            scaled.append(cloud * torch.from_numpy(scale).to(cloud) + torch.from_numpy(jitter).to(cloud))
        return torch.stack(scaled)


networks.register("points", build, own_presets(6, {"resolution": 64, "crop": HEAD_CROP}))
networks.register("lifted-points", build, own_presets(3, {"resolution": 64}))
networks.register("published-points", build, published_presets())
