"""Normals and colours of vertices where a file has unusable ones.

Shapes: N vertices, F triangles.
"""

import numpy as np

GREY = [0.4, 0.4, 0.4, 1.0]  # linear RGB, and alpha, of a surface whose colour is not known
# glTF record of a matt grey material, which is shown where a file has no usable material
GREY_MATERIAL = {
    "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1, "baseColorFactor": GREY},
    "doubleSided": True,
}

# The same for a surface with colours of its vertices, by which the colour of the material is multiplied.
UNKNOWN_WITH_COLOURS = {
    "pbrMetallicRoughness": {"metallicFactor": 0, "roughnessFactor": 1},
    "doubleSided": True,
}


def colours_255(colours: np.ndarray) -> np.ndarray:
    """Convert colours that a file stores as decimal numbers to integral numbers in 0..255.

    Files hold either 0..1 or 0..255 and do not say which. Colours are taken as 0..255 if one of them is above
    2, or if one is above 1 and all are integral. Numbers a little above 1 are rounding, and are clipped.

    Args:
        colours: red, green and blue [N, 3], or one channel such as alpha [N, 1]. NaN becomes 0.

    Returns: float64 array of the same shape.
    """
    finite_colours = np.nan_to_num(np.asarray(colours, dtype=np.float64), posinf=0.0, neginf=0.0)
    largest = finite_colours.max(initial=0)
    if largest > 2 or (largest > 1 and (finite_colours == np.rint(finite_colours)).all()):
        return np.rint(finite_colours.clip(0, 255))
    return np.rint(finite_colours.clip(0, 1) * 255)


def vertex_normals(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Compute smooth normals: the mean of the normals of the triangles at each vertex, weighted by area.

    Args:
        points: positions [N, 3].
        triangles: indices [F, 3] of vertices.

    Returns: unit normals [N, 3] float32; (0, 0, 1) for a vertex without a triangle that has an area.
    """
    points = np.asarray(points, dtype=np.float64)
    a, b, c = (points[triangles[:, corner]] for corner in range(3))
    # The cross product is the unit normal times twice the area, so that the sum is weighted by area.
    area_normals = np.cross(b - a, c - a)
    sums = np.stack(
        [
            np.bincount(triangles.reshape(-1), np.repeat(area_normals[:, axis], 3), len(points))
            for axis in range(3)
        ],
        axis=1,
    )
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(lengths > 0, sums / np.where(lengths > 0, lengths, 1), [0.0, 0.0, 1.0]).astype("<f4")


def mended_normals(normals: np.ndarray, points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Return normals in which smooth normals replace those that are NaN or infinite.

    Exporters write NaN for vertices whose triangles have no area.

    Args:
        normals: normals [N, 3], which are returned unchanged if all of them are finite.
        points: positions [N, 3].
        triangles: indices [F, 3] of vertices.
    """
    # Larger numbers overflow when their squares are added in float32. NaN fails the comparison, too.
    is_finite = (np.abs(normals) < 1e18).all(axis=1)
    if is_finite.all():
        return normals
    return np.where(is_finite[:, None], normals, vertex_normals(points, triangles)).astype("<f4")
