"""Where cameras stand: seeded draws as public text-to-3D has them, and the world of its four-view networks.

Our world is y up with a portrait's camera at +z, camera axes OpenCV's (x right, y down, z forward). MVDream's is z up, camera axes
OpenGL's (x right, y up, z back). An azimuth of 0 is the front in both and rises towards +x.

Letters: A assets, V views of each, B = A * V, views of an asset adjacent.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from training.rendering.cameras import intrinsics_matrix, look_at, pack_label

_TINY = 1e-8  # of MVDream's division by the translation's norm
FINISHED = {"distance": 2.6, "fov": 30.0, "elevation": 15.0}  # how finished assets are looked at: world units, degrees


class Views(NamedTuple):
    """B cameras; angles in degrees."""

    cameras: torch.Tensor  # [B, 25] labels: 16 cam2world, 9 intrinsics
    azimuth: torch.Tensor  # [B] in (-180, 180], 0 is the front
    elevation: torch.Tensor  # [B]
    distance: torch.Tensor  # [B] from the centre, world units
    fov: torch.Tensor  # [B]


@dataclass(frozen=True, kw_only=True)
class CameraDraws:
    """Ranges that cameras are drawn from; the defaults are those that MVDream, DreamReward, DreamDPO and RewardSDS share."""

    views: int = 4  # of each asset, evenly apart in azimuth
    fov: tuple[float, float] = (15.0, 60.0)  # degrees, over the image's edge
    elevation: tuple[float, float] = (0.0, 30.0)  # degrees
    distance: tuple[float, float] = (0.8, 1.0)  # in half_side / tan(fov / 2)
    half_side: float = 0.5  # of the cube that is looked at, world units

    def __post_init__(self) -> None:
        for name, (low, high), least, most in (
            ("fov", self.fov, 0, 180), ("elevation", self.elevation, -90, 90), ("distance", self.distance, 0, math.inf),
        ):
            if not least < low <= high < most:
                raise ValueError(f"CameraDraws: expected {least} < {name} < {most}, low <= high, got {(low, high)}. Correct it.")
        if self.views < 1 or self.half_side <= 0:
            raise ValueError(f"CameraDraws: expected a view and half_side > 0, got {self.views}, {self.half_side:g}. Correct it.")

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Views of A assets, on the CPU: one field of view, elevation and distance for each, azimuths a V-th of the circle apart.

        Half of the elevations are uniform in angle, half in height, which is uniform on the sphere. An asset's first azimuth lies in
        [-180, -180 + 360/V).
        """
        u = torch.rand(assets, 5, generator=rng, dtype=torch.float64)
        fov, angle, distance = (low + u[:, i] * (high - low) for i, (low, high) in enumerate((self.fov, self.elevation, self.distance)))
        low, high = (math.sin(math.radians(end)) for end in self.elevation)
        share = (angle - self.elevation[0]) / max(self.elevation[1] - self.elevation[0], _TINY)
        elevation = torch.where(u[:, 3] < 0.5, angle, torch.rad2deg(torch.asin(low + share * (high - low))))
        azimuth = (torch.arange(self.views) + u[:, 4:]) * (360 / self.views) - 180  # [A, V]
        distance = distance * self.half_side / torch.tan(torch.deg2rad(fov) / 2)
        each = (value.repeat_interleave(self.views) for value in (elevation, distance, fov))
        return views_at(azimuth.flatten(), *each)


def views_at(azimuth: torch.Tensor, elevation: torch.Tensor, distance: torch.Tensor, fov: torch.Tensor) -> Views:
    """The views of given angles [B] in degrees and distances [B]: cameras look at the origin, y is up."""
    around, up = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    place = torch.stack([around.sin() * up.cos(), up.sin(), around.cos() * up.cos()], dim=1) * distance[:, None]  # [B, 3]
    focal = 0.5 / torch.tan(torch.deg2rad(fov) / 2)
    intrinsics = torch.stack([intrinsics_matrix(float(f)) for f in focal])
    cameras = pack_label(look_at(place, torch.zeros_like(place)).float(), intrinsics)
    return Views(cameras, azimuth.float(), elevation.float(), distance.float(), fov.float())


def evenly_around(assets: int, views: int = 4, distance: float = 1.5, fov: float = 40.0, elevation: float = 0.0) -> Views:
    """The same views of every asset, the first from the front: those of the test problem, turntables and judges."""
    azimuth = (torch.arange(views, dtype=torch.float64) * (360 / views)).repeat(assets)
    azimuth = torch.where(azimuth > 180, azimuth - 360, azimuth)
    return views_at(azimuth, *(torch.full_like(azimuth, value) for value in (elevation, distance, fov)))


# row of the z-up world from rows of ours: x, -z, y
_TO_Z_UP = ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
_QUARTER_TURN = ((0.0, -1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))  # about z: -y to +x
_FLIP = (1.0, -1.0, -1.0, 1.0)  # columns: OpenCV's camera axes to OpenGL's, and back


def to_z_up(cam2world: torch.Tensor) -> torch.Tensor:
    """MVDream's cam2world [B, 4, 4] (z up, OpenGL axes) of ours (y up, OpenCV axes). Differentiable."""
    return cam2world.new_tensor(_TO_Z_UP) @ cam2world * cam2world.new_tensor(_FLIP)


def to_y_up(cam2world: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_z_up`."""
    return cam2world.new_tensor(_TO_Z_UP).T @ cam2world * cam2world.new_tensor(_FLIP)


def unit_distance(cam2world: torch.Tensor) -> torch.Tensor:
    """[B, 16] of cam2world [B, 4, 4]: its translation divided by (its norm + 1e-8), row-major. The argument stays as it is.

    Deviates: MVDream's own writes into the caller's tensor.
    """
    place = cam2world[:, :3, 3:]
    rows = torch.cat([cam2world[:, :3, :3], place / (place.norm(dim=1, keepdim=True) + _TINY)], dim=2)  # [B, 3, 4]
    return torch.cat([rows, cam2world[:, 3:]], dim=1).flatten(1)


def network_cameras(cameras: torch.Tensor) -> torch.Tensor:
    """What a four-view network of MVDream's kind reads, [B, 16], of our labels [B, 25] or their first 16 numbers.

    Fronts meet: ours, +z, becomes its +x, where threestudio and DreamReward say "front view". `to_z_up` alone would put it at -y, where
    MVDream's own table of cameras begins to count; its programs begin 90 degrees on.
    """
    return unit_distance(cameras.new_tensor(_QUARTER_TURN) @ to_z_up(cameras[:, :16].reshape(-1, 4, 4)))
