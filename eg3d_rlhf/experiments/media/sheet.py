"""Contact sheets of labelled images in rows and columns, and shaded images of shapes.

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
MARGIN = 12  # pixels
_PARTED = 22  # pixels between rows that a line separates
_LINE = 19  # pixels, height of a line of small print
_LETTER = 6.8  # pixels, mean width of a letter of small print


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row of cells with a name at the left."""

    cells: Sequence[np.ndarray]  # uint8 [H, B, 3] each, of one size
    name: str = ""
    more: str = ""  # small text below the name
    captions: Sequence[str] = ()  # a text below each cell
    parted: bool = False  # a line separates it from the row above
    spans: int = 1  # number of rows over which the name is centred


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's built-in font at a size in pixels, so that no font must be installed."""
    return ImageFont.load_default(size)


def sheet(title: str, rows: Sequence[Row], *, names: int = 0, note: str = "") -> np.ndarray:
    """Draw rows below a title: uint8 [H, B, 3] on white.

    Args: names: width of the column of names in pixels, 0: no column; note: small print at the foot.
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
        # "ma": the given point is the middle of the text's upper edge
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
    """Compute the height of a row in pixels, with the gap above and the captions below."""
    height: int = row.cells[0].shape[0]
    return (_PARTED if row.parted else 4) + height + (20 if row.captions else 0)


def to_uint8(image: ArrayLike) -> np.ndarray:
    """Convert an image [H, B, 3] in 0..1, tensor or array, to uint8."""
    shown: np.ndarray = np.rint(np.clip(np.asarray(image), 0, 1) * 255).astype(np.uint8)
    return shown


# Shapes as clay: a level set rendered from a camera, lit so that pits, bumps and holes are visible.


CLAY = (0.88, 0.86, 0.83)  # albedo
SUPERSAMPLE = 2  # rays per pixel along each axis
# directions towards the lights, in the axes of the camera: right, up, towards the camera
_KEY = (-0.45, 0.55, 0.70)
_FILL = (0.75, 0.05, 0.45)
FLAT = 0.15  # crowding above a flat surface, which counts as not occluded


@dataclass(frozen=True)
class View:
    """Visible part of a surface from one camera."""

    depth: Tensor  # [R, R] along the unit ray, in world units; inf where the ray misses
    points: Tensor  # [M, 3] world, in the order of the pixels that hit
    normals: Tensor  # [M, 3] outward
    light: Tensor  # [M] of a white surface, 0..1

    @property
    def hit(self) -> Tensor:
        """Return the mask of pixels whose ray hits the surface, [R, R] bool."""
        return self.depth.isfinite()


@torch.no_grad()
def look(shape: LevelSet, camera: Tensor, resolution: int) -> View:
    """Trace a shape from a camera [1, 25], with one ray per pixel."""
    cam2world, intrinsics = unpack_label(camera.to(shape.cube))
    origins, directions = (rays[0] for rays in RaySampler()(cam2world, intrinsics, resolution))  # [P, 3]
    depth = shape.trace(origins, directions)
    hit = depth.isfinite()
    points = origins[hit] + depth[hit, None] * directions[hit]
    if len(points) == 0:  # no ray hits: all fields of points are empty
        return View(depth.reshape(resolution, resolution), points, points, points[:, 0])
    normals = shape.normals(points)
    # OpenCV's axes (right, down, forwards) to right, up, towards the camera
    axes = cam2world[0, :3, :3] * cam2world.new_tensor([1, -1, -1])
    return View(
        depth.reshape(resolution, resolution),
        points,
        normals,
        light(shape, points, normals, axes, directions[hit]),
    )


def light(shape: LevelSet, points: Tensor, normals: Tensor, axes: Tensor, directions: Tensor) -> Tensor:
    """Compute the light of a white surface, [M].

    Sky, key and fill light move with the camera; occluded points and the rim are darker.
    """
    # [M] each: cosines between the normals and the lights
    key, fill = (normals @ (axes @ F.normalize(normals.new_tensor(way), dim=0)) for way in (_KEY, _FILL))
    # ambient occlusion: how much matter is around points at several distances above the surface
    reaches = normals.new_tensor(REACHES) * shape.spec.box_warp
    crowded = [
        sample(shape.crowding, shape.spec, points + reach * normals)[i] for i, reach in enumerate(reaches)
    ]
    openness = (1 - 1.5 * (torch.stack(crowded) - FLAT).clamp_min(0)).clamp(0.15, 1).prod(dim=0)
    # cosine to the viewing ray, 0 at the silhouette
    facing = -(normals * directions).sum(dim=1)
    rim = 0.72 + 0.28 * (facing.clamp(0, 1) / 0.45).clamp_max(1)
    return ((0.32 + 0.66 * key.clamp_min(0) + 0.22 * fill.clamp_min(0)) * openness * rim).clamp(0, 1)


def paint(view: View, albedo: Tensor | tuple[float, float, float] = CLAY) -> Tensor:
    """Paint a view: [R, R, 3] in 0..1 on white. Args: albedo: one colour, or one per point [M, 3]."""
    image = torch.ones(*view.depth.shape, 3).to(view.depth)
    image[view.hit] = view.light[:, None] * torch.as_tensor(albedo).to(view.light)
    return image


def shrink(image: Tensor, factor: int = SUPERSAMPLE) -> Tensor:
    """Average an image [R, R, 3] over squares of factor x factor pixels."""
    # avg_pool2d expects [1, 3, R, R]
    return F.avg_pool2d(image.movedim(-1, 0)[None], factor)[0].movedim(0, -1)


# Geometry-only images: the isosurface of a density cube, shaded on the CPU.


@torch.no_grad()
def shade(sigma: torch.Tensor, yaw: float = 0.0, resolution: int = 128, level: float = LEVEL) -> torch.Tensor:
    """Render the first crossings of the level along camera rays, with Lambert shading.

    Lengths are in units of the cube, so that its size and position do not matter.

    Args:
        sigma: [N, D, H, W] raw density over the whole cube; yaw: radians from frontal; level: raw density of
            the surface.
    Returns: [N, 1, R, R] in [0, 1], white background.
    """
    pose = LookAtPoseSampler.sample(torch.pi / 2 + yaw, torch.pi / 2 - 0.1, torch.zeros(3), radius=2.7)
    origins, directions = RaySampler()(pose, intrinsics_matrix(4.2647).reshape(1, 3, 3), resolution)
    right = pose[0, :3, 0]
    back = pose[0, :3, 3] * pose.new_tensor([1, 0, 1])
    # the light moves with the camera
    to_world = torch.stack([right, pose.new_tensor([0, 1, 0]), F.normalize(back, dim=0)], dim=1)
    t = torch.linspace(2.1, 3.3, 160)  # near to far
    points = origins[:, :, None] + t[None, None, :, None] * directions[:, :, None]  # [1, M, S, 3]
    images = []
    for cube in sigma.cpu():
        values = _lookup(cube, points[0])  # [M, S]
        above = values >= level
        hit = above.any(dim=1)
        # first sample above the level; at least 1, so that there is one before it
        index = above.float().argmax(dim=1).clamp_min(1)
        rows = torch.arange(len(values))
        v0 = values[rows, index - 1]
        v1 = values[rows, index]
        # linear interpolation of the crossing between both samples
        fraction = ((level - v0) / (v1 - v0).clamp_min(1e-6)).clamp(0, 1)
        depth = t[index - 1] + fraction * (t[1] - t[0])
        surface = origins[0] + depth[:, None] * directions[0]
        around = [
            _lookup(cube, surface - offset) - _lookup(cube, surface + offset)
            for offset in 0.012 * torch.eye(3)
        ]
        # outward: minus the density's central differences
        normal = F.normalize(torch.stack(around, dim=-1), dim=-1)
        light = F.normalize(torch.tensor([0.35, 0.5, 0.8]), dim=0) @ to_world.T
        shading = 0.25 + 0.75 * (normal @ light).clamp_min(0)
        images.append(torch.where(hit, shading, torch.ones_like(shading)).reshape(1, resolution, resolution))
    return torch.stack(images)


def _lookup(cube: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Interpolate a cube [D, H, W] of side 1 at points [..., 3]; outside, return a value below any level."""
    outside = -1000.0
    grid = (points * 2).reshape(1, 1, 1, -1, 3)
    values = (
        F.grid_sample((cube - outside)[None, None], grid, align_corners=True, padding_mode="zeros") + outside
    )
    return values.reshape(points.shape[:-1])
