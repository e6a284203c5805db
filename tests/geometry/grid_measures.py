"""All measures of a grid by those that the score is made of, for comparison with reference values."""

import itertools

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from eg3d_rlhf.geometry import solids

LEAST = 8  # voxels of a part that is more than a crumb


def lost(solid: np.ndarray, radius: float) -> np.ndarray:
    """Return the voxels that are too thin: further than 1 from all balls of this radius that fit inside."""
    return solid & ~solids.dilated(solids.morphological_opening(solid, radius), 1)


def _solidity(points: np.ndarray) -> float:
    """Share of the volume of the hull of the voxels' corners."""
    corners = np.unique(
        np.concatenate([points + step for step in itertools.product((0, 1), repeat=3)]), axis=0
    )
    try:
        return len(points) / ConvexHull(corners).volume
    except QhullError:  # cannot be: one voxel has a volume
        return 1.0


def measure_grid(solid: np.ndarray, rules: solids.Rules = solids.OBJECTS) -> dict:
    """All measures of a grid, as JSON values: shares are 0..1, lengths shares of the longest edge.

    volume, surface; parts, parts_least (of LEAST voxels or more), main (largest part's share of the exposed
    faces), main_volume; cavities, cavity_volume, cavity_share, leak_share (hollows with openings), inner
    (all of them; share of the filled shape); euler; thin (share lost); ridge (5 and 50 % of the thicknesses
    along the middle, low by up to a voxel); tip_angle, margin; cut (voxels on the grid's faces that are
    solid); solidity; symmetry (IoU with the mirror image, along each axis).
    """
    edge = max(solid.shape)
    count = int(solid.sum())
    labels, parts = ndimage.label(solid)
    faces = solids.exposed(labels, parts)
    sizes = np.bincount(labels.ravel())[1:]
    holes = solids.enclosed(solid)
    filled = solids.fill(solid, rules.bridge(solid)) | holes
    depth = ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1, 1:-1]
    ridge = (2 * depth[(ndimage.maximum_filter(depth, size=3) == depth) & solid] - 1) / edge
    angle, margin = solids.stability(solid)
    mirrored = [
        (solid & np.flip(solid, axis)).sum() / (solid | np.flip(solid, axis)).sum() for axis in range(3)
    ]
    shell = count - int(solid[1:-1, 1:-1, 1:-1].sum())
    return {
        "volume": count / solid.size,
        "surface": int(faces.sum()) / edge**2,
        "parts": parts,
        "parts_least": int((sizes >= LEAST).sum()),
        "main": float(faces.max() / faces.sum()),
        "main_volume": float(sizes.max() / count),
        "cavities": int(ndimage.label(holes)[1]),
        "cavity_volume": int(holes.sum()) / solid.size,
        "cavity_share": float(holes.sum() / (holes.sum() + count)),
        "leak_share": float((filled & ~solid & ~holes).sum() / filled.sum()),
        "inner": 1 - count / float(filled.sum()),
        "euler": solids.euler(solid),
        "thin": 0.0 if rules.thin is None else float(lost(solid, rules.thin).sum() / count),
        "ridge": np.quantile(ridge, (0.05, 0.5)).tolist(),
        "tip_angle": angle,
        "margin": margin / edge,
        "cut": shell,
        "solidity": _solidity(np.argwhere(solid)),
        "symmetry": [float(value) for value in mirrored],
    }
