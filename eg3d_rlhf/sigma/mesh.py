"""Isosurface of a density volume as a closed triangle mesh in world coordinates, and its files.

Letters: D, H, W = grid points along z, y, x; V vertices; F faces.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.sigma.spec import SlabSpec

MESH_SUFFIXES = (".ply", ".obj", ".glb")
_LEVEL = 10.0  # raw density of the surface (arXiv 2606.27305; EG3D's shape extraction)
_PAD_SLOPE = 100.0  # how far below the level the padding lies, in units of the largest rise above it


def extract_mesh(
    sigma: torch.Tensor | np.ndarray, axes: SlabSpec | Sequence[torch.Tensor | np.ndarray], level: float = _LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """The surface sigma = level by marching cubes.

    A body that runs into the border of the volume is closed there: the volume is padded with values far below the level, so the cap lies
    within 1/100 of a voxel of the border.

    Args:
        sigma: raw density [D, H, W]; inside is where it exceeds the level.
        axes: a SlabSpec of that shape, or increasing world coordinates (x [W], y [H], z [D]).
        level: raw density of the surface.

    Returns: vertices [V, 3] float32 in world coordinates (x, y, z), faces [F, 3] int64 wound counter-clockwise seen from outside.
    Not differentiable.
    Raises: ValueError when the shapes disagree, sigma is not finite, or the level is not crossed.
    """
    import mcubes  # only here: the rest of the package works without it

    volume = sigma.detach().cpu().numpy() if isinstance(sigma, torch.Tensor) else np.asarray(sigma)
    if volume.ndim != 3 or min(volume.shape) < 2:
        raise ValueError(
            f"extract_mesh: expected sigma [D, H, W] with sides >= 2, got {list(volume.shape)}. Pass one sample, without a batch axis."
        )
    volume = volume.astype(np.float32)  # PyMCubes raises on half and returns an empty mesh for integers
    coordinates = _coordinates(axes, volume.shape)
    low, high = float(volume.min()), float(volume.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError("extract_mesh: expected finite sigma, got NaN or infinity. Check the generator's weights.")
    if not low < level < high:
        raise ValueError(
            f"extract_mesh: expected sigma on both sides of level {level:g}, got [{low:g}, {high:g}]. Choose a level in between."
        )
    padding = level - _PAD_SLOPE * max(high - level, 1e-3 * abs(level), 1e-6)
    padded = np.pad(volume.transpose(2, 1, 0), 1, constant_values=padding)  # [W + 2, H + 2, D + 2], so vertices come as (x, y, z)
    vertices, faces = mcubes.marching_cubes(np.ascontiguousarray(padded), float(level))
    world = np.stack([_to_world(vertices[:, i] - 1, coordinates[i]) for i in range(3)], axis=1)
    return world.astype(np.float32), faces.astype(np.int64)


def save_mesh(path: str | Path, vertices: np.ndarray, faces: np.ndarray) -> Path:
    """Write the mesh as .ply (binary), .obj or .glb, by the suffix; folders are made as needed.

    Args: vertices [V, 3] world coordinates; faces [F, 3].
    Returns: the path written.
    Raises: ValueError for another suffix.
    """
    import trimesh

    path = Path(path)
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise ValueError(f"save_mesh: expected a file ending in {', '.join(MESH_SUFFIXES)}, got {path.name!r}. Change the suffix.")
    path.parent.mkdir(parents=True, exist_ok=True)
    trimesh.Trimesh(vertices=vertices, faces=faces, process=False).export(path)
    return path


def _coordinates(axes: SlabSpec | Sequence[torch.Tensor | np.ndarray], shape: tuple[int, ...]) -> list[np.ndarray]:
    """x [W], y [H], z [D] as float64, checked against the volume's shape (D, H, W)."""
    coordinates = [np.asarray(axis, dtype=np.float64) for axis in (axes.axes() if isinstance(axes, SlabSpec) else axes)]
    got = tuple(len(axis) for axis in reversed(coordinates))
    if got != tuple(shape):
        raise ValueError(
            f"extract_mesh: expected axes for a volume [D, H, W] = {list(shape)}, got {list(got)}. Pass the spec it was sampled with."
        )
    if any(np.any(np.diff(axis) <= 0) for axis in coordinates):
        raise ValueError(
            "extract_mesh: expected increasing coordinates on every axis, got a decreasing step. Flip the axis together with sigma."
        )
    return coordinates


def _to_world(index: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Coordinates at fractional indices, linear between grid points and carried on with the outermost step beyond them."""
    start = np.clip(np.floor(index).astype(np.int64), 0, len(axis) - 2)
    return axis[start] + (index - start) * (axis[start + 1] - axis[start])
