"""Cameras around assets, and renders of assets.

Cameras: seeded samples as in public text-to-3D code, and the conventions of its four-view networks. Renders:
four orthographic views of voxels (the test problem), and perspective views of any field.

In our world y points up, the camera of a portrait is at +z, and camera axes are OpenCV's (x right, y down, z
forward). In MVDream's world z points up, and camera axes are OpenGL's (x right, y up, z backward). An azimuth
of 0 is the front in both, and increases towards +x.

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

_TINY = 1e-8  # MVDream adds this to the norm of a translation before it divides by it
# views of finished assets: world units, degrees
FINISHED = {"distance": 2.6, "fov": 30.0, "elevation": 15.0}


class Views(NamedTuple):
    """B cameras. Angles are in degrees."""

    cameras: torch.Tensor  # [B, 25] labels: 16 cam2world, 9 intrinsics
    azimuth: torch.Tensor  # [B] in (-180, 180], 0 is the front
    elevation: torch.Tensor  # [B] above the horizon
    distance: torch.Tensor  # [B] from the centre, world units
    fov: torch.Tensor  # [B] field of view over the edge of the image


@dataclass(frozen=True, kw_only=True)
class CameraDraws:
    """Ranges from which cameras are sampled. The defaults are those of MVDream, DreamReward, DreamDPO and
    RewardSDS.
    """

    views: int = 4  # per asset, evenly spaced in azimuth
    fov: tuple[float, float] = (15.0, 60.0)  # degrees, over the edge of the image
    elevation: tuple[float, float] = (0.0, 30.0)  # degrees
    distance: tuple[float, float] = (0.8, 1.0)  # in units of half_side / tan(fov / 2)
    half_side: float = 0.5  # half the edge of the cube that the cameras look at, world units

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Sample views of A assets, on the CPU.

        Each asset gets one field of view, elevation and distance, and azimuths 360/V degrees apart. Half of
        the elevations are uniform in angle; the other half are uniform in height, that is, uniform on the
        sphere. The first azimuth of an asset lies in [-180, -180 + 360/V).
        """
        # Columns: fov, elevation, distance, choice of the elevation's distribution, azimuth.
        u = torch.rand(assets, 5, generator=rng, dtype=torch.float64)
        fov, angle, distance = (
            low + u[:, i] * (high - low)
            for i, (low, high) in enumerate((self.fov, self.elevation, self.distance))
        )
        lowest_sine, highest_sine = (math.sin(math.radians(end)) for end in self.elevation)
        share = (angle - self.elevation[0]) / max(self.elevation[1] - self.elevation[0], _TINY)
        elevation = torch.where(
            u[:, 3] < 0.5,
            angle,
            torch.rad2deg(torch.asin(lowest_sine + share * (highest_sine - lowest_sine))),
        )
        # One random offset per asset, then equal steps.
        azimuth = (torch.arange(self.views) + u[:, 4:]) * (360 / self.views) - 180  # [A, V]
        # At factor 1 the cube's side fills the field of view.
        distance = distance * self.half_side / torch.tan(torch.deg2rad(fov) / 2)
        # one value per asset -> one per view, [B]
        per_view = (value.repeat_interleave(self.views) for value in (elevation, distance, fov))
        return views_at(azimuth.flatten(), *per_view)


def views_at(
    azimuth: torch.Tensor, elevation: torch.Tensor, distance: torch.Tensor, fov: torch.Tensor
) -> Views:
    """Return the views of angles [B] in degrees and distances [B]. Cameras look at the origin; y points
    up.
    """
    azimuth_radians = torch.deg2rad(azimuth)
    elevation_radians = torch.deg2rad(elevation)
    # [B, 3]
    position = (
        torch.stack(
            [
                azimuth_radians.sin() * elevation_radians.cos(),
                elevation_radians.sin(),
                azimuth_radians.cos() * elevation_radians.cos(),
            ],
            dim=1,
        )
        * distance[:, None]
    )
    # Focal length over image size.
    focal = 0.5 / torch.tan(torch.deg2rad(fov) / 2)
    intrinsics = torch.stack([intrinsics_matrix(float(f)) for f in focal])
    cameras = pack_label(look_at(position, torch.zeros_like(position)).float(), intrinsics)
    return Views(cameras, azimuth.float(), elevation.float(), distance.float(), fov.float())


def evenly_around(
    assets: int, views: int = 4, distance: float = 1.5, fov: float = 40.0, elevation: float = 0.0
) -> Views:
    """Return evenly spaced views, the same for every asset, the first from the front.

    The test problem, turntables and image-based evaluators use them.
    """
    # The front first, then counter-clockwise seen from above.
    azimuth = (torch.arange(views, dtype=torch.float64) * (360 / views)).repeat(assets)
    azimuth = torch.where(azimuth > 180, azimuth - 360, azimuth)  # azimuths are in (-180, 180]
    return views_at(azimuth, *(torch.full_like(azimuth, value) for value in (elevation, distance, fov)))


# rows of the z-up world from rows of ours: x, -z, y
_TO_Z_UP = ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
# rotation by 90 degrees about z, from -y to +x
_QUARTER_TURN = ((0.0, -1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
_FLIP = (1.0, -1.0, -1.0, 1.0)  # signs of columns: OpenCV's camera axes to OpenGL's


def to_z_up(cam2world: torch.Tensor) -> torch.Tensor:
    """Convert cam2world [B, 4, 4] from ours (y up, OpenCV axes) to MVDream's (z up, OpenGL axes).
    Differentiable.
    """
    return cam2world.new_tensor(_TO_Z_UP) @ cam2world * cam2world.new_tensor(_FLIP)


def unit_distance(cam2world: torch.Tensor) -> torch.Tensor:
    """Divide the translation of cam2world [B, 4, 4] by (its norm + 1e-8). Returns [B, 16], row-major.

    Deviates: MVDream's function writes into the caller's tensor; this one does not.
    """
    translation = cam2world[:, :3, 3:]
    # [B, 3, 4]
    rows = torch.cat(
        [cam2world[:, :3, :3], translation / (translation.norm(dim=1, keepdim=True) + _TINY)], dim=2
    )
    return torch.cat([rows, cam2world[:, 3:]], dim=1).flatten(1)


def network_cameras(cameras: torch.Tensor) -> torch.Tensor:
    """Convert our camera labels [B, 25], or their first 16 numbers, to the input [B, 16] of networks like
    MVDream.

    Our front, +z, becomes their +x, which threestudio and DreamReward call "front view". `to_z_up` alone
    would give -y, where MVDream's own table of cameras starts; its programs start 90 degrees further.
    """
    return unit_distance(cameras.new_tensor(_QUARTER_TURN) @ to_z_up(cameras[:, :16].reshape(-1, 4, 4)))


# Renders of assets for a prior: all four orthographic views of voxels at once, or perspective views of any
# field.

DISTANCE = 1.5  # of the orthographic cameras from the centre, in sides of the cube
ORTHOGRAPHIC = 4  # number of these views


class Pictures(NamedTuple):
    """Renders of A assets from V cameras each."""

    images: torch.Tensor  # [B, C, R, R] in 0..1: RGB, and inverse depth if C is 4
    opacity: torch.Tensor  # [B, 1, R, R]


class Renderer(Protocol):
    """An object that samples cameras and renders assets. The optimisation loop uses views only through it."""

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Sample the cameras of one step."""

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> Pictures:
        """Render over a background [3] or [B, 3] in 0..1. Differentiable in the asset."""


def nearness(depth: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """Convert depth to inverse depth, scaled to 1 at `near` and 0 at `far`."""
    return (1 / depth - 1 / far) / (1 / near - 1 / far)


def four_views(raw: torch.Tensor, colours: torch.Tensor, pitch: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Render voxels orthographically along z and x from both ends: front (+z), +x, back, -x.

    Rays run through the centres of the voxels, so no samples are interpolated:

        tau_i = softplus(raw_i - 1) pitch,  w_i = (1 - exp(-tau_i)) exp(-sum of tau in front of i),
        channel = sum_i w_i c_i

    Opposite views share tau and its running sum.

    Args:
        raw: [A, N, N, N]; colours: [A, 3, N, N, N]; axes z, y, x.
        pitch: distance between voxels, world units.
    Returns: channels [A, 4, 4, N, N] (view, channel; RGB and inverse depth, premultiplied by opacity) and
    opacity [A, 4, 1, N, N]; rows from the top.
    Differentiable in raw and colours.
    """
    n = raw.shape[-1]
    # Optical depth of a voxel, as in EG3D's ray marcher.
    tau = F.softplus(raw - 1) * pitch
    alpha = -torch.expm1(-tau)
    # Edge of the cube between the centres of the outer voxels.
    side = pitch * (n - 1)
    across = torch.linspace(-0.5, 0.5, n).to(raw) * side  # coordinate along a ray, rising
    disparity = nearness(DISTANCE * side - across, (DISTANCE - 0.5) * side, (DISTANCE + 0.5) * side)
    rendered: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for axis, ends in ((1, ("back", "front")), (3, ("left", "right"))):
        # Inclusive sum from the low end. cumulative - tau lies in front of a voxel as seen from the low end,
        # total - cumulative as seen from the high end.
        cumulative = tau.cumsum(dim=axis)
        total = cumulative.narrow(axis, n - 1, 1)
        # For broadcasting a value per voxel along the ray.
        shape = [1, 1, 1, 1]
        shape[axis] = n
        # The low end first: rays that start there see voxels in rising order.
        for end, tau_in_front, near in zip(
            ends, (cumulative - tau, total - cumulative), (disparity.flip(0), disparity), strict=True
        ):
            weights = alpha * torch.exp(-tau_in_front)  # [A, N, N, N]
            rgb = (weights.unsqueeze(1) * colours).sum(dim=axis + 1)  # [A, 3, N, N]
            depth = (weights * near.view(shape)).sum(dim=axis).unsqueeze(1)
            rendered[end] = torch.cat([rgb, depth], dim=1), weights.sum(dim=axis).unsqueeze(1)
    # Views along z are [y, x], views along x [z, y]. Rows have to start at the top, and columns to run to the
    # camera's right.
    orient = {
        "front": lambda p: p.flip(2),
        "right": lambda p: p.transpose(2, 3).flip(2, 3),
        "back": lambda p: p.flip(2, 3),
        "left": lambda p: p.transpose(2, 3).flip(2),
    }
    channels, opacity = zip(*([orient[end](part) for part in rendered[end]] for end in orient), strict=True)
    return torch.stack(channels, dim=1), torch.stack(opacity, dim=1)


class FourViews:
    """A `Renderer` of the test problem: RGB and inverse depth of voxels from four sides, the same in
    every step.
    """

    def __init__(self, resolution: int = 16):
        self.resolution = resolution

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Return the four sides. Consumes no random numbers."""
        del rng
        return evenly_around(assets, ORTHOGRAPHIC, DISTANCE)

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> Pictures:
        """Render, see `Renderer`. The inverse depth of empty space is 0."""
        assert isinstance(asset, Voxels) and len(views.cameras) == ORTHOGRAPHIC * len(asset)
        channels, opacity = (
            part.flatten(0, 1) for part in four_views(asset.raw, torch.sigmoid(asset.paint), asset.pitch)
        )
        # [B, 4]: the background's inverse depth is 0
        background_channels = F.pad(background.to(channels).expand(len(channels), 3), (0, 1))
        # Channels are premultiplied, so the background is added by its transmittance.
        images = channels + (1 - opacity) * background_channels[:, :, None, None]
        # A prior may expect other sizes than one pixel per voxel.
        if asset.resolution != self.resolution:
            images, opacity = (F.adaptive_avg_pool2d(part, self.resolution) for part in (images, opacity))
        return Pictures(images, opacity)


class Cameras(Protocol):
    """An object that samples the cameras of a step."""

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Sample the same number of views for each asset."""


class PerspectiveViews:
    """A `Renderer` of perspective views: RGB of any field.

    Cameras are sampled as in public text-to-3D code (`CameraDraws`) by default.
    """

    def __init__(self, resolution: int = 64, cameras: Cameras | None = None, samples: int | None = None):
        self.options = RenderOptions(resolution=resolution, samples=samples)
        self.cameras: Cameras = cameras or CameraDraws()

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Sample cameras, see `CameraDraws.draw`."""
        return self.cameras.draw(assets, rng)

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> Pictures:
        """Render, see `Renderer`: one view of every asset after another."""
        cameras_by_view = views.cameras.unflatten(0, (len(asset), -1)).unbind(1)  # V tensors [A, 25]
        renderings = [asset.render(cameras, self.options) for cameras in cameras_by_view]
        # V of [A, C, R, R] -> [A, V, C, R, R] -> [B, C, R, R]
        raw, opacity = (
            torch.stack(parts, dim=1).flatten(0, 1)
            for parts in zip(*((s.raw, s.opacity) for s in renderings), strict=True)
        )
        background_colour = background.to(raw).expand(len(raw), 3)[:, :, None, None]
        # The render has a black background; its colour is -1..1.
        return Pictures((raw + 1) / 2 + (1 - opacity) * background_colour, opacity)
