"""Does a latent have one shape? Several views of it, and how far neighbouring ones agree in colour, depth and
surface normals.

Every measure is per latent, lower is better, and independent of the programmatic annotator: it reads
renderings, never the sigma grid.
Shape letters: N latents, F views, R pixels per edge, L x Wd style vectors. Depth is the Euclidean distance
along a pixel's unit ray. World: x right, y up, z to the camera; cameras are OpenCV's (x right, y down, z
forward), intrinsics normalised by the image size.
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

_BEHIND = 1e-3  # world units; a point nearer to the camera plane than this has no pixel
# world units; a point further than this behind the other view's surface is taken to be hidden there
HIDDEN_MARGIN = 0.10
MIN_PIXELS = 16  # co-visible pixels over all pairs below which a latent gets the worst value of a measure
WORST_COLOUR = 2.0  # the whole range of [-1, 1]
WORST_NORMAL = 180.0  # degrees


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Cameras on a level arc, ordered by yaw; neighbours in the tuple are compared with each other."""

    yaws: tuple[float, ...] = (-0.5, -0.25, 0.0, 0.25, 0.5)  # radians from frontal, at least two
    pitch: float = 0.0  # radians of EG3D's pitch parameter from level
    cameras: CameraFamily = CameraFamily()  # where they stand
    resolution: int = 64  # pixels per edge of the raw rendering
    # samples per ray in each of the two passes; None keeps the generator's own, which may be too few to
    # measure
    samples: int | None = 48
    opacity: float = 0.5  # accumulated opacity from which a pixel is foreground, 0..1

    def __post_init__(self) -> None:
        # neighbouring views are compared
        assert len(self.yaws) >= 2 and list(self.yaws) == sorted(set(self.yaws))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Ordered neighbours (target, source): both directions of every adjacent pair."""
        forward = [(i, i + 1) for i in range(len(self.yaws) - 1)]
        return forward + [(j, i) for i, j in forward]

    def cam2world(self, device: torch.device | str = "cpu") -> Tensor:
        """Poses [F, 4, 4]."""
        h = math.pi / 2 + torch.tensor(self.yaws, device=device)[:, None]
        position = camera_position(h, torch.full_like(h, math.pi / 2 + self.pitch), self.cameras.radius)
        return look_at(position, torch.tensor(self.cameras.pivot, device=device))

    def intrinsics(self, device: torch.device | str = "cpu") -> Tensor:
        """[3, 3], normalised by the image size."""
        return intrinsics_matrix(self.cameras.focal, device)


def spec_for(generator: Any, **settings) -> ViewSpec:
    """Views from a generator's own cameras; `settings` are fields of ViewSpec."""
    return ViewSpec(**{"cameras": of(generator).cameras, **settings})


class Views(NamedTuple):
    """Renderings of N latents from F cameras."""

    image: Tensor  # [N, F, 3, R, R] in [-1, 1]
    depth: Tensor  # [N, F, R, R] world units along the unit ray
    foreground: Tensor  # [N, F, R, R] bool
    points: Tensor  # [N, F, R, R, 3] world positions of the depth samples
    cam2world: Tensor  # [F, 4, 4]
    intrinsics: Tensor  # [3, 3]


class Match(NamedTuple):
    """Where the pixels of a target view fall in a source view."""

    grid: Tensor  # [N, R, R, 2] source position for grid_sample, -1..1 over the image's outer edges
    distance: Tensor  # [N, R, R] distance of the target's points from the source camera, world units
    depth: Tensor  # [N, R, R] what the source's own depth map says there
    visible: Tensor  # [N, R, R] bool: inside the source image, on its foreground, and not hidden


def lift(depth: Tensor, cam2world: Tensor, intrinsics: Tensor) -> Tensor:
    """World points [N, F, R, R, 3] of depth maps [N, F, R, R] seen by cameras [F, 4, 4]. Differentiable in
    depth.
    """
    resolution = depth.shape[-1]
    # [F, R*R, 3] each
    origins, directions = RaySampler()(cam2world, intrinsics.expand(len(cam2world), 3, 3), resolution)
    points = origins + depth.flatten(2)[..., None] * directions  # [N, F, R*R, 3]
    return points.unflatten(2, (resolution, resolution))


def project(points: Tensor, cam2world: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Image position (u, v), 0..1 over the image, and distance from the camera of world points [..., 3] for
    one camera [4, 4].

    Points at or behind the camera plane get a position far outside the image. Differentiable in points. The
    skew is taken as 0.
    """
    offset = points - cam2world[:3, 3]
    local = offset @ cam2world[:3, :3]  # [..., 3] camera axes; the rotation's inverse is its transpose
    ahead = local[..., 2] > _BEHIND
    scale = torch.where(ahead, local[..., 2], torch.ones_like(local[..., 2]))
    u = intrinsics[0, 0] * local[..., 0] / scale + intrinsics[0, 2]
    v = intrinsics[1, 1] * local[..., 1] / scale + intrinsics[1, 2]
    uv = torch.where(ahead[..., None], torch.stack([u, v], dim=-1), torch.full_like(points[..., :2], 1e3))
    return uv, offset.norm(dim=-1)


def views_from_maps(image: Tensor, depth: Tensor, opacity: Tensor, spec: ViewSpec) -> Views:
    """Views of maps rendered elsewhere: image [N, F, 3, R, R], depth and opacity [N, F, R, R]; non-finite
    depth counts as background.
    """
    cam2world = spec.cam2world(depth.device)
    intrinsics = spec.intrinsics(depth.device)
    foreground = (opacity >= spec.opacity) & depth.isfinite()
    depth = torch.where(depth.isfinite(), depth, torch.zeros_like(depth))
    return Views(image, depth, foreground, lift(depth, cam2world, intrinsics), cam2world, intrinsics)


@torch.no_grad()
def render_views(field: Field, spec: ViewSpec, seed: int = 0, device: torch.device | str = "cpu") -> Views:
    """Render a field from every camera of `spec`, with the same ray jitter in every call, so that two
    generators are compared under equal jitter. Args: device: of the field.
    """
    cameras = pack_label(spec.cam2world(device), spec.intrinsics(device))  # [F, 25]
    outputs = render_each(
        field, cameras.split(1), RenderOptions(resolution=spec.resolution, samples=spec.samples), seed
    )
    maps = zip(*((out.raw, out.depth[:, 0], out.opacity[:, 0]) for out in outputs), strict=True)
    image, depth, opacity = (torch.stack(part, dim=1).float() for part in maps)
    return views_from_maps(image, depth, opacity, spec)


def sample_map(values: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples [N, C, R, R] of maps [N, C, R, R] at grid [N, R, R, 2] (-1..1, pixel centres inside,
    edges repeated).
    """
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)


def inner_foreground(foreground: Tensor) -> Tensor:
    """Foreground [N, R, R] bool without the pixels at its edge or of the image's."""
    kept = F.max_pool2d((~foreground).float()[:, None], 3, stride=1, padding=1)[:, 0] == 0
    kept[:, :1], kept[:, -1:], kept[:, :, :1], kept[:, :, -1:] = False, False, False, False
    return kept


def match_views(views: Views, target: int, source: int) -> Match:
    """Carry every pixel of view `target` into view `source` through its depth.

    A point counts as hidden, and is left out, when it lies more than HIDDEN_MARGIN (world units) *behind*
    what the source sees there; a point that floats in front of the source's surface stays in, since the
    source should have seen it.
    """
    points = views.points[:, target]  # [N, R, R, 3]
    uv, distance = project(points, views.cam2world[source], views.intrinsics)
    grid = uv * 2 - 1
    solid = inner_foreground(views.foreground[:, source])
    maps = torch.stack([views.depth[:, source], solid.float()], dim=1)  # [N, 2, R, R]
    seen, inside = sample_map(maps, grid).unbind(dim=1)
    visible = inner_foreground(views.foreground[:, target]) & (inside > 0.999) & (grid.abs() < 1).all(dim=-1)
    return Match(grid, distance, seen, visible & (distance - seen < HIDDEN_MARGIN))


@dataclass(frozen=True, kw_only=True)
class MultiViewMeasures:
    """One value per latent, float64 [N]; lower is better except `covisible`, which says how much was
    compared.
    """

    photometric: np.ndarray  # mean L1 colour difference of matched pixels, 0..2
    # mean depth disagreement of matched pixels, as a fraction of the camera distance, 0..0.037 at radius 2.7
    depth: np.ndarray
    normal: np.ndarray  # mean angle between matched surface normals, degrees, 0..180
    covisible: np.ndarray  # matched share of the foreground pixels, 0..1


def normals_from_points(points: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normals [N, R, R, 3] of a point map [N, R, R, 3], and where they are known.

    Cross product of the central differences along the rows and columns; the sign faces the camera for a
    surface seen from outside (columns run right and rows run down the image, so down x right points at the
    viewer). Known where all four neighbours are foreground.
    """
    right = F.pad((points[:, :, 2:] - points[:, :, :-2]).permute(0, 3, 1, 2), (1, 1, 0, 0))  # [N, 3, R, R]
    down = F.pad((points[:, 2:] - points[:, :-2]).permute(0, 3, 1, 2), (0, 0, 1, 1))
    normal = torch.linalg.cross(down, right, dim=1)
    length = normal.norm(dim=1, keepdim=True)
    known = inner_foreground(foreground) & (length[:, 0] > 1e-12)
    return (normal / length.clamp_min(1e-12)).permute(0, 2, 3, 1), known


def _normal(views: Views, target: int, source: int, match: Match) -> tuple[Tensor, Tensor]:
    here, here_known = normals_from_points(views.points[:, target], views.foreground[:, target])
    there, there_known = normals_from_points(views.points[:, source], views.foreground[:, source])
    maps = torch.cat([there.permute(0, 3, 1, 2), there_known[:, None].float()], dim=1)  # [N, 4, R, R]
    sampled = sample_map(maps, match.grid)
    direction = F.normalize(sampled[:, :3], dim=1).permute(0, 2, 3, 1)
    # stable at small angles, where acos of a rounded cosine is not
    chord = (here - direction).norm(dim=-1).clamp_max(2.0)
    angle = torch.rad2deg(2 * torch.asin(chord / 2))
    return angle, match.visible & here_known & (sampled[:, 3] > 0.999)


def _mean_over_pairs(errors: list[tuple[Tensor, Tensor]], worst: float) -> np.ndarray:
    """Mean error over the valid pixels of all pairs, [N] float64; `worst` where fewer than MIN_PIXELS are
    valid.
    """
    total = sum(
        (torch.where(valid, error, 0.0).double().sum(dim=(1, 2)) for error, valid in errors),
        torch.tensor(0.0),
    )
    count = sum((valid.sum(dim=(1, 2)) for _, valid in errors), torch.tensor(0))
    mean = total / count.clamp_min(1)
    return torch.where((count >= MIN_PIXELS) & mean.isfinite(), mean, worst).cpu().numpy()


@torch.no_grad()
def compare_views(views: Views, spec: ViewSpec) -> MultiViewMeasures:
    """Measure rendered views; every ordered pair of neighbouring cameras counts, weighted by its matched
    pixels.

    photometric: |I_source(pi(X)) - I_target| for the point X behind each target pixel, pi the source's
    projection; depth: | |X - o_source| - d_source(pi(X)) | / |X - o_source|, capped at HIDDEN_MARGIN before
    the division; normal: angle between the normals of the two depth maps at X, both in world axes.
    A latent with almost nothing to match (empty, or all haze below the opacity threshold) gets the worst
    value of each.
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
        # also near: one far floater weighs no more than an occlusion
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

    Args: `batch` latents are rendered at once.
    Returns one value per latent and measure. Deterministic: constant noise, fixed ray jitter.
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
