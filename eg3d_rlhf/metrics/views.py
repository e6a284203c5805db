"""Several views of the same latents, and the geometry that ties their pixels together.

Shape letters: N latents, F views, R pixels per edge, L x Wd style vectors. Depth is the Euclidean distance along a pixel's unit ray.
World: x right, y up, z to the camera; cameras are OpenCV's (x right, y down, z forward), intrinsics normalised by the image size.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from training.rendering.cameras import FFHQ_FOCAL, FFHQ_RADIUS, camera_position, intrinsics_matrix, look_at, pack_label
from training.rendering.rays import RaySampler

_BEHIND = 1e-3  # world units; a point nearer to the camera plane than this has no pixel


class Renders(Protocol):
    """The part of a generator that the multi-view measures use."""

    rendering_kwargs: dict[str, Any]  # 'avg_camera_radius' and 'avg_camera_pivot', where the generator knows them
    neural_rendering_resolution: int  # this and the former are put back after rendering

    def synthesis(self, ws: Tensor, c: Tensor, **options) -> dict[str, Tensor]:
        """image_raw [N, 3, R, R] in [-1, 1], image_depth and image_opacity [N, 1, R, R] for cameras c [N, 25]."""


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Cameras on a level arc, ordered by yaw; neighbours in the tuple are compared with each other."""

    yaws: tuple[float, ...] = (-0.5, -0.25, 0.0, 0.25, 0.5)  # radians from frontal, at least two
    pitch: float = 0.0  # radians of EG3D's pitch parameter from level
    radius: float = FFHQ_RADIUS  # camera distance from the origin, world units
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)  # point looked at, world units
    focal: float = FFHQ_FOCAL  # focal length over image size
    resolution: int = 64  # pixels per edge of the raw rendering
    samples: int | None = 48  # samples per ray in each of the two passes; None keeps the generator's own, which may be too few to measure
    opacity: float = 0.5  # accumulated opacity from which a pixel is foreground, 0..1

    def __post_init__(self) -> None:
        if len(self.yaws) < 2 or list(self.yaws) != sorted(set(self.yaws)):
            raise ValueError(f"ViewSpec: expected at least two increasing yaws, got {self.yaws}. Neighbouring views are compared.")
        if self.samples is not None and self.samples < 4:
            raise ValueError(f"ViewSpec: expected samples >= 4 or None, got {self.samples}.")
        if self.resolution < 8 or not 0 < self.opacity < 1 or self.radius <= 0 or self.focal <= 0:
            raise ValueError("ViewSpec: expected resolution >= 8, opacity in (0, 1), positive radius and focal.")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Ordered neighbours (target, source): both directions of every adjacent pair."""
        forward = [(i, i + 1) for i in range(len(self.yaws) - 1)]
        return forward + [(j, i) for i, j in forward]

    def cam2world(self, device: torch.device | str = "cpu") -> Tensor:
        """Poses [F, 4, 4]."""
        h = math.pi / 2 + torch.tensor(self.yaws, device=device)[:, None]
        position = camera_position(h, torch.full_like(h, math.pi / 2 + self.pitch), self.radius)
        return look_at(position, torch.tensor(self.pivot, device=device))

    def intrinsics(self, device: torch.device | str = "cpu") -> Tensor:
        """[3, 3], normalised by the image size."""
        return intrinsics_matrix(self.focal, device)


def spec_for(G: Renders, **settings) -> ViewSpec:
    """Cameras at the generator's own average radius, looking at its own pivot; `settings` override fields of ViewSpec."""
    radius = G.rendering_kwargs.get("avg_camera_radius", FFHQ_RADIUS)
    pivot = tuple(float(value) for value in G.rendering_kwargs.get("avg_camera_pivot", (0.0, 0.0, 0.0)))
    return ViewSpec(**{"radius": radius, "pivot": pivot, **settings})


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
    """World points [N, F, R, R, 3] of depth maps [N, F, R, R] seen by cameras [F, 4, 4]. Differentiable in depth."""
    resolution = depth.shape[-1]
    origins, directions = RaySampler()(cam2world, intrinsics.expand(len(cam2world), 3, 3), resolution)  # [F, R*R, 3] each
    points = origins + depth.flatten(2)[..., None] * directions  # [N, F, R*R, 3]
    return points.unflatten(2, (resolution, resolution))


def project(points: Tensor, cam2world: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Image position (u, v), 0..1 over the image, and distance from the camera of world points [..., 3] for one camera [4, 4].

    Points at or behind the camera plane get a position far outside the image. Differentiable in points. The skew is taken as 0.
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
    """Views of maps rendered elsewhere: image [N, F, 3, R, R], depth and opacity [N, F, R, R]; non-finite depth counts as background."""
    cam2world, intrinsics = spec.cam2world(depth.device), spec.intrinsics(depth.device)
    foreground = (opacity >= spec.opacity) & depth.isfinite()
    depth = torch.where(depth.isfinite(), depth, torch.zeros_like(depth))
    return Views(image, depth, foreground, lift(depth, cam2world, intrinsics), cam2world, intrinsics)


@torch.no_grad()
def render_views(G: Renders, ws: Tensor, spec: ViewSpec | None = None, seed: int = 0) -> Views:
    """Render latents ws [N, L, Wd] from every camera of `spec`, with constant noise and the same ray jitter in every call.

    The ray sampler draws from torch's global generator; it is seeded here and its state put back afterwards, so that two generators
    are compared under equal jitter and nothing outside changes.
    """
    spec = spec or spec_for(G)
    labels = pack_label(spec.cam2world(ws.device), spec.intrinsics(ws.device))  # [F, 25]
    kept_resolution, kept_options = G.neural_rendering_resolution, G.rendering_kwargs
    outputs = []
    devices = [ws.device] if ws.device.type == "cuda" else []
    if spec.samples is not None:
        G.rendering_kwargs = {**kept_options, "depth_resolution": spec.samples, "depth_resolution_importance": spec.samples}
    try:
        with torch.random.fork_rng(devices=devices):
            for label in labels:
                torch.manual_seed(seed)
                c = label.expand(len(ws), -1)
                out = G.synthesis(ws, c, neural_rendering_resolution=spec.resolution, noise_mode="const")
                outputs.append((out["image_raw"], out["image_depth"][:, 0], out["image_opacity"][:, 0]))
    finally:
        G.neural_rendering_resolution, G.rendering_kwargs = kept_resolution, kept_options
    image, depth, opacity = (torch.stack(maps, dim=1).float() for maps in zip(*outputs, strict=True))
    return views_from_maps(image, depth, opacity, spec)


def sample_map(values: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples [N, C, R, R] of maps [N, C, R, R] at grid [N, R, R, 2] (-1..1, pixel centres inside, edges repeated)."""
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)


def inner_foreground(foreground: Tensor, steps: int = 1) -> Tensor:
    """Foreground [N, R, R] bool without the pixels within `steps` of its edge or of the image's."""
    kept = F.max_pool2d((~foreground).float()[:, None], 2 * steps + 1, stride=1, padding=steps)[:, 0] == 0
    kept[:, :steps], kept[:, -steps:], kept[:, :, :steps], kept[:, :, -steps:] = False, False, False, False
    return kept


def match_views(views: Views, target: int, source: int, hidden_margin: float) -> Match:
    """Carry every pixel of view `target` into view `source` through its depth.

    A point counts as hidden, and is left out, when it lies more than `hidden_margin` (world units) *behind* what the source sees there;
    a point that floats in front of the source's surface stays in, since the source should have seen it.
    """
    points = views.points[:, target]  # [N, R, R, 3]
    uv, distance = project(points, views.cam2world[source], views.intrinsics)
    grid = uv * 2 - 1
    solid = inner_foreground(views.foreground[:, source])
    maps = torch.stack([views.depth[:, source], solid.float()], dim=1)  # [N, 2, R, R]
    seen, inside = sample_map(maps, grid).unbind(dim=1)
    visible = inner_foreground(views.foreground[:, target]) & (inside > 0.999) & (grid.abs() < 1).all(dim=-1)
    return Match(grid, distance, seen, visible & (distance - seen < hidden_margin))
