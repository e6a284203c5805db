"""Depth maps of a field, from one camera or three: what the depth rewards of arXiv 2606.27305 read.

Letters: N shapes, V views, C channels (1, or 2 with the mask), R pixels per edge. A depth is a distance along the pixel's unit ray.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from eg3d_rlhf.core.field import CameraFamily, Field, RenderOptions, fixed_draws
from eg3d_rlhf.rewards.observations import Observation, register

if TYPE_CHECKING:
    from eg3d_rlhf.generators import Generator

VIEWS = {1: (0.0,), 3: (1.0, 0.0, -1.0)}  # radians from frontal, in the published order
PUBLISHED_RESOLUTION = 128  # pixels per edge of a published map
PUBLISHED_FOCAL = 4.2633910179138184  # of a field of view of 18.837 degrees; FFHQ's labels have 4.2647
_MATCHES = 1e-6  # world units


def nearness(depth: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """1 - (depth - near) / (far - near), of the same shape: 1 at `near`, 0 at `far`, not clamped. Differentiable."""
    return 1 - (depth - near) / (far - near)


@register
@dataclass(frozen=True, kw_only=True)
class Depth(Observation):
    """Maps [N, V, C, R, R] of how near the surface is, 1 at the near end of the generator's rays and 0 at the far end.

    `masked` (ours) multiplies nearness by the ray's opacity and adds opacity as a second channel, so that what lies beside the shape is 0
    in both whatever shares its batch, and silhouettes have a gradient. Without it, the published map: the marcher's depth alone.
    """

    kind: ClassVar[str] = "depth"
    ops: ClassVar[str] = "auto"
    yaws: tuple[float, ...] = VIEWS[1]  # of the cameras, radians from frontal
    resolution: int = 64  # R
    samples: int | None = 32  # per ray and pass; None: the generator's own
    masked: bool = True
    radius: float = CameraFamily.radius  # of the cameras, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)  # point that they look at
    focal: float = CameraFamily.focal  # over the image size
    near: float = 2.25  # world units along the ray
    far: float = 3.3

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far or self.resolution < 1 or not self.yaws:
            raise ValueError(f"depth: expected 0 < near < far, pixels and views, got {self}. Correct the reward's file.")

    @classmethod
    def of(cls, generator: "Generator", *, resolution: int | None = None, views: int = 1, published: bool = False) -> Self:  # type: ignore[override]
        """As the generator's own cameras see it, between the ends of its own rays, or else the front and the back of its cube.

        Args: resolution: pixels per edge, 64, or 128 for published maps; views: 1 or 3; published: their field of view, the generator's
        own samples, no mask.
        Raises: ValueError for another number of views, and a generator whose cameras stand inside the shape.
        """
        if views not in VIEWS:
            raise ValueError(f"depth: expected {' or '.join(map(str, VIEWS))} views, got {views}. Choose one of them.")
        cameras, half = generator.cameras, generator.bounds.side / 2
        if cameras.radius <= half * 3**0.5:
            raise ValueError(
                f"--observation=depth: expected cameras outside the shape's cube of side {2 * half:g}, got {cameras.radius:g} from its "
                "middle. Such a generator has no depth maps; use another observation."
            )
        near, far = reach(generator)
        kind = {"samples": None, "masked": False, "focal": PUBLISHED_FOCAL} if published else {"focal": cameras.focal}
        size = resolution or (PUBLISHED_RESOLUTION if published else cls.resolution)
        return cls(yaws=VIEWS[views], resolution=size, radius=cameras.radius, pivot=cameras.pivot, near=near, far=far, **kind)

    @property
    def shape(self) -> tuple[int, ...]:
        """(V, C, R, R)."""
        return (len(self.yaws), 1 + self.masked, self.resolution, self.resolution)

    def cameras(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Labels [V, 25]."""
        family = CameraFamily(self.radius, self.pivot, self.focal)
        with fixed_draws():  # the pose sampler draws, though to no effect
            return torch.cat([family.label(yaw, device=device) for yaw in self.yaws])

    def observe(self, field: Field) -> torch.Tensor:
        """See `Observation`. The field's planes are those it was made with, for all views; each view's rays are jittered alike."""
        options, maps = RenderOptions(resolution=self.resolution, samples=self.samples), []
        for camera in self.cameras().split(1):
            with fixed_draws():
                seen = field.render(camera, options)
            near = nearness(seen.depth, self.near, self.far)
            maps.append(torch.cat([near * seen.opacity, seen.opacity], dim=1) if self.masked else near)  # [N, C, R, R]
        return torch.stack(maps, dim=1)

    def augment(self, observed: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
        """Left and right are exchanged with probability one half: maps are mirrored, and views change places."""
        mirrored = torch.from_numpy(draws < 0.5).to(observed.device)
        return torch.where(mirrored[:, None, None, None, None], mirror(observed), observed)

    def misfits(self, generator: "Generator") -> list[str]:
        """The camera must stand where the generator's do, and its rays reach as far."""
        theirs = generator.cameras
        pairs: list[tuple[str, Any, Any]] = [("camera radius", self.radius, theirs.radius), ("camera pivot", self.pivot, theirs.pivot)]
        pairs.append(("rays between", (self.near, self.far), reach(generator)))
        return [f"{name} {mine}, got {theirs}" for name, mine, theirs in pairs if not np.allclose(mine, theirs, rtol=0, atol=_MATCHES)]


def reach(generator: "Generator") -> tuple[float, float]:
    """Least and greatest depth: the ends of the generator's rays, or its cube's front and back as seen from the front."""
    radius, half = generator.cameras.radius, generator.bounds.side / 2
    return generator.cameras.span or (radius - half, radius + half)


def mirror(observed: torch.Tensor) -> torch.Tensor:
    """Maps [N, V, C, R, R] of the shape exchanged left and right; yaws are symmetric about the front."""
    return observed.flip(1, 4)
