"""What point rewards read: a cloud of points on the level set of the density itself, or lifted from the depth map of a frontal camera.

`points` sees all sides of a shape and `lifted-points` one, both in world coordinates, so that size and place count. `published-points`
is the cloud of the published point rewards: the background is in it, and each sample has a scale of its own.

Letters: N shapes, P points, R pixels per edge.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from eg3d_rlhf.core.field import CameraFamily, Field, Rendering, RenderOptions
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.rewards.observations import Observation, SigmaSlab, register
from eg3d_rlhf.rewards.observations.clouds import draw, evenly, in_box, level_set, lift, self_scaled

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator

_OPAQUE = 0.5  # least opacity of a pixel whose depth is a surface's


def mirror(observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Left and right of clouds [N, 3 or 6, P] exchanged with probability one half: x of positions and normals changes its sign."""
    signs = torch.ones_like(observed[:, :, :1])
    signs[torch.from_numpy(draws < 0.5), ::3] = -1.0
    return observed * signs


def _check_cloud(who: str, points: int, seed: int) -> None:
    for name, value, least in (("points", points, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{who}.{name}: expected an integer of at least {least}, got {value!r}. Correct it.")


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelSetPoints(Observation):
    """Clouds [N, 6, P]: positions on the surface over half the box's side, and unit normals; see `clouds.level_set`.

    Positions are relative to the box's centre and in -1..1 whatever the shape: scale and place are the same for all. A shape without a
    surface in the box is all zeros and has no gradient.
    """

    kind: ClassVar[str] = "points"
    spec: SlabSpec = SlabSpec(resolution=64)  # grid on whose edges the level is looked for; straight
    points: int = 512  # P
    seed: int = 0  # of which crossings are taken

    def __post_init__(self) -> None:
        _check_cloud("LevelSetPoints", self.points, self.seed)
        if self.spec.lattice != "straight":
            raise ValueError(f"LevelSetPoints.spec: expected a straight lattice, got {self.spec.lattice!r}. Use 'straight'.")

    @classmethod
    def of(  # type: ignore[override]  # its keywords are its own
        cls, generator: "Generator", *, resolution: int = 64, crop: tuple[float, float, float, float, float, float] | None = None,
        points: int = 512,
    ) -> Self:
        """Args: resolution, crop: of the grid, as a slab's; points: drawn on the surface."""
        return cls(spec=SigmaSlab.of(generator, resolution=resolution, crop=crop).spec, points=points)

    @property
    def shape(self) -> tuple[int, ...]:
        """(6, P)."""
        return (6, self.points)

    def observe(self, field: Field) -> torch.Tensor:
        """See `Observation`."""
        points, normals, found = level_set(field.density_grid(self.spec), field.level, self.spec, self.points, self.seed)
        cloud = torch.cat([in_box(points, self.spec.box_warp, self.spec.centre), normals], dim=2)
        return (cloud * found[..., None]).transpose(1, 2)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Left and right are exchanged with probability one half."""
        return mirror(observed, draws)

    def misfits(self, generator: "Generator") -> list[str]:
        """The scene cube must be the generator's."""
        return SigmaSlab(self.spec).misfits(generator)

    def to_dict(self) -> dict[str, Any]:
        """See `Observation`."""
        return {"kind": self.kind, "spec": self.spec.to_dict(), "points": self.points, "seed": self.seed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """See `Observation`."""
        return super().from_dict({**values, "spec": SlabSpec.from_dict(values.get("spec", {}))})


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LiftedPoints(Observation):
    """Clouds [N, 3, P] lifted from the depth map of a frontal camera: one side of the shape, in halves of the box's side.

    Pixels of opacity under one half and points outside the box are left out; of the rest P are drawn, the same pixels wherever they are
    seen. A shape of which nothing is seen is all zeros and has no gradient.
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
                f"--points: expected at most the {self.resolution**2} pixels of a depth map of {self.resolution}, got {self.points}. "
                "Take fewer, or raise --resolution."
            )

    @classmethod
    def of(cls, generator: "Generator", *, resolution: int = 64, points: int = 512) -> Self:  # type: ignore[override]
        """Args: resolution: pixels per edge of the depth map; points: drawn of its pixels."""
        cameras, box = generator.cameras, generator.bounds
        return cls(
            resolution=resolution, points=points, radius=cameras.radius, pivot=cameras.pivot, focal=cameras.focal, box_side=box.side,
            centre=box.centre,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """(3, P)."""
        return (3, self.points)

    def _seen(self, field: Field) -> tuple[torch.Tensor, Rendering]:
        """World points of all pixels [N, R * R, 3], and the rendering; the rays' jitter is the same every time."""
        camera = CameraFamily(self.radius, self.pivot, self.focal).label()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            torch.manual_seed(0)
            seen = field.render(camera, RenderOptions(resolution=self.resolution, samples=self.samples))
        return lift(seen.depth, camera), seen

    def observe(self, field: Field) -> torch.Tensor:
        """See `Observation`."""
        points, seen = self._seen(field)
        points = in_box(points, self.box_side, self.centre)
        usable = (seen.opacity.flatten(1) >= _OPAQUE) & (points.abs() <= 1).all(dim=2)
        chosen, found = draw(usable, self.points, self.seed)
        return (points.gather(1, chosen[..., None].expand(-1, -1, 3)) * found[..., None]).transpose(1, 2)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Left and right are exchanged with probability one half."""
        return mirror(observed, draws)

    def misfits(self, generator: "Generator") -> list[str]:
        """The camera must stand where the generator's do, and the box must be its own."""
        cameras, box = generator.cameras, generator.bounds
        theirs = {"radius": cameras.radius, "pivot": cameras.pivot, "focal": cameras.focal, "box_side": box.side, "centre": box.centre}
        return [f"{name} {getattr(self, name)}, got {value}" for name, value in theirs.items() if getattr(self, name) != value]


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedPoints(LiftedPoints):
    """Clouds [N, 3, P] as the published point rewards read them: every so many pixels of the whole map, each cloud on its own scale.

    Deviates: the published training draws other pixels each time; here the pixels are those of its evaluation.
    """

    kind: ClassVar[str] = "published-points"
    resolution: int = 128
    points: int = 2048

    @classmethod
    def of(cls, generator: "Generator", *, resolution: int = 128, points: int = 2048) -> Self:  # type: ignore[override]
        """See `LiftedPoints.of`."""
        return super().of(generator, resolution=resolution, points=points)

    def observe(self, field: Field) -> torch.Tensor:
        """See `Observation`."""
        points = self._seen(field)[0]
        return self_scaled(points[:, evenly(points.shape[1], self.points)]).transpose(1, 2)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Each axis is scaled by 0.95 ... 1.05, and each coordinate moved by at most 0.001."""
        scaled = []
        for cloud, number in zip(observed, draws, strict=True):
            random = np.random.default_rng(int(number * 2**53))
            scale, jitter = random.uniform(0.95, 1.05, (3, 1)), random.uniform(-0.001, 0.001, tuple(cloud.shape))
            scaled.append(cloud * torch.from_numpy(scale).to(cloud) + torch.from_numpy(jitter).to(cloud))
        return torch.stack(scaled)
