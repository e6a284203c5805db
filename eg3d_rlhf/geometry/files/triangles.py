"""Reader of mesh files as vertices and triangles, with all parts joined, for measurements, training and
encoding.

GLB, PLY and OBJ are read as they are shown. Other formats, such as STL, are read by trimesh.

Letters: V vertices, F faces, N indices.
"""

from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry.files import glb, obj, ply
from eg3d_rlhf.geometry.files.model import GLB_MAGIC, Model, Primitive

SUFFIXES = (".glb", ".ply", ".obj", ".stl")  # mesh files that commands search for in folders
# glTF's modes of primitives
_STRIP = 5
_FAN = 6


def read_triangles(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the vertices [V, 3] float64 and faces [F, 3] int64 of a mesh file.

    The format is recognised by the content. Textures and materials of GLB and OBJ are not opened, so a mesh
    with a damaged texture can be read.

    Raises: ValueError, OSError.
    """
    data = path.read_bytes()
    if data[:4] == GLB_MAGIC:
        return scene_triangles(glb.read_glb(memoryview(data), geometry_only=True))
    if data[:3] == b"ply":
        return scene_triangles(ply.read_mesh(data))
    if path.suffix.lower() == ".obj":
        return scene_triangles(obj.read_obj(data, path, geometry_only=True))
    # OBJ has no magic bytes, so text in UTF-16 without the suffix .obj gets its own error.
    if (encoding := obj.utf16(data[:512])) is not None:
        raise ValueError(f"expected a mesh, got text in {encoding.upper()}; save it as UTF-8")
    if path.suffix.lower() in (".glb", ".ply"):
        raise ValueError(f"expected {path.suffix[1:].upper()} by content, got something else")
    import trimesh

    try:
        loaded = trimesh.load_mesh(path, process=False)
        vertices = np.asarray(loaded.vertices, np.float64)
        faces = np.asarray(loaded.faces, np.int64)
    except Exception as error:  # trimesh's readers raise many types of exceptions
        raise ValueError(
            f"expected a mesh that trimesh can read, got another or a damaged file ({type(error).__name__})"
        ) from None
    if not len(faces):
        raise ValueError("expected triangles, got none")
    return vertices, faces


def scene_triangles(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Return the triangles of a model's scene, with the transformations of its nodes applied.

    A mesh that occurs twice in the scene is returned twice. Mirrored meshes keep their outside.

    Returns: vertices [V, 3] float64, faces [F, 3] int64.
    """
    vertices = []
    faces = []
    count = 0
    # Depth-first traversal with a stack; reversed, so that nodes come in the order of the file.
    waiting = [(number, np.eye(4)) for number in reversed(model.roots)]
    while waiting:
        number, above = waiting.pop()
        node = model.nodes[number]
        matrix = above @ _matrix(node.place)
        waiting += [(child, matrix) for child in reversed(node.children)]
        for part in model.meshes[node.mesh] if node.mesh is not None else ():
            points = _points(part)
            sides = _sides(part)
            # A mirroring transformation reverses the orientation of faces.
            if np.linalg.det(matrix[:3, :3]) < 0:
                sides = sides[:, ::-1]
            vertices.append(points @ matrix[:3, :3].T + matrix[:3, 3])
            faces.append(sides + count)
            count += len(points)
    if not faces:
        raise ValueError("expected triangles, got none")
    return np.concatenate(vertices), np.concatenate(faces)


def _points(part: Primitive) -> np.ndarray:
    """Return the positions [N, 3] of a primitive in float64. Normalised integers are scaled to -1..1."""
    array = part.attributes["POSITION"]
    points = array.values.astype(np.float64)
    if not array.normalized:
        return points
    # glTF 2.0, section 3.11: max(c / 127, -1) and so on
    return np.maximum(points / np.iinfo(array.values.dtype).max, -1.0)


def _sides(part: Primitive) -> np.ndarray:
    """Return the triangles [F, 3] of a primitive, as indices of vertices. Strips and fans are resolved."""
    count = len(part.attributes["POSITION"].values)
    n = np.arange(count) if part.indices is None else part.indices.values[:, 0].astype(np.int64)
    if part.mode == _STRIP:
        sides = np.stack([n[:-2], n[1:-1], n[2:]], axis=1)
        # Every second triangle of a strip has the opposite orientation
        sides[1::2] = sides[1::2, [1, 0, 2]]
        return sides
    if part.mode == _FAN:
        return np.stack([np.full(len(n) - 2, n[0]), n[1:-1], n[2:]], axis=1)
    return n[: len(n) // 3 * 3].reshape(-1, 3)


def _matrix(place: dict) -> np.ndarray:
    """Return the matrix [4, 4] of a node: its own, or its scale, rotation and translation, applied in
    this order.
    """
    if "matrix" in place:
        # glTF stores matrices column by column
        return np.array(place["matrix"], dtype=np.float64).reshape(4, 4).T
    matrix = np.eye(4)
    x, y, z, w = place.get("rotation", (0, 0, 0, 1))
    # rotation matrix of the unit quaternion (x, y, z, w)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix[:3, :3] = rotation * np.array(place.get("scale", (1, 1, 1)), dtype=np.float64)
    matrix[:3, 3] = place.get("translation", (0, 0, 0))
    return matrix
