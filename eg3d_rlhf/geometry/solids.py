"""Measures of whether a shape on a grid is a physically valid solid, and a score that needs no labels.

A valid solid consists of one part, has no inner walls, is thick enough, and stands.

A grid is a bool array [X, Y, Z], which is True where there is material. Its second axis points up. A density
[D, H, W] above a level is such a grid, too. Lengths in this module are in voxels; the measures are relative
to the longest edge of the grid. Two voxels are connected if they share a face (6-connectivity), both in the
solid and in the background. Balls are computed with the Euclidean distance transform: a dilation by r selects
distances <= r, and an erosion by r selects distances > r.

The score alone cannot guide tuning, because a ball has the best score. `reward` therefore combines it with
the similarity to the shape before tuning. Reduce large grids first (`reduced`): the score takes 0.1 s at 64^3
voxels.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

EDGE = 64  # voxels per edge of the grids for which the constants of the score were chosen
MAX_EDGE = 256  # largest allowed number of voxels per edge
LEAK = 0.05  # radius of the closing that bridges holes, as a fraction of the longest edge
CRUMB = 0.05  # fraction of the exposed faces below which a part is dropped from the reference shape
GATE = (0.75, 0.95)  # fidelity up to which the reward is 0, and from which it is the full score
FLOOR = 0.01  # smallest value of a term in the geometric mean
TERMS = ("main", "inner", "thin", "stand")
_AROUND = ndimage.generate_binary_structure(3, 3)  # connectivity of a voxel with its 26 neighbours
_FALLS = -90.0  # stability of an empty grid in degrees


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Settings of the score of a physically valid solid, see `score`."""

    # Radius in voxels: solid where no ball of this radius fits is too thin. None: the term is not used; at
    # 16^3 every structure is thin.
    thin: float | None = 1.0
    # Radius in voxels: holes that a ball of this radius cannot pass are bridged. None: LEAK of the edge.
    leak: float | None = None
    # Weights of TERMS. 0 leaves a term out, for example `stand` of a head that the cube cuts off.
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        # A sum of weights of 0 would make the mean undefined.
        if len(self.weights) != len(TERMS) or min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ValueError(
                f"Rules: weights must be {len(TERMS)} numbers >= 0, of which at least one is above 0, got"
                f" {self.weights}. Use (1, 1, 1, 1) for equal weights."
            )
        invalid_radii = [
            radius for radius in (self.thin, self.leak) if radius is not None and not 0 < radius < math.inf
        ]
        if invalid_radii:
            raise ValueError(
                f"Rules: thin and leak must be radii > 0 in voxels, got {invalid_radii[0]}. Use a positive"
                " radius or None."
            )

    def bridge(self, solid: np.ndarray) -> float:
        """Return the radius in voxels of the closing that bridges holes of a grid [X, Y, Z]."""
        return LEAK * max(solid.shape) if self.leak is None else self.leak


OBJECTS = Rules()  # of complete objects
HEADS = Rules(
    weights=(1.0, 1.0, 1.0, 0.0)
)  # of heads: the cube cuts them off at the neck, so they cannot stand
OCCUPANCY = Rules(
    thin=None, weights=(1.0, 1.0, 0.0, 0.0)
)  # of grids of 16^3 voxels, which are too coarse for more


# Conversion into grids, and their bounding boxes.


def occupied(density: np.ndarray, level: float, caller: str = "solid") -> np.ndarray:
    """Convert a density into a grid: True where it is above the level.

    Args:
        density: raw density [D, H, W] of one shape.
        level: raw density on the surface.
        caller: name of the caller, with which error messages begin.

    Raises: ValueError for an array with another number of axes, and for values that are not finite.
    """
    density = np.asarray(density)
    if density.ndim != 3 or 0 in density.shape:
        raise ValueError(
            f"{caller}: the density must be an array [D, H, W] that is not empty, got {list(density.shape)}."
            " Pass one shape at a time."
        )
    invalid_count = int((~np.isfinite(density)).sum())
    # NaN is above no level, so it would silently count as background.
    if invalid_count:
        raise ValueError(
            f"{caller}: {invalid_count:,} of {density.size:,} densities are NaN or infinite. Check the"
            " weights of the generator."
        )
    return density > level


def reduced(solid: np.ndarray, edge: int = EDGE) -> np.ndarray:
    """Reduce a grid to at most `edge` voxels per axis. Smaller grids are returned unchanged.

    A block of k x k x k voxels becomes one voxel, which is solid if more than half of the block is solid.

    Args:
        solid: grid [X, Y, Z].
        edge: largest number of voxels per axis of the result.
    """
    # -(-a // b) is a / b, rounded up
    k = -(-max(solid.shape) // edge)
    if k <= 1:
        return solid
    # The grid is padded with background, so that its edges are multiples of k.
    # -size % k: number of voxels that are missing to a multiple of k
    padded_grid = np.pad(solid, [(0, -size % k) for size in solid.shape])
    x, y, z = (size // k for size in padded_grid.shape)
    # [x k, y k, z k] -> [x, k, y, k, z, k]
    return padded_grid.reshape(x, k, y, k, z, k).mean(axis=(1, 3, 5), dtype=np.float32) > 0.5


def _checked(solid: np.ndarray) -> np.ndarray:
    """Return the grid as an array [X, Y, Z].

    Raises: ValueError for another type or number of axes, and for a grid with more than MAX_EDGE voxels per
        edge.
    """
    solid = np.asarray(solid)
    if solid.ndim != 3 or solid.dtype != bool:
        raise ValueError(
            f"solid: the grid must be a bool array [X, Y, Z], got {solid.dtype} {list(solid.shape)}. Pass"
            " density > level."
        )
    # The time of the score grows with the number of voxels.
    if max(solid.shape) > MAX_EDGE:
        raise ValueError(
            f"solid: a grid may have at most {MAX_EDGE} voxels per edge, got {max(solid.shape)}. Reduce the"
            f" grid to {EDGE}^3 voxels first (`reduced`)."
        )
    return solid


def _cut_box(solid: np.ndarray, margin: int) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Cut the bounding box of the solid out of a grid, and add a margin of background on each side.

    Returns: the box with the margin, and the slices of the box without the margin in the grid.
    """
    box_slices = ndimage.find_objects(solid.astype(np.uint8))[0]
    return np.pad(solid[box_slices], margin), box_slices


def _insert_box(
    box: np.ndarray, bounds: tuple[slice, ...], margin: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Insert a box with its margin into an empty grid: the inverse of `_cut_box`.

    The parts of the margin that lie outside the grid are dropped.

    Args:
        box: box with the margin.
        bounds: slices of the box without the margin in the grid.
        margin: width of the margin in voxels.
        shape: numbers of voxels of the grid.
    """
    grid = np.zeros(shape, dtype=bool)
    # slices of the box with the margin in the grid, cut off at the border of the grid
    grid_slices = [
        slice(max(box_slice.start - margin, 0), min(box_slice.stop + margin, axis_length))
        for box_slice, axis_length in zip(bounds, shape, strict=True)
    ]
    # the same voxels, as slices in the box
    box_slices = [
        slice(grid_slice.start - box_slice.start + margin, grid_slice.stop - box_slice.start + margin)
        for box_slice, grid_slice in zip(bounds, grid_slices, strict=True)
    ]
    grid[tuple(grid_slices)] = box[tuple(box_slices)]
    return grid


def dilated(solid: np.ndarray, radius: float) -> np.ndarray:
    """Dilate a grid [X, Y, Z] by a ball with a radius in voxels. An empty grid is returned unchanged."""
    # The distance to the nearest solid voxel is undefined in an empty grid.
    return ndimage.distance_transform_edt(~solid) <= radius if solid.any() else solid


def morphological_opening(solid: np.ndarray, radius: float) -> np.ndarray:
    """Compute the morphological opening of a grid: the union of all balls that fit into the solid.

    Args:
        solid: grid [X, Y, Z].
        radius: radius of the balls in voxels.
    """
    # The padding makes everything outside the grid background. The erosion is dilated by the same ball.
    return (
        dilated(ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1, 1:-1] > radius, radius) & solid
    )


def morphological_closing(solid: np.ndarray, radius: float) -> np.ndarray:
    """Compute the morphological closing of a grid: all voxels that no ball outside the solid can cover.

    The balls may lie beyond the border of the grid. An empty grid is returned unchanged.

    Args:
        solid: grid [X, Y, Z].
        radius: radius of the balls in voxels.
    """
    if not solid.any():
        return solid
    # The margin leaves space for balls outside the bounding box.
    margin = math.ceil(radius) + 1
    box, box_slices = _cut_box(solid, margin)
    closed_box = ndimage.distance_transform_edt(dilated(box, radius)) > radius  # erosion by the same ball
    return _insert_box(closed_box | box, box_slices, margin, solid.shape)


def enclosed(solid: np.ndarray) -> np.ndarray:
    """Return the cavities of a grid: the background that is not connected to the border."""
    # Parts of the background have labels from 1 on, the solid has the label 0. The padding connects all
    # background at the border, so it has the label of the corner.
    part_labels, _ = ndimage.label(np.pad(~solid, 1, constant_values=True))
    return ((part_labels > 0) & (part_labels != part_labels[0, 0, 0]))[1:-1, 1:-1, 1:-1]


def fill(solid: np.ndarray, radius: float) -> np.ndarray:
    """Fill the cavities of a shape, and hollows whose openings a ball cannot pass.

    The cavities of the closing are filled. The material with which the closing bridges the openings is not
    added, so that a small hole in a shell does not change its filled volume.

    Args:
        solid: grid [X, Y, Z].
        radius: radius of the ball in voxels.
    """
    return solid | enclosed(morphological_closing(solid, radius))


# Measures.


def exposed(part_labels: np.ndarray, part_count: int) -> np.ndarray:
    """Count the exposed voxel faces of each part: faces next to background or at the border of the grid.

    Args:
        part_labels: [X, Y, Z], 0 for background and 1..part_count for the parts.
        part_count: number of parts.

    Returns: numbers of faces [part_count].
    """
    padded_labels = np.pad(part_labels, 1)
    face_counts = np.zeros(part_count + 1, dtype=np.int64)
    all_but_last = slice(None, -1)
    all_but_first = slice(1, None)
    for axis in range(3):
        # both directions along the axis: a voxel and its next neighbour, then its previous neighbour
        for voxel_slice, neighbour_slice in ((all_but_last, all_but_first), (all_but_first, all_but_last)):
            # a slice along this axis; all voxels along the axes before it
            voxel_label = padded_labels[(slice(None),) * axis + (voxel_slice,)]
            neighbour_label = padded_labels[(slice(None),) * axis + (neighbour_slice,)]
            is_exposed = (voxel_label > 0) & (neighbour_label == 0)
            face_counts += np.bincount(voxel_label[is_exposed], minlength=part_count + 1)
    # without the background, label 0
    return face_counts[1:]


def main_share(solid: np.ndarray) -> float:
    """Return the fraction of the exposed voxel faces that belong to the largest part; 0 for an empty grid."""
    faces = exposed(*ndimage.label(solid))
    # an empty grid has no parts
    return float(faces.max() / faces.sum()) if len(faces) else 0.0


def main_part(solid: np.ndarray) -> np.ndarray:
    """Return the grid with only the part that has the most exposed voxel faces."""
    part_labels, part_count = ndimage.label(solid)
    # `exposed` begins with the label 1
    return part_labels == 1 + exposed(part_labels, part_count).argmax() if part_count > 1 else solid


def euler(solid: np.ndarray) -> int:
    """Compute the Euler number of the union of the solid voxels, each a closed cube.

    The number is vertices - edges + faces - cubes. It equals bodies - tunnels + cavities, where bodies that
    touch at a corner count as one.
    """
    padded_grid = np.pad(solid, 1)
    euler_number = 0
    # A cell is extended along the axes that are True in `is_thick`, and flat along the other axes: (True,
    # True, True) are the cubes, (False, False, False) the vertices. A cell that is flat along an axis lies
    # between two voxels, and belongs to the union if one of them is solid.
    for is_thick in itertools.product((False, True), repeat=3):
        cells = padded_grid
        for axis in (axis for axis in range(3) if not is_thick[axis]):
            cells = np.delete(cells, -1, axis) | np.delete(cells, 0, axis)
        # the sign of a cell is (-1)^dimension
        euler_number += (-1) ** sum(is_thick) * int(cells.sum())
    return euler_number


def stability(solid: np.ndarray) -> tuple[float, float]:
    """Compute the stability of a shape that stands on its lowest layer of voxels.

    Args:
        solid: grid [X, Y, Z], whose second axis points up.

    Returns: the angle in degrees by which the shape can be tilted before it falls, and the distance in voxels
        between its projected centre of mass and the boundary of its base, the convex hull of the lowest
        layer. Both numbers are negative if the centre lies outside the base. An empty grid gives (-90, -inf).
    """
    points = np.argwhere(solid)
    if not len(points):
        return _FALLS, -math.inf
    lowest_y = points[:, 1].min()
    # + 0.5: voxel (i, j, k) covers the interval [i, i + 1] along the first axis, and likewise for the others
    centre = points.mean(axis=0) + 0.5
    # x and z of the voxels of the lowest layer
    base_voxels = points[points[:, 1] == lowest_y][:, [0, 2]]
    # Each voxel contributes its four corners. A row of `equations` is an outward unit normal (2) and an
    # offset.
    hull_sides = ConvexHull(
        np.concatenate([base_voxels + offset for offset in itertools.product((0, 1), repeat=2)])
    ).equations
    # n . p + offset is the distance from a side, negative inside the hull
    margin = -float((hull_sides[:, :2] @ centre[[0, 2]] + hull_sides[:, 2]).max())
    # the centre of mass lies above the tilting edge at this angle
    return math.degrees(math.atan2(margin, centre[1] - lowest_y)), margin


# The score of one shape, and its combination with fidelity.


@dataclass(frozen=True, kw_only=True)
class Score:
    """Terms of the score in 0..1, and their weighted geometric mean.

    The geometric mean is low if one term is low: other terms cannot compensate a failure.
    """

    # exp(-8 x), where x is the fraction of the exposed faces outside the largest part. The factor 8 makes a
    # floater of 3 % of the surface cost more than the errors of the grid.
    main: float
    inner: float  # fraction of the filled shape's volume that is solid
    thin: float  # exp(-8 x), where x is the fraction of the volume that is too thin
    stand: float  # clip(1/2 + angle of `stability` / 20 degrees, 0, 1)
    solid: float  # weighted geometric mean of the four terms

    def to_dict(self) -> dict[str, float]:
        """Return the terms and their mean by name."""
        return asdict(self)


NOTHING = Score(main=0.0, inner=0.0, thin=0.0, stand=0.0, solid=0.0)


def score(solid: np.ndarray, rules: Rules = OBJECTS, filled_solid: np.ndarray | None = None) -> Score:
    """Score a shape as a physically valid solid. All terms are 0 for an empty grid.

    The terms `main` and `stand` are measured on the shape and on its opening, and the worse value counts: a
    thin connection to a floater and a leg of one voxel carry no load.

    Args:
        solid: grid [X, Y, Z].
        rules: radii and weights.
        filled_solid: result of `fill` for this shape; None: it is computed here.

    Raises: ValueError for another type or number of axes, and for a grid that is too large.
    """
    if solid.ndim == 3 and solid.dtype == bool and not solid.any():
        return NOTHING
    solid = _checked(solid)
    inner_fraction = float(
        solid.sum() / (fill(solid, rules.bridge(solid)) if filled_solid is None else filled_solid).sum()
    )
    # The bounding box has the same measures as the grid, and takes less time.
    solid = _cut_box(solid, 0)[0]
    main_fraction = main_share(solid)
    angle = stability(solid)[0]
    thin_term = 1.0
    if rules.thin is not None:
        opening_of_solid = morphological_opening(solid, rules.thin)
        # The opening also removes the edges of thick parts. A dilation by one voxel restores them.
        load_bearing_solid = dilated(opening_of_solid, 1) & solid
        main_fraction = min(main_fraction, main_share(opening_of_solid))
        angle = min(angle, stability(load_bearing_solid)[0])
        thin_term = math.exp(-8 * (1 - load_bearing_solid.sum() / solid.sum()))
    return combine_terms(
        {
            "main": math.exp(-8 * (1 - main_fraction)),
            "inner": inner_fraction,
            "thin": thin_term,
            "stand": min(max(0.5 + angle / 20, 0.0), 1.0),
        },
        rules,
    )


def combine_terms(terms: Mapping[str, float], rules: Rules) -> Score:
    """Build a score from its terms, by computing their weighted geometric mean.

    A term below 0.01 counts as 0.01, so that a single term of 0 does not make the mean 0.

    Args:
        terms: values in 0..1 by the names of TERMS.
        rules: weights of the terms.
    """
    weights = dict(zip(TERMS, rules.weights, strict=True))
    # logarithm of the weighted geometric mean
    log_mean = sum(weights[name] * math.log(max(terms[name], FLOOR)) for name in TERMS) / sum(rules.weights)
    return Score(**terms, solid=math.exp(log_mean))


def without_defects(solid: np.ndarray, rules: Rules = OBJECTS) -> np.ndarray:
    """Return a copy of a shape without simple defects, which serves as a reference for the fidelity.

    Its hollows are filled, and parts with less than CRUMB of the exposed voxel faces are removed. An empty
    grid is returned unchanged.

    Args:
        solid: grid [X, Y, Z].
        rules: settings, of which only the radius `leak` is used.
    """
    filled_solid = fill(solid, rules.bridge(solid))
    # parts of the filled shape
    part_labels, part_count = ndimage.label(filled_solid)
    if part_count <= 1:
        return np.asarray(filled_solid)
    exposed_faces = exposed(part_labels, part_count)
    # [part_count + 1], by label; the background (label 0) stays empty, and the largest part always stays
    is_kept = np.concatenate(
        [[False], (exposed_faces >= CRUMB * exposed_faces.sum()) | (exposed_faces == exposed_faces.max())]
    )
    return is_kept[part_labels]


def overlap(filled_solid: np.ndarray, reference: np.ndarray) -> float:
    """Compute the fidelity F: the intersection over union (IoU) of a filled shape and a reference shape.

    Both shapes are filled, because the IoU of the unfilled shapes would penalise the removal of defects. The
    result is 0 if both shapes are empty.

    Args:
        filled_solid: result of `fill` for the shape, [X, Y, Z].
        reference: result of `without_defects` for the untuned shape, [X, Y, Z].
    """
    union = int((filled_solid | reference).sum())
    return float((filled_solid & reference).sum() / union) if union else 0.0


@dataclass(frozen=True, kw_only=True)
class ScoreWithFidelity:
    """Score of a shape, and its fidelity to the shape before tuning."""

    score: Score
    fidelity: float  # F of `overlap`, 0..1

    @property
    def reward(self) -> float:
        """Return the reward in 0..1: solid * clip((F - 0.75) / 0.2, 0, 1).

        A plain product solid * F would be higher for the convex hull of a shape than for the shape itself.
        The clipped weight prevents this.
        """
        low, high = GATE
        return self.score.solid * min(max((self.fidelity - low) / (high - low), 0.0), 1.0)

    def to_dict(self) -> dict[str, float]:
        """Return the terms of the score, their mean, the fidelity and the reward by name."""
        return {**self.score.to_dict(), "fidelity": self.fidelity, "reward": self.reward}


def score_against(
    solid: np.ndarray, references: Sequence[np.ndarray], rules: Rules = OBJECTS
) -> ScoreWithFidelity:
    """Score a shape, and compute its fidelity to the most similar of several reference shapes.

    Args:
        solid: grid [X, Y, Z] of the shape.
        references: grids [X, Y, Z] that `without_defects` returned for the reference shapes.
        rules: radii and weights of the score.

    Raises: ValueError for grids of different sizes, and for arrays that are not grids.
    """
    for reference in references:
        if reference.shape != solid.shape:
            raise ValueError(
                f"solid: the grids of the shape and of its reference must have the same size, got"
                f" {list(solid.shape)} and {list(reference.shape)}. Sample both on the same grid."
            )
    filled_solid = fill(solid, rules.bridge(solid))
    return ScoreWithFidelity(
        score=score(solid, rules, filled_solid),
        # The most similar reference counts.
        fidelity=max(overlap(filled_solid, reference) for reference in references),
    )


def reward(solid: np.ndarray, untuned_solid: np.ndarray, rules: Rules = OBJECTS) -> ScoreWithFidelity:
    """Score a shape, and compute its fidelity to the untuned shape of the same seed.

    Both grids are first reduced to at most EDGE voxels per axis.

    Args:
        solid: grid [X, Y, Z] of the shape.
        untuned_solid: grid [X, Y, Z] of the shape before tuning.
        rules: radii and weights of the score.

    Raises: ValueError for grids of different sizes, and for arrays that are not grids.
    """
    reduced_untuned = reduced(untuned_solid)
    return score_against(reduced(solid), [without_defects(reduced_untuned, rules)], rules)


# Defects that a gradient on the density can correct.


def floaters(solid: np.ndarray) -> np.ndarray:
    """Return the grid with all parts except the part with the most exposed voxel faces."""
    return solid & ~main_part(solid)


def hole_caps(solid: np.ndarray, radius: float) -> np.ndarray:
    """Return the voxels that would close openings and tunnels of the largest part.

    Only openings that a ball cannot pass are closed; dents and pits are left open. The result consists of
    those pieces of the closing whose addition raises the Euler number: a leak becomes a cavity (1 to 2), or a
    tunnel is closed (0 to 1). A hole of radius h in a wall of thickness w is missed approximately if
    radius < (h^2 + w^2/4) / w.

    Args:
        solid: grid [X, Y, Z].
        radius: radius of the ball in voxels.
    """
    body = main_part(solid)
    piece_labels, _ = ndimage.label(morphological_closing(body, radius) & ~body, _AROUND)
    plugs = np.zeros_like(solid)
    for piece_label, piece_slices in enumerate(ndimage.find_objects(piece_labels), start=1):
        # The region has one more voxel on each side, because the Euler number depends on the neighbours.
        region_slices = tuple(
            slice(max(axis_slice.start - 1, 0), axis_slice.stop + 1) for axis_slice in piece_slices
        )
        in_piece = piece_labels[region_slices] == piece_label
        body_in_region = body[region_slices]
        if euler(body_in_region | in_piece) > euler(body_in_region):
            plugs[region_slices] |= in_piece
    return plugs
