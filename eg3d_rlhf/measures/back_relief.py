"""Fine relief of the back of a head: whether it repeats the eyes and the nose of the front.

A tri-plane tends to repeat the face at the back of the head, because the features of its xy plane do not
depend on z. Parallel rays along z find the first surface from both sides, on the same grid of x and y for a
shape and for its ground-truth head. The relief is the depth minus its Gaussian average. Two
measures follow: the standard deviation of the relief in discs around the eyes, and its correlation with the
relief of the front at the same x and y, which are mirrored in an image from the back.

Shapes: N shapes, R = 62 rays per edge. Depths are in voxels of 1/64 world unit, and grow outwards on both
sides. NaN marks rays without a surface.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from eg3d_rlhf.core.field import Field
from training.heads.people import EYE, UNIT, Head, load_basis, rasterise

RAYS = 62  # R
HALF_WIDTH = 0.155  # half of the edge of the square that the rays cover, world units
CENTRE_Y = -0.03  # y coordinate of its centre
STEP = 2 * HALF_WIDTH / RAYS  # distance between rays
SMOOTHING = 0.014  # standard deviation of the Gaussian average, world units
EYE_RADIUS = 0.036  # radius of the discs around the eyes
VOXELS = 64  # voxels per world unit
_SAMPLES = 56  # samples along a ray, before the bisection
_BISECTIONS = 7  # halvings of the distance between two samples: at the end 1/200 voxel
_FAR = 40.0  # distance of the camera whose rays are taken as parallel, world units
_SURFACE_Z = 0.17  # typical |z| of the surface at the front and at the back
_POINT_CHUNK = 1 << 17  # points that are decoded at once

FRONT = 1  # sides from which rays come: the sign of their z coordinate
BACK = -1


def ray_grid() -> tuple[np.ndarray, np.ndarray]:
    """Return the x and the y coordinates [R, R] of the rays. Rows go from top to bottom, x to the right."""
    positions = (np.arange(RAYS) + 0.5) * STEP - HALF_WIDTH
    # Reversed, because y grows upwards and the index of a row downwards.
    x, y = np.meshgrid(positions, positions[::-1] + CENTRE_Y)
    return x, y


def eye_mask() -> np.ndarray:
    """Return a mask [R, R] of the rays in discs around both eyes."""
    x, y = ray_grid()
    # |x|, because both eyes are at the same distance from the plane x = 0.
    return np.hypot(np.abs(x) - UNIT * EYE[0], y - UNIT * EYE[1]) < EYE_RADIUS


def face_mask() -> np.ndarray:
    """Return a mask [R, R] of the rays through the eyes, the nose and the mouth of the front."""
    x, y = ray_grid()
    is_nose = (np.abs(x) < 0.03) & (y > -0.09) & (y < -0.01)
    is_mouth = (np.abs(x) < 0.045) & (np.abs(y + 0.115) < 0.025)
    return eye_mask() | is_nose | is_mouth


@torch.no_grad()
def field_depths(field: Field, side: int) -> np.ndarray:
    """Find the first surface of shapes along the rays from one side.

    Args: field: densities of N shapes; side: FRONT or BACK.
    Returns: outward depth [N, R, R] in voxels.
    """
    x, y = (torch.from_numpy(coordinates.ravel()).float() for coordinates in ray_grid())
    # Samples run from outside the head to just beyond its middle: the other side does not count.
    z = torch.linspace(0.5, -0.05, _SAMPLES) * side
    grid = torch.stack(
        [
            x[:, None].expand(-1, _SAMPLES),
            y[:, None].expand(-1, _SAMPLES),
            z.expand(len(x), -1),
        ],
        dim=-1,
    )
    densities = torch.cat(
        [field.density(points).float().cpu() for points in grid.reshape(-1, 3).split(_POINT_CHUNK)], dim=1
    )
    is_inside = densities.unflatten(1, (len(x), _SAMPLES)) > field.level  # [N, R R, samples]
    # argmax returns the first maximum, which is the first sample inside.
    hit_index = is_inside.float().argmax(dim=2)
    # An index of 0 means that a ray starts inside the shape, or never meets it.
    is_hit = is_inside.any(dim=2) & (hit_index > 0)
    outside_z = z[(hit_index - 1).clamp_min(0)]
    inside_z = z[hit_index]
    # All rays are bisected together; the values of rays without a hit are discarded below.
    for _ in range(_BISECTIONS):
        middle_z = (outside_z + inside_z) / 2
        points = torch.stack([x.expand_as(middle_z), y.expand_as(middle_z), middle_z], dim=-1)
        is_middle_inside = field.density(points).float().cpu() > field.level
        inside_z = torch.where(is_middle_inside, middle_z, inside_z)
        outside_z = torch.where(is_middle_inside, outside_z, middle_z)
    depth = torch.where(is_hit, (outside_z + inside_z) / 2 * side, torch.nan)
    return depth.unflatten(1, (RAYS, RAYS)).numpy() * VOXELS


def head_depths(heads: Sequence[Head], side: int) -> np.ndarray:
    """Find the first surface of meshes of ground-truth heads along the rays of `field_depths`.

    Args: heads: N heads; side: FRONT or BACK.
    Returns: outward depth [N, R, R] in voxels.
    """
    pose = np.eye(4)
    pose[:3, 3] = [0, CENTRE_Y, side * _FAR]
    # Columns: the directions of the image's x and y axes and of the view, which is -z from the front. From
    # the other side, the image's x axis is the world's -x axis.
    pose[:3, :3] = np.diag([side, -1, -side])
    # The square fills the image at the depth of a typical surface, where rays meet those of `field_depths`.
    focal = (_FAR - _SURFACE_Z) / (2 * HALF_WIDTH)
    depths = []
    for head in heads:
        axis_depth = rasterise(head.vertices.astype(np.float64), load_basis().triangles, pose, focal, RAYS)[2]
        # The camera is at the distance _FAR from the plane z = 0, from which the depth is measured.
        depth = np.where(np.isfinite(axis_depth), _FAR - axis_depth, np.nan)
        # Columns are mirrored back, so that both sides are on the same grid of x.
        depths.append(depth if side == FRONT else depth[:, ::-1])
    return np.stack(depths) * VOXELS


def high_passed(depth: np.ndarray) -> np.ndarray:
    """Subtract the Gaussian average from a depth [R, R]. Rays without a surface do not count."""
    is_hit = np.isfinite(depth)
    width = SMOOTHING / STEP  # in rays
    weights = gaussian_filter(is_hit.astype(float), width)
    # Normalised convolution: the sum over rays with a surface, divided by their weights.
    average = gaussian_filter(np.where(is_hit, depth, 0.0), width) / np.maximum(weights, 1e-6)
    return np.where(is_hit, depth - average, np.nan)


def eye_relief(back_depth: np.ndarray) -> float:
    """Return the standard deviation in voxels of the relief of a depth [R, R] at the eyes.

    It is NaN if fewer than half of the rays there meet a surface.
    """
    relief = high_passed(back_depth)[eye_mask()]
    is_hit = np.isfinite(relief)
    return float(relief[is_hit].std()) if is_hit.mean() >= 0.5 else float("nan")


def relief_correlation_with_front(back_depth: np.ndarray, front_depth: np.ndarray) -> float:
    """Return Pearson's correlation of the reliefs of back and front [R, R] in the region of the face.

    It is NaN if fewer than half of the rays there meet a surface on both sides.
    """
    reliefs = np.stack([high_passed(depth)[face_mask()] for depth in (back_depth, front_depth)])
    is_hit = np.isfinite(reliefs).all(axis=0)
    return float(np.corrcoef(reliefs[:, is_hit])[0, 1]) if is_hit.mean() >= 0.5 else float("nan")
