"""Compare neighbouring views of a latent in colour, depth and surface normals.

Every measure is per latent, and lower is better. The measures are independent of the simulated annotator,
since they read renders and never the sigma grid.
Shape letters: N latents, F views, R pixels per edge, L x Wd style vectors. Depth is the Euclidean distance
along a pixel's unit ray. World axes: x right, y up, z to the camera. Cameras follow OpenCV (x right, y down,
z forward). Intrinsics are normalised by the image size.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eg3d_rlhf.core.field import CameraFamily, Field, RenderOptions, render_each
from eg3d_rlhf.generators import of
from training.rendering.cameras import RaySampler, camera_position, intrinsics_matrix, look_at, pack_label

_NEAR_PLANE = 1e-3  # world units; a point closer to the camera plane than this has no pixel
# World units; a point that lies further than this behind the surface of the other view counts as hidden there
HIDDEN_MARGIN = 0.10
MIN_PIXELS = 16  # co-visible pixels over all pairs; below, a latent gets the worst value of each measure
WORST_COLOUR = 2.0  # the range of [-1, 1]
WORST_NORMAL = 180.0  # degrees


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Cameras on a horizontal arc, ordered by yaw. Neighbours in the tuple are compared with each other."""

    yaws: tuple[float, ...] = (-0.5, -0.25, 0.0, 0.25, 0.5)  # radians from frontal, at least two
    pitch: float = 0.0  # radians, relative to the horizontal in EG3D's pitch parameter
    cameras: CameraFamily = CameraFamily()  # radius, pivot and focal length
    resolution: int = 64  # pixels per edge of the raw render
    # Samples per ray in each of the two passes. None keeps the generator's number, which may be too small for
    # accurate depth.
    samples: int | None = 48
    opacity: float = 0.5  # accumulated opacity from which on a pixel is foreground, 0..1

    def __post_init__(self) -> None:
        # Only neighbouring views are compared, so their order matters.
        assert len(self.yaws) >= 2 and list(self.yaws) == sorted(set(self.yaws))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Ordered neighbours (target, source), in both directions for every adjacent pair."""
        forward = [(i, i + 1) for i in range(len(self.yaws) - 1)]
        return forward + [(j, i) for i, j in forward]

    def cam2world(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the poses [F, 4, 4]."""
        # EG3D counts yaw and pitch from pi/2.
        h = math.pi / 2 + torch.tensor(self.yaws, device=device)[:, None]
        position = camera_position(h, torch.full_like(h, math.pi / 2 + self.pitch), self.cameras.radius)
        return look_at(position, torch.tensor(self.cameras.pivot, device=device))

    def intrinsics(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the intrinsics [3, 3], normalised by the image size."""
        return intrinsics_matrix(self.cameras.focal, device)


def spec_for(generator: Any, **settings) -> ViewSpec:
    """Create a ViewSpec with a generator's cameras; `settings` are further fields of ViewSpec."""
    return ViewSpec(**{"cameras": of(generator).cameras, **settings})


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

    grid: Tensor  # [N, R, R, 2] positions in the source for grid_sample, -1..1 over the image's outer edges
    distance: Tensor  # [N, R, R] distance of the target's points from the source camera, world units
    depth: Tensor  # [N, R, R] the source's depth map at those positions, world units
    visible: Tensor  # [N, R, R] bool: inside the source image, on its foreground, and not hidden


def lift(depth: Tensor, cam2world: Tensor, intrinsics: Tensor) -> Tensor:
    """Compute world points [N, F, R, R, 3] from depth maps [N, F, R, R] of cameras [F, 4, 4].

    Differentiable in depth.
    """
    resolution = depth.shape[-1]
    # [F, R*R, 3] each; depth multiplies unit directions, since it is a distance along the ray
    origins, directions = RaySampler()(cam2world, intrinsics.expand(len(cam2world), 3, 3), resolution)
    points = origins + depth.flatten(2)[..., None] * directions  # [N, F, R*R, 3]
    return points.unflatten(2, (resolution, resolution))


def project(points: Tensor, cam2world: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Project world points [..., 3] into the image of one camera [4, 4].

    Returns the image position (u, v) [..., 2], 0..1 over the image, and the distance [...] from the camera.
    Points at or behind the camera plane get a position far outside the image. Differentiable in points. The
    skew is taken as 0.
    """
    offset = points - cam2world[:3, 3]
    local = offset @ cam2world[:3, :3]  # [..., 3] camera axes; the rotation's inverse is its transpose
    ahead = local[..., 2] > _NEAR_PLANE
    # A divisor of 1 behind the camera keeps the gradient of the unused branch finite.
    scale = torch.where(ahead, local[..., 2], torch.ones_like(local[..., 2]))
    u = intrinsics[0, 0] * local[..., 0] / scale + intrinsics[0, 2]
    v = intrinsics[1, 1] * local[..., 1] / scale + intrinsics[1, 2]
    uv = torch.where(ahead[..., None], torch.stack([u, v], dim=-1), torch.full_like(points[..., :2], 1e3))
    return uv, offset.norm(dim=-1)


def views_from_maps(image: Tensor, depth: Tensor, opacity: Tensor, spec: ViewSpec) -> Views:
    """Create Views from maps that were rendered elsewhere.

    Args: image: [N, F, 3, R, R]; depth, opacity: [N, F, R, R]. Depth that is not finite counts as background.
    """
    cam2world = spec.cam2world(depth.device)
    intrinsics = spec.intrinsics(depth.device)
    foreground = (opacity >= spec.opacity) & depth.isfinite()
    # Background gets depth 0, so that arithmetic on it stays finite; `foreground` excludes it.
    depth = torch.where(depth.isfinite(), depth, torch.zeros_like(depth))
    return Views(image, depth, foreground, lift(depth, cam2world, intrinsics), cam2world, intrinsics)


@torch.no_grad()
def render_views(field: Field, spec: ViewSpec, seed: int = 0, device: torch.device | str = "cpu") -> Views:
    """Render a field from every camera of `spec`.

    Every call uses the same ray jitter, so two generators are compared under equal jitter.
    Args: device: the field's device.
    """
    cameras = pack_label(spec.cam2world(device), spec.intrinsics(device))  # [F, 25]
    outputs = render_each(
        field, cameras.split(1), RenderOptions(resolution=spec.resolution, samples=spec.samples), seed
    )
    maps = zip(*((out.raw, out.depth[:, 0], out.opacity[:, 0]) for out in outputs), strict=True)
    image, depth, opacity = (torch.stack(part, dim=1).float() for part in maps)
    return views_from_maps(image, depth, opacity, spec)


def sample_map(values: Tensor, grid: Tensor) -> Tensor:
    """Sample maps [N, C, R, R] bilinearly at grid [N, R, R, 2]; returns [N, C, R, R].

    The grid spans -1..1 between the outer edges of the image. Values at the border are repeated outside.
    """
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)


def inner_foreground(foreground: Tensor) -> Tensor:
    """Remove pixels at the edge of the foreground [N, R, R] and at the edge of the image; returns bool."""
    # A pixel stays if its 3 x 3 neighbourhood contains no background.
    kept = F.max_pool2d((~foreground).float()[:, None], 3, stride=1, padding=1)[:, 0] == 0
    kept[:, :1], kept[:, -1:], kept[:, :, :1], kept[:, :, -1:] = False, False, False, False
    return kept


def match_views(views: Views, target: int, source: int) -> Match:
    """Project every pixel of view `target` into view `source` through its depth.

    A point counts as hidden, and is left out, if it lies more than HIDDEN_MARGIN (world units) farther away
    than the surface that the source sees there. A point in front of the source's surface is kept, because the
    source should have seen it.
    """
    points = views.points[:, target]  # [N, R, R, 3]
    uv, distance = project(points, views.cam2world[source], views.intrinsics)
    grid = uv * 2 - 1  # 0..1 to the -1..1 of grid_sample
    solid = inner_foreground(views.foreground[:, source])
    maps = torch.stack([views.depth[:, source], solid.float()], dim=1)  # [N, 2, R, R]
    seen, inside = sample_map(maps, grid).unbind(dim=1)
    # Interpolated foreground below 1 means that one of the four sampled pixels is background.
    visible = inner_foreground(views.foreground[:, target]) & (inside > 0.999) & (grid.abs() < 1).all(dim=-1)
    return Match(grid, distance, seen, visible & (distance - seen < HIDDEN_MARGIN))


@dataclass(frozen=True, kw_only=True)
class MultiViewMeasures:
    """One value per latent and measure, float64 [N].

    Lower is better, except for `covisible`, the compared share.
    """

    photometric: np.ndarray  # mean L1 colour difference of matched pixels, 0..2
    # Mean difference in depth of matched pixels, as a share of the camera distance, 0..0.037 at radius 2.7
    depth: np.ndarray
    normal: np.ndarray  # mean angle between matched surface normals, degrees, 0..180
    covisible: np.ndarray  # matched share of the foreground pixels, 0..1


def normals_from_points(points: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
    """Compute unit normals [N, R, R, 3] of a point map, and a mask [N, R, R] of known ones.

    The normal is the cross product of the central differences along rows and columns. It faces the camera for
    a surface that is seen from outside: columns run right and rows run down the image, so down x right points
    at the viewer. It is known where all four neighbours are foreground.
    """
    right = F.pad((points[:, :, 2:] - points[:, :, :-2]).permute(0, 3, 1, 2), (1, 1, 0, 0))  # [N, 3, R, R]
    down = F.pad((points[:, 2:] - points[:, :-2]).permute(0, 3, 1, 2), (0, 0, 1, 1))
    normal = torch.linalg.cross(down, right, dim=1)
    length = normal.norm(dim=1, keepdim=True)
    known = inner_foreground(foreground) & (length[:, 0] > 1e-12)
    return (normal / length.clamp_min(1e-12)).permute(0, 2, 3, 1), known


def _normal(views: Views, target: int, source: int, match: Match) -> tuple[Tensor, Tensor]:
    """Compute the angle [N, R, R] in degrees between matched normals, and a mask of where both are known."""
    target_normals, target_known = normals_from_points(views.points[:, target], views.foreground[:, target])
    source_normals, source_known = normals_from_points(views.points[:, source], views.foreground[:, source])
    maps = torch.cat(
        [source_normals.permute(0, 3, 1, 2), source_known[:, None].float()], dim=1
    )  # [N, 4, R, R]
    sampled = sample_map(maps, match.grid)
    # Interpolation shortens the normals.
    direction = F.normalize(sampled[:, :3], dim=1).permute(0, 2, 3, 1)
    # angle = 2 asin(chord / 2) is accurate at small angles, where acos of a rounded cosine is not.
    chord = (target_normals - direction).norm(dim=-1).clamp_max(2.0)
    angle = torch.rad2deg(2 * torch.asin(chord / 2))
    return angle, match.visible & target_known & (sampled[:, 3] > 0.999)


def _mean_over_pairs(errors: list[tuple[Tensor, Tensor]], worst: float) -> np.ndarray:
    """Average errors over the valid pixels of all pairs, [N] float64.

    The result is `worst` for a latent with fewer than MIN_PIXELS valid pixels.
    """
    # where() and not a product: an invalid pixel may hold NaN, and 0 * NaN is NaN.
    total = sum(
        (torch.where(valid, error, 0.0).double().sum(dim=(1, 2)) for error, valid in errors),
        torch.tensor(0.0),
    )
    count = sum((valid.sum(dim=(1, 2)) for _, valid in errors), torch.tensor(0))
    mean = total / count.clamp_min(1)
    return torch.where((count >= MIN_PIXELS) & mean.isfinite(), mean, worst).cpu().numpy()


@torch.no_grad()
def compare_views(views: Views, spec: ViewSpec) -> MultiViewMeasures:
    """Compute the measures of rendered views over all ordered pairs of neighbouring cameras.

    Every pair counts by the number of its matched pixels. For the surface point X of each target pixel, with
    pi the source's projection:
    photometric: |I_source(pi(X)) - I_target|;
    depth: | |X - o_source| - d_source(pi(X)) | / |X - o_source|, where the numerator is at most
    HIDDEN_MARGIN; normal: angle between the normals of both depth maps at X, in world axes.
    A latent with almost nothing to match (empty, or only haze below the opacity threshold) gets the worst
    value of each measure.
    """
    photometric = []
    depth = []
    normal = []
    matched = foreground = torch.tensor(0)
    for t, s in spec.pairs:
        match = match_views(views, t, s)
        photometric.append(
            ((sample_map(views.image[:, s], match.grid) - views.image[:, t]).abs().mean(dim=1), match.visible)
        )
        # Cap the difference also for points in front, so that a distant floater weighs no more than an
        # occlusion.
        gap = (match.distance - match.depth).abs().clamp_max(HIDDEN_MARGIN)
        depth.append((gap / match.distance.clamp_min(1e-6), match.visible))
        normal.append(_normal(views, t, s, match))
        matched = matched + match.visible.sum(dim=(1, 2))
        foreground = foreground + views.foreground[:, t].sum(dim=(1, 2))
    return MultiViewMeasures(
        photometric=_mean_over_pairs(photometric, WORST_COLOUR),
        depth=_mean_over_pairs(depth, HIDDEN_MARGIN / spec.cameras.radius),
        normal=_mean_over_pairs(normal, WORST_NORMAL),
        covisible=(matched / foreground.clamp_min(1)).double().cpu().numpy(),
    )


@torch.no_grad()
def multi_view_measures(
    generator: Any, ws: Tensor, spec: ViewSpec | None = None, batch: int = 8
) -> MultiViewMeasures:
    """Render a generator's latents ws [N, L, Wd] from the cameras of `spec` and compare neighbouring views.

    Args: batch: number of latents that are rendered at once.
    Returns: one value per latent and measure. Deterministic: constant noise and fixed ray jitter.
    """
    generator = of(generator)
    spec = spec or spec_for(generator)
    parts = []
    for chunk in ws.split(batch):
        parts.append(compare_views(render_views(generator.field(chunk), spec, device=ws.device), spec))
    names = MultiViewMeasures.__dataclass_fields__
    return MultiViewMeasures(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )
