"""Measures of whether a shape on a grid is a physically valid solid, and a label-free score.

A solid is in one part, has no inner walls and is thick enough.

A grid is bool [X, Y, Z], True where solid; its second axis points up. A density [D, H, W] is such a grid,
too. Lengths are in voxels inside this module. Measures are relative to the longest edge R of the grid. The
solid is 6-connected, and so is the background: a slit along a diagonal closes nothing that a slicer would
accept. Balls are computed with the Euclidean distance transform: dilation by r is distance <= r, erosion by r
is distance > r.

The score alone is useless, because a ball is a perfect solid. It is combined with the fidelity to the shape
before tuning (`reward`).
Reduce large grids first (`reduced`): the score takes 0.1 s at 64^3.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

EDGE = 64  # voxels per edge that the score is meant for
MOST = 256  # largest number of voxels per edge that is accepted
LEAK = 0.05  # radius that bridges holes, as a fraction of the longest edge
CRUMB = 0.05  # fraction of the exposed faces below which a part is dropped from the reference shape
GATE = (0.75, 0.95)  # fidelity up to which the reward is 0, and from which it is the full score
FLOOR = 0.01  # smallest value of a term in the geometric mean
TERMS = ("main", "inner", "thin", "stand")
_AROUND = ndimage.generate_binary_structure(3, 3)  # 26 neighbours
_FALLS = -90.0  # degrees; stability of an empty grid


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Settings of the score."""

    # Radius in voxels: solid where no ball of this radius fits is too thin. None: the term is not used; at
    # 16^3 every structure is thin.
    thin: float | None = 1.0
    # Radius in voxels: holes that a ball of this radius cannot pass are bridged. None: LEAK of the edge.
    leak: float | None = None
    # Weights of TERMS. 0 leaves a term out, for example `stand` of a head that the cube cuts off.
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.weights) != len(TERMS) or min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ValueError(
                f"Rules(weights): expected {len(TERMS)} weights >= 0, not all of them 0, got {self.weights}."
                " Correct the weights."
            )
        invalid = [
            value for value in (self.thin, self.leak) if value is not None and not 0 < value < math.inf
        ]
        if invalid:
            raise ValueError(f"Rules: expected radii > 0, got {invalid[0]}. Use a positive radius or None.")

    def bridge(self, solid: np.ndarray) -> float:
        """Return the radius that bridges holes of a grid, in voxels."""
        return LEAK * max(solid.shape) if self.leak is None else self.leak


OBJECTS = Rules()
HEADS = Rules(weights=(1.0, 1.0, 1.0, 0.0))  # the cube cuts heads off, so they do not stand on anything
OCCUPANCY = Rules(thin=None, weights=(1.0, 1.0, 0.0, 0.0))  # of grids of 16^3


# Conversion into grids, and their bounding boxes.


def occupied(density: np.ndarray, level: float, who: str = "solid") -> np.ndarray:
    """Return where a density [D, H, W] is above the level.

    Raises: ValueError for values that are not finite, and for other shapes than one grid.
    """
    density = np.asarray(density)
    if density.ndim != 3 or 0 in density.shape:
        raise ValueError(
            f"{who}: expected a grid [X, Y, Z], got {list(density.shape)}. Pass one shape at a time."
        )
    bad = int((~np.isfinite(density)).sum())
    if bad:
        raise ValueError(
            f"{who}: expected finite densities, got NaN or infinity in {bad:,} of {density.size:,}. Check the"
            " weights of the generator."
        )
    return density > level


def reduced(solid: np.ndarray, edge: int = EDGE) -> np.ndarray:
    """Reduce a grid to at most `edge` voxels per axis. Smaller grids are returned unchanged.

    Blocks of k^3 voxels become one voxel, which is solid if more than half of the block is.
    """
    k = -(-max(solid.shape) // edge)  # rounded up
    if k <= 1:
        return solid
    # The grid is padded with background to a multiple of k.
    padded = np.pad(solid, [(0, -size % k) for size in solid.shape])
    x, y, z = (size // k for size in padded.shape)
    # [x k, y k, z k] -> [x, k, y, k, z, k]
    return padded.reshape(x, k, y, k, z, k).mean(axis=(1, 3, 5), dtype=np.float32) > 0.5


def _checked(solid: np.ndarray) -> np.ndarray:
    """Return the grid as an array. Raises: ValueError for other types and shapes, and for a grid that is
    too large.
    """
    solid = np.asarray(solid)
    if solid.ndim != 3 or solid.dtype != bool:
        got = f"{solid.dtype} {list(solid.shape)}"
        raise ValueError(f"solid: expected a grid of bool [X, Y, Z], got {got}. Pass density > level.")
    if max(solid.shape) > MOST:
        raise ValueError(
            f"solid: expected at most {MOST} voxels per edge, got {max(solid.shape)}. Reduce the grid to"
            f" {EDGE}^3 first (`reduced`)."
        )
    return solid


def _box(solid: np.ndarray, margin: int) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Return the bounding box of the solid with a margin of background, and the slices of the box without
    margin.
    """
    bounds = ndimage.find_objects(solid.astype(np.uint8))[0]
    return np.pad(solid[bounds], margin), bounds


def _back(part: np.ndarray, bounds: tuple[slice, ...], margin: int, shape: tuple[int, ...]) -> np.ndarray:
    """Put a box with its margin back into a grid of the given shape: the inverse of `_box`.

    The parts of the margin that lie outside the grid are dropped.
    """
    out = np.zeros(shape, dtype=bool)
    # slices in the grid, clipped to it
    in_grid = [
        slice(max(s.start - margin, 0), min(s.stop + margin, size))
        for s, size in zip(bounds, shape, strict=True)
    ]
    # the same slices in the box
    in_box = [
        slice(t.start - s.start + margin, t.stop - s.start + margin)
        for s, t in zip(bounds, in_grid, strict=True)
    ]
    out[tuple(in_grid)] = part[tuple(in_box)]
    return out


def grown(solid: np.ndarray, radius: float) -> np.ndarray:
    """Dilate by a ball. An empty grid stays empty; its distance transform would be undefined."""
    return ndimage.distance_transform_edt(~solid) <= radius if solid.any() else solid


def opening(solid: np.ndarray, radius: float) -> np.ndarray:
    """Return the union of the balls of this radius that fit into the solid (morphological opening)."""
    # Padding makes everything outside the grid background.
    return grown(ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1, 1:-1] > radius, radius) & solid


def closing(solid: np.ndarray, radius: float) -> np.ndarray:
    """Return all points that no ball of this radius outside the solid can cover (morphological closing).

    The balls may lie beyond the edge of the grid.
    """
    if not solid.any():
        return solid
    # The margin leaves space for balls outside the bounding box.
    margin = math.ceil(radius) + 1
    box, bounds = _box(solid, margin)
    closed = ndimage.distance_transform_edt(grown(box, radius)) > radius  # erosion by the same ball
    return _back(closed | box, bounds, margin, solid.shape)


def enclosed(solid: np.ndarray) -> np.ndarray:
    """Return the background that is not connected to the border of the grid."""
    # 0 is solid; the padding joins all background at the border into the label of the corner
    labels, _ = ndimage.label(np.pad(~solid, 1, constant_values=True))
    return ((labels > 0) & (labels != labels[0, 0, 0]))[1:-1, 1:-1, 1:-1]


def fill(solid: np.ndarray, radius: float) -> np.ndarray:
    """Fill the hollows of a shape: closed ones, and those whose openings a ball of this radius cannot pass.

    The background of the closing that is not connected to the border is filled. The bridges over the openings
    are not added, so that piercing a shell does not change its filled volume.
    """
    return solid | enclosed(closing(solid, radius))


# Measures.


def exposed(labels: np.ndarray, count: int) -> np.ndarray:
    """Count the voxel faces that border on background or on the edge of the grid, for each part: [count].

    Args: labels: [X, Y, Z], 0 for background and 1..count for parts.
    """
    padded = np.pad(labels, 1)
    total = np.zeros(count + 1, dtype=np.int64)
    for axis in range(3):
        for before, after in ((slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1))):
            # neighbours along the axis, in both directions
            voxel, neighbour = (padded[(slice(None),) * axis + (part,)] for part in (before, after))
            total += np.bincount(voxel[(voxel > 0) & (neighbour == 0)], minlength=count + 1)
    return total[1:]


def main_share(solid: np.ndarray) -> float:
    """Return the largest part's fraction of the exposed faces; 0 for an empty grid."""
    faces = exposed(*ndimage.label(solid))
    return float(faces.max() / faces.sum()) if len(faces) else 0.0


def main_part(solid: np.ndarray) -> np.ndarray:
    """Return the part that has the most exposed faces."""
    labels, count = ndimage.label(solid)
    return labels == 1 + exposed(labels, count).argmax() if count > 1 else solid


def euler(solid: np.ndarray) -> int:
    """Compute the Euler number of the union of closed cubes: vertices - edges + faces - cubes.

    It equals bodies - tunnels + cavities. Bodies that touch at a corner count as one.
    """
    padded = np.pad(solid, 1)
    total = 0
    # A cell is extended along the axes in `thick` and flat along the others. (True, True, True) are the
    # cubes, (False, False, False) the vertices. Along a flat axis a cell belongs to both of its neighbours.
    for thick in itertools.product((False, True), repeat=3):
        cells = padded
        for axis in (axis for axis in range(3) if not thick[axis]):
            cells = np.delete(cells, -1, axis) | np.delete(cells, 0, axis)
        # the sign of a cell is (-1)^dimension
        total += (-1) ** sum(thick) * int(cells.sum())
    return total


def tip(solid: np.ndarray) -> tuple[float, float]:
    """Compute the stability of a shape that stands on its lowest layer.

    Returns: the angle in degrees by which it can be tilted before it falls, and the distance in voxels of its
    projected centre of mass from the edge of the convex hull of the lowest layer's voxels. Both are negative
    if the centre lies outside of the hull. (-90, -inf) for an empty grid.
    """
    points = np.argwhere(solid)
    if not len(points):
        return _FALLS, -math.inf
    lowest = points[:, 1].min()
    # voxel (i, j, k) covers [i, i + 1] along the first axis, and so on
    centre = points.mean(axis=0) + 0.5
    # x and z of the voxels of the lowest layer
    corners = points[points[:, 1] == lowest][:, [0, 2]]
    # Each voxel contributes four corners. Rows of `equations`: outward unit normal (2) and offset.
    sides = ConvexHull(
        np.concatenate([corners + step for step in itertools.product((0, 1), repeat=2)])
    ).equations
    # distance to the nearest side, negative outside
    margin = -float((sides[:, :2] @ centre[[0, 2]] + sides[:, 2]).max())
    return math.degrees(math.atan2(margin, centre[1] - lowest)), margin


# The score of one shape, and its combination with fidelity.


@dataclass(frozen=True, kw_only=True)
class Score:
    """Terms of the score in 0..1, and their geometric mean with the weights of the rules.

    In a geometric mean one failed term cannot be compensated by another.
    """

    # exp(-8 fraction outside the largest part): a floater of 3 % of the surface must cost more than rounding
    main: float
    inner: float  # fraction of the filled shape that is solid
    thin: float  # exp(-8 fraction that is too thin)
    stand: float  # clip(1/2 + angle of `tip` / 20 degrees, 0, 1)
    solid: float  # the weighted geometric mean

    def to_dict(self) -> dict[str, float]:
        """Return the fields as a dict."""
        return asdict(self)


NOTHING = Score(main=0.0, inner=0.0, thin=0.0, stand=0.0, solid=0.0)


def score(solid: np.ndarray, rules: Rules = OBJECTS, filled: np.ndarray | None = None) -> Score:
    """Score a shape; all terms are 0 for an empty grid.

    Parts and standing are measured on the shape and on its opening, and the worse value counts. A thin
    connection to a floater and a leg of one voxel carry no load.

    Args: filled: `fill` of the shape, if it is already computed.
    Raises: ValueError for other types and shapes, and for a grid that is too large.
    """
    if solid.ndim == 3 and solid.dtype == bool and not solid.any():
        return NOTHING
    solid = _checked(solid)
    inner = float(solid.sum() / (fill(solid, rules.bridge(solid)) if filled is None else filled).sum())
    # A bounding box gives the same measures in less time
    solid = _box(solid, 0)[0]
    main = main_share(solid)
    angle = tip(solid)[0]
    thin = 1.0
    if rules.thin is not None:
        opened = opening(solid, rules.thin)
        # The opening rounds off edges; growing it by one voxel gives these back.
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
    """Compute the weighted geometric mean of the terms.

    Each counts as at least 0.01, so that one term of 0 does not decide alone.
    """
    weights = dict(zip(TERMS, rules.weights, strict=True))
    mean = sum(weights[name] * math.log(max(terms[name], FLOOR)) for name in TERMS) / sum(rules.weights)
    return Score(**terms, solid=math.exp(mean))


def repaired(solid: np.ndarray, rules: Rules = OBJECTS) -> np.ndarray:
    """Return a reference shape without simple defects: filled, and without small parts.

    Parts with less than CRUMB of the exposed faces are dropped. An empty grid is returned unchanged.
    """
    filled = fill(solid, rules.bridge(solid))
    labels, count = ndimage.label(filled)
    if count <= 1:
        return np.asarray(filled)
    faces = exposed(labels, count)
    # [count + 1], by label; the largest part always stays
    is_kept = np.concatenate([[False], (faces >= CRUMB * faces.sum()) | (faces == faces.max())])
    return is_kept[labels]


def overlap(filled: np.ndarray, reference: np.ndarray) -> float:
    """Compute F, the IoU of a filled shape with the reference shape (`repaired`); 0 if both are empty.

    The IoU of the unfilled shapes would penalise the removal of defects.
    """
    union = int((filled | reference).sum())
    return float((filled & reference).sum() / union) if union else 0.0


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Score of a shape, and its fidelity to the shape before tuning."""

    score: Score
    fidelity: float  # F of `overlap`, 0..1

    @property
    def reward(self) -> float:
        """Compute solid * clip((F - 0.75) / 0.2, 0, 1), in 0..1.

        With the product solid * F, the convex hull of a shape would score higher than the shape. The clipped
        weight prevents that.
        """
        low, high = GATE
        return self.score.solid * min(max((self.fidelity - low) / (high - low), 0.0), 1.0)

    def to_dict(self) -> dict[str, float]:
        """Return the score's terms, the fidelity and the reward."""
        return {**self.score.to_dict(), "fidelity": self.fidelity, "reward": self.reward}


def beside(solid: np.ndarray, references: Sequence[np.ndarray], rules: Rules = OBJECTS) -> Judged:
    """Score a shape and compute its fidelity to the most similar of the references.

    Args: references: grids of the same size, see `repaired`.
    Raises: ValueError for grids that differ in size or are no grids.
    """
    for reference in references:
        if reference.shape != solid.shape:
            raise ValueError(
                f"solid: expected grids of one size, got {list(solid.shape)} and {list(reference.shape)}."
                " Sample both on the same grid."
            )
    filled = fill(solid, rules.bridge(solid))
    return Judged(
        score=score(solid, rules, filled),
        fidelity=max(overlap(filled, reference) for reference in references),
    )


def reward(solid: np.ndarray, untuned: np.ndarray, rules: Rules = OBJECTS) -> Judged:
    """Score a shape with its fidelity to the untuned shape of the same seed. Both are reduced to EDGE first.

    Raises: see `beside`.
    """
    small = reduced(untuned)
    return beside(reduced(solid), [repaired(small, rules)], rules)


# Defects that a gradient on the density can correct.


def floaters(solid: np.ndarray) -> np.ndarray:
    """Return all parts but the largest one."""
    return solid & ~main_part(solid)


def caps(solid: np.ndarray, radius: float) -> np.ndarray:
    """Return the voxels that would close openings and tunnels of the largest part. Dents and pits are left
    open.

    Only openings that a ball of this radius cannot pass are closed. The result consists of the pieces of the
    closing whose addition raises the Euler number: a leak becomes a cavity (1 to 2), a tunnel is closed (0 to
    1). It misses holes of radius h in a wall of thickness w if approximately radius < (h^2 + w^2/4) / w.
    """
    body = main_part(solid)
    pieces, count = ndimage.label(closing(body, radius) & ~body, _AROUND)
    plugs = np.zeros_like(solid)
    for number, bounds in enumerate(ndimage.find_objects(pieces), start=1):
        # one voxel more on each side, for the Euler number of the piece with its surroundings
        around = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in bounds)
        piece = pieces[around] == number
        before = body[around]
        if euler(before | piece) > euler(before):
            plugs[around] |= piece
    return plugs
