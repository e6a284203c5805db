"""Shapes as clay: a level set seen from a camera, lit so that pits, bumps and holes show, in one colour or tinted point by point.

Letters: R pixels per edge, P rays, M of them that hit, V vertices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eg3d_rlhf.geometry.level_set import REACHES, LevelSet, sample
from training.rendering.cameras import RaySampler, unpack_label

CLAY = (0.88, 0.86, 0.83)  # albedo
RED, BLUE = (0.86, 0.10, 0.08), (0.05, 0.28, 0.92)  # of material that was added, and taken away
SUPERSAMPLE = 2  # rays per pixel along each axis
_KEY, _FILL = (-0.45, 0.55, 0.70), (0.75, 0.05, 0.45)  # towards the lights, in camera axes: right, up, to the camera
FLAT = 0.15  # crowding above a plane


@dataclass(frozen=True)
class View:
    """What a camera sees of a surface."""

    depth: Tensor  # [R, R] along the unit ray, world units; inf where nothing is
    points: Tensor  # [M, 3] world, in the order of the pixels that hit
    normals: Tensor  # [M, 3] outward
    light: Tensor  # [M] of a white surface, 0..1

    @property
    def hit(self) -> Tensor:
        """[R, R] bool."""
        return self.depth.isfinite()


@torch.no_grad()
def look(shape: LevelSet, camera: Tensor, resolution: int) -> View:
    """What a camera [1, 25] sees of a shape, one ray per pixel."""
    cam2world, intrinsics = unpack_label(camera.to(shape.cube))
    origins, directions = (rays[0] for rays in RaySampler()(cam2world, intrinsics, resolution))  # [P, 3]
    depth = shape.trace(origins, directions)
    hit = depth.isfinite()
    points = origins[hit] + depth[hit, None] * directions[hit]
    if len(points) == 0:
        return View(depth.reshape(resolution, resolution), points, points, points[:, 0])
    normals = shape.normals(points)
    axes = cam2world[0, :3, :3] * cam2world.new_tensor([1, -1, -1])  # OpenCV's to right, up, towards the camera
    return View(depth.reshape(resolution, resolution), points, normals, _light(shape, points, normals, axes, directions[hit]))


def _light(shape: LevelSet, points: Tensor, normals: Tensor, axes: Tensor, directions: Tensor) -> Tensor:
    """Light [M] of a white surface: sky, key and fill light that move with the camera, less what is occluded, darker at the rim."""
    key, fill = (normals @ (axes @ F.normalize(normals.new_tensor(light), dim=0)) for light in (_KEY, _FILL))
    reaches = normals.new_tensor(REACHES) * shape.spec.box_warp
    crowded = [sample(shape.crowding, shape.spec, points + reach * normals)[i] for i, reach in enumerate(reaches)]
    openness = (1 - 1.5 * (torch.stack(crowded) - FLAT).clamp_min(0)).clamp(0.15, 1).prod(dim=0)
    facing = -(normals * directions).sum(dim=1)
    rim = 0.72 + 0.28 * (facing.clamp(0, 1) / 0.45).clamp_max(1)
    return ((0.32 + 0.66 * key.clamp_min(0) + 0.22 * fill.clamp_min(0)) * openness * rim).clamp(0, 1)


def paint(view: View, albedo: Tensor | tuple[float, float, float] = CLAY) -> Tensor:
    """A view as a picture [R, R, 3] in 0..1 on white; albedo: one colour, or one per point [M, 3]."""
    picture = torch.ones(*view.depth.shape, 3).to(view.depth)
    picture[view.hit] = view.light[:, None] * torch.as_tensor(albedo).to(view.light)
    return picture


def shrink(picture: Tensor, factor: int = SUPERSAMPLE) -> Tensor:
    """A picture [R, R, 3] averaged over squares of factor x factor pixels."""
    return F.avg_pool2d(picture.movedim(-1, 0)[None], factor)[0].movedim(0, -1)


def tint(moved: Tensor, full: float) -> Tensor:
    """Albedo [..., 3] of signed displacements [...]: blue at -full, clay about 0, red at +full, in the unit of `full`."""
    share = ((moved.abs() / full - 0.1) / 0.9).clamp(0, 1)[..., None]
    ends = torch.where(moved[..., None] < 0, moved.new_tensor(BLUE), moved.new_tensor(RED))
    return moved.new_tensor(CLAY) + (ends - moved.new_tensor(CLAY)) * share
