"""Shapes as pictures, and pictures in rows and columns with words beside them, as one PNG.

Letters: H, B = rows and columns of a cell; R pixels per edge, P rays, M of them that hit, N cubes, D, H, W
grid points, S steps.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.geometry.level_set import REACHES, LevelSet, sample
from training.rendering.cameras import LookAtPoseSampler, RaySampler, intrinsics_matrix, unpack_label

INK = (25, 25, 25)
QUIET = (110, 110, 110)
# pixels; between rows with a line
MARGIN = 12
_PARTED = 22
# pixels of small print: height of a line, mean width of a letter
_LINE = 19
_LETTER = 6.8


@dataclass(frozen=True, kw_only=True)
class Row:
    """Cells side by side under a name."""

    cells: Sequence[np.ndarray]  # uint8 [H, B, 3] each, of one size
    name: str = ""
    more: str = ""  # smaller, below the name
    captions: Sequence[str] = ()  # below the cells, one each
    parted: bool = False  # by a line from the row above
    spans: int = 1  # rows beside which the name stands


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font at so many pixels: it needs no installation."""
    return ImageFont.load_default(size)


def sheet(title: str, rows: Sequence[Row], *, names: int = 0, note: str = "") -> np.ndarray:
    """Rows below a title, uint8 [H, B, 3] on white.

    Args: names: width of the column of names, pixels (0: none); note: small print at the foot.
    """
    width = rows[0].cells[0].shape[1]
    columns = max(len(row.cells) for row in rows)
    page_width = names + columns * width + 2 * MARGIN
    lines = textwrap.wrap(note, int((page_width - 2 * MARGIN) / _LETTER))
    head = 44 if title else MARGIN
    foot = MARGIN + (8 + _LINE * len(lines) if lines else 0)
    page = Image.new("RGB", (page_width, head + sum(map(_height, rows)) + foot), "white")
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, 10), title, INK, font(24))
    y = head
    for i, row in enumerate(rows):
        top = y + (_PARTED if row.parted else 4)
        below = top + row.cells[0].shape[0]
        if row.parted:
            draw.line([(MARGIN, y + _PARTED // 2), (page.width - MARGIN, y + _PARTED // 2)], (215, 215, 215))
        for j, cell in enumerate(row.cells):
            page.paste(Image.fromarray(cell), (MARGIN + names + j * width, top))
        for j, words in enumerate(row.captions):
            draw.text(
                (MARGIN + names + j * width + width // 2, below + 2), words, QUIET, font(13), anchor="ma"
            )
        middle = top + sum(map(_height, rows[i : i + row.spans])) // 2
        draw.text((MARGIN, middle), row.name, INK, font(26), anchor="lm")
        draw.text((MARGIN, middle + 22), row.more, QUIET, font(15))
        y += _height(row)
    for i, words in enumerate(lines):
        draw.text((MARGIN, y + 8 + i * _LINE), words, QUIET, font(14))
    return np.array(page)


def _height(row: Row) -> int:
    height: int = row.cells[0].shape[0]
    return (_PARTED if row.parted else 4) + height + (20 if row.captions else 0)


def to_uint8(picture: ArrayLike) -> np.ndarray:
    """A picture [H, B, 3] in 0..1, tensor or array, as uint8."""
    shown: np.ndarray = np.rint(np.clip(np.asarray(picture), 0, 1) * 255).astype(np.uint8)
    return shown


# Shapes as clay: a level set seen from a camera, lit so that pits, bumps and holes show.


CLAY = (0.88, 0.86, 0.83)  # albedo
SUPERSAMPLE = 2  # rays per pixel along each axis
# towards the lights, in camera axes: right, up, to the camera
_KEY = (-0.45, 0.55, 0.70)
_FILL = (0.75, 0.05, 0.45)
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
    # OpenCV's to right, up, towards the camera
    axes = cam2world[0, :3, :3] * cam2world.new_tensor([1, -1, -1])
    return View(
        depth.reshape(resolution, resolution),
        points,
        normals,
        light(shape, points, normals, axes, directions[hit]),
    )


def light(shape: LevelSet, points: Tensor, normals: Tensor, axes: Tensor, directions: Tensor) -> Tensor:
    """Light [M] of a white surface: sky, key and fill light that move with the camera, less what is occluded,
    darker at the rim.
    """
    key, fill = (normals @ (axes @ F.normalize(normals.new_tensor(way), dim=0)) for way in (_KEY, _FILL))
    reaches = normals.new_tensor(REACHES) * shape.spec.box_warp
    crowded = [
        sample(shape.crowding, shape.spec, points + reach * normals)[i] for i, reach in enumerate(reaches)
    ]
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


# Geometry-only pictures: a density cube's isosurface, shaded, without a graphics card.


@torch.no_grad()
def shade(sigma: torch.Tensor, yaw: float = 0.0, resolution: int = 128, level: float = LEVEL) -> torch.Tensor:
    """Lambert-shaded first crossings of the level along camera rays, in units of the cube: its size and place
    do not matter.

    Args:
        sigma: [N, D, H, W] raw density over the whole cube; yaw: radians from frontal; level: raw density of
            the surface.
    Returns: [N, 1, R, R] in [0, 1], white background.
    """
    pose = LookAtPoseSampler.sample(torch.pi / 2 + yaw, torch.pi / 2 - 0.1, torch.zeros(3), radius=2.7)
    origins, directions = RaySampler()(pose, intrinsics_matrix(4.2647).reshape(1, 3, 3), resolution)
    right = pose[0, :3, 0]
    back = pose[0, :3, 3] * pose.new_tensor([1, 0, 1])
    # the light goes with the camera
    turned = torch.stack([right, pose.new_tensor([0, 1, 0]), F.normalize(back, dim=0)], dim=1)
    t = torch.linspace(2.1, 3.3, 160)  # near to far
    points = origins[:, :, None] + t[None, None, :, None] * directions[:, :, None]  # [1, M, S, 3]
    pictures = []
    for cube in sigma.cpu():
        values = _lookup(cube, points[0])  # [M, S]
        above = values >= level
        hit = above.any(dim=1)
        index = above.float().argmax(dim=1).clamp_min(1)
        rows = torch.arange(len(values))
        v0 = values[rows, index - 1]
        v1 = values[rows, index]
        fraction = ((level - v0) / (v1 - v0).clamp_min(1e-6)).clamp(0, 1)
        depth = t[index - 1] + fraction * (t[1] - t[0])
        surface = origins[0] + depth[:, None] * directions[0]
        around = [
            _lookup(cube, surface - offset) - _lookup(cube, surface + offset)
            for offset in 0.012 * torch.eye(3)
        ]
        # outward: minus the density's central differences
        normal = F.normalize(torch.stack(around, dim=-1), dim=-1)
        light = F.normalize(torch.tensor([0.35, 0.5, 0.8]), dim=0) @ turned.T
        shading = 0.25 + 0.75 * (normal @ light).clamp_min(0)
        pictures.append(
            torch.where(hit, shading, torch.ones_like(shading)).reshape(1, resolution, resolution)
        )
    return torch.stack(pictures)


def _lookup(cube: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Trilinear values of a cube [D, H, W] of side 1 at points [..., 3]; far below any level outside."""
    outside = -1000.0
    grid = (points * 2).reshape(1, 1, 1, -1, 3)
    values = (
        F.grid_sample((cube - outside)[None, None], grid, align_corners=True, padding_mode="zeros") + outside
    )
    return values.reshape(points.shape[:-1])
