"""From a shape's record to what the browser gets: the mesh, and the picture of the same latent.

Letters: V vertices, F triangles; X, Y, Z = grid points along x, y, z.
"""

import warnings
from collections import OrderedDict

import numpy as np

from eg3d_rlhf.generators import Generator, LoadedGenerator, load_generator, ws_of_seeds
from eg3d_rlhf.label.damage import damage
from eg3d_rlhf.label.entities import Shape
from eg3d_rlhf.label.shape_files import compress, encode_mesh
from eg3d_rlhf.media.rendering import camera, cameras_of, png, render
from eg3d_rlhf.sigma.chunked_mesh import extract_mesh_blockwise
from eg3d_rlhf.sigma.field_mesh import FieldGrid, extract_field_mesh
from eg3d_rlhf.sigma.mesh_checks import compact, decimate, face_volumes, parts
from eg3d_rlhf.sigma.mesh_export import BORDER
from torch_utils.ops.implementations import implementation

_SLACK = 1.1  # times the wanted triangles that a mesh may have
_PASSES = 5  # of decimation, each of which stops where edges are too costly
_DUST = 16  # triangles; smaller parts are left out
_HELD = 2  # generators in memory: the two of a study


def surface(generator: Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] float32 and triangles [F, 3] of a shape's surface, all its parts that can be seen, decimated.

    The cube's border is cleared as EG3D's tools do. Hollows inside the body and dust are left out. In plain torch: what is judged should
    not depend on the compiler of the machine, nor wait for it.
    Raises: ValueError when the density does not cross the level, or for a damage that finds no room.
    """
    with implementation("torch"):
        grid = FieldGrid(generator.field(ws_of_seeds(generator, [shape.seed], shape.psi)), shape.resolution, BORDER)
        vertices, faces = extract_field_mesh(grid, shape.level)
        if shape.degradation:
            axes = tuple(axis.double().numpy() for axis in grid.axes)
            sigma = grid(slice(0, shape.resolution)).numpy()
            sigma = damage(shape.degradation, sigma, axes, shape.level, visible_parts(vertices, faces)[0], shape.seed)
            vertices, faces = extract_mesh_blockwise(lambda x: sigma[x], axes, shape.level)
    vertices, faces = visible_parts(vertices, faces)
    return within_budget(vertices, faces, shape.triangles)


def visible_parts(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mesh without hollows (parts that enclose a negative volume) and without dust; always with the largest part."""
    count, part = parts(faces, len(vertices))
    if count == 1:
        return vertices, faces
    volume = np.bincount(part, weights=face_volumes(vertices, faces), minlength=count)
    kept = (volume > 0) & (np.bincount(part, minlength=count) >= _DUST)
    kept[volume.argmax()] = True
    return compact(vertices, faces[kept[part]])


def within_budget(vertices: np.ndarray, faces: np.ndarray, triangles: int) -> tuple[np.ndarray, np.ndarray]:
    """About so many triangles, closed where that can be had; a mesh that stays closed only with more is opened instead.

    What is looked at must load in time and need not be closed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that more triangles were kept
        fewer, fewer_faces = decimate(vertices, faces, triangles)
    if len(fewer_faces) <= _SLACK * triangles:
        return fewer, fewer_faces
    import fast_simplification

    for _ in range(_PASSES):
        fewer, fewer_faces = fast_simplification.simplify(fewer, fewer_faces, target_count=triangles)
        fewer, fewer_faces = compact(fewer.astype(np.float32), fewer_faces.astype(np.int32))
        if len(fewer_faces) <= _SLACK * triangles:
            break
    return fewer, fewer_faces


class ShapeDrawer:
    """Draws shapes; keeps the generators that it used last."""

    def __init__(self, device: str = "cpu"):
        self._device = device
        self._loaded: OrderedDict[tuple[str, str], LoadedGenerator] = OrderedDict()

    def mesh(self, shape: Shape) -> bytes:
        """The mesh in the browser's format, compressed. Raises as `surface` and `generator`."""
        return compress(encode_mesh(*surface(self.generator(shape).generator, shape)))

    def picture(self, shape: Shape) -> bytes:
        """The frontal rendering as PNG; that of a damaged shape shows the latent undamaged, as the image is not drawn from the mesh."""
        generator = self.generator(shape).generator
        with implementation("torch"):
            (pixels,) = render(generator, ws_of_seeds(generator, [shape.seed], shape.psi), [camera(cameras_of(generator))])
        return png(pixels)

    def generator(self, shape: Shape) -> LoadedGenerator:
        """The generator of a shape.

        Raises: FileNotFoundError; ValueError where the file holds other weights than when the campaign was made.
        """
        key = (shape.source, shape.generator)
        if key not in self._loaded:
            loaded = load_generator(shape.source or None, self._device)
            if loaded.hash != shape.generator:
                raise ValueError(
                    f"ShapeDrawer: expected weights {shape.generator[:12]}... in {loaded.path.name}, got {loaded.hash[:12]}... "
                    "Restore the file that the campaign was made with."
                )
            self._loaded[key] = loaded
            if len(self._loaded) > _HELD:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return self._loaded[key]
