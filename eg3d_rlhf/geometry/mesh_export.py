"""From a field to a file: isosurface, largest part, decimation, checks and colours (.ply, .obj, .glb), or the density itself (.mrc).

Letters: V vertices, F faces, N grid points per axis.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.geometry.chunked_mesh import Progress, block_planes
from eg3d_rlhf.geometry.field_mesh import FieldGrid, extract_field_mesh
from eg3d_rlhf.geometry.mesh import count_edges, decimate, face_volumes, largest_part, parts, vertex_normals
from training.storage import write_atomic

MESH_SUFFIXES = (".ply", ".obj", ".glb")
_PROBES = 20000  # vertices at which the normals are held against the density
_PROBE_STEP = 0.25  # distance of the two probes from the surface, in grid steps
_COLOR_CHUNK = 1 << 18  # vertices coloured between two calls of the progress function
SHAPE_SUFFIXES = (*MESH_SUFFIXES, ".mrc")


def check_mesh_suffix(path: str | Path, who: str = "save_mesh") -> Path:
    """The path, where its suffix names a mesh format; ValueError otherwise."""
    path = Path(path)
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise ValueError(f"{who}: expected a file ending in {', '.join(MESH_SUFFIXES)}, got {path.name!r}. Change the suffix.")
    return path


def save_mesh(
    path: str | Path, vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray | None = None, normals: np.ndarray | None = None
) -> Path:
    """Write the mesh as .ply (binary), .obj or .glb, by the suffix, atomically; folders are made as needed.

    Args: vertices [V, 3] world coordinates; faces [F, 3]; colors [V, 3] uint8; normals [V, 3] of unit length, pointing outwards.
    Returns: the path written.
    Raises: ValueError for another suffix.
    """
    import trimesh

    path = check_mesh_suffix(path)
    mesh = trimesh.Trimesh(vertices=vertices, faces=faces, vertex_colors=colors, vertex_normals=normals, process=False)
    kind = path.suffix.lower()[1:]
    options: dict[str, Any] = {"vertex_normal" if kind == "ply" else "include_normals": normals is not None}
    data: Any = mesh.export(file_type=kind, **options)
    write_atomic(path, data.encode() if isinstance(data, str) else data)
    return path


def write_mrc(
    path: str | Path, sample: Callable[[slice], torch.Tensor], resolution: int, step: float, progress: Progress | None = None
) -> Path:
    """Write a density cube as an MRC volume of mode 2 (float32), block by block, with EG3D's order of axes.

    Section i, row j, column k hold the point with x index N - 1 - i, y index j and z index k: EG3D flips x and stores z fastest. One cell
    is one unit of length, as in EG3D's files; a label in the header names the world step.

    Args: sample as for `extract_mesh_blockwise`; resolution N; step: world units between grid points; progress: ("density", done, N).
    Returns: the path written, atomically.
    """
    import mrcfile

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with mrcfile.new_mmap(temporary, shape=(resolution,) * 3, mrc_mode=2, overwrite=True) as file:
            for start in range(0, resolution, block_planes(resolution**2)):
                stop = min(start + block_planes(resolution**2), resolution)
                block = sample(slice(start, stop)).numpy()
                file.data[resolution - stop : resolution - start] = block[::-1]
                file.flush()
                if progress is not None:
                    progress("density", stop, resolution)
            file.voxel_size = 1.0
            file.add_label(f"raw density, step {step:.9g} world units, axes: -x, y, z")
            file.update_header_stats()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How a field becomes a mesh."""

    resolution: int = 256  # grid points per axis, 16..1024
    level: float | None = None  # raw density of the surface; None is the field's own
    border: float = 0.0  # share of the cube's edge trimmed from each face, 0 <= border < 0.5
    component: str = "largest"  # 'largest' by enclosed volume, or 'all'
    faces: int | None = None  # decimate to about so many faces, >= 4; None keeps all
    colors: bool = True  # vertex colours from the radiance field

    def __post_init__(self) -> None:
        if not 16 <= self.resolution <= 1024:
            raise ValueError(f"MeshOptions: expected a resolution of 16 to 1024, got {self.resolution}. Use 256.")
        if self.level is not None and not np.isfinite(self.level):
            raise ValueError(f"MeshOptions: expected a finite level, got {self.level}. Leave it out for the field's own.")
        if self.component not in ("largest", "all"):
            raise ValueError(f"MeshOptions: expected a component of 'largest' or 'all', got {self.component!r}.")
        if self.faces is not None and self.faces < 4:
            raise ValueError(f"MeshOptions: expected at least 4 faces, got {self.faces}. Leave it out to keep all.")


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh in world coordinates."""

    vertices: np.ndarray  # [V, 3] float32
    faces: np.ndarray  # [F, 3] int, counter-clockwise seen from outside
    normals: np.ndarray  # [V, 3] float32, unit, outwards
    colors: np.ndarray | None = None  # [V, 3] uint8

    def save(self, path: str | Path) -> Path:
        """Write as .ply, .obj or .glb; see `save_mesh`."""
        return save_mesh(path, self.vertices, self.faces, self.colors, self.normals)


@dataclass(frozen=True, kw_only=True)
class MeshReport:
    """What the checks found on the mesh as it is written."""

    vertices: int
    faces: int
    faces_extracted: int  # before the choice of a part and decimation
    components_extracted: int
    components: int
    open_edges: int
    shared_edges: int
    watertight: bool  # every edge in exactly two faces, run through in opposite directions
    volume: float  # enclosed, world units cubed
    outward: bool  # watertight with positive volume: the normals look outwards
    normals_down_density: float  # share of probed vertices along whose normal the density falls, 0..1
    bounds: list[list[float]]  # lowest and highest x, y, z, world units

    def write(self, path: str | Path, **more) -> None:
        """Write as JSON, with further entries."""
        write_atomic(path, (json.dumps({**asdict(self), **more}, indent=1) + "\n").encode())


def export_mesh(field: Field, options: MeshOptions, progress: Progress | None = None) -> tuple[Mesh, MeshReport]:
    """Mesh of one field, and its checks.

    Memory: the maps of two coordinates (`field_mesh`: 134 MB at 512 points and 64 hidden units, 200 MB where a layout has all three), a
    layer of the grid, and about 250 bytes per extracted face; the grid is never held as a whole.

    Args: progress: called with (stage, units done, units in all).
    Raises: ValueError when the level is not crossed, or for a border that leaves nothing.
    """
    tell = progress or (lambda stage, done, total: None)
    grid = FieldGrid(field, options.resolution, options.border)
    vertices, faces = extract_field_mesh(grid, field.level if options.level is None else options.level, progress)
    found = len(faces)
    tell("parts", 0, 1)
    if options.component == "largest":
        vertices, faces, components = largest_part(vertices, faces)
    else:
        components, _ = parts(faces, len(vertices))
    tell("parts", 1, 1)
    if options.faces is not None:
        tell("decimation", 0, 1)
        vertices, faces = decimate(vertices, faces, options.faces)
        tell("decimation", 1, 1)
    colors = vertex_colors(field, vertices, progress) if options.colors else None
    tell("checks", 0, 1)
    mesh = Mesh(vertices, faces, vertex_normals(vertices, faces), colors)
    report = check_mesh(mesh, field, options, found, components)
    tell("checks", 1, 1)
    return mesh, report


def check_mesh(mesh: Mesh, field: Field, options: MeshOptions, found: int, components: int) -> MeshReport:
    """Measure a mesh; `found` faces in `components` parts were extracted."""
    edges = count_edges(mesh.faces)
    volume = float(face_volumes(mesh.vertices, mesh.faces).sum())
    return MeshReport(
        vertices=len(mesh.vertices), faces=len(mesh.faces), faces_extracted=found, components_extracted=components,
        components=parts(mesh.faces, len(mesh.vertices))[0], open_edges=edges.open, shared_edges=edges.shared,
        watertight=edges.watertight, volume=volume, outward=edges.watertight and volume > 0,
        normals_down_density=normals_down_density(mesh, field, options),
        bounds=[mesh.vertices.min(axis=0).tolist(), mesh.vertices.max(axis=0).tolist()],
    )


@torch.no_grad()
def normals_down_density(mesh: Mesh, field: Field, options: MeshOptions) -> float:
    """Share of (at most 20,000, evenly chosen) vertices at which the density outside, along the normal, is below the density inside.

    Vertices on the caps that close the surface at the border of the cube are left out: there the field does not end.
    """
    step, centre = field.bounds.side / (options.resolution - 1), np.asarray(field.bounds.centre, dtype=mesh.vertices.dtype)
    inside = np.abs(mesh.vertices - centre).max(axis=1) < field.bounds.side * (0.5 - options.border) - 2 * step
    chosen = np.flatnonzero(inside)
    chosen = chosen[:: max(1, len(chosen) // _PROBES)]
    if len(chosen) == 0:
        return 1.0
    points, offset = torch.from_numpy(mesh.vertices[chosen]), torch.from_numpy(mesh.normals[chosen]) * (_PROBE_STEP * step)
    return float((field.density(points + offset) < field.density(points - offset)).double().mean())


@torch.no_grad()
def vertex_colors(field: Field, vertices: np.ndarray, progress: Progress | None = None) -> np.ndarray:
    """Colours [V, 3] uint8 of the radiance field at vertices [V, 3]."""
    colors = np.empty((len(vertices), 3), dtype=np.uint8)
    for start in range(0, len(vertices), _COLOR_CHUNK):
        part = torch.from_numpy(vertices[start : start + _COLOR_CHUNK])
        colors[start : start + len(part)] = (field.colour(part)[0].cpu() * 255).round().to(torch.uint8).numpy()
        if progress is not None:
            progress("colours", start + len(part), len(vertices))
    return colors


def shape_suffix(name: str) -> str:
    """'.ply', '.obj', '.glb' or '.mrc' from a format's name, with or without the dot.

    Raises: ValueError for another one.
    """
    suffix = "." + name.lower().removeprefix(".")
    if suffix not in SHAPE_SUFFIXES:
        raise ValueError(f"expected a shape format of {', '.join(SHAPE_SUFFIXES)}, got {name!r}. Choose one of them.")
    return suffix


def save_shape(path: str | Path, field: Field, options: MeshOptions, progress: Progress | None = None) -> Path:
    """Write the shape of a field: the density cube (.mrc), or its surface as a mesh (.ply, .obj, .glb).

    Of the options an .mrc has use for the resolution and the border only.
    Raises: ValueError for another suffix, or a level that the density does not cross.
    """
    path = Path(path)
    suffix = shape_suffix(path.suffix)
    if suffix == ".mrc":
        grid = FieldGrid(field, options.resolution, options.border)
        return write_mrc(path, grid, options.resolution, field.bounds.side / (options.resolution - 1), progress)
    mesh, _ = export_mesh(field, options, progress)
    return mesh.save(path)
