"""Measure how close a shape is to the ground-truth head of its latent, at the back of the head and in front.

The measures apply to the generator of synthetic heads (`synthetic:people64`), which was trained on scans that
are defective at the back of the head. The ground-truth head is the undamaged head that a latent describes. No
simulated annotator, reward or early stop reads these measures. A shape is a grid of values that are negative
inside: signed distances for a ground-truth head, level minus density for a generator's shape.

Shapes: N shapes; n grid points along each of x, y and z, at the centres of the cube's voxels
(`people_mesh.grid_points`); P points of a surface; R rows and C columns of the window around the face, rows
from the lowest to the highest and columns from left to right.
"""

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from scipy.spatial import cKDTree

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.measures.measure import Measure
from training.heads.people_mesh import BACK, BASE, FACE, grid_points

VOXEL = 1 / 64  # side of a voxel of the grid with n = 64, in world units; the unit of tolerances
DEFECTIVE = 0.12  # an untuned head counts as defective from this back-of-head volume error on
IN_FRONT = 0.06  # z, world units; damage to scans ends at z = 0.055
# Tolerance of the fine F-score and of completeness, in world units. At a tolerance of one voxel, a head that
# was blurred by 0.75 voxel scores nearly as well as a ground-truth head.
FINE = VOXEL / 4
FARTHEST = 32.0  # voxels; larger distances count as this distance, and so does a missing surface


@dataclass(frozen=True, kw_only=True)
class VolumeError:
    """Volume errors in a region of the head, as shares of the ground-truth head's volume in that region."""

    missing: float  # volume inside the ground-truth head and outside the shape
    extra: float  # volume inside the shape and outside the ground-truth head

    @property
    def total(self) -> float:
        """Sum of the missing and the extra share."""
        return self.missing + self.extra


@torch.no_grad()
def shape_grids(field: Field, resolution: int = 64) -> np.ndarray:
    """Compute grids [N, n, n, n] of level minus density, which is negative inside.

    Args:
        field: densities of N shapes.
        resolution: number n of grid points per axis.
    """
    points = torch.from_numpy(grid_points(resolution).reshape(-1, 3)).float()
    # In chunks of 131,072 points, since the activations of all n^3 points take too much memory.
    density_chunks = [field.level - field.density(chunk).float() for chunk in points.split(1 << 17)]
    return torch.cat(density_chunks, dim=1).unflatten(1, (resolution,) * 3).cpu().numpy()


def back_of_head(points: np.ndarray) -> np.ndarray:
    """Return bool [...]: True for each of the points [..., 3] that lies at the back of the head.

    Points of the neck and the shoulders are excluded.
    """
    return (points[..., 2] < BACK) & (points[..., 1] > BASE)


def in_front(points: np.ndarray) -> np.ndarray:
    """Return bool [...]: True for each of the points [..., 3] that lies at the front of the head.

    The front is intact in every scan. Points of the neck and the shoulders are excluded.
    """
    return (points[..., 2] > IN_FRONT) & (points[..., 1] > BASE)


def volume_error(shape_values: np.ndarray, head_values: np.ndarray, region_test=back_of_head) -> VolumeError:
    """Compute the volume errors of a shape against the ground-truth head in a region of the head.

    Args:
        shape_values: grid [n, n, n] of the shape, negative inside.
        head_values: grid [n, n, n] of the ground-truth head, negative inside.
        region_test: function of points [..., 3] that is True in the region, `back_of_head` or `in_front`.
    """
    region_mask = region_test(grid_points(len(shape_values)))
    shape_mask = (shape_values < 0) & region_mask
    head_mask = (head_values < 0) & region_mask
    head_volume = head_mask.sum()
    return VolumeError(
        missing=float((head_mask & ~shape_mask).sum() / head_volume),
        extra=float((shape_mask & ~head_mask).sum() / head_volume),
    )


def surface_points(grid_values: np.ndarray) -> np.ndarray:
    """Return the points [P, 3] where values [n, n, n] change sign between neighbouring grid points.

    Positions between the grid points are interpolated linearly.
    """
    points = grid_points(len(grid_values))
    crossings = []
    for axis in range(3):
        # Values at the first and at the second point of each pair of neighbours along the axis
        first_values, second_values = (
            np.take(grid_values, range(i, len(grid_values) - 1 + i), axis) for i in (0, 1)
        )
        is_crossed = (first_values < 0) != (second_values < 0)
        # The linear interpolant is zero at this share of the distance from the first point to the second.
        crossing_share = (first_values[is_crossed] / (first_values[is_crossed] - second_values[is_crossed]))[
            :, None
        ]
        first_points, second_points = (
            np.take(points, range(i, len(grid_values) - 1 + i), axis)[is_crossed] for i in (0, 1)
        )
        crossings.append(first_points + crossing_share * (second_points - first_points))
    return np.concatenate(crossings)


def surfaces(shape_values: np.ndarray, head_values: np.ndarray) -> dict[str, float]:
    """Compare the surface of a shape with the surface of the ground-truth head, at the back and in front.

    Args:
        shape_values: grid [n, n, n] of the shape, negative inside.
        head_values: grid [n, n, n] of the ground-truth head, negative inside.

    Returns: the following values by name, for the back of the head, and with the suffix _front for the front.
        fscore: F-score at a tolerance of one voxel.
        fine: F-score at a tolerance of a quarter voxel.
        completeness: share of the head's surface within a quarter voxel of the shape's surface.
        distance: mean distance in voxels to the other surface, averaged over the two directions (shape to
            head and head to shape). It is FARTHEST where there is no surface.
    """
    shape_points = surface_points(shape_values)
    head_points = surface_points(head_values)
    measures_by_name: dict[str, float] = {}
    for suffix, region_test in (("", back_of_head), ("_front", in_front)):
        # Distances in world units from the shape's points in the region to the head, and from the head's
        # points in the region to the shape
        distances = (
            _distances(shape_points, head_points, region_test),
            _distances(head_points, shape_points, region_test),
        )
        measures_by_name |= {
            f"fscore{suffix}": _fscore(distances, VOXEL),
            f"fine{suffix}": _fscore(distances, FINE),
            # Index 1: from the head to the shape
            f"completeness{suffix}": float((distances[1] <= FINE).mean()),
            f"distance{suffix}": float(
                np.mean(
                    [
                        np.minimum(one_way_distances / VOXEL, FARTHEST).mean()
                        for one_way_distances in distances
                    ]
                )
            ),
        }
    return measures_by_name


def _fscore(distances: tuple[np.ndarray, np.ndarray], tolerance: float) -> float:
    """Compute the F-score, the harmonic mean of precision and recall at a tolerance.

    Args:
        distances: distances from the shape to the head (precision) and from the head to the shape (recall).
        tolerance: largest distance that counts as a match, in the same unit.

    Returns: the F-score, 0..1; 0 if no point matches.
    """
    precision, recall = (float((one_way_distances <= tolerance).mean()) for one_way_distances in distances)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _distances(points: np.ndarray, target_points: np.ndarray, region_test) -> np.ndarray:
    """Compute the distances from the points of a surface to the nearest points of another surface.

    Distances are infinite if the region contains no point or the other surface is empty.

    Args:
        points: points [P, 3] of the surface; only those in the region count.
        target_points: all points of the other surface.
        region_test: function of points [..., 3] that is True in the region.
    """
    points_in_region = points[region_test(points)]
    if len(points_in_region) and len(target_points):
        return cKDTree(target_points).query(points_in_region)[0]
    # At least one infinite distance: a mean over no distances would be NaN.
    return np.full(max(len(points_in_region), 1), np.inf)


def face_depth(shape_values: np.ndarray, window: tuple[float, float, float] | None = FACE) -> np.ndarray:
    """Return the z coordinate [R, C] of the foremost surface in a window, in world units.

    Pixels at which the window shows no surface are NaN.

    Args:
        shape_values: grid [n, n, n] of a shape, negative inside.
        window: half of the width, lowest y and highest y of the window, as shares of the cube's side; the
            face by default. None: the whole front, in units of the cube's side.
    """
    n = len(shape_values)
    # Coordinates of the grid points along an axis; they are the same for x, y and z.
    axis_coordinates = grid_points(n)[0, 0, :, 2]
    half_width, lowest_y, highest_y = (np.inf, -np.inf, np.inf) if window is None else window
    is_column_in_window = np.abs(axis_coordinates) < half_width
    is_row_in_window = (axis_coordinates > lowest_y) & (axis_coordinates < highest_y)
    # The camera looks along -z: each ray starts at the largest z.
    ray_values = shape_values[is_column_in_window][:, is_row_in_window][:, :, ::-1].transpose(
        1, 0, 2
    )  # [R, C, n]
    is_inside = ray_values < 0
    hit_index = is_inside.argmax(axis=2)  # first point inside; 0 also if no point of the ray is inside
    value_inside = np.take_along_axis(ray_values, hit_index[..., None], 2)[..., 0]
    value_outside = np.take_along_axis(ray_values, np.maximum(hit_index - 1, 0)[..., None], 2)[..., 0]
    # Position of the zero between the two points, as a share of a step; the 1 avoids a division by 0
    step_share = value_outside / np.where(value_outside == value_inside, 1, value_outside - value_inside)
    # A step is 1 / n world units.
    depth = axis_coordinates[::-1][np.maximum(hit_index - 1, 0)] - step_share / n
    # An index of 0 means that the ray starts inside the shape, or never meets it.
    return np.where(is_inside.any(axis=2) & (hit_index > 0), depth, np.nan)


def face_relief(shape_values: np.ndarray, window: tuple[float, float, float] | None = FACE) -> np.ndarray:
    """Return the relief [R, C] of a face: `face_depth` minus its overall curvature, in world units.

    The overall curvature is a quadratic surface, fitted by least squares. Faces differ mainly in their
    relief. Pixels without a surface are NaN.

    Args:
        shape_values: grid [n, n, n] of a shape, negative inside.
        window: window of `face_depth`; None: the whole front.
    """
    depth = face_depth(shape_values, window)
    y, x = np.meshgrid(*(np.linspace(-1, 1, n_pixels) for n_pixels in depth.shape), indexing="ij")
    quadratic_terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)  # [R, C, 6]
    has_surface = np.isfinite(depth)  # pixels without a surface take no part in the fit
    return (
        depth
        - quadratic_terms @ np.linalg.lstsq(quadratic_terms[has_surface], depth[has_surface], rcond=None)[0]
    )


def relief_amplitude(shape_values: np.ndarray, head_values: np.ndarray) -> float:
    """Compute the standard deviation of a face's relief relative to the relief of the ground-truth head.

    The ratio is below 1 if brows, nose and lips are flatter than in the ground-truth head, and 0 if the shape
    shows no surface in the face window.

    Args:
        shape_values: grid [n, n, n] of the shape, negative inside.
        head_values: grid [n, n, n] of the ground-truth head, negative inside.
    """
    # The fit of `face_relief` needs at least one pixel with a surface.
    shape_relief, head_relief = (
        face_relief(grid) if np.isfinite(face_depth(grid)).any() else np.full((1, 1), np.nan)
        for grid in (shape_values, head_values)
    )
    return float(np.nanstd(shape_relief) / np.nanstd(head_relief)) if np.isfinite(shape_relief).any() else 0.0


def relief_correlation(first_relief: np.ndarray, second_relief: np.ndarray) -> float:
    """Compute Pearson's correlation, -1..1, of two reliefs [R, C].

    Only pixels count where both reliefs have a surface.
    """
    have_both_surfaces = np.isfinite(first_relief) & np.isfinite(second_relief)
    # The correlation is the entry off the diagonal of the 2 x 2 matrix.
    return float(np.corrcoef(first_relief[have_both_surfaces], second_relief[have_both_surfaces])[0, 1])


# Tables of measures. Each of these measures ranks ground-truth heads above their blurred copies and above
# their scans (tests/measures/test_people.py).


def compared(shape_values: np.ndarray, head_values: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the measurements that MEASURES and FRONT_MEASURES read.

    Args:
        shape_values: grids [N, n, n, n] of shapes, negative inside.
        head_values: grids [N, n, n, n] of the ground-truth heads of the same latents.

    Returns: arrays [N] by name: 'missing' and 'extra' (shares of volume at the back of the head), the values
        of `surfaces`, and 'amplitude' (see `relief_amplitude`).
    """
    grid_pairs = list(zip(shape_values, head_values, strict=True))
    volume_errors = [volume_error(*grid_pair) for grid_pair in grid_pairs]
    surface_measures = [surfaces(*grid_pair) for grid_pair in grid_pairs]
    return {
        "missing": np.array([volume_error_of_pair.missing for volume_error_of_pair in volume_errors]),
        "extra": np.array([volume_error_of_pair.extra for volume_error_of_pair in volume_errors]),
        # All comparisons have the same names.
        **{
            measure_name: np.array([measures_of_pair[measure_name] for measures_of_pair in surface_measures])
            for measure_name in surface_measures[0]
        },
        "amplitude": np.array([relief_amplitude(*grid_pair) for grid_pair in grid_pairs]),
    }


# measures of the back of the head by their name in a summary; each reads the result of `compared`
MEASURES = {
    "error": Measure(
        "back-of-head volume error",
        lambda measurements: measurements["missing"] + measurements["extra"],
        "lower",
        "share",
        "missing and extra volume as a share of the ground-truth head's volume at the back",
    ),
    "fine": Measure("back-of-head F-score at a quarter voxel", itemgetter("fine"), "higher", ""),
    "completeness": Measure(
        "back-of-head completeness at a quarter voxel", itemgetter("completeness"), "higher", "share"
    ),
    "distance": Measure(
        "back-of-head distance to the ground-truth head",
        itemgetter("distance"),
        "lower",
        "voxels",
        "mean of the distances from the shape to the head and from the head to the shape",
    ),
}
FRONT_MEASURES = {  # the front is intact in every scan, so tuning should not change these measures
    "fine_front": Measure("front F-score at a quarter voxel", itemgetter("fine_front"), "higher", ""),
    "completeness_front": Measure(
        "front completeness at a quarter voxel", itemgetter("completeness_front"), "higher", "share"
    ),
    "distance_front": Measure(
        "front distance to the ground-truth head",
        itemgetter("distance_front"),
        "lower",
        "voxels",
        "mean of the distances from the shape to the head and from the head to the shape",
    ),
    "amplitude": Measure(
        "face relief relative to the ground-truth head",
        itemgetter("amplitude"),
        "higher",
        "",
        "ratio of the standard deviations of both reliefs",
    ),
}
