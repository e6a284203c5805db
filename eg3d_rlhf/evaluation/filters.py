"""Label-free post-processing baselines: cheap methods that tuning has to outperform.

They are applied to every shape alike. The weighed forms, which leave a shape alone where a filter would
change little (`evaluation.baselines`), are stronger.

A filter takes the values of a shape on a grid, [n, n, n], negative inside, and returns new values. Most
filters keep a value where its sign does not change, so that the surface keeps its position between the grid
points there. Radii are in voxels of a 64^3 grid, and are scaled to n.
"""

from collections.abc import Callable
from functools import partial, reduce

import numpy as np
import scipy.ndimage as ndimage
from scipy.spatial import ConvexHull, QhullError

from eg3d_rlhf.measures.people import DEFECTIVE, volume_error
from eg3d_rlhf.preferences import annotator

Filter = Callable[[np.ndarray], np.ndarray]
# A filter leaves intact heads alone if at most this share of them is harmed.
SPARED = 0.02
# A head is harmed if its error grows by more than this share of the ground-truth head's volume.
HARM = 0.01


def _with_inside(shape_values: np.ndarray, is_inside: np.ndarray) -> np.ndarray:
    """Change the signs of values so that exactly the voxels of a mask are negative.

    Args:
        shape_values: values of the shape, [n, n, n].
        is_inside: mask of the voxels that shall be inside, [n, n, n].
    """
    # A voxel that becomes solid gets at most -1e-3, since a value of zero would count as outside.
    return np.where(
        (shape_values < 0) == is_inside,
        shape_values,
        np.where(is_inside, -1e-3 - np.abs(shape_values), np.abs(shape_values)),
    )


def blur(shape_values: np.ndarray, radius: float) -> np.ndarray:
    """Smooth the values with a Gaussian.

    Args: radius: standard deviation of the Gaussian, in voxels of a 64^3 grid.
    """
    return ndimage.gaussian_filter(shape_values, radius * len(shape_values) / 64, mode="nearest")


def largest_part(shape_values: np.ndarray) -> np.ndarray:
    """Remove all connected parts of the shape except the largest one."""
    return _with_inside(shape_values, annotator.largest_part(shape_values < 0))


def morphological_closing(shape_values: np.ndarray, radius: float) -> np.ndarray:
    """Close the shape morphologically: fill every point that no ball outside the shape can cover.

    Args: radius: radius of the ball, in voxels of a 64^3 grid.
    """
    grid_radius = radius * len(shape_values) / 64  # radius in voxels of this grid
    padding_voxels = int(np.ceil(grid_radius)) + 1
    # Padded by more than the radius, since the border of the grid would distort the erosion.
    is_inside = np.pad(shape_values < 0, padding_voxels)
    if not is_inside.any():
        return shape_values
    # Dilation and then erosion by a ball, both as thresholds on Euclidean distance transforms. A structuring
    # element would cost O(radius^3) per voxel.
    dilated_mask = ndimage.distance_transform_edt(~is_inside) <= grid_radius
    closed_mask = ndimage.distance_transform_edt(dilated_mask) > grid_radius
    # The union with the shape itself, since a closing must not remove voxels, also not by rounding.
    return _with_inside(
        shape_values,
        closed_mask[
            padding_voxels:-padding_voxels, padding_voxels:-padding_voxels, padding_voxels:-padding_voxels
        ]
        | (shape_values < 0),
    )


def fill_holes(shape_values: np.ndarray) -> np.ndarray:
    """Fill the empty space that the shape encloses."""
    return _with_inside(shape_values, ndimage.binary_fill_holes(shape_values < 0))


def mirror(shape_values: np.ndarray) -> np.ndarray:
    """Unite the shape with its mirror image along the first axis, x."""
    return np.minimum(shape_values, shape_values[::-1])


def hull(shape_values: np.ndarray) -> np.ndarray:
    """Replace the shape by its convex hull."""
    solid_voxels = np.argwhere(shape_values < 0)  # [P, 3] indices
    try:
        face_planes = ConvexHull(solid_voxels).equations  # [F, 4], normals outwards
    except (QhullError, ValueError):  # the shape is flat or empty, so it has no hull
        return shape_values
    is_inside = shape_values < 0
    # A voxel is inside if it is on the inner side of all F faces; 1e-9 includes voxels on a face. One layer
    # is tested at a time, [n, n, F], since all layers at once would need n times the memory.
    for layer in range(solid_voxels[:, 0].min(), solid_voxels[:, 0].max() + 1):
        y, z = np.meshgrid(*(np.arange(edge_length) for edge_length in shape_values.shape[1:]), indexing="ij")
        plane_offsets = layer * face_planes[:, 0] + face_planes[:, 3]
        is_inside[layer] |= (
            y[..., None] * face_planes[:, 1] + z[..., None] * face_planes[:, 2] + plane_offsets <= 1e-9
        ).all(axis=-1)
    return _with_inside(shape_values, is_inside)


def chain(*filters: Filter) -> Filter:
    """Return the filter that applies several filters, the first argument first."""
    return lambda values: reduce(lambda shape_values, next_filter: next_filter(shape_values), filters, values)


# Name -> filter. The numbers in the names are radii in voxels of a 64^3 grid.
FILTERS: dict[str, Filter] = {
    "largest part": largest_part,
    "blur .5": partial(blur, radius=0.5),
    "blur .75": partial(blur, radius=0.75),
    "blur 1": partial(blur, radius=1),
    "blur 2": partial(blur, radius=2),
    "fill holes": fill_holes,
    "mirror": mirror,
    "convex hull": hull,
    **{f"closing {r}": partial(morphological_closing, radius=r) for r in (4, 8, 11, 14)},
    **{
        f"largest part, closing {r}": chain(
            largest_part, partial(morphological_closing, radius=r), largest_part
        )
        for r in (4, 6, 8, 11, 14)
    },
    "largest part, mirror, closing 4": chain(largest_part, mirror, partial(morphological_closing, radius=4)),
}


# name of the filter -> (mean error of the defective shapes, share of the intact shapes that are harmed)
FilterResults = dict[str, tuple[float, float]]


def evaluate_filters(shapes: np.ndarray, ground_truth: np.ndarray) -> FilterResults:
    """Apply every filter to shapes, and measure its benefit and its harm.

    Args:
        shapes: values of the shapes, negative inside, [N, n, n, n].
        ground_truth: ground-truth heads of the same latents, [N, n, n, n].

    Returns: for each filter the mean back-of-head volume error of the shapes that were defective, and the
        share of the intact shapes whose error rises by more than HARM.
    """
    # [N] errors before filtering, as shares of the ground-truth head's volume
    errors_before = np.array(
        [volume_error(*shape_and_head).total for shape_and_head in zip(shapes, ground_truth, strict=True)]
    )
    is_defective = errors_before > DEFECTIVE
    result_by_filter = {}  # filter -> (error, harm)
    for filter_name, apply_filter in FILTERS.items():
        errors_after = np.array(
            [
                volume_error(apply_filter(shape_values), head_values).total
                for shape_values, head_values in zip(shapes, ground_truth, strict=True)
            ]
        )
        # If no shape is intact, none can be harmed. If no shape is defective, the mean is over all shapes.
        harmed_share = (
            float((errors_after > errors_before + HARM)[~is_defective].mean())
            if not is_defective.all()
            else 0.0
        )
        result_by_filter[filter_name] = (
            float(errors_after[is_defective].mean() if is_defective.any() else errors_after.mean()),
            harmed_share,
        )
    return result_by_filter


def best_post_processing(result_by_filter: FilterResults, *, spares_intact: bool) -> str:
    """Return the name of the filter after which the error of defective heads is smallest.

    Args:
        result_by_filter: result of `evaluate_filters`.
        spares_intact: True if only filters that harm at most the share SPARED of the intact heads are
            candidates. If there is no such filter, the candidates are the filters that harm the smallest
            share. False if all filters are candidates.
    """
    max_harm = max(SPARED, min(harmed_share for _, harmed_share in result_by_filter.values()))
    return min(
        (
            filter_name
            for filter_name, (_, harmed_share) in result_by_filter.items()
            if not spares_intact or harmed_share <= max_harm
        ),
        key=lambda filter_name: result_by_filter[filter_name][0],
    )
