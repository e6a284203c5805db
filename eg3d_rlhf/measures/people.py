"""How near a shape is to the whole head of a person that its latent names: behind, where scans of the family
are broken, and in front.

No annotator, reward or early stop reads these. A shape is a grid of values, negative inside: signed distances
of a head, or level minus density. Shape letters: n points along x, y, z, the middles of the cube's voxels
(`people_mesh.grid_points`); P points of a surface; R, C rows and columns of the face's window, from below and
from the left.
"""

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from scipy.spatial import cKDTree

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.measures.measure import Measure
from training.heads.people_mesh import BACK, BASE, FACE, grid_points

VOXEL = 1 / 64  # world units, in which tolerances are stated
DEFECTIVE = 0.12  # back-of-head volume error from which on an untuned head counts as defective
IN_FRONT = 0.06  # no scan is changed in front of z = 0.055
FINE = VOXEL / 4  # at a whole voxel a head that was blurred by .75 voxel is nearly as good as a true one
FARTHEST = 32.0  # voxels beyond which surfaces are as far apart as can be


@dataclass(frozen=True, kw_only=True)
class VolumeError:
    """Shares of the whole head's volume at a place."""

    missing: float  # of the whole head, and not in the shape
    extra: float  # in the shape, and not of the whole head

    @property
    def total(self) -> float:
        return self.missing + self.extra


@torch.no_grad()
def shape_grids(field: Field, resolution: int = 64) -> np.ndarray:
    """Grids [N, n, n, n] of a field's shapes, level minus density: negative inside."""
    points = torch.from_numpy(grid_points(resolution).reshape(-1, 3)).float()
    parts = [field.level - field.density(part).float() for part in points.split(1 << 17)]
    return torch.cat(parts, dim=1).unflatten(1, (resolution,) * 3).cpu().numpy()


def back_of_head(points: np.ndarray) -> np.ndarray:
    """Whether points [..., 3] lie at the back of the head."""
    return (points[..., 2] < BACK) & (points[..., 1] > BASE)


def in_front(points: np.ndarray) -> np.ndarray:
    """Whether points [..., 3] lie at its front, which no scan has changed."""
    return (points[..., 2] > IN_FRONT) & (points[..., 1] > BASE)


def volume_error(values: np.ndarray, whole: np.ndarray, place=back_of_head) -> VolumeError:
    """What a shape [n, n, n] lacks of the whole head [n, n, n], and has too much of, at a place."""
    here = place(grid_points(len(values)))
    shape = (values < 0) & here
    head = (whole < 0) & here
    volume = head.sum()
    return VolumeError(
        missing=float((head & ~shape).sum() / volume), extra=float((shape & ~head).sum() / volume)
    )


def surface_points(values: np.ndarray) -> np.ndarray:
    """Points [P, 3] where values [n, n, n] change their sign between neighbours, linearly between the two."""
    points = grid_points(len(values))
    found = []
    for axis in range(3):
        first, second = (np.take(values, range(i, len(values) - 1 + i), axis) for i in (0, 1))
        crossed = (first < 0) != (second < 0)
        share = (first[crossed] / (first[crossed] - second[crossed]))[:, None]
        start, end = (np.take(points, range(i, len(values) - 1 + i), axis)[crossed] for i in (0, 1))
        found.append(start + share * (end - start))
    return np.concatenate(found)


def surfaces(values: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """How near the surfaces of a shape and of the whole head are, behind and in front; what the measures
    below read.

    fscore: at one voxel; fine: at a quarter of one; completeness: share of the head's surface within that of
    the shape's; distance: mean distance in voxels of either to the other, the mean of both ways, FARTHEST
    where there is none.
    """
    shape = surface_points(values)
    head = surface_points(whole)
    found: dict[str, float] = {}
    for suffix, place in (("", back_of_head), ("_front", in_front)):
        # Distances of the shape's points at a place to the head, and of the head's to the shape
        ways = _distances(shape, head, place), _distances(head, shape, place)
        found |= {
            f"fscore{suffix}": _fscore(ways, VOXEL),
            f"fine{suffix}": _fscore(ways, FINE),
            f"completeness{suffix}": float((ways[1] <= FINE).mean()),
            f"distance{suffix}": float(np.mean([np.minimum(way / VOXEL, FARTHEST).mean() for way in ways])),
        }
    return found


def _fscore(ways: tuple[np.ndarray, np.ndarray], tolerance: float) -> float:
    first, second = (float((way <= tolerance).mean()) for way in ways)
    return 2 * first * second / (first + second) if first + second else 0.0


def _distances(mine: np.ndarray, other: np.ndarray, place) -> np.ndarray:
    """Distances of the points of one surface at a place to the other surface's points; infinite where either
    has none.
    """
    here = mine[place(mine)]
    return cKDTree(other).query(here)[0] if len(here) and len(other) else np.full(max(len(here), 1), np.inf)


def face_depth(values: np.ndarray) -> np.ndarray:
    """Depth [R, C] of the foremost surface in the face's window, world units; NaN where there is none."""
    n = len(values)
    steps = grid_points(n)[0, 0, :, 2]
    columns = np.abs(steps) < FACE[0]
    rows = (steps > FACE[1]) & (steps < FACE[2])
    rays = values[columns][:, rows][:, :, ::-1].transpose(1, 0, 2)  # [R, C, n], from the camera backwards
    inside = rays < 0
    hit = inside.argmax(axis=2)
    after = np.take_along_axis(rays, hit[..., None], 2)[..., 0]
    before = np.take_along_axis(rays, np.maximum(hit - 1, 0)[..., None], 2)[..., 0]
    share = before / np.where(before == after, 1, before - after)
    depth = steps[::-1][np.maximum(hit - 1, 0)] - share / n
    return np.where(inside.any(axis=2) & (hit > 0), depth, np.nan)


def face_relief(values: np.ndarray) -> np.ndarray:
    """`face_depth` without its overall curvature, a quadratic surface: what tells faces apart."""
    depth = face_depth(values)
    y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in depth.shape), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1)
    seen = np.isfinite(depth)
    return depth - terms @ np.linalg.lstsq(terms[seen], depth[seen], rcond=None)[0]


def relief_amplitude(values: np.ndarray, whole: np.ndarray) -> float:
    """Deviation of a face's relief over the whole head's own: below 1 where brows, nose and lips are
    flattened. 0 without a face.
    """
    shape, head = (
        face_relief(grid) if np.isfinite(face_depth(grid)).any() else np.full((1, 1), np.nan)
        for grid in (values, whole)
    )
    return float(np.nanstd(shape) / np.nanstd(head)) if np.isfinite(shape).any() else 0.0


def relief_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two reliefs [R, C] where both have a surface."""
    seen = np.isfinite(first) & np.isfinite(second)
    return float(np.corrcoef(first[seen], second[seen])[0, 1])


# The table. What stands here ranks true heads before their blurred selves and before their scans
# (tests/measures/test_people.py).


def compared(shapes: np.ndarray, wholes: np.ndarray) -> dict[str, np.ndarray]:
    """What the measures below read of shapes [N, n, n, n] beside the whole heads [N, n, n, n] that their
    latents name: [N] each.
    """
    pairs = list(zip(shapes, wholes, strict=True))
    errors = [volume_error(*pair) for pair in pairs]
    near = [surfaces(*pair) for pair in pairs]
    return {
        "missing": np.array([error.missing for error in errors]),
        "extra": np.array([error.extra for error in errors]),
        **{name: np.array([one[name] for one in near]) for name in near[0]},
        "amplitude": np.array([relief_amplitude(*pair) for pair in pairs]),
    }


MEASURES = {  # by name in a summary; of what `compared` gives
    "error": Measure(
        "back-of-head volume error",
        lambda seen: seen["missing"] + seen["extra"],
        "lower",
        "share",
        "missing and extra, of the ground-truth head's back-of-head volume",
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
        "mean of both ways",
    ),
}
FRONT_MEASURES = {  # nothing is broken there: tuning is to leave them alone
    "fine_front": Measure("F-score in front at a quarter voxel", itemgetter("fine_front"), "higher", ""),
    "completeness_front": Measure(
        "completeness in front at a quarter voxel", itemgetter("completeness_front"), "higher", "share"
    ),
    "distance_front": Measure(
        "distance to the ground-truth head in front",
        itemgetter("distance_front"),
        "lower",
        "voxels",
        "mean of both ways",
    ),
    "amplitude": Measure(
        "relief of the face over the ground-truth head's",
        itemgetter("amplitude"),
        "higher",
        "",
        "ratio of standard deviations",
    ),
}
