"""Isosurface of a density volume as a closed triangle mesh in world coordinates.

Letters: D, H, W = grid points along z, y, x; V vertices; F faces.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from eg3d_rlhf.field import LEVEL
from eg3d_rlhf.sigma.spec import SlabSpec

_REACH = 2.0**17  # values further from the level are clipped, in units of max(|level|, 1); the padding outside the volume lies there
LEVEL_BAND = 2.0**-22  # values so near to the level, in the same units, count as just below it: no vertex falls onto a grid point
_MARGIN = 2e-4  # vertices keep this distance from the ends of their grid edge, in grid steps: distinct ones stay distinct in float32


def extract_mesh(
    sigma: torch.Tensor | np.ndarray, axes: SlabSpec | Sequence[torch.Tensor | np.ndarray], level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """The surface sigma = level by marching cubes.

    A body that runs into the border of the volume is closed there: outside the volume the density counts as far below the level, so the cap
    lies within 1/100 of a grid step of the border for densities up to 1000 times the level (10,000 at level 10).

    Args:
        sigma: raw density [D, H, W]; inside is where it exceeds the level.
        axes: a SlabSpec of that shape, or increasing world coordinates (x [W], y [H], z [D]).
        level: raw density of the surface.

    Returns: vertices [V, 3] float32 in world coordinates (x, y, z), faces [F, 3] int64 wound counter-clockwise seen from outside.
    Not differentiable.
    Raises: ValueError when the shapes disagree, sigma is not finite, or the level is not crossed.
    """
    volume = sigma.detach().cpu().numpy() if isinstance(sigma, torch.Tensor) else np.asarray(sigma)
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise ValueError(
            f"extract_mesh: expected sigma [D, H, W] with sides >= 2, got {list(volume.shape)}. Pass one sample, without a batch axis."
        )
    coordinates = [np.asarray(axis, dtype=np.float64) for axis in (axes.axes() if isinstance(axes, SlabSpec) else axes)]
    got, wanted = [len(axis) for axis in reversed(coordinates)], list(volume.shape)
    if got != wanted:
        raise ValueError(f"extract_mesh: expected axes for a volume [D, H, W] = {wanted}, got {got}. Pass the spec it was sampled with.")
    if any(np.any(np.diff(axis) <= 0) for axis in coordinates):
        raise ValueError(
            "extract_mesh: expected increasing coordinates on every axis, got a decreasing step. Flip the axis together with sigma."
        )
    block = prepare_density(volume.transpose(2, 1, 0), level)  # [W, H, D], so vertices come as (x, y, z)
    check_crossed(float(volume.min()), float(volume.max()), level)
    vertices, faces, _ = marching_cubes([np.pad(block, 1, constant_values=outside_value(level))], level)
    return to_world(vertices - 1, coordinates), faces


def check_crossed(low: float, high: float, level: float) -> None:
    """Raise ValueError unless the densities from `low` to `high` lie on both sides of the level."""
    if not low < level < high:
        remedy = f"Choose a level in between, such as {(low + high) / 2:.6g}" if low < high else "It is constant: no level has a surface"
        raise ValueError(f"extract_mesh: expected sigma on both sides of level {level:g}, got [{low:g}, {high:g}]. {remedy}.")


def check_finite(low: float, high: float) -> None:
    """Raise ValueError unless the least and the greatest density are finite numbers."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("extract_mesh: expected finite sigma, got NaN or infinity. Check the generator's weights.")


def outside_value(level: float) -> float:
    """Density that stands for everything outside the volume: the lowest that `prepare_density` leaves."""
    return level - _REACH * max(abs(level), 1.0)


def prepare_density(volume: np.ndarray, level: float) -> np.ndarray:
    """A float32 copy of raw densities, clipped about the level and moved off it, as `marching_cubes` takes it.

    Raises: ValueError for NaN or infinity.
    """
    volume = np.array(volume, dtype=np.float32)  # PyMCubes raises on half and returns an empty mesh for integers
    check_finite(volume.min(), volume.max())
    unit = max(abs(level), 1.0)
    np.clip(volume, level - _REACH * unit, level + _REACH * unit, out=volume)
    volume[np.abs(volume - level) < LEVEL_BAND * unit] = level - LEVEL_BAND * unit
    return volume


def marching_cubes(blocks: Iterable[np.ndarray], level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Surfaces of prepared blocks [X, Y, Z] float32, each by itself.

    Returns: vertices [V, 3] float64 of one block after the other, in grid steps from its own first point and each strictly inside one grid
    edge; faces [F, 3] int64, numbers of vertices in all of them; how many of the vertices belong to each block [blocks].
    """
    import mcubes  # only here: the rest of the package works without it

    pieces = [mcubes.marching_cubes(np.ascontiguousarray(block), float(level)) for block in blocks]
    counts = np.array([len(vertices) for vertices, _ in pieces], dtype=np.int64)
    vertices = np.concatenate([vertices.reshape(-1, 3) for vertices, _ in pieces])
    faces = np.concatenate([faces.reshape(-1, 3) for _, faces in pieces]).astype(np.int64)
    faces += np.repeat(np.cumsum(counts) - counts, [len(faces) for _, faces in pieces])[:, None]
    start = np.floor(vertices)
    along = np.subtract(vertices, start, out=vertices)
    np.clip(along, _MARGIN, 1 - _MARGIN, out=along, where=along > 0)
    return np.add(start, along, out=start), faces, counts


def to_world(vertices: np.ndarray, coordinates: Sequence[np.ndarray]) -> np.ndarray:
    """Fractional indices [V, 3] to world coordinates [V, 3] float32, linear between grid points and carried on with the outermost step."""
    world = np.empty(vertices.shape, dtype=np.float32)
    for i, axis in enumerate(coordinates):
        start = np.clip(np.floor(vertices[:, i]).astype(np.int64), 0, len(axis) - 2)
        world[:, i] = axis[start] + (vertices[:, i] - start) * (axis[start + 1] - axis[start])
    return world
