"""Cameras around assets, and renders of assets.

Cameras are sampled as in public text-to-3D code, and converted to the conventions of networks with four views
such as MVDream (Shi et al. 2023). Renders are either four orthographic views of voxels, or perspective views
of any field.

In our world, y points up, the camera of a portrait is at +z, and the camera axes are those of OpenCV (x
right, y down, z forward). In MVDream's world, z points up, and the camera axes are those of OpenGL (x right,
y up, z backward). In each of the two worlds, an azimuth of 0 is the front, and increases towards +x.

Shapes: A is the number of assets, V of views of each, and B = A * V, where the views of an asset are
adjacent. N is the number of voxels per edge, R of pixels per edge.
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

_TINY = 1e-8  # MVDream adds this number to the norm of a translation before the division
# Cameras for renders of finished assets. The distance is in world units, the angles are in degrees.
FINISHED = {"distance": 2.6, "fov": 30.0, "elevation": 15.0}


class Views(NamedTuple):
    """B cameras that look at the origin. Angles are in degrees."""

    cameras: torch.Tensor  # [B, 25] camera labels: 16 numbers of cam2world, 9 of the intrinsics
    azimuth: torch.Tensor  # [B] in (-180, 180], 0 is the front
    elevation: torch.Tensor  # [B] angle above the horizon
    distance: torch.Tensor  # [B] distance from the origin, world units
    fov: torch.Tensor  # [B] field of view along an edge of the image


@dataclass(frozen=True, kw_only=True)
class CameraRanges:
    """Ranges (lowest, highest) from which cameras are sampled.

    The defaults are those of MVDream, DreamReward, DreamDPO and RewardSDS.
    """

    views: int = 4  # number of views of an asset, evenly spaced in azimuth
    fov: tuple[float, float] = (15.0, 60.0)  # field of view along an edge of the image, degrees
    elevation: tuple[float, float] = (0.0, 30.0)  # angle above the horizon, degrees
    # Distance from the origin, in units of half_side / tan(fov / 2). At 1, the cube's edge fills the image.
    distance: tuple[float, float] = (0.8, 1.0)
    half_side: float = 0.5  # half the edge of the cube that contains the assets, world units

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Sample the views of several assets, on the CPU.

        The views of an asset have the same field of view, elevation and distance, and azimuths that are 360/V
        degrees apart. With a probability of 1/2, the elevation is uniform in angle, otherwise it is uniform
        in height, that is, uniform on the sphere. The first azimuth of an asset lies in [-180, -180 + 360/V).

        Args: assets: number of assets A; rng: generator of the random numbers.
        """
        # Columns: fov, elevation, distance, choice of the elevation's distribution, azimuth.
        uniform_numbers = torch.rand(assets, 5, generator=rng, dtype=torch.float64)
        fov, uniform_angle, distance = (
            low + uniform_numbers[:, i] * (high - low)
            for i, (low, high) in enumerate((self.fov, self.elevation, self.distance))
        )
        lowest_elevation, highest_elevation = self.elevation
        lowest_sine = math.sin(math.radians(lowest_elevation))
        highest_sine = math.sin(math.radians(highest_elevation))
        # The height on the unit sphere is the sine of the elevation. The same random number is used for
        # either distribution.
        elevation_fraction = (uniform_angle - lowest_elevation) / max(
            highest_elevation - lowest_elevation, _TINY
        )
        uniform_height = lowest_sine + elevation_fraction * (highest_sine - lowest_sine)
        elevation = torch.where(
            uniform_numbers[:, 3] < 0.5, uniform_angle, torch.rad2deg(torch.asin(uniform_height))
        )
        # One random offset per asset, followed by equal steps: [V] + [A, 1] -> [A, V].
        azimuth = (torch.arange(self.views) + uniform_numbers[:, 4:]) * (360 / self.views) - 180  # [A, V]
        distance = distance * self.half_side / torch.tan(torch.deg2rad(fov) / 2)
        # One value per asset, [A] -> one value per view, [B].
        values_per_view = (
            asset_values.repeat_interleave(self.views) for asset_values in (elevation, distance, fov)
        )
        return views_at(azimuth.flatten(), *values_per_view)


def views_at(
    azimuth: torch.Tensor, elevation: torch.Tensor, distance: torch.Tensor, fov: torch.Tensor
) -> Views:
    """Return cameras that look at the origin, with the y axis up.

    Args:
        azimuth: angles [B] in degrees; 0 is the front, at +z.
        elevation: angles [B] above the horizon, in degrees.
        distance: distances [B] from the origin, world units.
        fov: fields of view [B] along an edge of the image, in degrees.
    """
    azimuth_radians = torch.deg2rad(azimuth)
    elevation_radians = torch.deg2rad(elevation)
    # [B, 3]
    camera_position = (
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
    # Focal lengths divided by the image size.
    focal_lengths = 0.5 / torch.tan(torch.deg2rad(fov) / 2)
    intrinsics = torch.stack([intrinsics_matrix(float(focal)) for focal in focal_lengths])
    cameras = pack_label(look_at(camera_position, torch.zeros_like(camera_position)).float(), intrinsics)
    return Views(cameras, azimuth.float(), elevation.float(), distance.float(), fov.float())


def evenly_around(
    asset_count: int,
    views_per_asset: int = 4,
    distance: float = 1.5,
    fov: float = 40.0,
    elevation: float = 0.0,
) -> Views:
    """Return views that are evenly spaced in azimuth. They are the same for every asset.

    The first view is from the front, and the azimuth increases towards +x.

    Args:
        asset_count: number of assets A.
        views_per_asset: number of views of an asset V.
        distance: distance from the origin, world units.
        fov: field of view along an edge of the image, degrees.
        elevation: angle above the horizon, degrees.
    """
    azimuth = (torch.arange(views_per_asset, dtype=torch.float64) * (360 / views_per_asset)).repeat(
        asset_count
    )
    azimuth = torch.where(azimuth > 180, azimuth - 360, azimuth)  # azimuths are in (-180, 180]
    return views_at(
        azimuth, *(torch.full_like(azimuth, view_value) for view_value in (elevation, distance, fov))
    )


# Rotation of world coordinates: (x, y, z) of our world becomes (x, -z, y) of the world whose z axis
# points up.
_TO_Z_UP = ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, -1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
# Rotation by 90 degrees about the z axis, from -y to +x.
_QUARTER_TURN = ((0.0, -1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
# Signs of the columns of a pose, which convert OpenCV's camera axes to OpenGL's.
_FLIP = (1.0, -1.0, -1.0, 1.0)


def to_z_up(cam2world: torch.Tensor) -> torch.Tensor:
    """Convert poses [B, 4, 4] from our convention (y up, OpenCV axes) to MVDream's (z up, OpenGL axes).

    Differentiable in cam2world.
    """
    return cam2world.new_tensor(_TO_Z_UP) @ cam2world * cam2world.new_tensor(_FLIP)


def unit_distance(cam2world: torch.Tensor) -> torch.Tensor:
    """Scale the translation of poses [B, 4, 4] to unit length, as MVDream does.

    The translation is divided by (its norm + 1e-8).

    Returns: the poses as rows [B, 16], row-major.
    Deviates: MVDream's function changes the caller's tensor; this function does not.
    """
    translation = cam2world[:, :3, 3:]
    # Rotation and scaled translation: [B, 3, 4].
    upper_rows = torch.cat(
        [cam2world[:, :3, :3], translation / (translation.norm(dim=1, keepdim=True) + _TINY)], dim=2
    )
    return torch.cat([upper_rows, cam2world[:, 3:]], dim=1).flatten(1)


def network_cameras(cameras: torch.Tensor) -> torch.Tensor:
    """Convert camera labels to the camera input [B, 16] of networks such as MVDream.

    Our front, +z, becomes +x of MVDream's world, which threestudio and DreamReward call "front view".
    `to_z_up` alone would convert it to -y, and the quarter turn moves -y to +x.

    Args: cameras: our camera labels [B, 25], or only their first 16 numbers.
    """
    return unit_distance(cameras.new_tensor(_QUARTER_TURN) @ to_z_up(cameras[:, :16].reshape(-1, 4, 4)))


# Renders of assets for a diffusion prior.

DISTANCE = 1.5  # distance of the orthographic cameras from the centre, in sides of the cube
ORTHOGRAPHIC = 4  # number of orthographic views


class RenderedViews(NamedTuple):
    """Renders of several assets, V views of each."""

    images: torch.Tensor  # [B, C, R, R] in 0..1: RGB for C = 3, RGB and inverse depth for C = 4
    opacity: torch.Tensor  # [B, 1, R, R] in 0..1


class Renderer(Protocol):
    """Interface to an object that samples cameras and renders assets for the optimisation loop."""

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Sample the cameras of one step of the optimisation, V for each asset.

        Args: assets: number of assets A; rng: generator of the random numbers.
        """

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> RenderedViews:
        """Render assets. Differentiable in their parameters.

        Args:
            asset: module that contains the assets, [A].
            views: B = A * V cameras.
            background: colour [3] or [B, 3] in 0..1.
        """


def nearness(depth: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """Convert depths to inverse depths, scaled to 1 at the depth `near` and 0 at the depth `far`."""
    return (1 / depth - 1 / far) / (1 / near - 1 / far)


def four_views(
    raw_density: torch.Tensor, colours: torch.Tensor, pitch: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Render voxels orthographically from four sides, in this order: +z (front), +x, -z (back), -x.

    A ray runs through the centres of the voxels i of a row, so no samples are interpolated. With the colour
    or inverse depth c_i of a voxel:

        tau_i = softplus(raw_density_i - 1) pitch,
        w_i = (1 - exp(-tau_i)) exp(-sum of tau_j over voxels j before i),
        channel = sum_i w_i c_i

    Opposite views share tau and its running sum. Differentiable in raw_density and colours.

    Args:
        raw_density: raw density [A, N, N, N], axes z, y, x.
        colours: colours [A, 3, N, N, N] in 0..1, axes z, y, x.
        pitch: distance between the centres of neighbouring voxels, world units.
    Returns: channels [A, 4, 4, N, N] (axes: asset, view, channel, rows from the top, columns) with RGB and
        inverse depth, multiplied by the opacity; and the opacity [A, 4, 1, N, N].
    """
    voxels_per_edge = raw_density.shape[-1]  # N
    # Optical depth of each voxel, as in EG3D's ray marcher.
    optical_depth = F.softplus(raw_density - 1) * pitch
    alpha = -torch.expm1(-optical_depth)
    # Edge of the cube between the centres of the outer voxels.
    cube_edge = pitch * (voxels_per_edge - 1)
    # Increasing coordinates of the voxels of a row.
    voxel_coordinates = torch.linspace(-0.5, 0.5, voxels_per_edge).to(raw_density) * cube_edge
    # Scaled inverse depth of each voxel for a camera at the high end of the axis, [N].
    disparity = nearness(
        DISTANCE * cube_edge - voxel_coordinates, (DISTANCE - 0.5) * cube_edge, (DISTANCE + 0.5) * cube_edge
    )
    rendered_views: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    # Axis 1 is z and axis 3 is x. The first view of a pair looks from the low end of the axis, the second
    # from the high end.
    for axis, view_names in ((1, ("back", "front")), (3, ("left", "right"))):
        # The sum includes the voxel itself. Seen from the low end, the optical depth before a voxel is
        # cumulative_optical_depth - optical_depth; seen from the high end, it is total_optical_depth -
        # cumulative_optical_depth.
        cumulative_optical_depth = optical_depth.cumsum(dim=axis)
        total_optical_depth = cumulative_optical_depth.narrow(axis, voxels_per_edge - 1, 1)
        # Shape that broadcasts one value per voxel of a row, [N], over [A, N, N, N].
        shape_along_ray = [1, 1, 1, 1]
        shape_along_ray[axis] = voxels_per_edge
        for view_name, optical_depth_before, view_disparity in zip(
            view_names,
            (cumulative_optical_depth - optical_depth, total_optical_depth - cumulative_optical_depth),
            (disparity.flip(0), disparity),
            strict=True,
        ):
            weights = alpha * torch.exp(-optical_depth_before)  # [A, N, N, N]
            rgb = (weights.unsqueeze(1) * colours).sum(dim=axis + 1)  # [A, 3, N, N]
            inverse_depth = (weights * view_disparity.view(shape_along_ray)).sum(dim=axis).unsqueeze(1)
            channels = torch.cat([rgb, inverse_depth], dim=1)  # [A, 4, N, N]
            rendered_views[view_name] = channels, weights.sum(dim=axis).unsqueeze(1)
    # The image axes of views along z are (y, x), those of views along x are (z, y). In the result, rows have
    # to begin at the top (largest y), and columns have to run to the camera's right.
    orient_by_view = {
        "front": lambda image: image.flip(2),
        "right": lambda image: image.transpose(2, 3).flip(2, 3),
        "back": lambda image: image.flip(2, 3),
        "left": lambda image: image.transpose(2, 3).flip(2),
    }
    oriented_channels = [
        orient_by_view[view_name](rendered_views[view_name][0]) for view_name in orient_by_view
    ]
    oriented_opacity = [
        orient_by_view[view_name](rendered_views[view_name][1]) for view_name in orient_by_view
    ]
    return torch.stack(oriented_channels, dim=1), torch.stack(oriented_opacity, dim=1)


class FourViews:
    """A `Renderer` of voxels from four fixed sides, with RGB and inverse depth.

    The CPU test problem for score distillation (eg3d_rlhf/rewards/boxes.py) uses it.

    Args: resolution: pixels per edge R.
    """

    def __init__(self, resolution: int = 16):
        self.resolution = resolution

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Return the four fixed views of each asset. No random number is drawn."""
        del rng
        return evenly_around(assets, ORTHOGRAPHIC, DISTANCE)

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> RenderedViews:
        """Render voxels, see `Renderer`. The inverse depth of empty space is 0."""
        assert isinstance(asset, Voxels) and len(views.cameras) == ORTHOGRAPHIC * len(asset)
        channels, opacity = (
            tensor.flatten(0, 1) for tensor in four_views(asset.raw, torch.sigmoid(asset.paint), asset.pitch)
        )
        # [B, 3] -> [B, 4]: the padding is the background's inverse depth, 0.
        background_channels = F.pad(background.to(channels).expand(len(channels), 3), (0, 1))
        # `four_views` returns channels that are multiplied by the opacity already.
        images = channels + (1 - opacity) * background_channels[:, :, None, None]
        # The images have one pixel per voxel. A prior may expect another size.
        if asset.resolution != self.resolution:
            images = F.adaptive_avg_pool2d(images, self.resolution)
            opacity = F.adaptive_avg_pool2d(opacity, self.resolution)
        return RenderedViews(images, opacity)


class Cameras(Protocol):
    """Interface to an object that samples the cameras of a step, such as `CameraRanges`."""

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Sample the same number of views for each asset."""


class PerspectiveViews:
    """A `Renderer` of perspective RGB views of any field.

    Args:
        resolution: pixels per edge R.
        cameras: ranges of the cameras; None: the ranges of public text-to-3D code (`CameraRanges`).
        samples: samples along a ray; None: the default of the asset.
    """

    def __init__(self, resolution: int = 64, cameras: Cameras | None = None, samples: int | None = None):
        self.options = RenderOptions(resolution=resolution, samples=samples)
        self.cameras: Cameras = cameras or CameraRanges()

    def draw(self, assets: int, rng: torch.Generator) -> Views:
        """Sample the cameras of one step, see `CameraRanges.draw`."""
        return self.cameras.draw(assets, rng)

    def render(self, asset: Asset, views: Views, background: torch.Tensor) -> RenderedViews:
        """Render assets, see `Renderer`.

        `Field.render` takes one camera per asset, so the V views are rendered one after another.
        """
        cameras_by_view = views.cameras.unflatten(0, (len(asset), -1)).unbind(1)  # V tensors [A, 25]
        renderings = [asset.render(cameras, self.options) for cameras in cameras_by_view]
        # V tensors [A, C, R, R] -> [A, V, C, R, R] -> [B, C, R, R]
        raw_images = torch.stack([rendering.raw for rendering in renderings], dim=1).flatten(0, 1)
        opacity = torch.stack([rendering.opacity for rendering in renderings], dim=1).flatten(0, 1)
        background_colour = background.to(raw_images).expand(len(raw_images), 3)[:, :, None, None]
        # The renders have a black background and colours in -1..1.
        return RenderedViews((raw_images + 1) / 2 + (1 - opacity) * background_colour, opacity)
