"""Where cameras stand and what they see of assets: seeded draws as public text-to-3D has them, the world of
its four-view networks, the test problem's four orthographic views of voxels, perspective views of any field.

Our world is y up with a portrait's camera at +z, camera axes OpenCV's (x right, y down, z forward). MVDream's
is z up, camera axes OpenGL's (x right, y up, z back). An azimuth of 0 is the front in both and rises towards
+x.

Letters: A assets, V views of each, B = A * V, views of an asset adjacent; N voxels per edge, R pixels per
edge.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from eg3d_rlhf.core.field import RenderOptions
from eg3d_rlhf.generators.assets.asset import Asset
from eg3d_rlhf.generators.assets.grids import Voxels
from training.rendering.cameras import intrinsics_matrix, look_at, pack_label

_TINY = 1e-8  # of MVDream's division by the translation's norm
# how finished assets are looked at: world units, degrees
FINISHED = {"distance": 2.6, "fov": 30.0, "elevation": 15.0}


class Views(NamedTuple):
    """B cameras; angles in degrees."""

    cameras: torch.Tensor  # [B, 25] labels: 16 cam2world, 9 intrinsics
    azimuth: torch.Tensor  # [B] in (-180, 180], 0 is the front
    elevation: torch.Tensor  # [B]
    distance: torch.Tensor  # [B] from the centre, world units
    fov: torch.Tensor  # [B]


@dataclass(frozen=True, kw_only=True)
class CameraDraws:
    """Ranges that cameras are drawn from; the defaults are those that MVDream, DreamReward, DreamDPO and
    RewardSDS share.
    """

    views: int = 4  # of each asset, evenly apart in azimuth
    fov: tuple[float, float] = (15.0, 60.0)  # degrees, over the image's edge
    elevation: tuple[float, float] = (0.0, 30.0)  # degrees
    distance: tuple[float, float] = (0.8, 1.0)  # in half_side / tan(fov / 2)
    half_side: float = 0.5  # of the cube that is looked at, world units

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Views of A assets, on the CPU: one field of view, elevation and distance for each, azimuths a V-th
        of the circle apart.

        Half of the elevations are uniform in angle, half in height, which is uniform on the sphere. An
        asset's first azimuth lies in [-180, -180 + 360/V).
        """
        u = torch.rand(assets, 5, generator=rng, dtype=torch.float64)
        fov, angle, distance = (
            low + u[:, i] * (high - low)
            for i, (low, high) in enumerate((self.fov, self.elevation, self.distance))
        )
        low, high = (math.sin(math.radians(end)) for end in self.elevation)
        share = (angle - self.elevation[0]) / max(self.elevation[1] - self.elevation[0], _TINY)
        elevation = torch.where(u[:, 3] < 0.5, angle, torch.rad2deg(torch.asin(low + share * (high - low))))
        azimuth = (torch.arange(self.views) + u[:, 4:]) * (360 / self.views) - 180  # [A, V]
        distance = distance * self.half_side / torch.tan(torch.deg2rad(fov) / 2)
        each = (value.repeat_interleave(self.views) for value in (elevation, distance, fov))
        return views_at(azimuth.flatten(), *each)


def views_at(
    azimuth: torch.Tensor, elevation: torch.Tensor, distance: torch.Tensor, fov: torch.Tensor
) -> Views:
    """The views of given angles [B] in degrees and distances [B]: cameras look at the origin, y is up."""
    around = torch.deg2rad(azimuth)
    up = torch.deg2rad(elevation)
    # [B, 3]
    place = (
        torch.stack([around.sin() * up.cos(), up.sin(), around.cos() * up.cos()], dim=1) * distance[:, None]
    )
    focal = 0.5 / torch.tan(torch.deg2rad(fov) / 2)
    intrinsics = torch.stack([intrinsics_matrix(float(f)) for f in focal])
    cameras = pack_label(look_at(place, torch.zeros_like(place)).float(), intrinsics)
    return Views(cameras, azimuth.float(), elevation.float(), distance.float(), fov.float())


def evenly_around(
    assets: int, views: int = 4, distance: float = 1.5, fov: float = 40.0, elevation: float = 0.0
) -> Views:
    """The same views of every asset, the first from the front: those of the test problem, turntables and
    judges.
    """
    azimuth = (torch.arange(views, dtype=torch.float64) * (360 / views)).repeat(assets)
    azimuth = torch.where(azimuth > 180, azimuth - 360, azimuth)
    return views_at(azimuth, *(torch.full_like(azimuth, value) for value in (elevation, distance, fov)))


# row of the z-up world from rows of ours: x, -z, y
_TO_Z_UP = ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
# about z: -y to +x
_QUARTER_TURN = ((0.0, -1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
_FLIP = (1.0, -1.0, -1.0, 1.0)  # columns: OpenCV's camera axes to OpenGL's


def to_z_up(cam2world: torch.Tensor) -> torch.Tensor:
    """MVDream's cam2world [B, 4, 4] (z up, OpenGL axes) of ours (y up, OpenCV axes). Differentiable."""
    return cam2world.new_tensor(_TO_Z_UP) @ cam2world * cam2world.new_tensor(_FLIP)


def unit_distance(cam2world: torch.Tensor) -> torch.Tensor:
    """[B, 16] of cam2world [B, 4, 4]: its translation divided by (its norm + 1e-8), row-major. The argument
    stays as it is.

    Deviates: MVDream's own writes into the caller's tensor.
    """
    place = cam2world[:, :3, 3:]
    # [B, 3, 4]
    rows = torch.cat([cam2world[:, :3, :3], place / (place.norm(dim=1, keepdim=True) + _TINY)], dim=2)
    return torch.cat([rows, cam2world[:, 3:]], dim=1).flatten(1)


def network_cameras(cameras: torch.Tensor) -> torch.Tensor:
    """What a four-view network of MVDream's kind reads, [B, 16], of our labels [B, 25] or their first 16
    numbers.

    Fronts meet: ours, +z, becomes its +x, where threestudio and DreamReward say "front view". `to_z_up` alone
    would put it at -y, where MVDream's own table of cameras begins to count; its programs begin 90 degrees
    on.
    """
    return unit_distance(cameras.new_tensor(_QUARTER_TURN) @ to_z_up(cameras[:, :16].reshape(-1, 4, 4)))


# What a prior is shown of assets: the test problem's four orthographic views of voxels, all at once, or
# perspective views of any field.

DISTANCE = 1.5  # of the orthographic cameras from the centre, in sides of the cube
ORTHOGRAPHIC = 4


class Pictures(NamedTuple):
    """What V cameras see of each of A assets."""

    images: torch.Tensor  # [B, C, R, R] in 0..1: RGB, and inverse depth where C is 4
    opacity: torch.Tensor  # [B, 1, R, R]


class Renderer(Protocol):
    """Draws cameras and renders; the loop knows nothing else of views."""

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Cameras of one step."""

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> Pictures:
        """What they see, over a background [3] or [B, 3] in 0..1. Differentiable in the asset."""


def nearness(depth: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """Inverse depth from 1 at `near` to 0 at `far`."""
    return (1 / depth - 1 / far) / (1 / near - 1 / far)


def four_views(raw: torch.Tensor, colours: torch.Tensor, pitch: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels seen along z and x from both ends: front (+z), +x, back, -x. Rays run through the voxels'
    centres, so nothing is sampled.

        tau_i = softplus(raw_i - 1) pitch,  w_i = (1 - exp(-tau_i)) exp(-sum of tau in front of i),
        channel = sum_i w_i c_i

    Both ends share tau and its running sum. Args: raw [A, N, N, N] and colours [A, 3, N, N, N], axes z, y, x;
    pitch: world units.
    Returns: channels [A, 4, 4, N, N] (view, channel; RGB and inverse depth, premultiplied by opacity) and
    opacity [A, 4, 1, N, N]; rows from the top. Differentiable in raw and colours.
    """
    n = raw.shape[-1]
    tau = F.softplus(raw - 1) * pitch
    alpha = -torch.expm1(-tau)
    side = pitch * (n - 1)
    across = torch.linspace(-0.5, 0.5, n).to(raw) * side  # coordinate along a ray, rising
    disparity = nearness(DISTANCE * side - across, (DISTANCE - 0.5) * side, (DISTANCE + 0.5) * side)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for axis, ends in ((1, ("back", "front")), (3, ("left", "right"))):
        behind = tau.cumsum(dim=axis)  # inclusive, from the low end
        total = behind.narrow(axis, n - 1, 1)
        shape = [1, 1, 1, 1]
        shape[axis] = n
        for end, before, near in zip(
            ends, (behind - tau, total - behind), (disparity.flip(0), disparity), strict=True
        ):
            weights = alpha * torch.exp(-before)  # [A, N, N, N]
            rgb = (weights.unsqueeze(1) * colours).sum(dim=axis + 1)  # [A, 3, N, N]
            depth = (weights * near.view(shape)).sum(dim=axis).unsqueeze(1)
            seen[end] = torch.cat([rgb, depth], dim=1), weights.sum(dim=axis).unsqueeze(1)
    # along z pictures are [y, x], along x [z, y]; rows from the top, columns to the camera's right
    turned = {
        "front": lambda p: p.flip(2),
        "right": lambda p: p.transpose(2, 3).flip(2, 3),
        "back": lambda p: p.flip(2, 3),
        "left": lambda p: p.transpose(2, 3).flip(2),
    }
    channels, opacity = zip(*([turned[end](part) for part in seen[end]] for end in turned), strict=True)
    return torch.stack(channels, dim=1), torch.stack(opacity, dim=1)


class FourViews:
    """`Renderer` of the test problem: RGB and inverse depth of voxels from four sides, every camera the same
    in every step.
    """

    def __init__(self, resolution: int = 16):
        self.resolution = resolution

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """The four sides; draws nothing."""
        del rng
        return evenly_around(assets, ORTHOGRAPHIC, DISTANCE)

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> Pictures:
        """See `Renderer`. Inverse depth is over 0."""
        assert isinstance(asset, Voxels) and len(views.cameras) == ORTHOGRAPHIC * len(asset)
        channels, opacity = (
            part.flatten(0, 1) for part in four_views(asset.raw, torch.sigmoid(asset.paint), asset.pitch)
        )
        below = F.pad(background.to(channels).expand(len(channels), 3), (0, 1))  # [B, 4]
        images = channels + (1 - opacity) * below[:, :, None, None]
        if asset.resolution != self.resolution:
            images, opacity = (F.adaptive_avg_pool2d(part, self.resolution) for part in (images, opacity))
        return Pictures(images, opacity)


class Cameras(Protocol):
    """Where the cameras of a step stand."""

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """As many of each asset."""


class PerspectiveViews:
    """`Renderer` of perspective pictures: RGB of any field, from cameras drawn as public text-to-3D draws
    them unless it says otherwise.
    """

    def __init__(self, resolution: int = 64, cameras: Cameras | None = None, samples: int | None = None):
        self.options = RenderOptions(resolution=resolution, samples=samples)
        self.cameras: Cameras = cameras or CameraDraws()

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """See `CameraDraws.draw`."""
        return self.cameras.draw(assets, rng)

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> Pictures:
        """See `Renderer`: one view of every asset after the other."""
        each = views.cameras.unflatten(0, (len(asset), -1)).unbind(1)  # V of [A, 25]
        seen = [asset.render(cameras, self.options) for cameras in each]
        raw, opacity = (
            torch.stack(parts, dim=1).flatten(0, 1)
            for parts in zip(*((s.raw, s.opacity) for s in seen), strict=True)
        )
        below = background.to(raw).expand(len(raw), 3)[:, :, None, None]
        return Pictures((raw + 1) / 2 + (1 - opacity) * below, opacity)
