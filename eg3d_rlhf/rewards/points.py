"""Observations that are point clouds, from the density's level set or from a frontal depth map.

The observation `points` covers all sides of a shape, and `lifted-points` covers the side that a frontal
camera sees. In these two observations all shapes have the same scale and origin, so that a score can depend
on a shape's size and position. `published-points` is the cloud of the published point rewards (arXiv
2606.27305): it includes the background, and each sample is scaled separately.

Shapes: N shapes, P points of a cloud, E candidates for a point (grid edges or pixels), R pixels per edge. D,
H and W are the numbers of grid points along z, y and x.
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
from eg3d_rlhf.rewards.point_networks import build, own_presets, published_presets
from eg3d_rlhf.rewards.slab_crops import Crop, choose_crop
from training.rendering.cameras import RaySampler, unpack_label

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator

_FLAT = 1e-6  # smallest density difference of two grid points that counts as different from 0


def lift(depth: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
    """Compute the world point of every pixel of a depth map: origin + depth * unit direction of its ray.

    Differentiable in depth.

    Args:
        depth: depths [N, 1, R, R] along the unit rays, world units.
        cameras: camera labels [N or 1, 25].
    Returns: points [N, R * R, 3] in world units, row by row.
    """
    n, _, resolution, _ = depth.shape
    origins, directions = RaySampler()(*unpack_label(cameras.to(depth)), resolution)  # [N, R * R, 3] each
    return origins + depth.reshape(n, -1, 1) * directions


def evenly_spaced(available_count: int, chosen_count: int) -> torch.Tensor:
    """Return evenly spaced indices from 0 to `available_count` - 1, as in the published code.

    Returns: round(linspace(0, available_count - 1, chosen_count)), int64 [chosen_count].
    """
    return torch.from_numpy(np.linspace(0, available_count - 1, chosen_count).round().astype(np.int64))


def self_scaled(points: torch.Tensor) -> torch.Tensor:
    """Return clouds [N, P, 3] whose centroid is the origin and whose coordinates are in -1..1.

    Each cloud is divided by its largest absolute coordinate after its centroid was subtracted.
    Differentiable, also through the centroid and the largest coordinate.
    """
    centred = points - points.mean(dim=1, keepdim=True)
    # As in the published code, the factor makes all absolute values smaller than 1.
    return centred / centred.abs().flatten(1).max(dim=1).values[:, None, None] * 0.999999


@functools.lru_cache(maxsize=8)
def _random_ranks(candidate_count: int, seed: int) -> torch.Tensor:
    """Return the random permutation of 0..E - 1 that belongs to the seed, int64 [E].

    The result is cached and must not be changed.
    """
    return torch.from_numpy(np.random.default_rng(seed).permutation(candidate_count))


def choose_candidates(
    is_usable: torch.Tensor, point_count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose P of the E candidates for the points of each shape's cloud.

    The choice is the same in every call with the same seed and mask. The seed gives every candidate a rank,
    and the usable candidates with the lowest ranks are chosen. If one candidate becomes usable or unusable,
    at most one chosen candidate changes. If fewer than P candidates are usable, the usable candidates are
    repeated in their order.

    Args:
        is_usable: mask [N, E] of the usable candidates.
        point_count: number of candidates to choose, P.
        seed: random seed of the ranks.
    Returns: the indices of the chosen candidates, int64 [N, P], and a mask [N, 1] of the shapes that have a
        usable candidate. The indices of all other shapes have no meaning.
    Raises: ValueError if E is smaller than P.
    """
    candidate_count = is_usable.shape[1]
    if candidate_count < point_count:
        raise ValueError(
            f"--points: expected at most {candidate_count}, the number of candidates for a point at this"
            f" resolution, got {point_count}. Increase --resolution, or decrease --points."
        )
    ranks = _random_ranks(candidate_count, seed).to(is_usable.device)
    # Unusable candidates get ranks after all usable ones. topk returns sorted values.
    lowest_ranks = torch.where(is_usable, ranks, ranks + candidate_count).topk(
        point_count, dim=1, largest=False
    )
    # The lower limit 1 makes the remainder below defined for shapes without a usable candidate.
    usable_count = is_usable.sum(dim=1, keepdim=True).clamp(1, point_count)  # [N, 1]
    # 0, 1, ..., usable_count - 1, 0, 1, ...: repeats the usable candidates
    repeated_order = torch.arange(point_count, device=is_usable.device) % usable_count
    return lowest_ranks.indices.gather(1, repeated_order), is_usable.any(dim=1, keepdim=True)


def _density_gradient(density: torch.Tensor, voxel: float) -> torch.Tensor:
    """Compute the spatial gradient [N, 3, D, H, W] of densities [N, D, H, W]: components along x, y, z.

    Differences are central, and one-sided at the faces of the grid. `voxel` is the distance between grid
    points in world units.
    """
    # The axes 3, 2, 1 are x, y, z.
    return torch.stack(torch.gradient(density, spacing=voxel, dim=(3, 2, 1)), dim=1)


def _grid_edges(
    shape: tuple[int, int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the edges between neighbouring points of a grid [D, H, W].

    Args:
        shape: numbers of grid points (D, H, W).
        device: device of the result.
    Returns: the indices of the start points in the flattened grid, the indices of the end points, and the
        axes of the edges (0 for x, 1 for y, 2 for z), int64 [E] each.
    """
    point_indices = torch.arange(int(np.prod(shape)), device=device).reshape(shape)
    start_points = []
    end_points = []
    axes = []
    # Dimensions 2, 1, 0 of the grid are x, y, z.
    for axis, dim in enumerate((2, 1, 0)):
        start_points.append(point_indices.narrow(dim, 0, shape[dim] - 1).flatten())
        end_points.append(point_indices.narrow(dim, 1, shape[dim] - 1).flatten())
        axes.append(torch.full_like(start_points[-1], axis))
    return torch.cat(start_points), torch.cat(end_points), torch.cat(axes)


def level_set(
    density: torch.Tensor, level: float, grid: SlabSpec, point_count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose points at which edges of a grid cross the surface, and compute the surface's normals there.

    For an edge from a to b with the positions p_a, p_b and the densities s_a, s_b, the crossing p and the
    normal are

        p = p_a + t (p_b - p_a),  t = (level - s_a) / (s_b - s_a),  normal = -grad s / |grad s|.

    Differentiable in density, but not in the choice of edges. If s_a and s_b differ by at most 1e-6, t is the
    constant 0.5.

    Args:
        density: raw densities [N, D, H, W] at the points of the grid.
        level: raw density at the surface.
        grid: grid of the densities, whose `lattice` must be "straight".
        point_count: number of points to choose, P.
        seed: random seed of the choice, see `choose_candidates`.
    Returns: the world points [N, P, 3], the outward normals of length 1 [N, P, 3], and a mask [N, 1] of the
        shapes with a crossing. Points and normals of all other shapes have no meaning.
    """
    edge_start, edge_end, edge_axis = _grid_edges(grid.shape, density.device)  # [E] each
    flat_density = density.flatten(1)
    crosses_surface = (flat_density[:, edge_start] >= level) != (flat_density[:, edge_end] >= level)  # [N, E]
    chosen_edges, has_crossing = choose_candidates(crosses_surface, point_count, seed)  # [N, P]
    # Indices of the grid points at both ends of the chosen edges, [N, P]
    a = edge_start[chosen_edges]
    b = edge_end[chosen_edges]
    density_a = flat_density.gather(1, a)
    density_difference = flat_density.gather(1, b) - flat_density.gather(1, a)
    is_steep = density_difference.abs() > _FLAT
    # The inner where() replaces tiny divisors. A division by 0 would give NaN gradients, even if its result
    # is not used.
    divisor = torch.where(is_steep, density_difference, torch.ones_like(density_difference))
    # [N, P]
    t = torch.where(is_steep, (level - density_a) / divisor, torch.full_like(density_difference, 0.5))
    grid_points = grid.points().reshape(-1, 3).to(density)  # [D * H * W, 3]
    edge_vector = torch.nn.functional.one_hot(edge_axis[chosen_edges], 3) * grid.voxel  # [N, P, 3]
    points = grid_points[a] + t[..., None] * edge_vector
    gradient = _density_gradient(density, grid.voxel).flatten(2)  # [N, 3, D * H * W]
    gradient_a = gradient.gather(2, a[:, None].expand(-1, 3, -1))  # [N, 3, P]
    gradient_b = gradient.gather(2, b[:, None].expand(-1, 3, -1))
    # Interpolate the gradient between both ends of the edge.
    gradient_p = torch.lerp(gradient_a, gradient_b, t[:, None])
    normals = torch.nn.functional.normalize(-gradient_p, dim=1, eps=_FLAT).transpose(1, 2)
    return points, normals, has_crossing


def in_box(points: torch.Tensor, side: float, centre: tuple[float, float, float]) -> torch.Tensor:
    """Convert world points [..., 3] to coordinates of a box, which are -1..1 inside the box.

    Args:
        points: world points [..., 3].
        side: edge of the box, world units.
        centre: centre of the box, world units.
    """
    return (points - torch.tensor(centre).to(points)) / (0.5 * side)


_OPAQUE = 0.5  # smallest opacity of a pixel that shows a surface and not the background


def mirror(observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Mirror each cloud left to right if its random number is below one half.

    The x components of positions and normals are negated.

    Args:
        observations: clouds [N, 3 or 6, P].
        draws: random numbers [N], uniform in [0, 1).
    """
    signs = torch.ones_like(observations[:, :, :1])
    # Channels 0 and 3 are the x components of position and normal.
    signs[torch.from_numpy(draws < 0.5), ::3] = -1.0
    return observations * signs


def _check_cloud(owner: str, point_count: int, seed: int) -> None:
    """Raise ValueError unless the fields `points` and `seed` of an observation are integers in their ranges.

    The values may come from a reward's file.

    Args:
        owner: name of the observation's class, for the message.
        point_count: number of points, the field `points`, at least 1.
        seed: random seed, at least 0.
    """
    for field_name, field_value, min_value in (("points", point_count, 1), ("seed", seed, 0)):
        # bool is a subclass of int.
        if isinstance(field_value, bool) or not isinstance(field_value, int) or field_value < min_value:
            raise ValueError(
                f"{owner}.{field_name}: expected an integer of at least {min_value}, got {field_value!r}."
                f" Correct the entry {field_name} of the observation in the reward's file."
            )


@observations.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelSetPoints(Observation):
    """Observation of clouds [N, 6, P] of points on the surface, with position and normal (3 channels each).

    Normals have length 1. Positions are coordinates of the cube, -1..1. The points are chosen by `level_set`.
    The cloud of a shape without a surface inside the grid is zero and has no gradient.
    """

    kind: ClassVar[str] = "points"
    spec: SlabSpec = SlabSpec(resolution=64)  # straight grid whose edges are searched for crossings
    points: int = 512  # P
    seed: int = 0  # random seed of the choice of crossings

    def __post_init__(self) -> None:
        _check_cloud("LevelSetPoints", self.points, self.seed)
        if self.spec.lattice != "straight":
            raise ValueError(
                f"LevelSetPoints.spec: expected the lattice 'straight', got {self.spec.lattice!r}. Correct"
                " the entry lattice of the observation in the reward's file."
            )

    # The keyword arguments differ from those of the base class.
    @classmethod
    def from_generator(  # type: ignore[override]
        cls,
        generator: "Generator",
        *,
        resolution: int = 64,
        crop: Crop | None = None,
        points: int = 512,
    ) -> Self:
        """Create the observation for a generator's cube.

        Args:
            generator: generator whose shapes are observed.
            resolution: number of grid points per axis of the complete cube.
            crop: shares of the cube that are trimmed from its faces (x, x, y, y, z, z); None chooses them by
                the generator, see `eg3d_rlhf.rewards.slab_crops`.
            points: number of points on the surface.
        """
        chosen_crop = choose_crop([generator], cls.kind).crop if crop is None else tuple(crop)
        return cls(spec=SlabSpec.from_bounds(generator.bounds, resolution, crop=chosen_crop), points=points)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [6, P] of the cloud of one sample."""
        return (6, self.points)

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the clouds [N, 6, P] of the shapes of a field. Differentiable in the field."""
        points, normals, has_surface = level_set(
            field.density_grid(self.spec), field.level, self.spec, self.points, self.seed
        )
        # The product with `has_surface` sets the clouds of shapes without a surface, and their gradients, to
        # zero.
        cloud = torch.cat([in_box(points, self.spec.box_warp, self.spec.centre), normals], dim=2)
        return (cloud * has_surface[..., None]).transpose(1, 2)

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Mirror each cloud [N, 6, P] left to right if its random number is below one half.

        Args:
            observations: clouds [N, 6, P].
            draws: random numbers [N], uniform in [0, 1).
        """
        return mirror(observations, draws)

    def misfits(self, generator: "Generator") -> list[str]:
        """List the differences between the cube of this observation and the cube of a generator.

        Returns: one text per difference; empty if both cubes are equal.
        """
        return SigmaSlab(self.spec).misfits(generator)


@observations.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LiftedPoints(Observation):
    """Observation of clouds [N, 3, P] of the surface points that a frontal camera sees, from a depth map.

    Positions are coordinates of the cube, -1..1. Pixels with an opacity below one half, and points outside
    the cube, are not used. P of the remaining pixels are chosen by `choose_candidates`. The cloud of a shape
    without such a pixel is zero and has no gradient.
    """

    kind: ClassVar[str] = "lifted-points"
    ops: ClassVar[str] = "auto"
    resolution: int = 64  # R
    samples: int = 32  # samples per ray and pass
    points: int = 512  # P
    seed: int = 0  # random seed of the choice of pixels
    radius: float = CameraFamily.radius  # distance of the camera from the world's origin, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # point that the camera looks at, world units
    focal: float = CameraFamily.focal  # focal length in units of the image size
    box_side: float = 1.0  # edge of the cube, world units
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # centre of the cube, world units

    def __post_init__(self) -> None:
        _check_cloud(type(self).__name__, self.points, self.seed)
        if self.points > self.resolution**2:
            raise ValueError(
                f"--points: expected at most {self.resolution**2}, the number of pixels of a depth map with"
                f" --resolution={self.resolution}, got {self.points}. Decrease --points, or increase"
                " --resolution."
            )

    @classmethod
    def from_generator(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int = 64, points: int = 512
    ) -> Self:
        """Create the observation with the frontal camera and the cube of a generator.

        Args:
            generator: generator whose shapes are observed.
            resolution: pixels per edge of the depth map.
            points: number of points of the cloud.
        """
        cameras = generator.cameras
        bounds = generator.bounds
        return cls(
            resolution=resolution,
            points=points,
            radius=cameras.radius,
            pivot=cameras.pivot,
            focal=cameras.focal,
            box_side=bounds.side,
            centre=bounds.centre,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [3, P] of the cloud of one sample."""
        return (3, self.points)

    def _render_points(self, field: Field) -> tuple[torch.Tensor, Rendering]:
        """Render a field from the front, and compute the world point of every pixel.

        The random offsets of the samples along the rays are the same in every call.

        Returns: the world points [N, R * R, 3] of all pixels, and the rendering.
        """
        camera = CameraFamily(self.radius, self.pivot, self.focal).label()
        # Torch's global random state is restored at the end of the block. To store the state of CUDA devices
        # would initialise CUDA, so this is done only if CUDA is in use.
        with torch.random.fork_rng(
            devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        ):
            torch.manual_seed(0)
            rendering = field.render(camera, RenderOptions(resolution=self.resolution, samples=self.samples))
        return lift(rendering.depth, camera), rendering

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the clouds [N, 3, P] of the shapes of a field. Differentiable in the field."""
        points, rendering = self._render_points(field)
        points = in_box(points, self.box_side, self.centre)
        is_usable = (rendering.opacity.flatten(1) >= _OPAQUE) & (points.abs() <= 1).all(dim=2)  # [N, R * R]
        pixel_indices, has_pixels = choose_candidates(is_usable, self.points, self.seed)
        # [N, P, 3]; the product sets the clouds of shapes without a usable pixel to zero.
        clouds = points.gather(1, pixel_indices[..., None].expand(-1, -1, 3)) * has_pixels[..., None]
        return clouds.transpose(1, 2)

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Mirror each cloud [N, 3, P] left to right if its random number is below one half.

        Args:
            observations: clouds [N, 3, P].
            draws: random numbers [N], uniform in [0, 1).
        """
        return mirror(observations, draws)

    def misfits(self, generator: "Generator") -> list[str]:
        """List the differences between camera and cube of this observation and those of a generator.

        The list is empty if all are equal.
        """
        cameras = generator.cameras
        bounds = generator.bounds
        generator_values = {
            "radius": cameras.radius,
            "pivot": cameras.pivot,
            "focal": cameras.focal,
            "box_side": bounds.side,
            "centre": bounds.centre,
        }
        return [
            f"{name} {getattr(self, name)}, got {value}"
            for name, value in generator_values.items()
            if getattr(self, name) != value
        ]


@observations.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedPoints(LiftedPoints):
    """Observation of clouds [N, 3, P] as the published point rewards read them.

    The points belong to evenly spaced pixels of the complete depth map, and each cloud is scaled separately.

    Deviates: the published training chooses pixels at random in each step. This class always uses the pixels
        of the published evaluation.
    """

    kind: ClassVar[str] = "published-points"
    resolution: int = 128
    points: int = 2048

    @classmethod
    def from_generator(  # type: ignore[override]
        cls, generator: "Generator", *, resolution: int = 128, points: int = 2048
    ) -> Self:
        """Create the observation with the frontal camera of a generator.

        Args:
            generator: generator whose shapes are observed.
            resolution: pixels per edge of the depth map.
            points: number of points of the cloud.
        """
        return super().from_generator(generator, resolution=resolution, points=points)

    def observe(self, field: Field) -> torch.Tensor:
        """Compute the clouds [N, 3, P] of the shapes of a field. Differentiable in the field."""
        points, _ = self._render_points(field)
        return self_scaled(points[:, evenly_spaced(points.shape[1], self.points)]).transpose(1, 2)

    def augment(self, observations: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Scale each axis of a cloud by 0.95..1.05, and move each coordinate by at most 0.001, at random.

        Args:
            observations: clouds [N, 3, P].
            draws: random numbers [N] in [0, 1), from which the random numbers of each cloud are derived.
        """
        augmented_clouds = []
        for cloud, cloud_draw in zip(observations, draws, strict=True):
            # A float64 in [0, 1) has 53 random bits, which become the seed of this cloud's generator.
            rng = np.random.default_rng(int(cloud_draw * 2**53))
            scale = torch.from_numpy(rng.uniform(0.95, 1.05, (3, 1))).to(cloud)
            jitter = torch.from_numpy(rng.uniform(-0.001, 0.001, tuple(cloud.shape))).to(cloud)
            augmented_clouds.append(cloud * scale + jitter)
        return torch.stack(augmented_clouds)


networks.register("points", build, own_presets(6, {"resolution": 64}))
networks.register("lifted-points", build, own_presets(3, {"resolution": 64}))
networks.register("published-points", build, published_presets())
