"""Contact sheets of labelled images in rows and columns, and shaded images of shapes.

Shapes: H rows and B columns of pixels of a cell; R pixels per edge of an image, P rays of an image, M rays
that hit a surface; N density cubes, D, H, W grid points of a cube along z, y, x, S samples along a ray.
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

INK = (25, 25, 25)  # colour of titles and names, red, green and blue in 0..255
QUIET = (110, 110, 110)  # colour of small text
MARGIN = 12  # width of the empty border, in pixels
_PARTED = 22  # distance between rows that a line separates, in pixels
_LINE = 19  # height of a line of the note, in pixels
_LETTER = 6.8  # mean width of a letter of the note, in pixels
_CAPTION_LINE = 16  # height of a further line of a caption, in pixels
_CAPTION_LETTER = 6.3  # mean width of a letter of a caption, in pixels


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row of cells of a contact sheet, with a name at the left."""

    cells: Sequence[np.ndarray]  # images of one size, uint8 [H, B, 3] each
    name: str = ""  # text at the left of the row; "": no text
    more: str = ""  # small text below the name
    captions: Sequence[str] = ()  # a text below each cell; empty: no captions
    parted: bool = False  # True if a line separates this row from the row above
    spans: int = 1  # number of rows, from this one on, over which the name is centred


def font(text_height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the built-in font of Pillow in a size. No font needs to be installed for it.

    Args:
        text_height: height of the text in pixels.
    """
    return ImageFont.load_default(text_height)


def sheet(title: str, rows: Sequence[Row], *, name_width: int = 0, note: str = "") -> np.ndarray:
    """Draw a contact sheet on white: a title, rows of images, and a note.

    Args:
        title: text at the top; "": no title.
        rows: rows of images, all of one size.
        name_width: width of the column that holds the names of the rows, in pixels; 0: no such column.
        note: small text at the foot, which is wrapped; "": no note.

    Returns:
        Image, uint8 [height, width, 3].
    """
    cell_width = rows[0].cells[0].shape[1]
    column_count = max(len(sheet_row.cells) for sheet_row in rows)  # rows may have different numbers of cells
    page_width = name_width + column_count * cell_width + 2 * MARGIN
    note_lines = textwrap.wrap(note, int((page_width - 2 * MARGIN) / _LETTER))
    # all lengths below are in pixels
    head_height = 44 if title else MARGIN
    foot_height = MARGIN + (8 + _LINE * len(note_lines) if note_lines else 0)
    page_height = head_height + sum(map(_height, rows)) + foot_height
    page_image = Image.new("RGB", (page_width, page_height), "white")
    canvas = ImageDraw.Draw(page_image)
    if title:
        canvas.text((MARGIN, 10), title, INK, font(24))
    row_top = head_height  # upper edge of the current row
    for i, sheet_row in enumerate(rows):
        cell_top = row_top + (_PARTED if sheet_row.parted else 4)
        cell_bottom = cell_top + sheet_row.cells[0].shape[0]
        if sheet_row.parted:
            # a light grey line in the middle of the gap above the row
            line_y = row_top + _PARTED // 2
            canvas.line([(MARGIN, line_y), (page_image.width - MARGIN, line_y)], (215, 215, 215))
        for j, cell in enumerate(sheet_row.cells):
            page_image.paste(Image.fromarray(cell), (MARGIN + name_width + j * cell_width, cell_top))
        for j, caption in enumerate(sheet_row.captions):
            cell_centre = MARGIN + name_width + j * cell_width + cell_width // 2
            for k, caption_line in enumerate(_wrapped_caption(sheet_row, caption)):
                # "ma": the position is the middle of the upper edge of the text
                line_y = cell_bottom + 2 + k * _CAPTION_LINE
                canvas.text((cell_centre, line_y), caption_line, QUIET, font(13), anchor="ma")
        name_y = cell_top + sum(map(_height, rows[i : i + sheet_row.spans])) // 2
        # "lm": the position is the middle of the left edge of the text
        canvas.text((MARGIN, name_y), sheet_row.name, INK, font(26), anchor="lm")
        canvas.text((MARGIN, name_y + 22), sheet_row.more, QUIET, font(15))
        row_top += _height(sheet_row)
    for i, note_line in enumerate(note_lines):
        canvas.text((MARGIN, row_top + 8 + i * _LINE), note_line, QUIET, font(14))
    return np.array(page_image)


def _height(sheet_row: Row) -> int:
    """Compute the height of a row in pixels, including the gap above it and the captions below it."""
    cell_height: int = sheet_row.cells[0].shape[0]
    caption_lines = max(
        (len(_wrapped_caption(sheet_row, caption)) for caption in sheet_row.captions), default=0
    )
    # the first line has 20 pixels with its margins
    caption_height = 20 + (caption_lines - 1) * _CAPTION_LINE if caption_lines else 0
    return (_PARTED if sheet_row.parted else 4) + cell_height + caption_height


def _wrapped_caption(sheet_row: Row, caption: str) -> list[str]:
    """Wrap a caption to lines that fit below a cell, at least one."""
    letters = max(int(sheet_row.cells[0].shape[1] / _CAPTION_LETTER), 8)
    return textwrap.wrap(caption, letters) or [""]


def blank_cell(side: int, reason: str) -> np.ndarray:
    """Draw a white cell that states why it shows nothing else, uint8 [R, R, 3].

    The text lies within the middle 72 % of the width, so that a cell whose margins are cropped shows it.

    Args:
        side: pixels per edge, R.
        reason: text of the cell, which is wrapped.
    """
    text_height = max(side // 13, 6)  # in pixels
    # the mean width of a letter is about 0.54 of the height of the text
    reason_lines = textwrap.wrap(reason, max(int(0.72 * side / (0.54 * text_height)), 8))
    cell_image = Image.new("RGB", (side, side), "white")
    # "mm": the position is the middle of the text
    ImageDraw.Draw(cell_image).multiline_text(
        (side // 2, side // 2), "\n".join(reason_lines), QUIET, font(text_height), anchor="mm", align="center"
    )
    return np.array(cell_image)


def explain_blank(low: float, high: float, level: float) -> str:
    """Return the reason why a render of a shape shows no surface.

    Args:
        low: smallest raw density of the shape.
        high: largest raw density.
        level: raw density at the surface.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        return "no surface: the density is not finite"
    if low < level <= high:
        return "the surface is outside this view"
    side = "below" if high < level else "above"
    return f"no surface: all densities, {low:.3g} to {high:.3g}, are {side} the level {level:g}"


def to_uint8(image: ArrayLike) -> np.ndarray:
    """Convert an image [H, B, 3] in 0..1, a tensor on the CPU or an array, to uint8 0..255, rounded."""
    image_uint8: np.ndarray = np.rint(np.clip(np.asarray(image), 0, 1) * 255).astype(np.uint8)
    return image_uint8


# Renders of a shape in the colour of clay. The light is chosen so that pits, bumps and holes are visible.


CLAY = (0.88, 0.86, 0.83)  # albedo, red, green and blue in 0..1
SUPERSAMPLE = 2  # number of rays per pixel along each axis of the image
# directions towards the lights, in the axes of the camera: right, up, towards the camera
_KEY = (-0.45, 0.55, 0.70)
_FILL = (0.75, 0.05, 0.45)
# Value of LevelSet.crowding above a flat surface. Points with at most this value count as not occluded.
FLAT = 0.15


@dataclass(frozen=True)
class View:
    """Part of a surface that is visible from one camera."""

    depth: Tensor  # [R, R] distance along the ray in world units; inf where the ray misses the surface
    points: Tensor  # [M, 3] world coordinates of the hit points, in the row-major order of their pixels
    normals: Tensor  # [M, 3] unit normals that point outward
    light: Tensor  # [M] brightness that a white surface would have at the points, 0..1
    blank_reason: str = ""  # why no surface is visible; "" if one is visible

    @property
    def hit(self) -> Tensor:
        """Return the mask of the pixels whose ray hits the surface, bool [R, R]."""
        return self.depth.isfinite()


@torch.no_grad()
def look(shape: LevelSet, camera: Tensor, resolution: int) -> View:
    """Trace the surface of a shape from a camera, with one ray per pixel.

    Args:
        shape: shape whose surface is traced.
        camera: camera label, [1, 25].
        resolution: number of pixels per edge of the image, R.
    """
    cam2world, intrinsics = unpack_label(camera.to(shape.cube))  # [1, 4, 4], [1, 3, 3]
    # [P, 3] each; index 0 takes the only camera of the batch
    origins, directions = (rays[0] for rays in RaySampler()(cam2world, intrinsics, resolution))
    depth = shape.trace(origins, directions)  # [P], inf where a ray misses the surface
    is_hit = depth.isfinite()
    points = origins[is_hit] + depth[is_hit, None] * directions[is_hit]
    # if no ray hits the surface, points and normals are [0, 3], and the light is [0]
    if len(points) == 0:
        blank_reason = explain_blank(float(shape.cube.min()), float(shape.cube.max()), shape.level)
        return View(depth.reshape(resolution, resolution), points, points, points[:, 0], blank_reason)
    normals = shape.normals(points)  # [M, 3]
    # The columns of the rotation are the camera's axes of OpenCV (right, down, forward) in the world. With
    # the signs they become right, up, and towards the camera.
    camera_axes = cam2world[0, :3, :3] * cam2world.new_tensor([1, -1, -1])
    return View(
        depth.reshape(resolution, resolution),
        points,
        normals,
        light(shape, points, normals, camera_axes, directions[is_hit]),
    )


def light(
    shape: LevelSet, points: Tensor, normals: Tensor, camera_axes: Tensor, directions: Tensor
) -> Tensor:
    """Compute the brightness of a white surface, [M] in 0..1.

    An ambient light, a key light and a fill light move with the camera. Occluded points and points near the
    silhouette are darker. The weights were chosen by eye.

    Args:
        shape: shape that is lit.
        points: points on its surface, [M, 3].
        normals: outward unit normals, [M, 3].
        camera_axes: axes of the camera in the world (right, up, towards the camera) as columns, [3, 3].
        directions: unit directions of the rays, [M, 3].
    """
    # cosines between the normals and the directions of the key light and the fill light, [M] each
    key_cosine, fill_cosine = (
        normals @ (camera_axes @ F.normalize(normals.new_tensor(light_direction), dim=0))
        for light_direction in (_KEY, _FILL)
    )
    # Ambient occlusion: the share of matter around points at several distances above the surface. Channel i
    # of `crowding` belongs to distance i.
    occlusion_distances = normals.new_tensor(REACHES) * shape.spec.box_warp
    crowding = [
        sample(shape.crowding, shape.spec, points + occlusion_distance * normals)[channel]
        for channel, occlusion_distance in enumerate(occlusion_distances)
    ]
    openness = (1 - 1.5 * (torch.stack(crowding) - FLAT).clamp_min(0)).clamp(0.15, 1).prod(dim=0)  # [M]
    # cosine between the normal and the direction to the camera, [M]: 1 if facing it, 0 at the silhouette
    facing_cosine = -(normals * directions).sum(dim=1)
    # the factor is 1 where the cosine is at least 0.45, and falls to 0.72 at the silhouette
    rim_factor = 0.72 + 0.28 * (facing_cosine.clamp(0, 1) / 0.45).clamp_max(1)
    return (
        (0.32 + 0.66 * key_cosine.clamp_min(0) + 0.22 * fill_cosine.clamp_min(0)) * openness * rim_factor
    ).clamp(0, 1)


def paint(view: View, albedo: Tensor | tuple[float, float, float] = CLAY) -> Tensor:
    """Render a view as an image on white, [R, R, 3] in 0..1. A view without a surface shows the reason.

    Args:
        view: visible part of a surface.
        albedo: colour of the surface in 0..1: one colour (3), or a colour per point [M, 3].
    """
    if view.blank_reason:
        blank = torch.from_numpy(blank_cell(len(view.depth), view.blank_reason)) / 255
        return blank.to(view.depth)
    # pixels whose ray misses the surface stay white
    image = torch.ones(*view.depth.shape, 3).to(view.depth)
    image[view.hit] = view.light[:, None] * torch.as_tensor(albedo).to(view.light)
    return image


def shrink(image: Tensor, factor: int = SUPERSAMPLE) -> Tensor:
    """Average an image [R, R, 3] over squares of factor x factor pixels: [R / factor, R / factor, 3]."""
    # avg_pool2d needs the shape [1, 3, R, R]
    return F.avg_pool2d(image.movedim(-1, 0)[None], factor)[0].movedim(0, -1)


# Images of the geometry alone: the isosurface of a density cube, shaded on the CPU.


@torch.no_grad()
def shade(sigma: torch.Tensor, yaw: float = 0.0, resolution: int = 128, level: float = LEVEL) -> torch.Tensor:
    """Render the isosurface of density cubes with Lambert shading.

    A pixel shows the first point of its ray at which the density reaches the level. Lengths are in units of
    the side of the cube, so the size and the position of the cube in the world have no influence. The image
    of a cube without a visible surface states the reason.

    Args:
        sigma: raw density over each cube, [N, D, H, W].
        yaw: horizontal angle of the camera from the frontal view, in radians.
        resolution: number of pixels per edge of the images, R.
        level: raw density at the surface.

    Returns:
        Grey images on white, [N, 1, R, R] in 0..1.
    """
    # EG3D's camera of FFHQ: radius 2.7 and focal length 4.2647. It is 0.1 rad above the horizon.
    cam2world = LookAtPoseSampler.sample(torch.pi / 2 + yaw, torch.pi / 2 - 0.1, torch.zeros(3), radius=2.7)
    origins, directions = RaySampler()(cam2world, intrinsics_matrix(4.2647).reshape(1, 3, 3), resolution)
    # The light moves with the camera, but not with its height. Its axes are the camera's right, the world's
    # up, and the horizontal direction towards the camera, whose position is column 3 of the pose.
    right_axis = cam2world[0, :3, 0]
    camera_direction = cam2world[0, :3, 3] * cam2world.new_tensor([1, 0, 1])
    world_axes = torch.stack(
        [right_axis, cam2world.new_tensor([0, 1, 0]), F.normalize(camera_direction, dim=0)], dim=1
    )
    # distances of the samples along a ray, near to far; they cover a ball of radius 0.6 around the centre
    ray_distances = torch.linspace(2.1, 3.3, 160)
    points = origins[:, :, None] + ray_distances[None, None, :, None] * directions[:, :, None]  # [1, M, S, 3]
    images = []
    # `_lookup` interpolates a single cube
    for cube in sigma.cpu():
        densities = _lookup(cube, points[0])  # [M, S]
        is_inside = densities >= level
        is_hit = is_inside.any(dim=1)
        if not is_hit.any():
            blank_reason = explain_blank(float(cube.min()), float(cube.max()), level)
            blank = torch.from_numpy(blank_cell(resolution, blank_reason)[None, :, :, 0]) / 255
            images.append(blank.to(densities))
            continue
        # index of the first sample inside the surface; at least 1, because the sample before it is needed
        hit_index = is_inside.float().argmax(dim=1).clamp_min(1)
        ray_indices = torch.arange(len(densities))
        value_before = densities[ray_indices, hit_index - 1]
        value_inside = densities[ray_indices, hit_index]
        # linear interpolation of the position between these two samples at which the density is the level
        fraction = ((level - value_before) / (value_inside - value_before).clamp_min(1e-6)).clamp(0, 1)
        depth = ray_distances[hit_index - 1] + fraction * (ray_distances[1] - ray_distances[0])
        surface_points = origins[0] + depth[:, None] * directions[0]
        # The outward normal is the negative gradient of the density, from central differences along x, y and
        # z.
        differences = [
            _lookup(cube, surface_points - offset) - _lookup(cube, surface_points + offset)
            for offset in 0.012 * torch.eye(3)
        ]
        normals = F.normalize(torch.stack(differences, dim=-1), dim=-1)
        light_direction = F.normalize(torch.tensor([0.35, 0.5, 0.8]), dim=0) @ world_axes.T
        # ambient light 0.25, and Lambert's cosine law for the rest
        shading = 0.25 + 0.75 * (normals @ light_direction).clamp_min(0)
        shading = torch.where(is_hit, shading, torch.ones_like(shading))  # white background
        images.append(shading.reshape(1, resolution, resolution))
    return torch.stack(images)


def _lookup(cube: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Interpolate a density cube of side 1, centred at the origin, at points.

    Args:
        cube: raw density, [D, H, W].
        points: coordinates x, y, z, [..., 3].

    Returns:
        Densities, [...]; -1000, which is below every level, outside the cube.
    """
    outside_density = -1000.0
    # grid_sample expects coordinates in -1..1
    grid_coordinates = (points * 2).reshape(1, 1, 1, -1, 3)
    # Padding with zeros is the only constant padding, so the cube is shifted before and after.
    shifted_values = F.grid_sample(
        (cube - outside_density)[None, None], grid_coordinates, align_corners=True, padding_mode="zeros"
    )
    return (shifted_values + outside_density).reshape(points.shape[:-1])
