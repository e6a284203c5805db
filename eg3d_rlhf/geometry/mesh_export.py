"""Export of the shape of a density field: as a mesh (.ply, .obj, .glb), or as a density volume (.mrc).

A mesh is made in five steps: isosurface, largest part, decimation, colours, checks.

Shapes: V vertices; F faces; N grid points per axis; X, Y, Z grid points along x, y, z; P points; J hidden
units of the decoder; S cells along the edge of a brick.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.field import Field, ProductField
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.geometry.brick_bounds import bound_bricks
from eg3d_rlhf.geometry.mesh import (
    BRICK,
    Progress,
    SurfaceBuilder,
    block_planes,
    check_crossed,
    count_edges,
    decimate,
    extract_mesh_blockwise,
    face_volumes,
    find_parts,
    largest_part,
    outside_value,
    padded_points,
    vertex_normals,
)
from eg3d_rlhf.geometry.settings import MeshOptions
from eg3d_rlhf.geometry.slab import SeparableDensity, SeparableField
from training.storage import write_atomic

# Isosurface of a field on a cube of grid points, without evaluating the density away from the surface: bricks
# whose bounds (brick_bounds.py) exclude a surface are neither evaluated nor meshed.

OUTSIDE = -1000.0  # raw density of a trimmed border, as in EG3D's shape extraction
# Fraction of undecided bricks in a layer above which it is faster to evaluate the full layer.
_DENSE_SHARE = 0.5
_DENSE_ROWS = 65  # number of y indices in one evaluation of a full layer


class FieldGrid:
    """Density of a field on a cube of grid points, which is evaluated for ranges of x indices.

    An instance can be passed as the argument `sample` of `extract_mesh_blockwise` and `write_mrc`.

    Args:
        field: field of one shape.
        resolution: number of grid points per axis, at least 2. The outermost points are the corners of the
            field's cube.
        border: fraction of the cube's edge that is trimmed at each face, 0 <= border < 0.5. Trimmed points
            have the density `OUTSIDE`.

    Raises: ValueError if fewer than two points per axis remain inside the border.
    """

    def __init__(self, field: Field, resolution: int, border: float = 0.0):
        assert len(field) == 1 and 0 <= border < 0.5
        self.field = field
        self.resolution = resolution
        # smallest and largest density that was evaluated so far, without the trimmed border
        self.low = float("inf")
        self.high = float("-inf")
        self.axes: Sequence[torch.Tensor] = SlabSpec.from_bounds(field.bounds, resolution).axes()
        # number of grid points at each face that have the density `OUTSIDE`
        self.trim = int(border * resolution)
        # indices along each axis that are not trimmed
        self.inside = slice(self.trim, resolution - self.trim)
        if resolution - 2 * self.trim < 2:
            raise ValueError(
                f"FieldGrid: a border of {border:g} with {resolution} points per axis leaves fewer than 2"
                " points inside. Reduce the border or increase the resolution."
            )

    @torch.no_grad()
    def separable(self, *axes: torch.Tensor) -> SeparableDensity | None:
        """Return the density in separable form, or None if the field has no such form.

        Args:
            axes: world coordinates x [X], y [Y], z [Z]. By default, all points that are not trimmed are used.
        """
        x, y, z = axes or (axis[self.inside] for axis in self.axes)
        return self.field.separable(x, y, z) if isinstance(self.field, SeparableField) else None

    @torch.no_grad()
    def _block(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Compute the raw density [X, Y, Z] at all combinations of world coordinates x [X], y [Y] and z [Z].

        The result is on the CPU. `low` and `high`, the range of the densities so far, are updated.
        """
        density = self.separable(x, y, z)
        if density is None and isinstance(self.field, ProductField):
            block = self.field.density_product(x, y, z)[0].cpu()
        elif density is None:
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1).reshape(-1, 3)
            block = self.field.density(points)[0].cpu().reshape(len(x), len(y), len(z))
        else:
            # The maps stay on their device; only the density is copied to the CPU.
            block = density.maps.density(density.w, density.b, density.shape).cpu()
        self.low = min(self.low, float(block.min()))
        self.high = max(self.high, float(block.max()))
        return block

    def __call__(self, x_range: slice) -> torch.Tensor:
        """Return the raw density [indices of x_range, Y, Z] of the grid points with x indices in a slice."""
        first_inside = self.inside.start
        end_inside = self.inside.stop
        start = max(x_range.start, first_inside)
        stop = min(x_range.stop, end_inside)
        if first_inside == 0:  # no trimmed border
            return self._block(self.axes[0][x_range], *self.axes[1:])
        block = torch.full((x_range.stop - x_range.start, self.resolution, self.resolution), OUTSIDE)
        if start < stop:
            y, z = (axis[first_inside:end_inside] for axis in self.axes[1:])
            block[
                start - x_range.start : stop - x_range.start, first_inside:end_inside, first_inside:end_inside
            ] = self._block(self.axes[0][start:stop], y, z)
        return block


def extract_field_mesh(
    grid: FieldGrid, level: float, on_progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Extract the surface on which the raw density of a grid equals a level.

    The mesh equals the mesh of `extract_mesh_blockwise`, and is closed at the border of the volume. For a
    field in separable form on the CPU, only bricks near the surface are evaluated. Other fields are evaluated
    by `extract_mesh_blockwise`; a GPU evaluates the full grid faster than many small parts.

    Args:
        grid: grid of the field.
        level: raw density on the surface.
        on_progress: function that is called with ("density", number of finished x indices, X).

    Returns: vertices [V, 3] float32 in world coordinates, and faces [F, 3] int32, whose corners are in
        counter-clockwise order seen from outside.

    Raises: ValueError if the density is not finite, or if it does not cross the level.
    """
    density = grid.separable()
    # The bounds assume that trimmed points lie below the level.
    if density is None or density.w.device.type != "cpu" or (grid.trim and level <= OUTSIDE):
        return extract_mesh_blockwise(
            grid, grid.axes, level, on_progress=on_progress, get_density_range=lambda: (grid.low, grid.high)
        )
    brick_bounds = bound_bricks(density, level)
    axes = [axis[grid.inside].double().numpy() for axis in grid.axes]
    builder = SurfaceBuilder(axes, float(level))
    thread_count = torch.get_num_threads()
    # Bricks are evaluated in parallel threads, each with serial operations. If instead each of the thousands
    # of small operations ran in parallel, the threads would mostly wait for each other.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(thread_count) as pool:
            sampler = _LayerSampler(density, OUTSIDE if grid.trim else outside_value(level), pool)
            for layer_index, selected_bricks in enumerate(brick_bounds.undecided):
                builder.add(layer_index * BRICK, sampler.layer(layer_index, selected_bricks), selected_bricks)
                if on_progress is not None:
                    on_progress("density", min((layer_index + 1) * BRICK, len(axes[0])), len(axes[0]))
    finally:
        torch.set_num_threads(thread_count)
    if not (
        (brick_bounds.any_below or sampler.low < level) and (brick_bounds.any_above or sampler.high > level)
    ):
        # The surface may consist only of caps at the border. All densities are evaluated, to decide whether
        # they cross the level, and to name their range in the error message.
        for x_index in range(grid.resolution):
            grid(slice(x_index, x_index + 1))
        check_crossed(grid.low, grid.high, level)
    return builder.finish()


class _LayerSampler:
    """Evaluator of the density on selected bricks (cubes of grid cells), layer by layer along x.

    A grid point that two bricks share has the value of its first evaluation. The values of two evaluations
    could differ by rounding, which would leave gaps between the bricks.

    Args:
        density: density in separable form.
        outside_density: raw density of points outside the volume.
        pool: pool of threads that evaluate the density.
    """

    def __init__(self, density: SeparableDensity, outside_density: float, pool: ThreadPoolExecutor):
        self._density = density
        self._outside = outside_density
        self._pool = pool
        # smallest and largest density evaluated so far
        self.low = np.inf
        self.high = -np.inf
        padded_sizes = [padded_points(points) for points in density.shape[1:]]
        self._layer = np.full((BRICK + 1, *padded_sizes), outside_density, dtype=np.float32)
        # last plane of the previous layer, NaN where it was not evaluated
        self._shared = self._layer[0].copy()

    def layer(self, layer_index: int, selected_bricks: np.ndarray) -> np.ndarray:
        """Evaluate the density of some bricks of a layer.

        Args:
            layer_index: index of the layer; layers must be evaluated in order.
            selected_bricks: bool [bricks along y, bricks along z], True for the bricks to evaluate.

        Returns: raw density [S + 1, padded Y, padded Z]. Other bricks contain old values or NaN.
        """
        points_x, points_y, points_z = self._density.shape
        # x index of the layer's first plane; -1 is outside
        first_plane = layer_index * BRICK - 1
        x_range = slice(max(first_plane, 0), min(first_plane + BRICK + 1, points_x))
        inside_slices = (slice(1, points_y + 1), slice(1, points_z + 1))
        self._layer[-1][inside_slices] = np.nan
        if selected_bricks.mean() > _DENSE_SHARE:
            # Ranges of rows overlap by one row, so that each range has at least two points.
            y_ranges = [
                slice(y_start, min(y_start + _DENSE_ROWS, points_y))
                for y_start in range(0, points_y - 1, _DENSE_ROWS - 1)
            ]
            z_ranges = [[slice(0, points_z)]] * len(y_ranges)
        else:
            brick_rows = np.flatnonzero(selected_bricks.any(axis=1)).tolist()
            y_ranges = [_points(brick_row, points_y) for brick_row in brick_rows]
            z_ranges = [_runs(selected_bricks[brick_row], points_z) for brick_row in brick_rows]
        self._fill(first_plane, x_range, y_ranges, z_ranges)
        # The last layer reaches beyond the volume.
        if first_plane + BRICK + 1 > points_x:
            self._layer[points_x - first_plane :] = self._outside
        is_evaluated = ~np.isnan(self._shared)
        self._layer[0][is_evaluated] = self._shared[is_evaluated]
        self._shared = self._layer[-1].copy()
        return self._layer

    def _fill(
        self, first_plane: int, x_range: slice, y_ranges: list[slice], z_ranges: list[list[slice]]
    ) -> None:
        """Evaluate the density at ranges of y and z indices, and write it into the layer.

        Args:
            first_plane: x index of the first plane of the layer; -1 is outside the volume.
            x_range: x indices to evaluate.
            y_ranges: ranges of y indices.
            z_ranges: ranges of z indices for each range of y indices.
        """
        # `slab_density` recognises the layout of a map by its sizes, so an axis needs at least two points.
        extra_planes = int(x_range.stop - x_range.start == 1)
        evaluate_part = functools.partial(
            self._density.part, slice(x_range.start - extra_planes, x_range.stop)
        )
        for y_range, z_runs, sampled_densities in zip(
            y_ranges, z_ranges, self._pool.map(evaluate_part, y_ranges, z_ranges), strict=True
        ):
            densities = sampled_densities.numpy()[extra_planes:]
            self.low = min(self.low, float(densities.min()))
            self.high = max(self.high, float(densities.max()))
            # + 1: index 0 of the padded axes is outside
            layer_part = self._layer[
                x_range.start - first_plane : x_range.stop - first_plane, y_range.start + 1 : y_range.stop + 1
            ]
            run_end = 0
            for run in z_runs:
                run_start = run_end
                run_end = run_end + run.stop - run.start
                layer_part[:, :, run.start + 1 : run.stop + 1] = densities[:, :, run_start:run_end]


def _points(brick_index: int, point_count: int) -> slice:
    """Return the indices of the grid points of one brick along an axis, at least two points.

    Args:
        brick_index: index of the brick along the axis.
        point_count: number of grid points of the volume along the axis.
    """
    stop = min(brick_index * BRICK + BRICK, point_count)
    return slice(max(min(brick_index * BRICK - 1, stop - 2), 0), stop)


def _runs(selected_bricks: np.ndarray, point_count: int) -> list[slice]:
    """Return ranges of indices of the grid points in the selected bricks of a row.

    All ranges together contain at least two points.

    Args:
        selected_bricks: bool [bricks along z], True for the selected bricks.
        point_count: number of grid points of the volume along z.
    """
    # pairs: first brick of a run of selected bricks, and first brick after the run
    run_bounds = np.flatnonzero(np.diff(selected_bricks, prepend=False, append=False)).reshape(-1, 2)
    runs = [
        # Brick k has the points k BRICK - 1 to (k + 1) BRICK - 1: points of the volume count from 0, bricks
        # begin outside.
        slice(max(first_brick * BRICK - 1, 0), min(end_brick * BRICK, point_count))
        for first_brick, end_brick in run_bounds.tolist()
    ]
    # A single point, the last one: its neighbour is added, because an axis needs at least two points.
    if len(runs) == 1 and runs[0].stop - runs[0].start == 1:
        return [slice(point_count - 2, point_count)]
    return runs


MESH_SUFFIXES = (".ply", ".obj", ".glb")
_PROBES = 20000  # largest number of vertices at which the normals are compared with the density
_PROBE_STEP = (
    0.25  # distance from the surface, in grid steps, of the two points where the density is compared
)
_COLOR_CHUNK = 1 << 18  # number of vertices that are coloured between two calls of the progress function
SHAPE_SUFFIXES = (*MESH_SUFFIXES, ".mrc")


def check_mesh_suffix(path: str | Path, caller: str = "save_mesh") -> Path:
    """Check that a path has the suffix of a mesh format, and return it as a Path.

    Args:
        path: path of the file.
        caller: name of the caller, with which the error message begins.

    Raises: ValueError if the suffix is not the suffix of a mesh format.
    """
    path = Path(path)
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise ValueError(
            f"{caller}: the name {path.name!r} does not end in one of {', '.join(MESH_SUFFIXES)}. Choose a"
            " name with one of these endings."
        )
    return path


def save_mesh(
    path: str | Path,
    vertices: np.ndarray,
    faces: np.ndarray,
    colors: np.ndarray | None = None,
    normals: np.ndarray | None = None,
) -> Path:
    """Write a mesh as binary .ply, as .obj or as .glb, depending on the suffix.

    The file is written atomically. Missing folders are created.

    Args:
        path: path of the file.
        vertices: world coordinates [V, 3].
        faces: triangles [F, 3] as indices of vertices.
        colors: colours [V, 3] uint8 of the vertices; None: no colours are written.
        normals: outward unit normals [V, 3]; None: no normals are written.

    Returns: the path.

    Raises: ValueError for another suffix.
    """
    # imported here, because few functions need this library
    import trimesh

    path = check_mesh_suffix(path)
    # process=False: trimesh would otherwise merge vertices and reorder them.
    mesh = trimesh.Trimesh(
        vertices=vertices, faces=faces, vertex_colors=colors, vertex_normals=normals, process=False
    )
    file_type = path.suffix.lower()[1:]
    # trimesh names this option differently for each format
    export_options: dict[str, Any] = {
        "vertex_normal" if file_type == "ply" else "include_normals": normals is not None
    }
    # text for .obj, bytes for the other formats
    file_content: Any = mesh.export(file_type=file_type, **export_options)
    write_atomic(path, file_content.encode() if isinstance(file_content, str) else file_content)
    return path


def write_mrc(
    path: str | Path,
    sample: Callable[[slice], torch.Tensor],
    resolution: int,
    grid_step: float,
    on_progress: Progress | None = None,
) -> Path:
    """Write a density on a cube of grid points as an MRC volume of mode 2 (float32), with EG3D's axes.

    Section i, row j and column k hold the point with the x index N - 1 - i, the y index j and the z index k:
    EG3D reverses x, and its z varies fastest. The size of a voxel is 1, as in EG3D's files. A label in the
    header states the distance between grid points. The file is written block by block, and atomically.

    Args:
        path: path of the file.
        sample: function of a slice of x indices that returns the raw density [x, N, N] of these grid points.
        resolution: number N of grid points per axis.
        grid_step: distance between grid points in world units.
        on_progress: function that is called with ("density", number of finished x indices, N).

    Returns: the path.
    """
    # imported here, because few functions need this library
    import mrcfile

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with mrcfile.new_mmap(temporary_path, shape=(resolution,) * 3, mrc_mode=2, overwrite=True) as file:
            for start in range(0, resolution, block_planes(resolution**2)):
                stop = min(start + block_planes(resolution**2), resolution)
                block = sample(slice(start, stop)).numpy()
                # x is reversed
                file.data[resolution - stop : resolution - start] = block[::-1]
                file.flush()
                if on_progress is not None:
                    on_progress("density", stop, resolution)
            file.voxel_size = 1.0
            file.add_label(f"raw density, step {grid_step:.9g} world units, axes: -x, y, z")
            file.update_header_stats()
        # Renaming is atomic within one file system; the temporary file lies in the same folder.
        os.replace(temporary_path, path)
    finally:
        temporary_path.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh in world coordinates, with normals and colours of its vertices."""

    vertices: np.ndarray  # [V, 3] float32
    faces: np.ndarray  # [F, 3] int, corners in counter-clockwise order seen from outside
    normals: np.ndarray  # [V, 3] float32, outward unit normals
    colors: np.ndarray | None = None  # [V, 3] uint8

    def save(self, path: str | Path) -> Path:
        """Write the mesh as .ply, .obj or .glb, depending on the suffix, and return the path."""
        return save_mesh(path, self.vertices, self.faces, self.colors, self.normals)


@dataclass(frozen=True, kw_only=True)
class MeshReport:
    """Results of the checks of an exported mesh."""

    vertices: int  # number of vertices
    faces: int  # number of faces
    faces_extracted: int  # number of faces before the selection of a part and the decimation
    components_extracted: int  # number of connected parts before the selection of a part
    components: int  # number of connected parts
    open_edges: int  # number of half-edges without a partner, see `EdgeCounts`
    shared_edges: int  # number of repetitions of half-edges, see `EdgeCounts`
    watertight: bool  # every edge belongs to exactly two faces, which traverse it in opposite directions
    volume: float  # enclosed volume, world units cubed
    outward: bool  # watertight and of positive volume: the normals point outwards
    normals_down_density: float  # fraction of probed vertices along whose normal the density decreases, 0..1
    bounds: list[list[float]]  # smallest and largest x, y, z, world units

    def write(self, path: str | Path, **further_entries) -> None:
        """Write the report as a JSON file.

        Args:
            path: path of the file.
            further_entries: further entries of the file, by name.
        """
        write_atomic(path, (json.dumps({**asdict(self), **further_entries}, indent=1) + "\n").encode())


def export_mesh(
    field: Field, mesh_options: MeshOptions, on_progress: Progress | None = None
) -> tuple[Mesh, MeshReport]:
    """Extract the mesh of a density field, and check it.

    Required memory: the maps of two coordinates (134 MB for two maps at 512 points and 64 hidden units, 200
    MB for three maps), one layer of the grid, and about 250 bytes per extracted face. The grid is never
    completely in memory.

    Args:
        field: field of one shape.
        mesh_options: settings of the export.
        on_progress: function that is called with (name of the stage, number of finished units, number of all
            units).

    Returns: the mesh, and the results of its checks.

    Raises: ValueError if the density does not cross the level, or if the border leaves no grid points.

    >>> from eg3d_rlhf import load_generator, ws_of_seeds
    >>> generator = load_generator().generator
    >>> field = generator.field(ws_of_seeds(generator, [1]))
    >>> mesh, report = export_mesh(field, MeshOptions(resolution=32, colors=False))
    >>> report.components
    1
    """
    # a function that does nothing if no progress is shown
    report_progress = on_progress or (lambda stage, finished_count, total_count: None)
    grid = FieldGrid(field, mesh_options.resolution, mesh_options.border)
    vertices, faces = extract_field_mesh(
        grid, field.level if mesh_options.level is None else mesh_options.level, on_progress
    )
    extracted_face_count = len(faces)
    report_progress("parts", 0, 1)
    if mesh_options.component == "largest":
        vertices, faces, component_count = largest_part(vertices, faces)
    else:
        component_count, _ = find_parts(faces, len(vertices))
    report_progress("parts", 1, 1)
    if mesh_options.faces is not None:
        report_progress("decimation", 0, 1)
        vertices, faces = decimate(vertices, faces, mesh_options.faces)
        report_progress("decimation", 1, 1)
    colors = vertex_colors(field, vertices, on_progress) if mesh_options.colors else None
    report_progress("checks", 0, 1)
    mesh = Mesh(vertices, faces, vertex_normals(vertices, faces), colors)
    report = check_mesh(mesh, field, mesh_options, extracted_face_count, component_count)
    report_progress("checks", 1, 1)
    return mesh, report


def check_mesh(
    mesh: Mesh, field: Field, mesh_options: MeshOptions, extracted_face_count: int, component_count: int
) -> MeshReport:
    """Measure a mesh, and check whether it is closed and oriented outwards.

    Args:
        mesh: mesh to check.
        field: field of which it is the surface.
        mesh_options: settings of the export.
        extracted_face_count: number of faces before the selection of a part and the decimation.
        component_count: number of connected parts before the selection of a part.
    """
    edges = count_edges(mesh.faces)
    # positive only if the faces are oriented outwards
    volume = float(face_volumes(mesh.vertices, mesh.faces).sum())
    return MeshReport(
        vertices=len(mesh.vertices),
        faces=len(mesh.faces),
        faces_extracted=extracted_face_count,
        components_extracted=component_count,
        components=find_parts(mesh.faces, len(mesh.vertices))[0],
        open_edges=edges.open,
        shared_edges=edges.shared,
        watertight=edges.watertight,
        volume=volume,
        outward=edges.watertight and volume > 0,
        normals_down_density=normals_down_density(mesh, field, mesh_options),
        bounds=[mesh.vertices.min(axis=0).tolist(), mesh.vertices.max(axis=0).tolist()],
    )


@torch.no_grad()
def normals_down_density(mesh: Mesh, field: Field, mesh_options: MeshOptions) -> float:
    """Compute the fraction of vertices at which the density decreases along the outward normal.

    At each vertex, the density slightly outside is compared with the density slightly inside. At most 20,000
    vertices are tested, at equal intervals. Vertices on the caps that close the surface at the border of the
    cube are left out, because the field continues there. The result is 1 if there are no other vertices.

    Args:
        mesh: mesh to check.
        field: field of which it is the surface.
        mesh_options: settings of the export.
    """
    # distance between grid points in world units
    grid_step = field.bounds.side / (mesh_options.resolution - 1)
    centre = np.asarray(field.bounds.centre, dtype=mesh.vertices.dtype)
    # Two grid steps from the border: vertices of the caps lie at the border.
    is_inside = (
        np.abs(mesh.vertices - centre).max(axis=1)
        < field.bounds.side * (0.5 - mesh_options.border) - 2 * grid_step
    )
    vertex_indices = np.flatnonzero(is_inside)
    vertex_indices = vertex_indices[:: max(1, len(vertex_indices) // _PROBES)]
    if len(vertex_indices) == 0:
        return 1.0  # only caps
    points = torch.from_numpy(mesh.vertices[vertex_indices])
    offset = torch.from_numpy(mesh.normals[vertex_indices]) * (_PROBE_STEP * grid_step)
    return float((field.density(points + offset) < field.density(points - offset)).double().mean())


@torch.no_grad()
def vertex_colors(field: Field, vertices: np.ndarray, on_progress: Progress | None = None) -> np.ndarray:
    """Evaluate the colours of the radiance field at the vertices of a mesh.

    Args:
        field: field of one shape.
        vertices: world coordinates [V, 3].
        on_progress: function that is called with ("colours", number of finished vertices, V).

    Returns: colours [V, 3] uint8.
    """
    colors = np.empty((len(vertices), 3), dtype=np.uint8)
    for start in range(0, len(vertices), _COLOR_CHUNK):
        vertex_chunk = torch.from_numpy(vertices[start : start + _COLOR_CHUNK])
        colors[start : start + len(vertex_chunk)] = (
            # 0..1 -> 0..255
            (field.colour(vertex_chunk)[0].cpu() * 255).round().to(torch.uint8).numpy()
        )
        if on_progress is not None:
            on_progress("colours", start + len(vertex_chunk), len(vertices))
    return colors


def shape_suffix(name: str) -> str:
    """Return the suffix of a shape format: '.ply', '.obj', '.glb' or '.mrc'.

    Args:
        name: name of the format, with or without the dot, in upper or lower case.

    Raises: ValueError for another name.
    """
    suffix = "." + name.lower().removeprefix(".")
    if suffix not in SHAPE_SUFFIXES:
        raise ValueError(f"{name!r} is not a shape format. Choose one of {', '.join(SHAPE_SUFFIXES)}.")
    return suffix


def save_shape(
    path: str | Path, field: Field, mesh_options: MeshOptions, on_progress: Progress | None = None
) -> Path:
    """Write the shape of a density field, in the format that the suffix names.

    An .mrc file contains the density on a cube of grid points; other formats contain the surface as a mesh.

    Args:
        path: path of the file.
        field: field of one shape.
        mesh_options: settings of the export. For .mrc only the resolution and the border are used.
        on_progress: function that is called with (name of the stage, number of finished units, number of all
            units).

    Returns: the path.

    Raises: ValueError for another suffix, or for a level that the density does not cross.
    """
    path = Path(path)
    suffix = shape_suffix(path.suffix)
    if suffix == ".mrc":
        # The density is written on the grid of the options, without extracting a surface.
        grid = FieldGrid(field, mesh_options.resolution, mesh_options.border)
        return write_mrc(
            path,
            grid,
            mesh_options.resolution,
            field.bounds.side / (mesh_options.resolution - 1),
            on_progress,
        )
    mesh, _ = export_mesh(field, mesh_options, on_progress)
    return mesh.save(path)
