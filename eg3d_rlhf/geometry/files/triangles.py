"""Reader of the vertices and triangles of mesh files, for measurements, training and encoding.

All parts of a file are joined to one mesh. GLB, PLY and OBJ files are read by this package, with the
transformations that viewers apply. Other formats, such as STL, are read by trimesh.

Shapes: V vertices, F faces, N vertices or indices of one primitive.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eg3d_rlhf.geometry.files import glb, obj, ply
from eg3d_rlhf.geometry.files.model import (
    GLB_MAGIC,
    Model,
    Primitive,
    primitive_points,
    primitive_triangles,
)
from eg3d_rlhf.geometry.files.mtl import utf16

# A face has no area if twice its area is at most this share of the square of its longest edge. The label page
# has the same number (people/label/web/src/textured.js).
NO_AREA = 1e-9
SUFFIXES = (".glb", ".ply", ".obj", ".stl")  # mesh files that commands search for in folders


def read_triangles(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the vertices and triangles of a mesh file.

    GLB and PLY are recognised by their first bytes, other formats by their suffix. Materials, textures,
    normals, colours and texture coordinates are not read, so a mesh in which they are damaged can be read.

    Returns: vertices [V, 3] float64 and faces [F, 3] int64.

    Raises: ValueError for a file that is damaged or has no triangles; OSError for a file that cannot be read.
    """
    file_bytes = path.read_bytes()
    # The content decides, because files from untrusted sources may have wrong suffixes.
    if file_bytes[:4] == GLB_MAGIC:
        return scene_triangles(glb.read_glb(memoryview(file_bytes), geometry_only=True))
    if file_bytes[:3] == b"ply":
        return scene_triangles(ply.read_mesh(file_bytes, geometry_only=True))
    if path.suffix.lower() == ".obj":
        return scene_triangles(obj.read_obj(file_bytes, path, geometry_only=True))
    # An OBJ file has no magic bytes, so text in UTF-16 without the suffix .obj gets an error of its own.
    if (encoding := utf16(file_bytes[:512])) is not None:
        raise ValueError(
            f"the file {path.name} is text in {encoding.upper()} and not a mesh. Save it as UTF-8."
        )
    if path.suffix.lower() in (".glb", ".ply"):
        raise ValueError(
            f"the content of {path.name} is not {path.suffix[1:].upper()}, although its suffix is"
            f" {path.suffix}. Export the file again."
        )
    # imported here, because few functions need this library
    import trimesh

    try:
        # process=False: vertices are neither merged nor reordered
        loaded_mesh = trimesh.load_mesh(path, process=False)
        vertices = np.asarray(loaded_mesh.vertices, np.float64)
        faces = np.asarray(loaded_mesh.faces, np.int64)
    # The readers of trimesh raise many types of exceptions for damaged files.
    except Exception as error:
        raise ValueError(
            f"{path.name} is damaged or not a mesh: trimesh cannot read it ({type(error).__name__}). Export"
            " the mesh again."
        ) from None
    if not len(faces):
        raise ValueError(f"{path.name} has no triangles. Export a mesh that has faces.")
    return vertices, faces


def scene_parts(model: Model) -> Iterator[tuple[Primitive, np.ndarray, np.ndarray]]:
    """Yield the primitives of a model's scene, with the transformations of its nodes applied.

    A mesh that two nodes refer to is yielded twice. A mesh that its nodes scale to a point or a line is left
    out, because it cannot be seen. If a transformation mirrors a mesh, the orientation of
    its faces is reversed, so that they still point outwards.

    Yields: the primitive, its vertices [N, 3] float64 in the scene, and its faces [F, 3] as indices of them.
    """
    # Depth-first traversal with a stack. Reversed, because the last item of the stack is taken first.
    pending_nodes = [(node_index, np.eye(4)) for node_index in reversed(model.roots)]
    while pending_nodes:
        node_index, parent_matrix = pending_nodes.pop()
        node = model.nodes[node_index]
        matrix = parent_matrix @ _matrix(node.place)
        pending_nodes += [(child_index, matrix) for child_index in reversed(node.children)]
        for primitive in model.meshes[node.mesh] if node.mesh is not None else ():
            # A scale of 0 along two axes or more hides a mesh: it collapses to a line or a point.
            if np.linalg.matrix_rank(matrix[:3, :3]) < 2:
                continue
            points = primitive_points(primitive)
            triangles = primitive_triangles(primitive)
            # A negative determinant: the transformation mirrors the mesh, so the faces are reversed again.
            if np.linalg.det(matrix[:3, :3]) < 0:
                triangles = triangles[:, ::-1]
            # row vectors: x' = x M^T + t
            yield primitive, points @ matrix[:3, :3].T + matrix[:3, 3], triangles


def scene_triangles(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Return the triangles of a model's scene as one mesh, see `scene_parts`.

    Returns: vertices [V, 3] float64, faces [F, 3] int64.

    Raises: ValueError if the scene has no triangles.
    """
    vertices = []
    faces = []
    vertex_count = 0
    # Faces are counted from the first vertex of their part.
    for _, points, triangles in scene_parts(model):
        vertices.append(points)
        faces.append(triangles + vertex_count)
        vertex_count += len(points)
    if not faces:
        raise ValueError("the file has no triangles that can be seen. Export a mesh that has faces.")
    return np.concatenate(vertices), np.concatenate(faces)


def may_be_visible(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the mask [F] of the faces that have an area, or that lie in the bounding box of those faces.

    Args:
        vertices: positions [V, 3].
        faces: vertex indices [F, 3].

    Returns: all True if no face has an area, or if a position is not finite.
    """
    largest_coordinate = np.abs(vertices).max()
    is_visible = np.ones(len(faces), dtype=bool)
    if not 0 < largest_coordinate < np.inf:
        return is_visible
    # [F, 3, 3], at most 1, so that no product overflows
    corners = (vertices / largest_coordinate)[faces]
    edges = np.roll(corners, -1, axis=1) - corners
    double_area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    # Relative to the square of the longest edge, so that small faces count, but not the rounding of a line.
    has_area = double_area > NO_AREA * (edges**2).sum(axis=2).max(axis=1)
    if not has_area.any():
        return is_visible
    visible_corners = corners[has_area].reshape(-1, 3)
    is_inside = (corners >= visible_corners.min(axis=0)) & (corners <= visible_corners.max(axis=0))
    return has_area | is_inside.all(axis=(1, 2))


def drop_unused(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the vertices that no face uses, and renumber the others in the faces.

    Args:
        vertices: positions [V, 3].
        faces: vertex indices [F, 3].

    Returns: the vertices that are used, and the faces [F, 3] with the new indices.
    """
    is_used = np.zeros(len(vertices), dtype=bool)
    is_used[faces.reshape(-1)] = True
    # The new number of a vertex is the count of used vertices before it.
    return vertices[is_used], (np.cumsum(is_used) - 1)[faces]


def _matrix(node_place: dict) -> np.ndarray:
    """Return the transformation matrix [4, 4] of a node.

    Args:
        node_place: fields of the node's record in glTF: either a matrix, or scale, rotation and translation,
            which are applied in this order. A missing field means no change.
    """
    if "matrix" in node_place:
        # glTF stores matrices column by column
        return np.array(node_place["matrix"], dtype=np.float64).reshape(4, 4).T
    matrix = np.eye(4)
    # the identity by default
    x, y, z, w = node_place.get("rotation", (0, 0, 0, 1))
    # rotation matrix of the unit quaternion (x, y, z, w)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    # scales the columns: the scale is applied before the rotation
    matrix[:3, :3] = rotation * np.array(node_place.get("scale", (1, 1, 1)), dtype=np.float64)
    matrix[:3, 3] = node_place.get("translation", (0, 0, 0))
    return matrix
