"""Label-free post-processing baselines: the cheapest methods that tuning has to outperform.

A filter takes the values [n, n, n] of a shape, negative inside, and returns new values. Where it does not
change the sign it keeps the value, so that the surface keeps its place between the grid's points. Radii are
in voxels of a 64^3 grid and are scaled to n.
"""

from collections.abc import Callable
from functools import partial, reduce

import numpy as np
import scipy.ndimage as ndimage
from scipy.spatial import ConvexHull, QhullError

from eg3d_rlhf.measures.people import DEFECTIVE, volume_error
from eg3d_rlhf.preferences import annotator

Filter = Callable[[np.ndarray], np.ndarray]
# A filter is acceptable if at most the share SPARED of the intact heads gets worse by more than HARM, in
# units of the ground-truth head's volume.
SPARED = 0.02
HARM = 0.01


def _with_inside(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Give the values the sign that `inside` [n, n, n] asks for; values whose sign is right are kept."""
    # A voxel that becomes solid gets at least -1e-3: minus zero would still count as outside.
    return np.where((values < 0) == inside, values, np.where(inside, -1e-3 - np.abs(values), np.abs(values)))


def blur(values: np.ndarray, radius: float) -> np.ndarray:
    """Smooth the values with a Gaussian whose standard deviation is `radius`."""
    return ndimage.gaussian_filter(values, radius * len(values) / 64, mode="nearest")


def largest_part(values: np.ndarray) -> np.ndarray:
    """Keep the largest connected part of the shape."""
    return _with_inside(values, annotator.largest_part(values < 0))


def closing(values: np.ndarray, radius: float) -> np.ndarray:
    """Close the shape morphologically: fill what no outside ball of that radius can reach."""
    reach = radius * len(values) / 64  # radius in voxels of this grid
    pad = int(np.ceil(reach)) + 1
    # Padded by more than the radius: without it the border of the grid would distort the erosion.
    inside = np.pad(values < 0, pad)
    if not inside.any():
        return values
    # Dilation and erosion by a ball, through Euclidean distance transforms. A ball as structuring element
    # would cost O(radius^3) per voxel.
    grown = ndimage.distance_transform_edt(~inside) <= reach
    closed = ndimage.distance_transform_edt(grown) > reach
    # The union with the shape itself: the closing is extensive, also after rounding to voxels.
    return _with_inside(values, closed[pad:-pad, pad:-pad, pad:-pad] | (values < 0))


def fill_holes(values: np.ndarray) -> np.ndarray:
    """Fill the empty space that the shape encloses."""
    return _with_inside(values, ndimage.binary_fill_holes(values < 0))


def mirror(values: np.ndarray) -> np.ndarray:
    """Unite the shape with its mirror image along the first axis."""
    return np.minimum(values, values[::-1])


def hull(values: np.ndarray) -> np.ndarray:
    """Replace the shape by its convex hull."""
    solid = np.argwhere(values < 0)
    # [P, 3] indices of the solid voxels
    try:
        sides = ConvexHull(solid).equations  # [F, 4], normals outwards
    except (QhullError, ValueError):  # flat or empty
        return values
    inside = values < 0
    # One layer at a time, [n, n, F] half-space tests; all layers at once would take n times the memory.
    for layer in range(solid[:, 0].min(), solid[:, 0].max() + 1):
        y, z = np.meshgrid(*(np.arange(size) for size in values.shape[1:]), indexing="ij")
        level = layer * sides[:, 0] + sides[:, 3]
        inside[layer] |= (y[..., None] * sides[:, 1] + z[..., None] * sides[:, 2] + level <= 1e-9).all(
            axis=-1
        )
    return _with_inside(values, inside)


def chain(*filters: Filter) -> Filter:
    """Compose filters; the first argument is applied first."""
    return lambda values: reduce(lambda shape, step: step(shape), filters, values)


# Name -> filter. The numbers in the names are radii.
FILTERS: dict[str, Filter] = {
    "largest part": largest_part,
    "blur .5": partial(blur, radius=0.5),
    "blur .75": partial(blur, radius=0.75),
    "blur 1": partial(blur, radius=1),
    "blur 2": partial(blur, radius=2),
    "fill holes": fill_holes,
    "mirror": mirror,
    "convex hull": hull,
    **{f"closing {r}": partial(closing, radius=r) for r in (4, 8, 11, 14)},
    **{
        f"largest part, closing {r}": chain(largest_part, partial(closing, radius=r), largest_part)
        for r in (4, 6, 8, 11, 14)
    },
    "largest part, mirror, closing 4": chain(largest_part, mirror, partial(closing, radius=4)),
}


Trial = dict[
    str, tuple[float, float]
]  # filter -> (mean error of defective shapes, share of intact ones harmed)


def tried(values: np.ndarray, targets: np.ndarray) -> Trial:
    """Apply every filter to the shapes [N, n, n, n] and measure its benefit and its harm.

    Returns: for each filter the mean back-of-head volume error of the shapes that were defective, and the
        share of the other shapes whose error rises by more than HARM.

    Args: targets: [N, n, n, n], the ground-truth heads of the same latents.
    """
    # [N] errors before filtering, as shares of the ground-truth head's volume
    before = np.array([volume_error(*pair).total for pair in zip(values, targets, strict=True)])
    defective = before > DEFECTIVE
    results = {}
    for name, made in FILTERS.items():
        after = np.array(
            [volume_error(made(shape), head).total for shape, head in zip(values, targets, strict=True)]
        )
        # Without an intact shape nothing can be harmed; without a defective one the mean is over all shapes.
        harmed = float((after > before + HARM)[~defective].mean()) if not defective.all() else 0.0
        results[name] = float(after[defective].mean() if defective.any() else after.mean()), harmed
    return results


def best_filter(trial: Trial, *, spares: bool) -> str:
    """Return the name of the filter that leaves the least error.

    With `spares`, only filters that harm at most the share SPARED of intact heads are candidates. If there is
    none, the candidates are those with the least harm.
    """
    least_harm = max(SPARED, min(harmed for _, harmed in trial.values()))
    return min(
        (name for name, (_, harmed) in trial.items() if not spares or harmed <= least_harm),
        key=lambda name: trial[name][0],
    )
