"""Is a shape on a grid a sound body? Measures and a score without labels, of what is solid: in one part,
without inner walls, thick enough.

A grid is bool [X, Y, Z], True where solid, its second axis up; [D, H, W] of a density is one, too. The unit
of length is the voxel inside and the grid's longest edge R in what is measured. Solid is 6-connected, so is
background: a slit along a diagonal closes nothing that a slicer would trust. Balls by the Euclidean distance
transform: grown by r is distance <= r, eroded by r is distance > r.

Alone the score is useless: a ball is a perfect solid. It is paired with fidelity to the shape before
(`reward`).
Reduce large grids first (`reduced`): the score takes .1 s at 64^3.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

EDGE = 64  # voxels per edge that the score is meant for
MOST = 256  # voxels per edge that are measured
LEAK = 0.05  # of the edge: the radius that bridges holes
CRUMB = 0.05  # share of the exposed faces under which a part is no part of the repaired shape
GATE = (0.75, 0.95)  # fidelity below which the reward is 0, and above which it is whole
FLOOR = 0.01  # least value of a term in the mean
TERMS = ("main", "inner", "thin", "stand")
_AROUND = ndimage.generate_binary_structure(3, 3)  # 26 neighbours
_FALLS = -90.0  # degrees, of what is empty


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the score asks for."""

    # voxels; what no ball of this radius fits in is too thin. None: not asked, nothing of 16^3 is thick
    thin: float | None = 1.0
    # voxels; holes that a ball of this radius does not pass are bridged. None: LEAK of the edge
    leak: float | None = None
    # of TERMS; 0 leaves one out, as `stand` of a head cut by its cube
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.weights) != len(TERMS) or min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ValueError(
                f"Rules(weights): expected {len(TERMS)} weights >= 0, not all 0, got {self.weights}. Correct"
                " them."
            )
        odd = [value for value in (self.thin, self.leak) if value is not None and not 0 < value < math.inf]
        if odd:
            raise ValueError(f"Rules: expected radii above 0, got {odd[0]}. Correct it.")

    def bridge(self, solid: np.ndarray) -> float:
        return LEAK * max(solid.shape) if self.leak is None else self.leak


OBJECTS = Rules()
HEADS = Rules(weights=(1.0, 1.0, 1.0, 0.0))  # up and floor mean nothing
OCCUPANCY = Rules(thin=None, weights=(1.0, 1.0, 0.0, 0.0))  # of 16^3


# Grids: where they come from, and their edges.


def occupied(density: np.ndarray, level: float, who: str = "solid") -> np.ndarray:
    """Where a density [D, H, W] is above the level.

    Raises: ValueError for values that are not finite, and for no grid.
    """
    density = np.asarray(density)
    if density.ndim != 3 or 0 in density.shape:
        raise ValueError(
            f"{who}: expected a grid [X, Y, Z], got {list(density.shape)}. Give one shape at a time."
        )
    bad = int((~np.isfinite(density)).sum())
    if bad:
        raise ValueError(
            f"{who}: expected finite densities, got NaN or infinity in {bad:,} of {density.size:,}. Mend the"
            " generator."
        )
    return density > level


def reduced(solid: np.ndarray, edge: int = EDGE) -> np.ndarray:
    """At most `edge` voxels per axis: blocks of k^3 voxels become one, solid where more than half of them
    are. Smaller grids stay.
    """
    k = -(-max(solid.shape) // edge)
    if k <= 1:
        return solid
    padded = np.pad(solid, [(0, -size % k) for size in solid.shape])
    x, y, z = (size // k for size in padded.shape)
    return padded.reshape(x, k, y, k, z, k).mean(axis=(1, 3, 5), dtype=np.float32) > 0.5


def _checked(solid: np.ndarray) -> np.ndarray:
    """Raises: ValueError for what is no grid, and for one that is too large."""
    solid = np.asarray(solid)
    if solid.ndim != 3 or solid.dtype != bool:
        got = f"{solid.dtype} {list(solid.shape)}"
        raise ValueError(
            f"solid: expected a grid of bool [X, Y, Z], got {got}. Compare a density with its level."
        )
    if max(solid.shape) > MOST:
        raise ValueError(
            f"solid: expected at most {MOST} voxels per edge, got {max(solid.shape)}. Reduce the grid to"
            f" {EDGE}^3 first."
        )
    return solid


def _box(solid: np.ndarray, margin: int) -> tuple[np.ndarray, tuple[slice, ...]]:
    """The bounding box of what is solid, with a margin of background; and the slices of that box in it,
    without the margin.
    """
    where = ndimage.find_objects(solid.astype(np.uint8))[0]
    return np.pad(solid[where], margin), where


def _back(part: np.ndarray, where: tuple[slice, ...], margin: int, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `_box`. What lies in the margin is left out where the grid ends."""
    out = np.zeros(shape, dtype=bool)
    there = [
        slice(max(s.start - margin, 0), min(s.stop + margin, size))
        for s, size in zip(where, shape, strict=True)
    ]
    here = [
        slice(t.start - s.start + margin, t.stop - s.start + margin)
        for s, t in zip(where, there, strict=True)
    ]
    out[tuple(there)] = part[tuple(here)]
    return out


def grown(solid: np.ndarray, radius: float) -> np.ndarray:
    return ndimage.distance_transform_edt(~solid) <= radius if solid.any() else solid


def opening(solid: np.ndarray, radius: float) -> np.ndarray:
    """The union of the balls that fit inside."""
    # What is outside the grid is background
    return grown(ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1, 1:-1] > radius, radius) & solid


def closing(solid: np.ndarray, radius: float) -> np.ndarray:
    """What no ball outside can reach, beyond the grid's edge, too."""
    if not solid.any():
        return solid
    margin = math.ceil(radius) + 1
    box, where = _box(solid, margin)
    closed = ndimage.distance_transform_edt(grown(box, radius)) > radius
    return _back(closed | box, where, margin, solid.shape)


def enclosed(solid: np.ndarray) -> np.ndarray:
    """Background that does not reach the grid's border."""
    labels, _ = ndimage.label(np.pad(~solid, 1, constant_values=True))
    return ((labels > 0) & (labels != labels[0, 0, 0]))[1:-1, 1:-1, 1:-1]


def fill(solid: np.ndarray, radius: float) -> np.ndarray:
    """The shape with its hollows: closed ones, and those behind holes that a ball of this radius does not
    pass.

    Background of the closing that does not reach the border is filled, the bridge itself is not: piercing a
    shell gains nothing.
    """
    return solid | enclosed(closing(solid, radius))


# Measures.


def exposed(labels: np.ndarray, count: int) -> np.ndarray:
    """Faces of voxels that border on background or the grid's edge,
    of each of the parts 1 to count: [count].
    """
    padded = np.pad(labels, 1)
    total = np.zeros(count + 1, dtype=np.int64)
    for axis in range(3):
        for before, after in ((slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1))):
            here, there = (padded[(slice(None),) * axis + (part,)] for part in (before, after))
            total += np.bincount(here[(here > 0) & (there == 0)], minlength=count + 1)
    return total[1:]


def main_share(solid: np.ndarray) -> float:
    """Share of the exposed faces that the largest part has; 0 of an empty grid."""
    faces = exposed(*ndimage.label(solid))
    return float(faces.max() / faces.sum()) if len(faces) else 0.0


def main_part(solid: np.ndarray) -> np.ndarray:
    """The part of the most exposed faces."""
    labels, count = ndimage.label(solid)
    return labels == 1 + exposed(labels, count).argmax() if count > 1 else solid


def euler(solid: np.ndarray) -> int:
    """Vertices - edges + faces - cubes of the union of closed cubes: bodies - tunnels + cavities; bodies that
    touch at a corner are one.
    """
    padded = np.pad(solid, 1)
    total = 0
    # along the other axes a cell is shared by both neighbours
    for thick in itertools.product((False, True), repeat=3):
        cells = padded
        for axis in (axis for axis in range(3) if not thick[axis]):
            cells = np.delete(cells, -1, axis) | np.delete(cells, 0, axis)
        total += (-1) ** sum(thick) * int(cells.sum())
    return total


def tip(solid: np.ndarray) -> tuple[float, float]:
    """How far it is from falling over: degrees that it can be tilted, and voxels by which its centre of mass
    is inside what it stands on.

    That is the hull of the lowest layer's voxels; negative where the centre, projected, lies outside. -90 of
    an empty grid.
    """
    points = np.argwhere(solid)
    if not len(points):
        return _FALLS, -math.inf
    floor = points[:, 1].min()
    centre = points.mean(axis=0) + 0.5
    corners = points[points[:, 1] == floor][:, [0, 2]]
    sides = ConvexHull(
        np.concatenate([corners + step for step in itertools.product((0, 1), repeat=2)])
    ).equations
    margin = -float((sides[:, :2] @ centre[[0, 2]] + sides[:, 2]).max())
    return math.degrees(math.atan2(margin, centre[1] - floor)), margin


# The score, and its pair.


@dataclass(frozen=True, kw_only=True)
class Score:
    """Terms in 0..1, and their geometric mean by the rules' weights: one failed demand cannot be bought with
    another.
    """

    # exp(-8 share outside the largest part): a floater of 3 % of the surface must cost more than rounding
    main: float
    inner: float  # share of the filled shape that is solid
    thin: float  # exp(-8 share that is too thin)
    stand: float  # clip(1/2 + tip / 20 degrees)
    solid: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


NOTHING = Score(main=0.0, inner=0.0, thin=0.0, stand=0.0, solid=0.0)


def score(solid: np.ndarray, rules: Rules = OBJECTS, filled: np.ndarray | None = None) -> Score:
    """How sound a shape is; all 0 of an empty grid. Args: filled: `fill` of it, where that is known.

    Parts and standing are those of the shape or of its opening, whichever is worse: a thread to a floater and
    a leg of one voxel carry nothing. Raises: ValueError for a foreign and a gigantic grid.
    """
    if solid.ndim == 3 and solid.dtype == bool and not solid.any():
        return NOTHING
    solid = _checked(solid)
    inner = float(solid.sum() / (fill(solid, rules.bridge(solid)) if filled is None else filled).sum())
    solid = _box(solid, 0)[0]
    main = main_share(solid)
    angle = tip(solid)[0]
    thin = 1.0
    if rules.thin is not None:
        opened = opening(solid, rules.thin)
        thick = grown(opened, 1) & solid
        main = min(main, main_share(opened))
        angle = min(angle, tip(thick)[0])
        thin = math.exp(-8 * (1 - thick.sum() / solid.sum()))
    return joined(
        {
            "main": math.exp(-8 * (1 - main)),
            "inner": inner,
            "thin": thin,
            "stand": min(max(0.5 + angle / 20, 0.0), 1.0),
        },
        rules,
    )


def joined(terms: Mapping[str, float], rules: Rules) -> Score:
    """The geometric mean of the terms, each at least FLOOR."""
    weights = dict(zip(TERMS, rules.weights, strict=True))
    mean = sum(weights[name] * math.log(max(terms[name], FLOOR)) for name in TERMS) / sum(rules.weights)
    return Score(**terms, solid=math.exp(mean))


def repaired(solid: np.ndarray, rules: Rules = OBJECTS) -> np.ndarray:
    """What a cure would leave: filled, without parts of less than CRUMB of the exposed faces. An empty grid
    stays.
    """
    filled = fill(solid, rules.bridge(solid))
    labels, count = ndimage.label(filled)
    if count <= 1:
        return np.asarray(filled)
    faces = exposed(labels, count)
    kept = np.concatenate([[False], (faces >= CRUMB * faces.sum()) | (faces == faces.max())])
    return kept[labels]


def overlap(filled: np.ndarray, reference: np.ndarray) -> float:
    """F: IoU of a filled shape with the repaired one before, since the plain IoU punishes the cure. 0 where
    both are empty.
    """
    union = int((filled | reference).sum())
    return float((filled & reference).sum() / union) if union else 0.0


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A shape beside the one before."""

    score: Score
    fidelity: float

    @property
    def reward(self) -> float:
        """solid * clip((F - .75) / .2, 0, 1). The product of both lets a hull pass its shape; the gate does
        not.
        """
        low, high = GATE
        return self.score.solid * min(max((self.fidelity - low) / (high - low), 0.0), 1.0)

    def to_dict(self) -> dict[str, float]:
        return {**self.score.to_dict(), "fidelity": self.fidelity, "reward": self.reward}


def beside(solid: np.ndarray, references: Sequence[np.ndarray], rules: Rules = OBJECTS) -> Judged:
    """The score of a shape, and its fidelity to that of the references, `repaired` grids of its size, which
    it is likest to.

    Raises: ValueError for grids that differ in size, or are none.
    """
    for reference in references:
        if reference.shape != solid.shape:
            raise ValueError(
                f"solid: expected grids of one size, got {list(solid.shape)} and {list(reference.shape)}."
                " Sample both alike."
            )
    filled = fill(solid, rules.bridge(solid))
    return Judged(
        score=score(solid, rules, filled),
        fidelity=max(overlap(filled, reference) for reference in references),
    )


def reward(solid: np.ndarray, untuned: np.ndarray, rules: Rules = OBJECTS) -> Judged:
    """A shape beside the same seed's before; both are reduced to EDGE first. Raises: see `beside`."""
    small = reduced(untuned)
    return beside(reduced(solid), [repaired(small, rules)], rules)


# Defects that a gradient can mend.


def floaters(solid: np.ndarray) -> np.ndarray:
    """All but the largest part."""
    return solid & ~main_part(solid)


def caps(solid: np.ndarray, radius: float) -> np.ndarray:
    """What would close leaks and tunnels of the largest part that a ball of this radius does not pass; dents
    and pits are left.

    Pieces of its closing whose addition raises the Euler number: a leak becomes a cavity (1 to 2), a tunnel
    is stopped (0 to 1). Misses holes of radius h in a wall w where radius < (h^2 + w^2/4) / w, about.
    """
    body = main_part(solid)
    pieces, count = ndimage.label(closing(body, radius) & ~body, _AROUND)
    found = np.zeros_like(solid)
    for number, where in enumerate(ndimage.find_objects(pieces), start=1):
        around = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in where)
        piece = pieces[around] == number
        before = body[around]
        if euler(before | piece) > euler(before):
            found[around] |= piece
    return found
