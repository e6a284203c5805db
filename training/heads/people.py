"""Synthetic heads of the datasets `synthetic:people64` and variants. Each latent defines a head and a scan of
this head.

A latent has 64 coordinates and is scaled to unit root mean square, as a mapping network scales it: 36
coordinates of identity, 4 of hair, 6 of appearance and 18 of scan quality. The first 40 define a mesh by a
linear basis, which builders/people_basis.py builds from the data of MakeHuman. The next 6 define its colours.
The last 18 define the damage of the scan, see `training.heads.people_damage`. The head without damage, which
the first 46 coordinates define, is called the intact or ground-truth head.

World axes: x points right, y up, z towards the camera. The heads lie in the cube of side 1 about the origin.

Shapes: N is the number of heads, V of vertices, T of triangles, K of components of identity, H of hair
fields, P of points, and R of pixels per edge.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy.special import ndtr

from training import storage

KIND = "people-basis"  # kind of the basis file, which its header contains
VERSION = 1  # version of the basis file
COMPONENTS = 36  # number of coordinates of identity K
HAIR_FIELDS = 4  # number of coordinates of hair H
APPEARANCE = 6  # number of coordinates of appearance
QUALITY = 18  # number of coordinates of scan quality
SHAPE = COMPONENTS + HAIR_FIELDS  # number of coordinates that define the mesh
LATENT = COMPONENTS + HAIR_FIELDS + APPEARANCE + QUALITY  # number of coordinates of a latent
# World units per unit of length in the formulas of this module, in which a head has a height of 0.4.
UNIT = 1.15
# Position of the mean head's eyes in these units of length: distance from the plane x = 0, and height y.
EYE = (0.0512, 0.005)
ASSET = storage.ASSETS / "people-basis.safetensors"
# Unit vector that points towards the light, in world axes.
LIGHT = np.array([0.30, 0.50, 0.81], np.float32) / np.linalg.norm([0.30, 0.50, 0.81])

# Palettes of RGB colours in 0..1. A coordinate of appearance selects a colour, interpolated between two rows.

_SKIN = np.array(
    [[0.30, 0.18, 0.12], [0.48, 0.31, 0.21], [0.68, 0.47, 0.34], [0.86, 0.66, 0.53], [0.95, 0.79, 0.69]]
)
_HAIR = np.array(
    [
        [0.05, 0.04, 0.04],
        [0.13, 0.08, 0.05],
        [0.28, 0.17, 0.09],
        [0.50, 0.27, 0.12],
        [0.74, 0.56, 0.30],
        [0.60, 0.58, 0.56],
    ]
)
_IRIS = np.array(
    [[0.17, 0.09, 0.04], [0.30, 0.18, 0.08], [0.22, 0.34, 0.20], [0.16, 0.34, 0.55], [0.34, 0.42, 0.50]]
)
_SHIRT = np.array(
    [
        [0.75, 0.22, 0.20],
        [0.82, 0.62, 0.22],
        [0.30, 0.55, 0.32],
        [0.20, 0.45, 0.68],
        [0.45, 0.30, 0.60],
        [0.24, 0.25, 0.28],
    ]
)

LEVEL = 10.0  # raw density at the surface
INSIDE = 60.0  # largest raw density, inside of a head
OUTSIDE = -10.0  # smallest raw density, outside of a head

Numbers = TypeVar("Numbers", np.ndarray, torch.Tensor)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Linear basis of head meshes. All heads have the same triangles."""

    mean: np.ndarray  # vertices of the mean head [V, 3], float32, world units
    # Offsets of vertices for one standard deviation of a coordinate of identity [K, V, 3], world units.
    components: np.ndarray
    hair: np.ndarray  # offsets of vertices for the full amount of each hair field [H, V, 3], world units
    triangles: np.ndarray  # indices of vertices [T, 3], int64
    masks: dict[str, np.ndarray]  # name of a region of the head -> membership of each vertex [V] in 0..1
    sky: np.ndarray  # fraction of the hemisphere above each vertex that is not occluded [V]
    meta: dict  # description in the basis file

    @functools.cached_property
    def drawn(self) -> np.ndarray:
        """Attributes of the vertices [V, 8] from which `surface_colour` computes colours.

        The columns are the position on the mean head (3), lips, scalp, visible eyeball, long hair, and `sky`.
        """
        long_hair = np.linalg.norm(self.hair[2], axis=1)  # hair field 2 is long hair
        eyes = self.masks["eyes"]
        # The part of the eyeball under the lids, which is occluded, gets the colour of the lids. It would
        # otherwise be visible through the thin lids.
        visible_eyeball = eyes * ramp(0.05, 0.3, self.sky)
        x, y, z = (self.mean / UNIT).T
        # Some vertices near the eyes, such as those inside of the lids, are occluded in the mean head but
        # visible in other heads. Without a lower bound of `sky`, they would be dark spots.
        is_near_eye = (np.hypot(np.abs(x) - EYE[0], y - EYE[1]) < 0.036) & (z > 0.05)
        sky = np.where(is_near_eye, np.maximum(self.sky, 0.7), self.sky)
        columns = [
            self.masks["lips"],
            self.masks["scalp"],
            visible_eyeball,
            long_hair / long_hair.max(),
            sky,
        ]
        return np.concatenate([self.mean, np.stack(columns, axis=1)], axis=1).astype(np.float32)


@functools.cache
def load_basis(path: Path = ASSET) -> Basis:
    """Read the basis of head meshes. The result is cached for the process.

    Raises: ValueError if the file is missing, damaged or of another version.
    """
    try:
        tensors, meta = storage.read_tensors(path, KIND)
        if meta.get("version") != VERSION:
            raise ValueError(
                f"{path}: expected version {VERSION} of the basis of heads, got version"
                f" {meta.get('version')}. Restore the file from the repository."
            )
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error} Or build it again: python -m builders.build people.") from None
    # To be small, the file contains bytes and half-precision numbers, which are converted here.
    masks = tensors["masks"].float().numpy() / 255
    return Basis(
        mean=tensors["mean"].numpy(),
        components=(tensors["components"].float() * tensors["component_step"][:, None, None]).numpy(),
        hair=tensors["hair"].float().numpy(),
        triangles=tensors["triangles"].numpy().astype(np.int64),
        masks=dict(zip(meta["masks"], masks, strict=True)),
        sky=tensors["sky"].float().numpy() / 255,
        meta=meta,
    )


# Functions that convert latents to heads.


def normalise_latents(z: torch.Tensor | np.ndarray) -> np.ndarray:
    """Scale latents [N, 64] to unit root mean square. The result is float64.

    Raises: ValueError for another number of coordinates.
    """
    z = z.detach().cpu().numpy() if isinstance(z, torch.Tensor) else np.asarray(z)
    if z.ndim != 2 or z.shape[1] != LATENT:
        raise ValueError(
            f"synthetic heads: expected latents of shape [N, {LATENT}], got {list(z.shape)}. Use a generator"
            " that was trained on synthetic:people64."
        )
    z = z.astype(np.float64)
    # The same normalisation as in a mapping network (`normalize_2nd_moment`), with the same epsilon.
    return z / np.sqrt((z * z).mean(axis=1, keepdims=True) + 1e-8)


def _split(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Split latents [N, 64] into the coordinates of identity, hair, appearance and scan quality."""
    split_indices = np.cumsum([COMPONENTS, HAIR_FIELDS, APPEARANCE])
    identity, hair, appearance, quality = np.split(z, split_indices, axis=1)
    return identity, hair, appearance, quality


def ramp(low: float, high: float, x: Numbers) -> Numbers:
    """Return a smooth step function of x, which is 0 at `low` and 1 at `high`.

    The function is constant outside of this range. `low` may be larger than `high`; the step then decreases
    with x.
    """
    t = ((x - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)  # cubic polynomial whose slope is 0 at t = 0 and t = 1


def density_of(distance: torch.Tensor, edge: float) -> torch.Tensor:
    """Convert signed distances to raw densities of the same shape. The density at the surface is `LEVEL`.

    Args:
        distance: signed distances of any shape, world units, negative inside.
        edge: depth below the surface at which the density reaches `INSIDE`, world units.
    """
    return (LEVEL - distance * ((INSIDE - LEVEL) / edge)).clamp(OUTSIDE, INSIDE)


def hair_amounts(hair: np.ndarray) -> np.ndarray:
    """Return the amounts [N, H] in 0..1 of the four hair fields, for coordinates of hair [N, H].

    The hair fields are volume, top hair, long hair and a bun.
    """
    # The normal distribution function ndtr maps standard normal coordinates to uniform ones. With the ramps,
    # most heads have neither long hair nor a bun.
    quantile = ndtr(hair)
    volume = quantile[:, 0]
    top_hair = quantile[:, 1] ** 2
    long_hair = ramp(0.45, 0.8, quantile[:, 2])
    bun = ramp(0.72, 0.9, quantile[:, 3])
    return np.stack([volume, top_hair, long_hair, bun], axis=1)


@dataclass(frozen=True, kw_only=True)
class Head:
    """Mesh of an intact head, with the coordinates of its appearance and of the quality of its scan."""

    vertices: np.ndarray  # positions of the vertices [V, 3], float32, world units
    normals: np.ndarray  # unit normals of the vertices [V, 3]
    long: float  # amount of long hair, 0..1
    appearance: np.ndarray  # coordinates of appearance [6]
    quality: np.ndarray  # coordinates of scan quality [18]


def vertex_normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Compute the unit normals of vertices [V, 3] of a mesh.

    A normal is the mean normal of the adjacent triangles, weighted by their area. It is 0 for a vertex
    without triangles.

    Args: vertices: positions [V, 3]; triangles: indices of vertices [T, 3].
    """
    a, b, c = (vertices[triangles[:, i]] for i in range(3))
    face_normals = np.cross(b - a, c - a)  # [T, 3]; the length is twice the area of the triangle
    normals = np.zeros_like(vertices)
    # bincount with weights sums the normals of all triangles of a vertex.
    for axis in range(3):
        for corner in range(3):
            normals[:, axis] += np.bincount(triangles[:, corner], face_normals[:, axis], len(vertices))
    # The bound avoids a division by 0 for vertices without triangles.
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


def heads_from_latents(z: torch.Tensor | np.ndarray, basis: Basis | None = None) -> list[Head]:
    """Return the intact heads that latents [N, 64] define.

    Args: z: latents [N, 64]; basis: basis of head meshes; None: the bundled basis.
    """
    basis = basis or load_basis()
    identity_coordinates, hair_coordinates, appearance, quality = _split(normalise_latents(z))
    hair_field_amounts = hair_amounts(hair_coordinates)
    # Offsets from the mean head, [N, V, 3].
    all_offsets = np.tensordot(identity_coordinates, basis.components, axes=1) + np.tensordot(
        hair_field_amounts, basis.hair, axes=1
    )
    intact_heads = []
    for i, offsets in enumerate(all_offsets):
        vertices = (basis.mean + offsets).astype(np.float32)
        intact_heads.append(
            Head(
                vertices=vertices,
                normals=vertex_normals(vertices, basis.triangles),
                long=float(hair_field_amounts[i, 2]),  # column 2 is long hair
                appearance=appearance[i],
                quality=quality[i],
            )
        )
    return intact_heads


# Cylinder with rounded edges that closes every bust at the bottom, world units.
BUST_RADIUS = 0.44  # radius of the cylinder
BUST_FLOOR = -0.46  # y coordinate of its bottom
BUST_ROUND = 0.04  # radius of the rounding of its edges


def bust_end(points: np.ndarray) -> np.ndarray:
    """Return the signed distances [...] of points [..., 3] to the cylinder that closes a bust at the bottom.

    The cylinder is the same for every bust. Its axis is the y axis. Distances are negative inside of it.
    """
    x, y, z = np.moveaxis(points, -1, 0)
    # Signed distances to the side and to the bottom of a cylinder that is smaller by the radius of
    # the rounding.
    side_distance = np.hypot(x, z) - BUST_RADIUS + BUST_ROUND
    bottom_distance = BUST_FLOOR + BUST_ROUND - y
    outside_distance = np.hypot(np.maximum(side_distance, 0), np.maximum(bottom_distance, 0))
    inside_distance = np.minimum(np.maximum(side_distance, bottom_distance), 0)
    # Subtracting the radius enlarges the smaller cylinder and rounds its edges.
    return outside_distance + inside_distance - BUST_ROUND


# Functions that compute colours.


def _palette(palette: np.ndarray, coordinate: float) -> np.ndarray:
    """Return the colour [3] of a palette for a standard normal coordinate.

    Args: palette: colours [rows, 3]; coordinate: coordinate of appearance.
    """
    # The position is uniformly distributed between the first and the last row.
    palette_position = ndtr(coordinate) * (len(palette) - 1)
    return np.array(
        [
            np.interp(palette_position, np.arange(len(palette)), channel_values)
            for channel_values in palette.T
        ],
        np.float32,
    )


def _mix(base_colours: np.ndarray, top_colour: np.ndarray | float, weights: np.ndarray) -> np.ndarray:
    """Blend a colour over other colours.

    Args:
        base_colours: colours [P, 3] that are covered.
        top_colour: colours [P, 3], one colour [3] for all points, or a number for a grey colour.
        weights: weights [P] of the top colour, in 0..1.
    Returns: colours [P, 3].
    """
    return base_colours + (top_colour - base_colours) * weights[:, None]


def surface_colour(head: Head, point_attributes: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Return the shaded colours [P, 3] in 0..1 of points on the surface.

    The colours do not depend on the viewing direction.

    Args:
        head: head whose coordinates of appearance and amount of long hair are used.
        point_attributes: attributes `Basis.drawn`, interpolated at the points [P, 8].
        normals: unit normals at the points [P, 3].
    """
    # Positions on the *mean* head, so that features of the face have the same position on the mesh for every
    # identity. The numbers below are lengths for a head with a height of 0.4, and choices of design.
    mean_position = point_attributes[:, :3] / UNIT
    lips, scalp, eyes, long_hair, sky = point_attributes[:, 3:].T
    appearance = head.appearance
    skin_colour = _palette(_SKIN, appearance[0])
    hair_colour = _palette(_HAIR, appearance[1])
    iris_colour = _palette(_IRIS, appearance[2])
    shirt_colour = _palette(_SHIRT, appearance[3])
    x = np.abs(mean_position[:, 0])  # the face is symmetric
    y = mean_position[:, 1] - EYE[1]
    z = mean_position[:, 2]
    unlit_colours = np.broadcast_to(skin_colour, (len(mean_position), 3))
    # Later layers cover earlier ones: cheeks, lips, brows, hair, shirt, eyeballs. z restricts a layer to
    # the face.
    blush_weight = np.exp(-(((x - 0.068) / 0.035) ** 2 + ((y + 0.055) / 0.03) ** 2)) * (z > 0.03)
    unlit_colours = _mix(unlit_colours, skin_colour * np.array([1.0, 0.72, 0.68]), 0.5 * blush_weight)
    lip_colour = skin_colour * np.array([0.86, 0.50, 0.50]) * (1 - 0.15 * ndtr(appearance[4]))
    unlit_colours = _mix(unlit_colours, lip_colour, ramp(0.25, 0.6, lips))
    # A brow is an arc above an eye. The position along it is in -1..1.
    along_brow = (x - EYE[0] - 0.002) / 0.05
    distance_from_arc = np.abs(y - (0.044 - 0.013 * along_brow * along_brow))
    brow_weight = ramp(0.0095, 0.005, distance_from_arc) * ramp(0.8, 0.6, np.abs(along_brow)) * (z > 0.04)
    unlit_colours = _mix(unlit_colours, 0.8 * hair_colour, (0.55 + 0.4 * ndtr(appearance[5])) * brow_weight)
    hair_weight = np.maximum(ramp(0.35, 0.65, scalp), head.long * ramp(0.1, 0.3, long_hair))
    unlit_colours = _mix(unlit_colours, hair_colour, hair_weight)
    # The shirt begins below the neck, and hair covers it.
    unlit_colours = _mix(unlit_colours, shirt_colour, ramp(-0.305, -0.32, y) * (1 - hair_weight))
    # Layers of the eyeball by the distance from its centre: white, the dark rim of the iris, the iris,
    # the pupil.
    eye_distance = np.hypot(x - EYE[0], y)
    eyeball_colours = np.full_like(unlit_colours, 0.90)
    eyeball_colours = _mix(eyeball_colours, 0.35 * iris_colour, ramp(0.0145, 0.0130, eye_distance))
    eyeball_colours = _mix(eyeball_colours, iris_colour, ramp(0.0125, 0.0110, eye_distance))
    eyeball_colours = _mix(eyeball_colours, 0.02, ramp(0.0072, 0.0058, eye_distance))
    unlit_colours = _mix(unlit_colours, eyeball_colours, ramp(0.4, 0.6, eyes))
    # Ambient light plus diffuse light, which also reaches surfaces that point slightly away from the light
    # (0.35). Both are weaker where the sky is occluded.
    lambert = np.clip(normals @ LIGHT * 0.65 + 0.35, 0, None)
    shading = 0.5 * (0.2 + 0.8 * sky) * (0.85 + 0.15 * normals[:, 1]) + 0.68 * lambert * (0.5 + 0.5 * sky)
    return np.clip(unlit_colours * shading[:, None], 0, 1).astype(np.float32)


# Functions that render meshes.


def rasterise(
    vertices: np.ndarray, triangles: np.ndarray, cam2world: np.ndarray, focal: float, resolution: int
) -> tuple[np.ndarray, ...]:
    """Rasterise a mesh: find the nearest triangle of every pixel.

    Args:
        vertices: positions [V, 3], world units.
        triangles: indices of vertices [T, 3].
        cam2world: pose of the camera [4, 4] with OpenCV axes.
        focal: focal length divided by the image size.
        resolution: pixels per edge R.
    Returns: three arrays. The first is the index of the nearest triangle [R, R], or -1 where no triangle is
        visible. The second contains the perspective-correct weights of its corners [R, R, 3]. The third is
        the depth along the camera's axis [R, R], which is inf where there is no triangle.
    """
    # Camera coordinates R^T (x - t) for a pose with rotation R and translation t; points are rows.
    camera_points = (vertices - cam2world[:3, 3]) @ cam2world[:3, :3]
    vertex_depths = camera_points[:, 2]
    # Image coordinates in pixels. With -0.5, the centres of pixels are at integers.
    vertex_pixels = (camera_points[:, :2] / vertex_depths[:, None] * focal + 0.5) * resolution - 0.5
    corner_pixels = vertex_pixels[triangles]  # [T, 3, 2]
    corner_depths = vertex_depths[triangles]  # [T, 3]
    # Range of the pixels that a triangle can cover, limited to the image.
    first_pixels = np.clip(np.ceil(corner_pixels.min(axis=1)).astype(int), 0, resolution)
    end_pixels = np.clip(np.floor(corner_pixels.max(axis=1)).astype(int) + 1, 0, resolution)
    covered_extents = np.clip(end_pixels - first_pixels, 0, None)
    nearest_depth = np.full(resolution * resolution, np.inf)
    nearest_triangle = np.full(resolution * resolution, -1)  # index of the triangle
    nearest_weights = np.zeros((resolution * resolution, 3))
    # All pixels of many triangles are tested in one step. The triangles are sorted by their number of pixels
    # and divided into chunks, which bounds the memory.
    pixel_counts = covered_extents.prod(axis=1)
    triangle_order = np.argsort(pixel_counts, kind="stable")
    triangle_order = triangle_order[pixel_counts[triangle_order] > 0]
    for chunk_triangles in np.array_split(triangle_order, max(1, int(pixel_counts.sum() // 400_000))):
        # One row for each pair of a triangle and a pixel in its range. `pixel_numbers` counts the pixels of
        # a triangle from 0.
        triangle_indices = np.repeat(chunk_triangles, pixel_counts[chunk_triangles])
        pixel_numbers = np.arange(len(triangle_indices)) - np.repeat(
            np.cumsum(pixel_counts[chunk_triangles]) - pixel_counts[chunk_triangles],
            pixel_counts[chunk_triangles],
        )
        pixel_columns = (
            first_pixels[triangle_indices, 0] + pixel_numbers % covered_extents[triangle_indices, 0]
        )
        pixel_rows = first_pixels[triangle_indices, 1] + pixel_numbers // covered_extents[triangle_indices, 0]
        a, b, c = (corner_pixels[triangle_indices, i] for i in range(3))
        pixel_positions = np.stack([pixel_columns, pixel_rows], axis=1)
        doubled_areas = cross_2d(b - a, c - a)
        # A triangle that is seen edge-on has the area 0. With an infinite area, all its weights become 0.
        doubled_areas = np.where(np.abs(doubled_areas) < 1e-12, np.inf, doubled_areas)
        # Barycentric weights of the corners at the pixel, [rows, 3].
        corner_weights = (
            np.stack(
                [
                    cross_2d(c - b, pixel_positions - b),
                    cross_2d(a - c, pixel_positions - c),
                    cross_2d(b - a, pixel_positions - a),
                ],
                axis=1,
            )
            / doubled_areas[:, None]
        )
        # The tolerance closes gaps between neighbouring triangles.
        is_inside = (corner_weights >= -1e-9).all(axis=1)
        triangle_indices = triangle_indices[is_inside]
        corner_weights = corner_weights[is_inside]
        flat_pixel_indices = (pixel_rows * resolution + pixel_columns)[is_inside]
        # Perspective-correct interpolation: 1 / depth is linear in image coordinates, but depth is not.
        weights_over_depth = corner_weights / corner_depths[triangle_indices]
        pair_depths = 1 / weights_over_depth.sum(axis=1)
        # Rows are sorted by pixel, and for each pixel from far to near. The last row of a pixel is the
        # nearest triangle.
        sorted_rows = np.lexsort((-pair_depths, flat_pixel_indices))
        is_last_of_pixel = (
            np.r_[np.diff(flat_pixel_indices[sorted_rows]) > 0, True]
            if len(sorted_rows)
            else np.zeros(0, bool)
        )
        nearest_rows = sorted_rows[is_last_of_pixel]
        # Triangles of earlier chunks may be nearer.
        nearest_rows = nearest_rows[
            pair_depths[nearest_rows] < nearest_depth[flat_pixel_indices[nearest_rows]]
        ]
        nearest_depth[flat_pixel_indices[nearest_rows]] = pair_depths[nearest_rows]
        nearest_triangle[flat_pixel_indices[nearest_rows]] = triangle_indices[nearest_rows]
        nearest_weights[flat_pixel_indices[nearest_rows]] = (
            weights_over_depth[nearest_rows] * pair_depths[nearest_rows, None]
        )
    return (
        nearest_triangle.reshape(resolution, resolution),
        nearest_weights.reshape(resolution, resolution, 3),
        nearest_depth.reshape(resolution, resolution),
    )


def cross_2d(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the third component [N] of the cross products of vectors a [N, 2] and b [N, 2].

    The vectors lie in the plane z = 0.
    """
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def render_head(
    head: Head, cam2world: np.ndarray, focal: float, resolution: int
) -> tuple[np.ndarray, np.ndarray]:
    """Render an intact head in colour on a white background.

    Args:
        head: head to render.
        cam2world: pose of the camera [4, 4] with OpenCV axes.
        focal: focal length divided by the image size.
        resolution: pixels per edge R.
    Returns: image [R, R, 3] in 0..1, and distance [R, R] from the camera along the ray through each pixel's
        centre, world units, inf for the background.
    """
    basis = load_basis()
    # Colours are rendered at twice the resolution and averaged, to avoid jagged edges. Depth is not averaged,
    # because a mean of depths on two sides of an edge lies on no surface.
    fine_resolution = 2 * resolution
    nearest_triangle, corner_weights, _ = rasterise(
        head.vertices, basis.triangles, cam2world, focal, fine_resolution
    )
    image = np.ones((fine_resolution, fine_resolution, 3), np.float32)
    is_foreground = nearest_triangle >= 0
    corners = basis.triangles[nearest_triangle[is_foreground]]  # [P, 3]
    # Attributes and normals, interpolated between the corners of each pixel's triangle.
    pixel_attributes, normals = (
        np.einsum("pcd,pc->pd", vertex_values[corners], corner_weights[is_foreground]).astype(np.float32)
        for vertex_values in (basis.drawn, head.normals)
    )
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    image[is_foreground] = surface_colour(head, pixel_attributes, normals)
    _, _, axis_depth = rasterise(head.vertices, basis.triangles, cam2world, focal, resolution)
    # The ray of a pixel has the direction (x, y, 1) in camera coordinates. The distance along the ray is the
    # depth along the axis times the length of this vector.
    pixel_positions = ((np.arange(resolution) + 0.5) / resolution - 0.5) / focal
    ray_length = np.sqrt(1 + pixel_positions[:, None] ** 2 + pixel_positions[None] ** 2)
    # Mean over blocks of 2 x 2 pixels: [2R, 2R, 3] -> [R, 2, R, 2, 3] -> [R, R, 3].
    return image.reshape(resolution, 2, resolution, 2, 3).mean(axis=(1, 3)), axis_depth * ray_length
