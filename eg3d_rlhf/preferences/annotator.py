"""A simulated annotator of synthetic heads. It prefers the scan that is closer to the ground-truth head of
its latent.

A shape is a grid of values, negative inside: signed distances of a head, or level minus density. The ground
truth is a grid of distances. Only the sign changes of the values count, and the values within two voxels of
these; the steepness does not.

utility = sum_d WEIGHTS[d] * exp(-defect_d / SCALES[d]) is in (0, 1], equals 1 for the ground truth itself,
and decreases strictly with every defect.

Labels follow Bradley and Terry (1952) with lapses:
P(a preferred over b) = LAPSES + (1 - 2 LAPSES) / (1 + exp(-(u_a - u_b) / T)).

Letters: n points along x, y, z, the centres of the cube's voxels (`people_mesh.grid_points`); S samples, P
pairs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.optimize import brentq
from scipy.special import expit

from training.heads.people_mesh import BACK, BASE, FACE, grid_points

NEAR = 1.75  # voxels; relief is compared where the shape's surface is this close to the ground truth's
REACH = 2.0  # voxels; offsets are clipped to this: a surface further away counts as missing or extra
DETAIL = 0.016  # world units; standard deviation of the Gaussian that separates relief from shape

DEFECTS = ("missing", "extra", "floaters", "roughness", "face")
# They sum to 1.
WEIGHTS = {"missing": 0.52, "extra": 0.24, "floaters": 0.08, "roughness": 0.06, "face": 0.10}
# defect at which the part of the utility has lost 63 % (1 - 1/e)
SCALES = {"missing": 0.6, "extra": 0.4, "floaters": 0.1, "roughness": 0.5, "face": 0.5}

ANNOTATOR = "people"  # the annotator's name in labels
LAPSES = 0.02  # fraction of answers that are accidental, independent of the shapes


@dataclass(frozen=True, kw_only=True)
class Utility:
    """Noise-free evaluation of a shape."""

    total: float  # in (0, 1]; 1 for the ground truth
    parts: dict[str, float]  # by defect, unweighted, each in (0, 1]; 1 without the defect
    defects: dict[str, float]  # see `defects`; 0 is ideal

    @property
    def volume_error(self) -> float:
        """Return the missing and extra volume, relative to the volume of the back of the head."""
        return self.defects["missing"] + self.defects["extra"] + self.defects["floaters"]


@functools.lru_cache(maxsize=4)
def _regions(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return masks [n, n, n] of the head above its base, of its back, and of the face."""
    x, y, z = np.moveaxis(grid_points(n), -1, 0)
    # Above the base of the neck; the rest of the cube does not count.
    head = y > BASE
    face = (np.abs(x) < FACE[0]) & (y > FACE[1]) & (y < FACE[2]) & (z > 0)
    return head, head & (z < BACK), face


def _offsets(values: np.ndarray) -> np.ndarray:
    """Compute the signed distance [n, n, n] to the surface in voxels, to first order, clipped to REACH."""
    slopes = np.zeros_like(values)
    for axis in range(3):
        # central differences, one-sided at the faces of the cube
        slope = np.gradient(values, axis=axis)
        slopes += slope * slope
    # value / |gradient|; 1e-12 avoids 0 / 0 where the grid is constant
    offsets: np.ndarray = np.clip(values / np.sqrt(slopes + 1e-12), -REACH, REACH)
    return offsets


def _detail(offsets: np.ndarray) -> np.ndarray:
    """Return the relief [n, n, n]: offsets minus their smooth part."""
    detail: np.ndarray = offsets - ndimage.gaussian_filter(offsets, DETAIL * len(offsets), truncate=2)
    return detail


def _at_surface(inside: np.ndarray) -> np.ndarray:
    """Return a mask [n, n, n] of the voxels that have a neighbour on the other side of the surface."""
    at_surface = np.zeros_like(inside)
    for axis in range(3):
        # Views with the axis in front; writing to one writes to the array.
        result_view = np.moveaxis(at_surface, axis, 0)
        inside_view = np.moveaxis(inside, axis, 0)
        changes = inside_view[1:] != inside_view[:-1]
        result_view[1:] |= changes
        result_view[:-1] |= changes
    return at_surface


def largest_part(inside: np.ndarray) -> np.ndarray:
    """Return the largest part of a mask [n, n, n]; parts are connected through faces of voxels."""
    labels, count = ndimage.label(inside)
    # label 0 is the background
    return inside if count < 2 else labels == 1 + np.bincount(labels.ravel())[1:].argmax()


def defects(values: np.ndarray, ground_truth: np.ndarray) -> dict[str, float]:
    """Measure the DEFECTS of a shape [n, n, n] against the ground-truth head [n, n, n].

    0 is ideal, larger is worse. The results are finite for any values.

    missing: volume of the head that the shape's largest part lacks, relative to the volume of the back of the
    head. extra: volume that the largest part has too much, likewise. floaters: all other parts, likewise.
    roughness: |log| of the ratio of the fine relief of both surfaces where they are close together; a surface
    that is smoother than the ground truth is penalised, too. face: mean distance of the face's surface to the
    shape's, in voxels.
    """
    assert values.shape == ground_truth.shape and values.ndim == 3
    # NaN counts as outside
    values = np.nan_to_num(np.asarray(values, np.float32), nan=1e4, posinf=1e4, neginf=-1e4)
    head, back, face = _regions(len(values))
    inside = values < 0
    ground_truth_inside = ground_truth < 0
    # A grid that is solid throughout has no surface. It counts as empty.
    if inside.all():
        inside = ~inside
    # Everything that is not connected to it is a floater.
    part = largest_part(inside)
    body = largest_part(ground_truth_inside)
    # 1: a ground truth without a back would divide by 0.
    volume = max(int((body & back).sum()), 1)
    shares = {
        name: float((mask & head).sum() / volume)
        for name, mask in (
            ("missing", body & ~part),
            ("extra", part & ~body),
            ("floaters", inside & ~part & ~ground_truth_inside),
        )
    }
    shape_offsets = _offsets(values)
    truth_offsets = _offsets(np.asarray(ground_truth, np.float32))
    # Relief and face are compared on the surface of the ground truth.
    surface = _at_surface(ground_truth_inside) & head
    both_surfaces = surface & (np.abs(shape_offsets) < NEAR)
    # Root mean square of the relief, for the shape and for the ground truth, where both surfaces are close.
    rough = (
        [
            float(np.sqrt(np.square(_detail(offsets)[both_surfaces]).mean()))
            for offsets in (shape_offsets, truth_offsets)
        ]
        if both_surfaces.any()
        else [0.0, 1.0]
    )
    face_surface = surface & face
    return {
        **shares,
        # 1e-3: two flat surfaces have equal roughness
        "roughness": abs(float(np.log((rough[0] + 1e-3) / (rough[1] + 1e-3)))),
        "face": float(np.abs(shape_offsets - truth_offsets)[face_surface].mean())
        if face_surface.any()
        else 0.0,
    }


def utility(values: np.ndarray, ground_truth: np.ndarray) -> Utility:
    """Evaluate a shape [n, n, n] against the ground-truth head [n, n, n] of its latent.

    The constants are meant for 64 points along an axis.
    """
    measured = defects(values, ground_truth)
    parts = {name: float(np.exp(-measured[name] / SCALES[name])) for name in DEFECTS}
    return Utility(total=sum(WEIGHTS[name] * parts[name] for name in DEFECTS), parts=parts, defects=measured)


class PairLabel(NamedTuple):
    """One noisy label. `winner` and `loser` are indices of utilities."""

    winner: int
    loser: int
    clean: bool  # True if the noise-free order agrees (a tie agrees)


def _gaps(
    utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs as int64 [P, 2] and their differences of utility u_a - u_b as float64 [P]."""
    # An empty list of pairs needs the reshape to have two columns.
    index = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    values = np.asarray(utilities, dtype=np.float64)
    assert np.isfinite(values).all()
    return index, values[index[:, 0]] - values[index[:, 1]]


def label_pairs(
    utilities: ArrayLike,
    pairs: Sequence[tuple[int, int]] | np.ndarray,
    temperature: float,
    rng: np.random.Generator,
) -> list[PairLabel]:
    """Sample one noisy label per pair.

    Args:
        utilities: [S].
        pairs: [P, 2], indices of utilities.
        temperature: >= 0, in units of utility; 0 gives labels without noise and lapses.
        rng: advanced by exactly P uniform numbers.
    Returns: P labels in the order of `pairs`.
    """
    assert temperature >= 0
    index, gap = _gaps(utilities, pairs)
    # Also without noise, so that the random stream does not depend on the temperature.
    draw = rng.random(len(index))
    noisy = temperature > 0
    # P(a preferred) [P]. A tie without noise is decided at random.
    chance = (
        LAPSES + (1 - 2 * LAPSES) * expit(gap / temperature) if noisy else np.where(gap == 0, 0.5, gap > 0)
    )
    a_wins = draw < chance
    return [
        PairLabel(int(a if won else b), int(b if won else a), bool((delta >= 0) if won else (delta <= 0)))
        for (a, b), won, delta in zip(index, a_wins, gap, strict=True)
    ]


def solve_temperature(
    utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray, flip_rate: float = 0.12
) -> float:
    """Find the temperature at which the expected fraction of labels against the noise-free order is
    `flip_rate`.

    The expectation is over these pairs and includes lapses. E[flips] = mean over pairs of 1 / (1 + exp(|u_a -
    u_b| / T)) increases from 0 to 1/2 with T, so the root is unique. Ties are left out.

    Args: flip_rate: 0, or from LAPSES to below 0.5.
    Returns: T >= 0, in units of utility.
    Raises: ValueError if all pairs tie.
    """
    assert 0.0 <= flip_rate < 0.5
    _, gap = _gaps(utilities, pairs)
    # Ties have no noise-free order that noise could contradict.
    gap = np.abs(gap[gap != 0])
    if gap.size == 0:
        raise ValueError(
            "solve_temperature: expected at least one pair whose utilities differ, got only ties. Sample"
            " pairs of other seeds."
        )
    if flip_rate == 0.0:
        return 0.0
    # Lapses flip a fraction LAPSES of the labels at any temperature; the noise has to give the rest.
    wanted = max((flip_rate - LAPSES) / (1 - 2 * LAPSES), 1e-4)
    scale = float(np.median(gap))
    # The root is searched in log T, relative to the median gap, which is valid at any scale of utilities.
    return scale * float(
        np.exp(brentq(lambda log_t: expit(-gap / (scale * np.exp(log_t))).mean() - wanted, -60.0, 60.0))
    )
