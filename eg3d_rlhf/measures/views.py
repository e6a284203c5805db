"""Compare neighbouring views of a latent in colour, depth and surface normals.

A latent is rendered from several cameras. The pixels of one view are projected into the neighbouring view by
their depth, and the two views are compared there. Every measure has one value per latent, and lower is
better. The measures are independent of the simulated annotator, since they read renders and never the density
grid.

Shapes: N latents, F views, R pixels per side of an image, L x Wd style vectors, C channels. Depth is the
Euclidean distance along a pixel's unit ray. World axes: x right, y up, z to the camera. Cameras follow OpenCV
(x right, y down, z forward). Intrinsics are normalised by the image size.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eg3d_rlhf.core.field import CameraFamily, Field, RenderOptions, render_each
from eg3d_rlhf.generators import as_generator
from training.rendering.cameras import RaySampler, camera_position, intrinsics_matrix, look_at, pack_label

_NEAR_PLANE = 1e-3  # in world units: points closer to the camera plane than this have no pixel
# In world units: a point that lies farther than this behind the surface of the other view counts as hidden
# there.
HIDDEN_MARGIN = 0.10
MIN_PIXELS = 16  # latents with fewer matched pixels in all pairs get the worst value of each measure
WORST_COLOUR = 2.0  # largest difference of two values in [-1, 1]
WORST_NORMAL = 180.0  # largest angle between two normals, in degrees


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Cameras on a horizontal arc, ordered by yaw. Cameras with neighbouring yaws are compared."""

    yaws: tuple[float, ...] = (-0.5, -0.25, 0.0, 0.25, 0.5)  # radians from frontal, ascending, at least two
    pitch: float = 0.0  # radians, added to the horizontal direction pi/2 of EG3D's pitch parameter
    cameras: CameraFamily = CameraFamily()  # radius, pivot and focal length
    resolution: int = 64  # pixels per side of the raw render
    # Number of samples per ray in each of the two passes. None uses the generator's number, which may be too
    # small for accurate depth.
    samples: int | None = 48
    opacity: float = 0.5  # smallest accumulated opacity of a foreground pixel, 0..1

    def __post_init__(self) -> None:
        # Only neighbouring views are compared, so their order matters.
        assert len(self.yaws) >= 2 and list(self.yaws) == sorted(set(self.yaws))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices (target, source) of neighbouring views. Each pair of neighbours occurs in both orders."""
        ascending_pairs = [(i, i + 1) for i in range(len(self.yaws) - 1)]
        return ascending_pairs + [(j, i) for i, j in ascending_pairs]

    def cam2world(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the camera-to-world poses [F, 4, 4]."""
        # In EG3D's parameters, the frontal view has yaw and pitch pi/2.
        yaw = math.pi / 2 + torch.tensor(self.yaws, device=device)[:, None]  # [F, 1]
        camera_positions = camera_position(
            yaw, torch.full_like(yaw, math.pi / 2 + self.pitch), self.cameras.radius
        )
        return look_at(camera_positions, torch.tensor(self.cameras.pivot, device=device))

    def intrinsics(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the intrinsics [3, 3] of all cameras, normalised by the image size."""
        return intrinsics_matrix(self.cameras.focal, device)


def spec_for(generator: Any, **other_fields) -> ViewSpec:
    """Create a ViewSpec with the cameras of a generator.

    Args:
        generator: generator, in any form that `generators.as_generator` accepts.
        other_fields: values of other fields of ViewSpec.
    """
    return ViewSpec(**{"cameras": as_generator(generator).cameras, **other_fields})


class Views(NamedTuple):
    """Renders of N latents from F cameras."""

    image: Tensor  # [N, F, 3, R, R] in [-1, 1]
    depth: Tensor  # [N, F, R, R] world units along the unit ray
    foreground: Tensor  # [N, F, R, R] bool
    points: Tensor  # [N, F, R, R, 3] world positions of the depth samples
    cam2world: Tensor  # [F, 4, 4]
    intrinsics: Tensor  # [3, 3]


class Match(NamedTuple):
    """Positions of a target view's pixels in a source view."""

    grid: Tensor  # [N, R, R, 2] positions (x, y) in the source view, -1..1 between the image's outer edges
    distance: Tensor  # [N, R, R] distance of the target's points from the source camera, in world units
    depth: Tensor  # [N, R, R] the source's depth map at those positions, in world units
    visible: Tensor  # [N, R, R] bool: the point is inside the source image, on its foreground, and not hidden


def lift(depth: Tensor, cam2world: Tensor, intrinsics: Tensor) -> Tensor:
    """Compute world points [N, F, R, R, 3] from depth maps. Differentiable in depth.

    Args:
        depth: distances [N, F, R, R] along each pixel's ray, in world units.
        cam2world: camera-to-world poses [F, 4, 4].
        intrinsics: normalised intrinsics [3, 3] of all cameras.
    """
    resolution = depth.shape[-1]
    # [F, R*R, 3] each; depth multiplies unit directions, since it is a distance along the ray
    origins, directions = RaySampler()(cam2world, intrinsics.expand(len(cam2world), 3, 3), resolution)
    points = origins + depth.flatten(2)[..., None] * directions  # [N, F, R*R, 3]
    return points.unflatten(2, (resolution, resolution))


def project(points: Tensor, cam2world: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Project world points [..., 3] into the image of one camera. Differentiable in points.

    The skew of the camera is assumed to be 0.

    Args:
        points: world points [..., 3].
        cam2world: camera-to-world pose [4, 4].
        intrinsics: normalised intrinsics [3, 3].

    Returns: the image positions (u, v) [..., 2], 0..1 over the image, and the distances [...] from the camera
        in world units. Points at or behind the camera plane get a position far outside the image.
    """
    offset = points - cam2world[:3, 3]
    # Multiplying a row vector by the rotation applies its transpose, which is the inverse: world to camera.
    camera_points = offset @ cam2world[:3, :3]  # [..., 3]
    is_in_front = camera_points[..., 2] > _NEAR_PLANE
    # A divisor of 1 behind the camera keeps the gradient of the unused branch finite.
    divisor = torch.where(is_in_front, camera_points[..., 2], torch.ones_like(camera_points[..., 2]))
    u = intrinsics[0, 0] * camera_points[..., 0] / divisor + intrinsics[0, 2]
    v = intrinsics[1, 1] * camera_points[..., 1] / divisor + intrinsics[1, 2]
    uv = torch.where(
        is_in_front[..., None], torch.stack([u, v], dim=-1), torch.full_like(points[..., :2], 1e3)
    )
    return uv, offset.norm(dim=-1)


def views_from_maps(image: Tensor, depth: Tensor, opacity: Tensor, spec: ViewSpec) -> Views:
    """Create Views from maps that were rendered already.

    Args:
        image: images [N, F, 3, R, R] in [-1, 1].
        depth: depth maps [N, F, R, R] in world units. Values that are not finite count as background.
        opacity: accumulated opacities [N, F, R, R], 0..1.
        spec: cameras of the maps, and the smallest opacity of the foreground.
    """
    cam2world = spec.cam2world(depth.device)
    intrinsics = spec.intrinsics(depth.device)
    foreground = (opacity >= spec.opacity) & depth.isfinite()
    # Background gets depth 0, so that arithmetic on it stays finite; `foreground` excludes it.
    depth = torch.where(depth.isfinite(), depth, torch.zeros_like(depth))
    return Views(image, depth, foreground, lift(depth, cam2world, intrinsics), cam2world, intrinsics)


@torch.no_grad()
def render_views(field: Field, spec: ViewSpec, seed: int = 0, device: torch.device | str = "cpu") -> Views:
    """Render a field of N latents from every camera of `spec`.

    The same seed gives the same random offsets of the samples along the rays, so two generators can be
    compared with the same offsets.

    Args:
        field: field of N latents.
        spec: cameras, resolution and number of samples.
        seed: random seed of the offsets.
        device: device of the field.
    """
    cameras = pack_label(spec.cam2world(device), spec.intrinsics(device))  # [F, 25]
    view_renders = render_each(
        field, cameras.split(1), RenderOptions(resolution=spec.resolution, samples=spec.samples), seed
    )
    # Regroup from one triple per view to three tuples with one map per view. Index 0 drops the channel axis.
    maps = zip(
        *(
            (view_render.raw, view_render.depth[:, 0], view_render.opacity[:, 0])
            for view_render in view_renders
        ),
        strict=True,
    )
    image, depth, opacity = (torch.stack(view_maps, dim=1).float() for view_maps in maps)  # [N, F, ...]
    return views_from_maps(image, depth, opacity, spec)


def sample_map(image_maps: Tensor, grid: Tensor) -> Tensor:
    """Sample maps bilinearly at given positions. Values at the border of a map are repeated outside.

    Args:
        image_maps: maps [N, C, R, R].
        grid: positions (x, y) [N, R, R, 2], -1..1 between the outer edges of the image.

    Returns: the samples [N, C, R, R].
    """
    return F.grid_sample(image_maps, grid, mode="bilinear", padding_mode="border", align_corners=False)


def inner_foreground(foreground: Tensor) -> Tensor:
    """Return the foreground without the pixels at its edge and at the edge of the image, bool [N, R, R].

    Args:
        foreground: True for each foreground pixel, bool [N, R, R].
    """
    # A pixel is inner if its 3 x 3 neighbourhood contains no background.
    is_inner = F.max_pool2d((~foreground).float()[:, None], 3, stride=1, padding=1)[:, 0] == 0
    # The padding of the image counts as foreground above, so its
    # first and last rows and columns are set here.
    is_inner[:, :1] = False
    is_inner[:, -1:] = False
    is_inner[:, :, :1] = False
    is_inner[:, :, -1:] = False
    return is_inner


def match_views(views: Views, target_view: int, source_view: int) -> Match:
    """Project every pixel of one view into another view by its depth.

    A point counts as hidden, and is not compared, if it lies more than HIDDEN_MARGIN (world units) behind the
    surface in the source view. A point in front of that surface is compared: the source view should show it.

    Args:
        views: renders of N latents.
        target_view: index of the view whose pixels are projected.
        source_view: index of the view into which they are projected.
    """
    points = views.points[:, target_view]  # [N, R, R, 3]
    uv, distance = project(points, views.cam2world[source_view], views.intrinsics)
    grid = uv * 2 - 1  # 0..1 to the -1..1 of grid_sample
    source_foreground = inner_foreground(views.foreground[:, source_view])
    stacked_maps = torch.stack(
        [views.depth[:, source_view], source_foreground.float()], dim=1
    )  # [N, 2, R, R]
    source_depth, source_weight = sample_map(stacked_maps, grid).unbind(dim=1)
    # An interpolated foreground below 1 means that one of the four interpolated pixels is background.
    target_foreground = inner_foreground(views.foreground[:, target_view])
    is_visible = target_foreground & (source_weight > 0.999) & (grid.abs() < 1).all(dim=-1)
    return Match(grid, distance, source_depth, is_visible & (distance - source_depth < HIDDEN_MARGIN))


@dataclass(frozen=True, kw_only=True)
class MultiViewMeasures:
    """Values of the measures for N latents, float64 [N] each.

    Lower is better, except for `covisible`, the share of the images that was compared.
    """

    photometric: np.ndarray  # mean L1 colour difference of matched pixels, 0..2
    # Mean difference in depth of matched pixels, as a share of the camera distance, 0..0.037 at radius 2.7
    depth: np.ndarray
    normal: np.ndarray  # mean angle between matched surface normals, degrees, 0..180
    covisible: np.ndarray  # matched share of the foreground pixels, 0..1


def normals_from_points(points: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the surface normals of a point map.

    A normal is the cross product of the central differences along rows and columns. It faces the camera for a
    surface that is seen from outside: columns run right and rows run down the image, so down x right points
    to the viewer.

    Args:
        points: world points [N, R, R, 3] of the pixels.
        foreground: True for each pixel that shows a surface, bool [N, R, R].

    Returns: unit normals [N, R, R, 3], and a mask [N, R, R] that is True where the normal is defined: where
        the pixel and all its neighbours are foreground, and the differences are not parallel.
    """
    column_differences = F.pad(
        (points[:, :, 2:] - points[:, :, :-2]).permute(0, 3, 1, 2), (1, 1, 0, 0)
    )  # [N, 3, R, R]
    row_differences = F.pad((points[:, 2:] - points[:, :-2]).permute(0, 3, 1, 2), (0, 0, 1, 1))
    normal = torch.linalg.cross(row_differences, column_differences, dim=1)
    normal_lengths = normal.norm(dim=1, keepdim=True)
    has_normal = inner_foreground(foreground) & (normal_lengths[:, 0] > 1e-12)
    return (normal / normal_lengths.clamp_min(1e-12)).permute(0, 2, 3, 1), has_normal


def _normal(views: Views, target_view: int, source_view: int, match: Match) -> tuple[Tensor, Tensor]:
    """Compute the angles between the normals of matched pixels.

    Args:
        views: renders of N latents.
        target_view: index of the target view.
        source_view: index of the source view.
        match: positions of the target's pixels in the source view.

    Returns: the angles [N, R, R] in degrees, and a mask [N, R, R] that is True where the pixels match and
        the normals of both views are defined.
    """
    target_normals, is_target_defined = normals_from_points(
        views.points[:, target_view], views.foreground[:, target_view]
    )
    source_normals, is_source_defined = normals_from_points(
        views.points[:, source_view], views.foreground[:, source_view]
    )
    stacked_maps = torch.cat(
        [source_normals.permute(0, 3, 1, 2), is_source_defined[:, None].float()], dim=1
    )  # [N, 4, R, R]
    sampled_maps = sample_map(stacked_maps, match.grid)
    # Interpolation shortens the normals.
    source_direction = F.normalize(sampled_maps[:, :3], dim=1).permute(0, 2, 3, 1)
    # angle = 2 asin(chord / 2) is accurate at small angles, where acos of a rounded cosine is not.
    chords = (target_normals - source_direction).norm(dim=-1).clamp_max(2.0)
    angles = torch.rad2deg(2 * torch.asin(chords / 2))
    # An interpolated mask below 1 means that one of the four interpolated normals is undefined.
    return angles, match.visible & is_target_defined & (sampled_maps[:, 3] > 0.999)


def _mean_over_pairs(errors_and_masks: list[tuple[Tensor, Tensor]], worst_value: float) -> np.ndarray:
    """Average errors over the valid pixels of all pairs of views, float64 [N].

    Args:
        errors_and_masks: errors [N, R, R] of each pair of views, and the mask [N, R, R] of its valid pixels.
        worst_value: value of a latent with fewer than MIN_PIXELS valid pixels in all pairs.
    """
    # where() and not a product: an invalid pixel may hold NaN, and 0 * NaN is NaN.
    error_sums = sum(
        (torch.where(is_valid, error, 0.0).double().sum(dim=(1, 2)) for error, is_valid in errors_and_masks),
        torch.tensor(0.0),
    )
    pixel_counts = sum((is_valid.sum(dim=(1, 2)) for _, is_valid in errors_and_masks), torch.tensor(0))
    mean_errors = error_sums / pixel_counts.clamp_min(1)
    return (
        torch.where((pixel_counts >= MIN_PIXELS) & mean_errors.isfinite(), mean_errors, worst_value)
        .cpu()
        .numpy()
    )


@torch.no_grad()
def compare_views(views: Views, spec: ViewSpec) -> MultiViewMeasures:
    """Compute the measures of rendered views over all ordered pairs of neighbouring cameras.

    Every pair is weighted by its number of matched pixels. Let X be the surface point of a target pixel, pi
    the projection into the source view, o_source the position of the source camera, I the images and d_source
    the depth map of the source. The errors of the pixel are
    photometric: |I_source(pi(X)) - I_target|;
    depth: | |X - o_source| - d_source(pi(X)) | / |X - o_source|, with a numerator of at most HIDDEN_MARGIN;
    normal: the angle between the normals of the two depth maps at X, in world axes.
    A latent with fewer than MIN_PIXELS matched pixels (an empty scene, or one with only low opacities) gets
    the worst value of each measure.

    Args:
        views: renders of N latents.
        spec: cameras of the renders.
    """
    photometric_errors = []
    depth_errors = []
    normal_errors = []
    # Numbers of pixels [N], summed over all pairs
    matched_counts = foreground_counts = torch.tensor(0)
    for target_view, source_view in spec.pairs:
        match = match_views(views, target_view, source_view)
        source_colours = sample_map(views.image[:, source_view], match.grid)
        photometric_errors.append(
            ((source_colours - views.image[:, target_view]).abs().mean(dim=1), match.visible)
        )
        # Cap the difference also for points in front, so that a
        # distant floater weighs no more than an occlusion.
        depth_gap = (match.distance - match.depth).abs().clamp_max(HIDDEN_MARGIN)
        depth_errors.append((depth_gap / match.distance.clamp_min(1e-6), match.visible))
        normal_errors.append(_normal(views, target_view, source_view, match))
        matched_counts = matched_counts + match.visible.sum(dim=(1, 2))
        foreground_counts = foreground_counts + views.foreground[:, target_view].sum(dim=(1, 2))
    return MultiViewMeasures(
        photometric=_mean_over_pairs(photometric_errors, WORST_COLOUR),
        depth=_mean_over_pairs(depth_errors, HIDDEN_MARGIN / spec.cameras.radius),
        normal=_mean_over_pairs(normal_errors, WORST_NORMAL),
        covisible=(matched_counts / foreground_counts.clamp_min(1)).double().cpu().numpy(),
    )


@torch.no_grad()
def multi_view_measures(
    generator: Any, ws: Tensor, spec: ViewSpec | None = None, batch: int = 8
) -> MultiViewMeasures:
    """Render latents of a generator from several cameras and compare neighbouring views.

    The result is deterministic: noise inputs are constant, and the random offsets of samples along the rays
    have a fixed seed.

    Args:
        generator: generator, in any form that `generators.as_generator` accepts.
        ws: style vectors [N, L, Wd].
        spec: cameras; None uses the defaults of ViewSpec with the generator's cameras.
        batch: number of latents that are rendered at once.
    """
    generator = as_generator(generator)
    spec = spec or spec_for(generator)
    batch_measures = []
    for ws_batch in ws.split(batch):
        views = render_views(generator.field(ws_batch), spec, device=ws.device)
        batch_measures.append(compare_views(views, spec))
    measure_names = MultiViewMeasures.__dataclass_fields__
    return MultiViewMeasures(
        **{
            measure_name: np.concatenate([getattr(measures, measure_name) for measures in batch_measures])
            for measure_name in measure_names
        }
    )
