"""A programmatic annotator of heads of people: says which of two scans is the better one, by the whole heads
that their latents name.

A shape is a grid of values, negative inside: signed distances of a head, or level minus density; the whole
head is one of distances. Only where values change their sign counts, and how they do within two voxels of it,
never how steep they are.
utility = sum_d WEIGHTS[d] * exp(-defect_d / SCALES[d]) lies in (0, 1], is 1 for the whole head itself, and
falls strictly with every defect.
Labels follow Bradley and Terry (1952), with lapses: P(a preferred over b) = LAPSES + (1 - 2
LAPSES) / (1 + exp(-(u_a - u_b) / T)).

Shape letters: n points along x, y, z, the middles of the cube's voxels (`people_mesh.grid_points`);
S = samples, P = pairs.
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

NEAR = 1.75  # voxels; relief is compared where the shape's surface is so near to the whole head's
REACH = 2.0  # voxels; a surface farther from the whole head's is missing or grown, and no farther than this
DETAIL = 0.016  # world units; relief finer than a Gaussian of this deviation is what makes a surface rough

DEFECTS = ("missing", "extra", "floaters", "roughness", "face")
WEIGHTS = {"missing": 0.52, "extra": 0.24, "floaters": 0.08, "roughness": 0.06, "face": 0.10}
# defects that cost 63 % of their part
SCALES = {"missing": 0.6, "extra": 0.4, "floaters": 0.1, "roughness": 0.5, "face": 0.5}

ANNOTATOR = "people"  # name in the labels
LAPSES = 0.02  # share of answers that are mistakes of the hand, whatever the shapes are


@dataclass(frozen=True, kw_only=True)
class Utility:
    """Noise-free judgement of a shape."""

    total: float  # in (0, 1]; 1 for the whole head itself
    parts: dict[str, float]  # by defect, unweighted, each in (0, 1], 1 without it
    defects: dict[str, float]

    @property
    def volume_error(self) -> float:
        """Missing and superfluous volume together, over that of the head's back."""
        return self.defects["missing"] + self.defects["extra"] + self.defects["floaters"]


@functools.lru_cache(maxsize=4)
def _places(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks [n, n, n] of the head above its base, of its back, and of the face."""
    x, y, z = np.moveaxis(grid_points(n), -1, 0)
    head = y > BASE
    face = (np.abs(x) < FACE[0]) & (y > FACE[1]) & (y < FACE[2]) & (z > 0)
    return head, head & (z < BACK), face


def _offsets(values: np.ndarray) -> np.ndarray:
    """Signed distance [n, n, n] to the surface in voxels, to first order and at most REACH."""
    slopes = np.zeros_like(values)
    for axis in range(3):  # central differences, one-sided at the faces
        slope = np.gradient(values, axis=axis)
        slopes += slope * slope
    offsets: np.ndarray = np.clip(values / np.sqrt(slopes + 1e-12), -REACH, REACH)
    return offsets


def _detail(offsets: np.ndarray) -> np.ndarray:
    detail: np.ndarray = offsets - ndimage.gaussian_filter(offsets, DETAIL * len(offsets), truncate=2)
    return detail


def _at_surface(inside: np.ndarray) -> np.ndarray:
    """Voxels [n, n, n] with a neighbour on the other side of the surface."""
    beside = np.zeros_like(inside)
    for axis in range(3):
        mine = np.moveaxis(beside, axis, 0)
        other = np.moveaxis(inside, axis, 0)
        changes = other[1:] != other[:-1]
        mine[1:] |= changes
        mine[:-1] |= changes
    return beside


def largest_part(inside: np.ndarray) -> np.ndarray:
    """The largest of the parts of a mask [n, n, n] that hang together by faces of voxels."""
    labels, count = ndimage.label(inside)
    return inside if count < 2 else labels == 1 + np.bincount(labels.ravel())[1:].argmax()


def defects(values: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """DEFECTS of a shape [n, n, n] against the whole head [n, n, n]; 0 is ideal, larger is worse, all finite
    for any values.

    missing: what the head has and the shape's largest part has not, over the volume of the head's back.
    extra: what that part has too much, likewise. floaters: all other parts, likewise. roughness: |log| of the
    ratio of the fine relief of both surfaces where they run close together, so that a surface which is
    smoother than the head's own has it, too. face: mean distance of the face's surface to the shape's, in
    voxels.
    """
    assert values.shape == whole.shape and values.ndim == 3
    values = np.nan_to_num(np.asarray(values, np.float32), nan=1e4, posinf=1e4, neginf=-1e4)
    head, back, face = _places(len(values))
    inside = values < 0
    named = whole < 0
    if inside.all():  # no surface is to be seen
        inside = ~inside
    part = largest_part(inside)
    body = largest_part(named)
    volume = max(int((body & back).sum()), 1)
    shares = {
        name: float((mask & head).sum() / volume)
        for name, mask in (
            ("missing", body & ~part),
            ("extra", part & ~body),
            ("floaters", inside & ~part & ~named),
        )
    }
    mine = _offsets(values)
    own = _offsets(np.asarray(whole, np.float32))
    surface = _at_surface(named) & head
    both = surface & (np.abs(mine) < NEAR)
    rough = (
        [float(np.sqrt(np.square(_detail(offsets)[both]).mean())) for offsets in (mine, own)]
        if both.any()
        else [0.0, 1.0]
    )
    seen = surface & face
    return {
        **shares,
        "roughness": abs(float(np.log((rough[0] + 1e-3) / (rough[1] + 1e-3)))),
        "face": float(np.abs(mine - own)[seen].mean()) if seen.any() else 0.0,
    }


def utility(values: np.ndarray, whole: np.ndarray) -> Utility:
    """Judge a shape [n, n, n] by the whole head [n, n, n] that its latent names; 64 points along an axis are
    the intended range.
    """
    found = defects(values, whole)
    parts = {name: float(np.exp(-found[name] / SCALES[name])) for name in DEFECTS}
    return Utility(total=sum(WEIGHTS[name] * parts[name] for name in DEFECTS), parts=parts, defects=found)


class PairLabel(NamedTuple):
    """One noisy judgement; `winner` and `loser` index the utilities."""

    winner: int
    loser: int
    clean: bool  # the noise-free order agrees (a tie counts as agreeing)


def _gaps(
    utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs as int64 [P, 2] and their utility differences u_a - u_b, float64 [P]."""
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
    """Draw one judgement per pair.

    Args: `utilities` [S]; `pairs` [P, 2] of indices into them; `temperature` >= 0 in units of utility, 0 for
    labels without noise and lapses; `rng` is advanced by exactly P uniform draws.
    Returns P labels in the order of `pairs`.
    """
    assert temperature >= 0
    index, gap = _gaps(utilities, pairs)
    draw = rng.random(len(index))
    noisy = temperature > 0
    # P(a preferred) [P]
    chance = (
        LAPSES + (1 - 2 * LAPSES) * expit(gap / temperature) if noisy else np.where(gap == 0, 0.5, gap > 0)
    )
    first = draw < chance
    return [
        PairLabel(int(a if won else b), int(b if won else a), bool((delta >= 0) if won else (delta <= 0)))
        for (a, b), won, delta in zip(index, first, gap, strict=True)
    ]


def solve_temperature(
    utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray, flip_rate: float = 0.12
) -> float:
    """Temperature at which the expected share of labels against the noise-free order is `flip_rate` over
    these pairs, lapses included.

    E[flips] = mean over pairs of 1 / (1 + exp(|u_a - u_b| / T)) rises from 0 to 1/2 with T, so the root is
    unique. Ties are left out.
    Args: `flip_rate` 0, or from LAPSES to below 0.5. Returns T >= 0 in units of utility. Raises ValueError
        when all pairs tie.
    """
    assert 0.0 <= flip_rate < 0.5
    _, gap = _gaps(utilities, pairs)
    gap = np.abs(gap[gap != 0])
    if gap.size == 0:
        raise ValueError(
            "solve_temperature: expected at least one pair whose utilities differ, got only ties. Sample"
            " other pairs."
        )
    if flip_rate == 0.0:
        return 0.0
    wanted = max((flip_rate - LAPSES) / (1 - 2 * LAPSES), 1e-4)
    scale = float(np.median(gap))
    return scale * float(
        np.exp(brentq(lambda log_t: expit(-gap / (scale * np.exp(log_t))).mean() - wanted, -60.0, 60.0))
    )
