"""Simulated annotator of synthetic heads. It prefers the shape that is closer to the ground-truth head.

The ground truth of a sample is the head that belongs to its latent. A shape is a grid of values that are
negative inside: signed distances, or level minus density. The ground truth is a grid of signed distances.
Only the position of the surface has an influence, and not the slope of the values.

The utility of a shape is u = sum over defects d of WEIGHTS[d] * exp(-defect_d / SCALES[d]). It is in (0, 1],
equals 1 for the ground truth itself, and decreases strictly with every defect.

Labels follow Bradley and Terry (1952), with a share of lapses (accidental answers):
P(a is preferred to b) = LAPSES + (1 - 2 LAPSES) / (1 + exp(-(u_a - u_b) / T)), with the temperature T.

Shapes: n points along x, y, z, the centres of the cube's voxels (`people_mesh.grid_points`); S samples, P
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

NEAR = 1.75  # greatest distance of both surfaces at which their relief is compared, voxels
REACH = 2.0  # greatest distance to a surface that is measured, voxels; larger distances are clipped
DETAIL = 0.016  # standard deviation of the Gaussian filter that separates relief from shape, world units

DEFECTS = ("missing", "extra", "floaters", "roughness", "face")
# Weights of the defects in the utility; they sum to 1.
WEIGHTS = {"missing": 0.52, "extra": 0.24, "floaters": 0.08, "roughness": 0.06, "face": 0.10}
# Size of each defect at which its part of the utility has decreased by 63 % (1 - 1/e)
SCALES = {"missing": 0.6, "extra": 0.4, "floaters": 0.1, "roughness": 0.5, "face": 0.5}

ANNOTATOR = "people"  # name of the simulated annotator in labels
LAPSES = 0.02  # share of labels that accidental answers flip, independent of the shapes


@dataclass(frozen=True, kw_only=True)
class Utility:
    """Utility of a shape compared with its ground-truth head, without label noise, and its defects."""

    total: float  # utility, in (0, 1]; 1 for the ground truth
    parts: dict[str, float]  # exp(-defect / scale) by defect, in (0, 1]; 1 without the defect
    defects: dict[str, float]  # size of each defect, see `defects`; 0 is ideal

    @property
    def volume_error(self) -> float:
        """Volume of all missing and extra parts, relative to the volume of the back of the head."""
        return self.defects["missing"] + self.defects["extra"] + self.defects["floaters"]


@functools.lru_cache(maxsize=4)
def _regions(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return masks [n, n, n] of three regions of the cube: above the neck, back of the head, and face."""
    x, y, z = np.moveaxis(grid_points(n), -1, 0)
    # Everything below the base of the neck is ignored.
    is_above_neck = y > BASE
    is_face = (np.abs(x) < FACE[0]) & (y > FACE[1]) & (y < FACE[2]) & (z > 0)
    return is_above_neck, is_above_neck & (z < BACK), is_face


def _offsets(signed_values: np.ndarray) -> np.ndarray:
    """Compute the signed distance [n, n, n] to the surface, in voxels and clipped to -REACH..REACH.

    The distance is approximated to first order by value / |gradient|.
    """
    squared_slope = np.zeros_like(signed_values)
    for axis in range(3):
        # Differences are central, and one-sided at the faces of the cube.
        slope = np.gradient(signed_values, axis=axis)
        squared_slope += slope * slope
    # 1e-12 avoids 0 / 0 where the values are constant.
    offsets: np.ndarray = np.clip(signed_values / np.sqrt(squared_slope + 1e-12), -REACH, REACH)
    return offsets


def _relief(offsets: np.ndarray) -> np.ndarray:
    """Compute the relief [n, n, n] of a surface: distances [n, n, n] to it minus their smooth part."""
    # The filter's width is in voxels; the cube has an edge of 1 world unit.
    relief: np.ndarray = offsets - ndimage.gaussian_filter(offsets, DETAIL * len(offsets), truncate=2)
    return relief


def _at_surface(is_inside: np.ndarray) -> np.ndarray:
    """Return a mask [n, n, n] of the voxels that have a neighbour on the other side of the surface.

    Args: is_inside: mask [n, n, n] of the voxels inside the surface.
    """
    is_at_surface = np.zeros_like(is_inside)
    for axis in range(3):
        # Views with this axis first. Writing to `surface_view` writes to `is_at_surface`.
        surface_view = np.moveaxis(is_at_surface, axis, 0)
        inside_view = np.moveaxis(is_inside, axis, 0)
        changes_sign = inside_view[1:] != inside_view[:-1]
        surface_view[1:] |= changes_sign
        surface_view[:-1] |= changes_sign
    return is_at_surface


def largest_part(is_inside: np.ndarray) -> np.ndarray:
    """Return a mask [n, n, n] of the largest connected part of a mask; voxels are connected through faces."""
    part_labels, part_count = ndimage.label(is_inside)
    # Label 0 is the background, so the sizes of parts begin at index 1.
    return is_inside if part_count < 2 else part_labels == 1 + np.bincount(part_labels.ravel())[1:].argmax()


def defects(shape_grid: np.ndarray, truth_grid: np.ndarray) -> dict[str, float]:
    """Measure the defects of a shape against its ground-truth head.

    Args:
        shape_grid: grid [n, n, n] of the shape, negative inside; it may contain NaN and infinity.
        truth_grid: grid [n, n, n] of signed distances to the ground-truth head.
    Returns: size of each of DEFECTS; 0 is ideal, and larger is worse.
        "missing" is the volume of the ground truth that the largest part of the shape does not contain,
        "extra" the volume of the largest part outside the ground truth, and "floaters" the volume of all
        other parts outside the ground truth. All three are relative to the volume of the back of the head.
        "roughness" is |log(relief of the shape / relief of the ground truth)| where both surfaces are close
        together, so that a surface that is too smooth is a defect, too. "face" is the mean distance between
        both surfaces in the region of the face, in voxels.
    """
    assert shape_grid.shape == truth_grid.shape and shape_grid.ndim == 3
    # NaN counts as outside.
    shape_grid = np.nan_to_num(np.asarray(shape_grid, np.float32), nan=1e4, posinf=1e4, neginf=-1e4)
    is_above_neck, is_back_of_head, is_face = _regions(len(shape_grid))
    is_inside = shape_grid < 0
    is_inside_truth = truth_grid < 0
    # A grid that is negative everywhere has no surface. It counts as empty.
    if is_inside.all():
        is_inside = ~is_inside
    is_in_shape_part = largest_part(is_inside)
    is_in_truth_part = largest_part(is_inside_truth)
    # The lower limit 1 avoids a division by 0 for a ground truth without a back of the head.
    back_volume = max(int((is_in_truth_part & is_back_of_head).sum()), 1)
    defect_masks = {
        "missing": is_in_truth_part & ~is_in_shape_part,
        "extra": is_in_shape_part & ~is_in_truth_part,
        "floaters": is_inside & ~is_in_shape_part & ~is_inside_truth,
    }
    volume_errors = {
        name: float((mask & is_above_neck).sum() / back_volume) for name, mask in defect_masks.items()
    }
    shape_offsets = _offsets(shape_grid)
    truth_offsets = _offsets(np.asarray(truth_grid, np.float32))
    # Relief and face are compared on the surface of the ground truth.
    is_surface = _at_surface(is_inside_truth) & is_above_neck
    is_near_both_surfaces = is_surface & (np.abs(shape_offsets) < NEAR)
    # Root mean square of the relief where both surfaces are close together. Without any such voxel, the
    # values 0 and 1 give a large roughness.
    shape_relief = 0.0
    truth_relief = 1.0
    if is_near_both_surfaces.any():
        shape_relief = float(np.sqrt(np.square(_relief(shape_offsets)[is_near_both_surfaces]).mean()))
        truth_relief = float(np.sqrt(np.square(_relief(truth_offsets)[is_near_both_surfaces]).mean()))
    is_face_surface = is_surface & is_face
    return {
        **volume_errors,
        # 1e-3 avoids the logarithm of 0, and gives two flat surfaces a roughness of 0.
        "roughness": abs(float(np.log((shape_relief + 1e-3) / (truth_relief + 1e-3)))),
        "face": float(np.abs(shape_offsets - truth_offsets)[is_face_surface].mean())
        if is_face_surface.any()
        else 0.0,
    }


def utility(shape_grid: np.ndarray, truth_grid: np.ndarray) -> Utility:
    """Evaluate a shape against its ground-truth head; the arguments are described in `defects`.

    The constants of this module are chosen for grids with 64 points along each axis.
    """
    defect_sizes = defects(shape_grid, truth_grid)
    utility_parts = {name: float(np.exp(-defect_sizes[name] / SCALES[name])) for name in DEFECTS}
    return Utility(
        total=sum(WEIGHTS[name] * utility_parts[name] for name in DEFECTS),
        parts=utility_parts,
        defects=defect_sizes,
    )


class PairLabel(NamedTuple):
    """Simulated label of one pair."""

    winner: int  # index of the preferred shape
    loser: int  # index of the other shape
    clean: bool  # True if the label agrees with the order of the utilities; equal utilities agree


def _utility_differences(
    utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs as int64 [P, 2], and their differences of utility u_a - u_b as float64 [P]."""
    # An empty list of pairs needs the reshape to have two columns.
    pair_indices = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    utility_array = np.asarray(utilities, dtype=np.float64)
    assert np.isfinite(utility_array).all()
    return pair_indices, utility_array[pair_indices[:, 0]] - utility_array[pair_indices[:, 1]]


def label_pairs(
    utilities: ArrayLike,
    pairs: Sequence[tuple[int, int]] | np.ndarray,
    temperature: float,
    rng: np.random.Generator,
) -> list[PairLabel]:
    """Sample one noisy label per pair, see the formula of the module.

    Args:
        utilities: utilities [S].
        pairs: pairs [P, 2] of indices of utilities.
        temperature: temperature of the noise, >= 0, in units of utility; 0 gives labels without noise and
            without lapses.
        rng: random numbers; exactly P uniform numbers are drawn.
    Returns: P labels in the order of `pairs`.
    """
    assert temperature >= 0
    pair_indices, utility_differences = _utility_differences(utilities, pairs)
    # Numbers are also drawn without noise, so that the state of `rng` does not depend on the temperature.
    uniform_draws = rng.random(len(pair_indices))
    # [P]: probability that a is preferred
    if temperature > 0:
        a_win_probabilities = LAPSES + (1 - 2 * LAPSES) * expit(utility_differences / temperature)
    else:
        # Without noise, a pair with equal utilities is decided at random.
        a_win_probabilities = np.where(utility_differences == 0, 0.5, utility_differences > 0)
    labels = []
    for (a, b), a_wins, pair_difference in zip(
        pair_indices, uniform_draws < a_win_probabilities, utility_differences, strict=True
    ):
        if a_wins:
            labels.append(PairLabel(int(a), int(b), bool(pair_difference >= 0)))
        else:
            labels.append(PairLabel(int(b), int(a), bool(pair_difference <= 0)))
    return labels


def solve_temperature(
    utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray, flip_rate: float = 0.12
) -> float:
    """Find the temperature at which an expected share `flip_rate` of the labels contradicts the utilities.

    The share is the expectation over these pairs, and includes lapses. Without lapses it is the mean over
    pairs of 1 / (1 + exp(|u_a - u_b| / T)), which increases with T from 0 to 1/2, so there is exactly one
    solution. Pairs with equal utilities are left out.

    Args:
        utilities: utilities [S].
        pairs: pairs [P, 2] of indices of utilities.
        flip_rate: expected share of contradicting labels; 0, or from LAPSES to below 0.5.
    Returns: temperature T >= 0, in units of utility.
    Raises: ValueError if the utilities of all pairs are equal.
    """
    assert 0.0 <= flip_rate < 0.5
    _, utility_differences = _utility_differences(utilities, pairs)
    # No label can contradict equal utilities.
    nonzero_gaps = np.abs(utility_differences[utility_differences != 0])
    if nonzero_gaps.size == 0:
        raise ValueError(
            "solve_temperature: the utilities of both shapes are equal in every pair. Choose other seeds, or"
            " check that the generator gives different shapes."
        )
    if flip_rate == 0.0:
        return 0.0
    # Lapses flip a share LAPSES of the labels at any temperature, and the noise must flip the remaining
    # share.
    noise_flip_rate = max((flip_rate - LAPSES) / (1 - 2 * LAPSES), 1e-4)
    median_gap = float(np.median(nonzero_gaps))

    def excess(log_t: float) -> float:
        """Return the share of flipped labels at T = scale * exp(log_t), minus the required share."""
        return float(expit(-nonzero_gaps / (median_gap * np.exp(log_t))).mean() - noise_flip_rate)

    # The search is over log T relative to the median difference, so it works at any scale of utilities.
    return median_gap * float(np.exp(brentq(excess, -60.0, 60.0)))
