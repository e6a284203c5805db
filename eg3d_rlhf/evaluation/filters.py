"""Filters of shapes that need no labels and no training: the cheapest thing that tuning has to beat.

A filter takes the values [n, n, n] of a shape, negative inside, and gives values again: where it changes
nothing the surface keeps its place between the grid's points. Radii are voxels of 64^3.
"""

from collections.abc import Callable
from functools import partial, reduce

import numpy as np
import scipy.ndimage as ndimage
from scipy.spatial import ConvexHull, QhullError

from eg3d_rlhf.measures.people import DEFECTIVE, volume_error
from eg3d_rlhf.preferences import annotator

Filter = Callable[[np.ndarray], np.ndarray]
# at most this share of intact heads may be worse by so much of the ground-truth head's volume
SPARED = 0.02
HARM = 0.01


def _with_inside(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The same values where their sign is right already, negated elsewhere."""
    return np.where((values < 0) == inside, values, np.where(inside, -1e-3 - np.abs(values), np.abs(values)))


def blur(values: np.ndarray, radius: float) -> np.ndarray:
    return ndimage.gaussian_filter(values, radius * len(values) / 64, mode="nearest")


def largest_part(values: np.ndarray) -> np.ndarray:
    return _with_inside(values, annotator.largest_part(values < 0))


def closing(values: np.ndarray, radius: float) -> np.ndarray:
    """What no ball of that radius outside the shape can reach."""
    reach = radius * len(values) / 64
    pad = int(np.ceil(reach)) + 1
    inside = np.pad(values < 0, pad)
    if not inside.any():
        return values
    grown = ndimage.distance_transform_edt(~inside) <= reach
    closed = ndimage.distance_transform_edt(grown) > reach
    return _with_inside(values, closed[pad:-pad, pad:-pad, pad:-pad] | (values < 0))


def fill_holes(values: np.ndarray) -> np.ndarray:
    """Empty space that the shape encloses becomes solid."""
    return _with_inside(values, ndimage.binary_fill_holes(values < 0))


def mirror(values: np.ndarray) -> np.ndarray:
    """The shape and its mirror image together."""
    return np.minimum(values, values[::-1])


def hull(values: np.ndarray) -> np.ndarray:
    solid = np.argwhere(values < 0)
    try:
        sides = ConvexHull(solid).equations  # [F, 4], normals outwards
    except (QhullError, ValueError):  # flat or empty
        return values
    inside = values < 0
    for layer in range(solid[:, 0].min(), solid[:, 0].max() + 1):
        y, z = np.meshgrid(*(np.arange(size) for size in values.shape[1:]), indexing="ij")
        level = layer * sides[:, 0] + sides[:, 3]
        inside[layer] |= (y[..., None] * sides[:, 1] + z[..., None] * sides[:, 2] + level <= 1e-9).all(
            axis=-1
        )
    return _with_inside(values, inside)


def chain(*filters: Filter) -> Filter:
    """One filter after another."""
    return lambda values: reduce(lambda shape, step: step(shape), filters, values)


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


Trial = dict[str, tuple[float, float]]


def tried(values: np.ndarray, targets: np.ndarray) -> Trial:
    """Return for each method the mean back-of-head volume error of the shapes [N, n, n, n] that were
    defective, and the share of the others that are worse by HARM.

    Args: targets: [N, n, n, n], the ground-truth heads of the same latents.
    """
    before = np.array([volume_error(*pair).total for pair in zip(values, targets, strict=True)])
    defective = before > DEFECTIVE
    found = {}
    for name, made in FILTERS.items():
        after = np.array(
            [volume_error(made(shape), head).total for shape, head in zip(values, targets, strict=True)]
        )
        harmed = float((after > before + HARM)[~defective].mean()) if not defective.all() else 0.0
        found[name] = float(after[defective].mean() if defective.any() else after.mean()), harmed
    return found


def best_filter(trial: Trial, *, spares: bool) -> str:
    """The filter that leaves least error; with `spares` among those that harm at most SPARED, or where none
    does, fewest.
    """
    least_harm = max(SPARED, min(harmed for _, harmed in trial.values()))
    return min(
        (name for name, (_, harmed) in trial.items() if not spares or harmed <= least_harm),
        key=lambda name: trial[name][0],
    )
