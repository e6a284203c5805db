"""Bounds of the raw density in bricks of a grid, from which follows where the surface can be.

In the separable form (`plane_maps`), the decoder's pre-activation of hidden unit j is a sum of maps,

    h_j = A_j[x, y] + B_j[x, z] + C_j[y, z],      sigma = sum_j w_j softplus(h_j) + b

The extremes of the maps over the index ranges of a brick are bounds of h_j in the brick. softplus increases,
so that in the brick

    sigma <= sum_j (max(w_j, 0) softplus(max h_j) + min(w_j, 0) softplus(min h_j)) + b

and the lower bound is the same with max h_j and min h_j exchanged. A brick whose bounds lie on one side of
the level contains no surface. Both bounds are densities of the same form on the grid of bricks, with 2 J
hidden units. The surface of the remaining bricks equals the surface of the full volume.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eg3d_rlhf.geometry.mesh import BRICK, bricks_along, check_finite
from eg3d_rlhf.geometry.slab import SeparableDensity
from torch_utils.ops.slab_density import slab_density

# Relative tolerance of the bounds: 64 rounding errors of float32 in the sum of |w| softplus.
_ROUNDING = 2.0**-17
# Fraction of undecided bricks above which bounds of smaller bricks save more time than they take.
_REFINE_SHARE = 0.15


@dataclass(frozen=True)
class BrickBounds:
    """Bricks that may contain a part of the surface, according to bounds of the density in each brick."""

    # bool [bricks along x, y, z], True for bricks that may contain a part of the surface
    undecided: np.ndarray
    any_below: bool  # True if at least one brick lies certainly below the level
    any_above: bool  # True if at least one brick lies certainly above the level


def bound_bricks(density: SeparableDensity, level: float) -> BrickBounds:
    """Find the bricks that may contain a part of the surface, by bounds of the density in each brick.

    If many bricks are undecided, the bounds of bricks of half the size are computed, too.

    Args:
        density: density in separable form.
        level: raw density on the surface.
    """
    coarse_bounds = bounds_of_size(density, level, BRICK)
    if coarse_bounds.undecided.mean() <= _REFINE_SHARE:
        return coarse_bounds
    fine_bounds = bounds_of_size(density, level, BRICK // 2)
    # The grid of halved bricks may be smaller than twice the coarse grid. The rest stays False.
    halved_brick_is_undecided = np.zeros(
        [2 * brick_count for brick_count in coarse_bounds.undecided.shape], dtype=bool
    )
    halved_brick_is_undecided[tuple(slice(brick_count) for brick_count in fine_bounds.undecided.shape)] = (
        fine_bounds.undecided
    )
    x, y, z = coarse_bounds.undecided.shape
    # A brick remains undecided if it is undecided by its own bounds, and at least one of its eight halved
    # bricks is undecided by the finer bounds. [2 x, 2 y, 2 z] -> [x, 2, y, 2, z, 2]
    is_undecided = coarse_bounds.undecided & halved_brick_is_undecided.reshape(x, 2, y, 2, z, 2).any(
        axis=(1, 3, 5)
    )
    return BrickBounds(
        is_undecided,
        coarse_bounds.any_below or fine_bounds.any_below,
        coarse_bounds.any_above or fine_bounds.any_above,
    )


def bounds_of_size(density: SeparableDensity, level: float, cells_per_brick: int) -> BrickBounds:
    """Find the bricks of a given size that may contain a part of the surface, see `bound_bricks`.

    Args:
        density: density in separable form.
        level: raw density on the surface.
        cells_per_brick: number of cells along the edge of a brick.

    Raises: ValueError if a map contains NaN or infinity.
    """
    w = torch.cat([density.w.clamp(min=0), density.w.clamp(max=0)])  # [2 J]
    x, y, z = (bricks_along(point_count, cells_per_brick) for point_count in density.shape)
    shape = (x, y, z)
    upper_parts: list[torch.Tensor] = []
    lower_parts: list[torch.Tensor] = []
    part_bounds: list[torch.Tensor] = []  # [J] each
    for map_minima, map_maxima, brick_count_z in _extremes_of_runs(density, cells_per_brick):
        # A density that is not finite is an error, as it is when the full volume is evaluated.
        for map_low, map_high in zip(map_minima, map_maxima, strict=True):
            check_finite(float(map_low.min()), float(map_high.max()))
        # Hidden units 1..J have the weights max(w, 0), units J + 1..2 J the weights min(w, 0).
        part_shape = (x, y, brick_count_z)
        for parts, extremes, opposite_extremes in (
            (upper_parts, map_maxima, map_minima),
            (lower_parts, map_minima, map_maxima),
        ):
            joined_maps = [
                torch.cat(map_pair, dim=1) for map_pair in zip(extremes, opposite_extremes, strict=True)
            ]
            parts.append(slab_density(joined_maps, w, density.b, part_shape))
        largest_values = [map_values.abs().amax(dim=(0, 2, 3)) for map_values in (*map_minima, *map_maxima)]
        part_bounds.append(functools.reduce(torch.add, largest_values))
    upper_bounds = torch.cat(upper_parts, dim=2)
    lower_bounds = torch.cat(lower_parts, dim=2)
    # [J], an upper bound of |h_j| on the grid
    activation_bound = torch.stack(part_bounds).amax(dim=0)
    # softplus(h) <= max(h, 0) + log 2 < |h| + 1, which bounds each term of the sum.
    tolerance = _ROUNDING * (
        float((density.w.abs() * (activation_bound + 1)).sum()) + abs(float(density.b)) + max(abs(level), 1.0)
    )
    # True for bricks without points outside the volume
    is_inner = np.ones((), dtype=bool)
    for axis, point_count in enumerate(density.shape):
        first_point = np.arange(shape[axis]) * cells_per_brick
        is_inner = is_inner & np.expand_dims(
            (first_point > 0) & (first_point + cells_per_brick <= point_count),
            tuple(other_axis for other_axis in range(3) if other_axis != axis),
        )
    is_below = (upper_bounds < level - tolerance).numpy()
    is_above = (lower_bounds > level + tolerance).numpy()
    # A brick at the border that lies above the level contains a part of the cap.
    is_undecided = ~(is_below | (is_above & is_inner))
    return BrickBounds(is_undecided, bool(is_below.any()), bool(is_above.any()))


def _extremes_of_runs(
    density: SeparableDensity, cells_per_brick: int
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor], int]]:
    """Compute the smallest and the largest values of all maps over each brick, for runs of bricks along z.

    If the first plane has two slices, there are runs in which one slice counts, and runs in which both do. A
    blend of two maps lies between the smaller and the larger of them, so these are the bounds of the latter.

    Args:
        density: density in separable form.
        cells_per_brick: number of cells along the edge of a brick.

    Yields: the smallest and the largest values of each map in the layout of `_map_extremes`, and the number
        of bricks of the run along z.
    """

    def extremes_of(map_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _map_extremes(map_values, density.shape, cells_per_brick)

    first_map, *other_maps = density.maps.maps
    first_extremes = extremes_of(first_map)
    other_extremes = [extremes_of(map_values) for map_values in other_maps]
    back_map = density.maps.back
    front_weights = density.maps.front
    if back_map is None or front_weights is None:
        minima, maxima = zip(first_extremes, *other_extremes, strict=True)
        yield list(minima), list(maxima), bricks_along(density.shape[2], cells_per_brick)
        return
    back_extremes = extremes_of(back_map)
    both_extremes = (
        torch.minimum(first_extremes[0], back_extremes[0]),
        torch.maximum(first_extremes[1], back_extremes[1]),
    )
    # Smallest and largest weight of the slice in front in each layer of bricks along z
    low_weights, high_weights = (
        # As a map [1, 1, 1, Z], so that the bricks have the same ranges as those of the maps.
        weights.flatten().tolist()
        for weights in extremes_of(front_weights[None, None, None])
    )
    start = 0
    for weight_range, run in itertools.groupby(
        (low, high) if (low, high) in ((0, 0), (1, 1)) else None
        for low, high in zip(low_weights, high_weights, strict=True)
    ):
        brick_count = len(list(run))
        slice_extremes = {(1, 1): first_extremes, (0, 0): back_extremes, None: both_extremes}[weight_range]
        runs_of_others = [
            tuple(
                # A map that does not depend on z has the same bounds in every run.
                bounds[..., start : start + brick_count] if map_values.shape[3] > 1 else bounds
                for bounds in map_extremes
            )
            for map_values, map_extremes in zip(other_maps, other_extremes, strict=True)
        ]
        minima, maxima = zip(slice_extremes, *runs_of_others, strict=True)
        yield list(minima), list(maxima), brick_count
        start += brick_count


def _map_extremes(
    map_values: torch.Tensor, shape: Sequence[int], cells_per_brick: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the smallest and the largest value of a map over the grid points of each brick.

    The grid points on the faces of a brick are included.

    Args:
        map_values: map [X, J, Y, 1], [X, J, 1, Z] or [1, J, Y, Z].
        shape: numbers X, Y, Z of grid points.
        cells_per_brick: number of cells along the edge of a brick.

    Returns: smallest and largest values, in the layout of the map, with bricks in place of grid points.
    """
    map_low = map_values
    map_high = map_values
    # The extremes over a brick are computed axis by axis; axis 1 holds the hidden units.
    for axis, point_count in ((0, shape[0]), (2, shape[1]), (3, shape[2])):
        # the map does not depend on this coordinate
        if map_values.shape[axis] == 1:
            continue
        # A point outside the volume repeats the nearest point inside, which does not change the extremes.
        first_points = torch.arange(bricks_along(point_count, cells_per_brick)) * cells_per_brick - 1
        point_indices = [
            # A row of n cells has n + 1 points.
            (first_points + step).clamp(0, point_count - 1)
            for step in range(cells_per_brick + 1)
        ]
        range_low = map_low.index_select(axis, point_indices[0])
        range_high = map_high.index_select(axis, point_indices[0])
        for step_indices in point_indices[1:]:
            torch.minimum(range_low, map_low.index_select(axis, step_indices), out=range_low)
            torch.maximum(range_high, map_high.index_select(axis, step_indices), out=range_high)
        map_low = range_low
        map_high = range_high
    return map_low, map_high
