"""Measure how close a shape is to the ground-truth head of its latent, at the back of the head and in front.

Scans of this family are defective at the back of the head. No simulated annotator, reward or early stop reads
these measures. A shape is a grid of values that are negative inside: signed distances of a head, or level
minus density.
Shape letters: n points along x, y, z, the centres of the cube's voxels (`people_mesh.grid_points`); P points
of a surface; R, C rows and columns of the window around the face, from below and from the left.
"""

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from scipy.spatial import cKDTree

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.measures.measure import Measure
from training.heads.people_mesh import BACK, BASE, FACE, grid_points

VOXEL = 1 / 64  # world units; the unit of tolerances
DEFECTIVE = 0.12  # an untuned head counts as defective from this back-of-head volume error on
IN_FRONT = 0.06  # z, world units; damage to scans ends at z = 0.055
# At a tolerance of one voxel, a head that was blurred by .75 voxel scores nearly as well as a ground-truth
# head.
FINE = VOXEL / 4
FARTHEST = 32.0  # voxels; larger distances count as this one, and so does a missing surface


@dataclass(frozen=True, kw_only=True)
class VolumeError:
    """Volume errors at a place, as shares of the ground-truth head's volume at that place."""

    missing: float  # volume inside the ground-truth head and outside the shape
    extra: float  # volume inside the shape and outside the ground-truth head

    @property
    def total(self) -> float:
        """Sum of both shares."""
        return self.missing + self.extra


@torch.no_grad()
def shape_grids(field: Field, resolution: int = 64) -> np.ndarray:
    """Compute grids [N, n, n, n] of level minus density, which is negative inside."""
    points = torch.from_numpy(grid_points(resolution).reshape(-1, 3)).float()
    # In parts of 131,072 points, since the activations of all n^3 points take too much memory.
    parts = [field.level - field.density(part).float() for part in points.split(1 << 17)]
    return torch.cat(parts, dim=1).unflatten(1, (resolution,) * 3).cpu().numpy()


def back_of_head(points: np.ndarray) -> np.ndarray:
    """Return which points [..., 3] lie at the back of the head, as bool [...]."""
    return (points[..., 2] < BACK) & (points[..., 1] > BASE)


def in_front(points: np.ndarray) -> np.ndarray:
    """Return which points [..., 3] lie at the front of the head, which is intact in every scan."""
    return (points[..., 2] > IN_FRONT) & (points[..., 1] > BASE)


def volume_error(values: np.ndarray, head_values: np.ndarray, place=back_of_head) -> VolumeError:
    """Compute the volume errors of a shape [n, n, n] against the ground-truth head [n, n, n] at a place.

    Args: place: function of points [..., 3] that selects the place, `back_of_head` or `in_front`.
    """
    here = place(grid_points(len(values)))
    shape = (values < 0) & here
    head = (head_values < 0) & here
    volume = head.sum()
    return VolumeError(
        missing=float((head & ~shape).sum() / volume), extra=float((shape & ~head).sum() / volume)
    )


def surface_points(values: np.ndarray) -> np.ndarray:
    """Locate points [P, 3] where values [n, n, n] change sign between neighbours, by linear interpolation."""
    points = grid_points(len(values))
    crossings = []
    for axis in range(3):
        first, second = (np.take(values, range(i, len(values) - 1 + i), axis) for i in (0, 1))
        crossed = (first < 0) != (second < 0)
        # The linear interpolant is zero at this share of the way from the first point to the second.
        share = (first[crossed] / (first[crossed] - second[crossed]))[:, None]
        start, end = (np.take(points, range(i, len(values) - 1 + i), axis)[crossed] for i in (0, 1))
        crossings.append(start + share * (end - start))
    return np.concatenate(crossings)


def surfaces(values: np.ndarray, head_values: np.ndarray) -> dict[str, float]:
    """Compare the surface of a shape with that of the ground-truth head, at the back and in front.

    Returns the values that the measures below read; those with the suffix _front belong to the front.
    fscore: F-score at a tolerance of one voxel. fine: F-score at a quarter voxel. completeness: share of the
    head's surface that lies within a quarter voxel of the shape's surface. distance: mean distance in voxels
    to the other surface, averaged over both directions; FARTHEST where there is no surface.
    """
    shape = surface_points(values)
    head = surface_points(head_values)
    results: dict[str, float] = {}
    for suffix, place in (("", back_of_head), ("_front", in_front)):
        # Distances from the shape's points at a place to the head, and from the head's points to the shape
        distances = _distances(shape, head, place), _distances(head, shape, place)
        results |= {
            f"fscore{suffix}": _fscore(distances, VOXEL),
            f"fine{suffix}": _fscore(distances, FINE),
            f"completeness{suffix}": float((distances[1] <= FINE).mean()),
            f"distance{suffix}": float(
                np.mean([np.minimum(way / VOXEL, FARTHEST).mean() for way in distances])
            ),
        }
    return results


def _fscore(distances: tuple[np.ndarray, np.ndarray], tolerance: float) -> float:
    """Compute the harmonic mean of precision and recall from the distances in both directions."""
    first, second = (float((way <= tolerance).mean()) for way in distances)
    return 2 * first * second / (first + second) if first + second else 0.0


def _distances(points: np.ndarray, other: np.ndarray, place) -> np.ndarray:
    """Compute distances from the points of a surface that lie at a place to the points of another surface.

    They are infinite if either set is empty.
    """
    here = points[place(points)]
    # At least one infinite distance, so that means over an empty place are infinite and not NaN.
    return cKDTree(other).query(here)[0] if len(here) and len(other) else np.full(max(len(here), 1), np.inf)


def face_depth(values: np.ndarray) -> np.ndarray:
    """Return the depth [R, C] of the foremost surface in the face window, world units, or NaN."""
    n = len(values)
    steps = grid_points(n)[0, 0, :, 2]
    columns = np.abs(steps) < FACE[0]
    rows = (steps > FACE[1]) & (steps < FACE[2])
    # The camera looks along -z: each ray starts at the largest z.
    rays = values[columns][:, rows][:, :, ::-1].transpose(1, 0, 2)  # [R, C, n]
    inside = rays < 0
    hit = inside.argmax(axis=2)  # index of the first point inside; 0 also if no point is inside
    after = np.take_along_axis(rays, hit[..., None], 2)[..., 0]
    before = np.take_along_axis(rays, np.maximum(hit - 1, 0)[..., None], 2)[..., 0]
    share = before / np.where(before == after, 1, before - after)  # of a step; 1 avoids a division by 0
    depth = steps[::-1][np.maximum(hit - 1, 0)] - share / n
    # hit = 0 means that the ray starts inside the shape, or never meets it.
    return np.where(inside.any(axis=2) & (hit > 0), depth, np.nan)


def face_relief(values: np.ndarray) -> np.ndarray:
    """Subtract the overall curvature, a fitted quadratic surface, from `face_depth`; returns [R, C].

    Faces differ mainly in what is left.
    """
    depth = face_depth(values)
    y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in depth.shape), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)  # [R, C, 6]
    seen = np.isfinite(depth)  # rays without a surface take no part in the fit
    return depth - terms @ np.linalg.lstsq(terms[seen], depth[seen], rcond=None)[0]


def relief_amplitude(values: np.ndarray, head_values: np.ndarray) -> float:
    """Divide the standard deviation of a face's relief by that of the ground-truth head.

    The ratio is below 1 where brows, nose and lips are flattened, and 0 if the shape has no face.
    """
    shape, head = (
        face_relief(grid) if np.isfinite(face_depth(grid)).any() else np.full((1, 1), np.nan)
        for grid in (values, head_values)
    )
    return float(np.nanstd(shape) / np.nanstd(head)) if np.isfinite(shape).any() else 0.0


def relief_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the correlation of two reliefs [R, C] over the pixels where both have a surface."""
    seen = np.isfinite(first) & np.isfinite(second)
    return float(np.corrcoef(first[seen], second[seen])[0, 1])


# Tables of measures. Each of these measures ranks ground-truth heads above their blurred copies and above
# their scans (tests/measures/test_people.py).


def compared(shapes: np.ndarray, wholes: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the values that the measures below read, [N] each.

    Args: shapes: [N, n, n, n]; wholes: ground-truth heads [N, n, n, n] of the same latents.
    """
    pairs = list(zip(shapes, wholes, strict=True))
    errors = [volume_error(*pair) for pair in pairs]
    near = [surfaces(*pair) for pair in pairs]
    return {
        "missing": np.array([error.missing for error in errors]),
        "extra": np.array([error.extra for error in errors]),
        **{name: np.array([values[name] for values in near]) for name in near[0]},
        "amplitude": np.array([relief_amplitude(*pair) for pair in pairs]),
    }


MEASURES = {  # by name in a summary; each reads the result of `compared`
    "error": Measure(
        "back-of-head volume error",
        lambda seen: seen["missing"] + seen["extra"],
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
        "mean of both directions",
    ),
}
FRONT_MEASURES = {  # the front is intact in every scan, so tuning should not change these
    "fine_front": Measure("front F-score at a quarter voxel", itemgetter("fine_front"), "higher", ""),
    "completeness_front": Measure(
        "front completeness at a quarter voxel", itemgetter("completeness_front"), "higher", "share"
    ),
    "distance_front": Measure(
        "front distance to the ground-truth head",
        itemgetter("distance_front"),
        "lower",
        "voxels",
        "mean of both directions",
    ),
    "amplitude": Measure(
        "face relief relative to the ground-truth head",
        itemgetter("amplitude"),
        "higher",
        "",
        "ratio of standard deviations",
    ),
}
