"""Export of the shape of a field: as a mesh (.ply, .obj, .glb), or as a density volume (.mrc).

A mesh is made in steps: isosurface, largest part, decimation, colours, checks.

Letters: V vertices, F faces, N grid points per axis, X, Y, Z = along x, y, z, P points, J hidden units, S =
cells along a brick's edge.
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
from eg3d_rlhf.geometry.mesh import (
    BRICK,
    Progress,
    SurfaceBuilder,
    block_planes,
    bricks_along,
    check_crossed,
    check_finite,
    count_edges,
    decimate,
    extract_mesh_blockwise,
    face_volumes,
    largest_part,
    outside_value,
    padded,
    parts,
    vertex_normals,
)
from eg3d_rlhf.geometry.settings import MeshOptions
from eg3d_rlhf.geometry.slab import SeparableDensity, SeparableField
from torch_utils.ops.slab_density import slab_density
from training.storage import write_atomic

# Isosurface of a field on a cube of grid points, without evaluating the density away from the surface. In the
# separable form h_j = A_j[x, y] + B_j[x, z] + C_j[y, z], the extremes of the maps over the index ranges of a
# brick bound every h_j in it. softplus increases, so over the brick     sum_j max(w_j, 0) softplus(max h_j) +
# min(w_j, 0) softplus(min h_j) + b  >=  sigma         >=  the same with max h_j and min h_j exchanged. A
# brick whose bounds lie on one side of the level contains no surface, and is neither evaluated nor meshed.
# Both bounds are densities of the same form on the grid of bricks, with 2 J hidden units. The bounds are
# exact: the surface equals that of the full volume.

OUTSIDE = -1000.0  # raw density of a trimmed border, as in EG3D's shape extraction
# Relative tolerance between a bound and the density: 64 rounding errors of float32 in sum |w| softplus.
_ROUNDING = 2.0**-17
# Fraction of undecided bricks above which finer bounds save more time than they cost.
_REFINE_SHARE = 0.15
# Fraction of a layer's bricks that are undecided above which evaluating the full layer is faster.
_DENSE_SHARE = 0.5
_DENSE_ROWS = 65  # rows of y in one call for a full layer


class FieldGrid:
    """A field on a cube of grid points, evaluated in ranges of x, for `extract_mesh_blockwise` and
    `write_mrc`.

    Args:
        field: one shape.
        resolution: grid points per axis, >= 2, on the corners of the scene cube.
        border: fraction of the cube's edge that is trimmed at each face, 0 <= border < 0.5; trimmed points
            have the density `OUTSIDE`.
    Raises: ValueError if no points remain inside the border.
    """

    def __init__(self, field: Field, resolution: int, border: float = 0.0):
        assert len(field) == 1 and 0 <= border < 0.5
        self.field = field
        self.resolution = resolution
        # smallest and largest density returned so far, without a trimmed border
        self.low = float("inf")
        self.high = float("-inf")
        self.axes: Sequence[torch.Tensor] = SlabSpec.of(field.bounds, resolution).axes()
        # Points at each face that have the density `OUTSIDE`
        self.trim = int(border * resolution)
        # indices along each axis that are not trimmed
        self.inside = slice(self.trim, resolution - self.trim)
        if resolution - 2 * self.trim < 2:
            raise ValueError(
                f"FieldGrid: expected at least 2 points inside the border, got a border of {border:g} with"
                f" {resolution} points. Reduce the border or increase the resolution."
            )

    @torch.no_grad()
    def separable(self, *axes: torch.Tensor) -> SeparableDensity | None:
        """Return the density as maps of two coordinates, or None if the field has no such form.

        Args: axes: x, y, z; by default the coordinates that are not trimmed.
        """
        x, y, z = axes or (axis[self.inside] for axis in self.axes)
        return self.field.separable(x, y, z) if isinstance(self.field, SeparableField) else None

    @torch.no_grad()
    def _block(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Compute the raw density [X, Y, Z] on the CPU at the product of world coordinates x [X], y [Y],
        z [Z].
        """
        density = self.separable(x, y, z)
        if density is None and isinstance(self.field, ProductField):
            block = self.field.density_product(x, y, z)[0].cpu()
        elif density is None:
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1).reshape(-1, 3)
            block = self.field.density(points)[0].cpu().reshape(len(x), len(y), len(z))
        else:
            # only the density goes through the CPU's memory, the maps stay on their device
            block = slab_density(density.maps, density.w, density.b, density.shape).cpu()
        self.low = min(self.low, float(block.min()))
        self.high = max(self.high, float(block.max()))
        return block

    def __call__(self, x: slice) -> torch.Tensor:
        """Return the raw density [x, Y, Z] of the grid points with these x indices."""
        low = self.inside.start
        high = self.inside.stop
        start = max(x.start, low)
        stop = min(x.stop, high)
        if low == 0:  # no trimmed border
            return self._block(self.axes[0][x], *self.axes[1:])
        block = torch.full((x.stop - x.start, self.resolution, self.resolution), OUTSIDE)
        if start < stop:
            y, z = (axis[low:high] for axis in self.axes[1:])
            block[start - x.start : stop - x.start, low:high, low:high] = self._block(
                self.axes[0][start:stop], y, z
            )
        return block


def extract_field_mesh(
    grid: FieldGrid, level: float, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Extract the surface sigma = level of a field's grid. The mesh equals that of `extract_mesh_blockwise`.

    The surface is closed at the border of the volume. A field without separable form goes through
    `extract_mesh_blockwise`, and so does one on a GPU, which evaluates the full grid faster than many small
    parts.

    Args: progress: called with ("density", x indices done, X).
    Returns: vertices [V, 3] float32 in world coordinates, and faces [F, 3] int32 in counter-clockwise order
    seen from outside.
    Raises: ValueError if sigma is not finite or the level is not crossed.
    """
    density = grid.separable()
    # Bounds assume that trimmed points lie below the level.
    if density is None or density.w.device.type != "cpu" or (grid.trim and level <= OUTSIDE):
        return extract_mesh_blockwise(
            grid, grid.axes, level, progress=progress, between=lambda: (grid.low, grid.high)
        )
    bounds = bound_bricks(density, level)
    axes = [axis[grid.inside].double().numpy() for axis in grid.axes]
    builder = SurfaceBuilder(axes, float(level))
    threads = torch.get_num_threads()
    # Bricks are evaluated in threads, each with serial operations. With parallel operations, thousands of
    # small ones would spend their time waiting at barriers.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            sampler = _LayerSampler(density, OUTSIDE if grid.trim else outside_value(level), pool)
            for number, wanted in enumerate(bounds.undecided):
                builder.add(number * BRICK, sampler.layer(number, wanted), wanted)
                if progress is not None:
                    progress("density", min((number + 1) * BRICK, len(axes[0])), len(axes[0]))
    finally:
        torch.set_num_threads(threads)
    if not ((bounds.any_below or sampler.low < level) and (bounds.any_above or sampler.high > level)):
        # The surface may consist of caps at the border only. All densities are evaluated to decide whether
        # the level is crossed, and to name their range in the error.
        for x in range(grid.resolution):
            grid(slice(x, x + 1))
        check_crossed(grid.low, grid.high, level)
    return builder.finish()


@dataclass(frozen=True)
class BrickBounds:
    """Result of the bounds on a grid."""

    undecided: np.ndarray  # bool [bricks along x, along y, along z]: may contain a part of the surface
    any_below: bool  # at least one brick lies certainly below the level
    any_above: bool  # at least one brick lies certainly above it


def bound_bricks(density: SeparableDensity, level: float) -> BrickBounds:
    """Compute the bounds of all bricks. If many remain undecided, also those of bricks of half the size."""
    coarse = bounds_of_size(density, level, BRICK)
    if coarse.undecided.mean() <= _REFINE_SHARE:
        return coarse
    fine = bounds_of_size(density, level, BRICK // 2)
    halves = np.zeros([2 * n for n in coarse.undecided.shape], dtype=bool)
    halves[tuple(slice(n) for n in fine.undecided.shape)] = fine.undecided
    x, y, z = coarse.undecided.shape
    # A brick remains undecided if the coarse bounds leave it so and the fine ones at least one of its eight
    # parts.
    undecided = coarse.undecided & halves.reshape(x, 2, y, 2, z, 2).any(axis=(1, 3, 5))
    return BrickBounds(undecided, coarse.any_below or fine.any_below, coarse.any_above or fine.any_above)


def bounds_of_size(density: SeparableDensity, level: float, size: int) -> BrickBounds:
    """Compute the bounds of bricks with `size` cells along an edge.

    Raises: ValueError if a map contains NaN or infinity.
    """
    low, high = zip(*(_map_extremes(m, density.shape, size) for m in density.maps), strict=True)
    # so that a non-finite density is an error here as it is for the full volume
    for least, greatest in zip(low, high, strict=True):
        check_finite(float(least.min()), float(greatest.max()))
    w = torch.cat([density.w.clamp(min=0), density.w.clamp(max=0)])  # [2 J]
    x, y, z = (bricks_along(n, size) for n in density.shape)
    shape = (x, y, z)
    # Hidden units 1..J have the weights max(w, 0), units J + 1..2 J the weights min(w, 0).
    upper = slab_density(
        [torch.cat(pair, dim=1) for pair in zip(high, low, strict=True)], w, density.b, shape
    )
    lower = slab_density(
        [torch.cat(pair, dim=1) for pair in zip(low, high, strict=True)], w, density.b, shape
    )
    largest = sum(m.abs().amax(dim=(0, 2, 3)) for m in (*low, *high))  # [J], at least |h_j| everywhere
    slack = _ROUNDING * (
        float((density.w.abs() * (largest + 1)).sum()) + abs(float(density.b)) + max(abs(level), 1.0)
    )
    # bricks without points outside the volume
    is_inner = np.ones((), dtype=bool)
    for axis, points in enumerate(density.shape):
        first = np.arange(shape[axis]) * size
        is_inner = is_inner & np.expand_dims(
            (first > 0) & (first + size <= points), tuple(i for i in range(3) if i != axis)
        )
    below = (upper < level - slack).numpy()
    above = (lower > level + slack).numpy()
    # A brick at the border that lies above the level contains a part of the cap.
    undecided = ~(below | (above & is_inner))
    return BrickBounds(undecided, bool(below.any()), bool(above.any()))


def _map_extremes(values: torch.Tensor, shape: Sequence[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a map's smallest and largest values over the grid points of each brick, faces included.

    Returns: [bricks, J, bricks, 1] and so on, in the layout of the map.
    """
    low = values
    high = values
    for dim, points in ((0, shape[0]), (2, shape[1]), (3, shape[2])):
        if values.shape[dim] == 1:
            continue
        # indices in the volume; a point outside repeats its neighbour, so it does not change the extremes
        starts = torch.arange(bricks_along(points, size)) * size - 1
        near = [(starts + step).clamp(0, points - 1) for step in range(size + 1)]
        least = low.index_select(dim, near[0])
        greatest = high.index_select(dim, near[0])
        for index in near[1:]:
            torch.minimum(least, low.index_select(dim, index), out=least)
            torch.maximum(greatest, high.index_select(dim, index), out=greatest)
        low = least
        high = greatest
    return low, high


class _LayerSampler:
    """Density of the undecided bricks, layer by layer.

    The value of a grid point that two bricks share is the one from its first evaluation. Values from two
    calls could differ by rounding, which would leave gaps at seams.
    """

    def __init__(self, density: SeparableDensity, outside: float, pool: ThreadPoolExecutor):
        self._density = density
        self._outside = outside
        self._pool = pool
        # smallest and largest density evaluated so far
        self.low = np.inf
        self.high = -np.inf
        sides = [padded(n) for n in density.shape[1:]]
        self._layer = np.full((BRICK + 1, *sides), outside, dtype=np.float32)
        # last plane of the previous layer, NaN where it was not evaluated
        self._shared = self._layer[0].copy()

    def layer(self, number: int, wanted: np.ndarray) -> np.ndarray:
        """Return a layer [S + 1, padded Y, padded Z] with the density in the bricks `wanted`.

        Elsewhere it contains old values or NaN.
        """
        points_x, points_y, points_z = self._density.shape
        # x index of the layer's first plane; -1 is outside
        first = number * BRICK - 1
        planes = slice(max(first, 0), min(first + BRICK + 1, points_x))
        inner = (slice(1, points_y + 1), slice(1, points_z + 1))
        self._layer[-1][inner] = np.nan
        if wanted.mean() > _DENSE_SHARE:
            # rows overlap by one, so each has at least two points
            rows = [slice(y, min(y + _DENSE_ROWS, points_y)) for y in range(0, points_y - 1, _DENSE_ROWS - 1)]
            columns = [[slice(0, points_z)]] * len(rows)
        else:
            chosen = np.flatnonzero(wanted.any(axis=1)).tolist()
            rows = [_points(row, points_y) for row in chosen]
            columns = [_runs(wanted[row], points_z) for row in chosen]
        self._fill(first, planes, rows, columns)
        # the layer reaches beyond the volume
        if first + BRICK + 1 > points_x:
            self._layer[points_x - first :] = self._outside
        evaluated = ~np.isnan(self._shared)
        self._layer[0][evaluated] = self._shared[evaluated]
        self._shared = self._layer[-1].copy()
        return self._layer

    def _fill(self, first: int, x: slice, rows: list[slice], columns: list[list[slice]]) -> None:
        """Evaluate ranges of y, each at its ranges of z, and write them into the layer, in order."""
        # `slab_density` distinguishes the maps by their sizes, so it needs two points along an axis at least.
        extra_planes = int(x.stop - x.start == 1)
        part = functools.partial(self._density.part, slice(x.start - extra_planes, x.stop))
        for y, runs, sampled in zip(rows, columns, self._pool.map(part, rows, columns), strict=True):
            values = sampled.numpy()[extra_planes:]
            self.low = min(self.low, float(values.min()))
            self.high = max(self.high, float(values.max()))
            # + 1: index 0 of the padded axes is outside
            target = self._layer[x.start - first : x.stop - first, y.start + 1 : y.stop + 1]
            end = 0
            for run in runs:
                start = end
                end = end + run.stop - run.start
                target[:, :, run.start + 1 : run.stop + 1] = values[:, :, start:end]


def _points(brick: int, points: int) -> slice:
    """Return the indices of the grid points in one brick of a row, at least two."""
    stop = min(brick * BRICK + BRICK, points)
    return slice(max(min(brick * BRICK - 1, stop - 2), 0), stop)


def _runs(wanted: np.ndarray, points: int) -> list[slice]:
    """Return ranges of indices of the grid points in the selected bricks of a row, at least two points in
    all.
    """
    # pairs: first selected brick of a run, first brick after it
    change = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).reshape(-1, 2)
    runs = [slice(max(first * BRICK - 1, 0), min(stop * BRICK, points)) for first, stop in change.tolist()]
    if len(runs) == 1 and runs[0].stop - runs[0].start == 1:
        return [slice(points - 2, points)]
    return runs


MESH_SUFFIXES = (".ply", ".obj", ".glb")
_PROBES = 20000  # largest number of vertices at which the normals are compared with the density
_PROBE_STEP = 0.25  # distance of the two probes from the surface, in grid steps
_COLOR_CHUNK = 1 << 18  # vertices that are coloured between two calls of the progress function
SHAPE_SUFFIXES = (*MESH_SUFFIXES, ".mrc")


def check_mesh_suffix(path: str | Path, who: str = "save_mesh") -> Path:
    """Return the path if its suffix is that of a mesh format. Raises: ValueError otherwise."""
    path = Path(path)
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise ValueError(
            f"{who}: expected a file ending in {', '.join(MESH_SUFFIXES)}, got {path.name!r}. Change the"
            " suffix."
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

    Args: vertices: [V, 3] world coordinates; faces: [F, 3]; colors: [V, 3] uint8; normals: [V, 3], unit,
    pointing outwards.
    Returns: the path.
    Raises: ValueError for another suffix.
    """
    import trimesh

    path = check_mesh_suffix(path)
    # process=False: trimesh would otherwise merge vertices and reorder them.
    mesh = trimesh.Trimesh(
        vertices=vertices, faces=faces, vertex_colors=colors, vertex_normals=normals, process=False
    )
    kind = path.suffix.lower()[1:]
    options: dict[str, Any] = {"vertex_normal" if kind == "ply" else "include_normals": normals is not None}
    data: Any = mesh.export(file_type=kind, **options)
    write_atomic(path, data.encode() if isinstance(data, str) else data)
    return path


def write_mrc(
    path: str | Path,
    sample: Callable[[slice], torch.Tensor],
    resolution: int,
    step: float,
    progress: Progress | None = None,
) -> Path:
    """Write a density cube as an MRC volume of mode 2 (float32), block by block, with EG3D's order of axes.

    Section i, row j, column k hold the point with x index N - 1 - i, y index j and z index k: EG3D reverses
    x, and its z varies fastest. The size of a voxel is 1, as in EG3D's files. A label in the header gives the
    step in world units.

    Args:
        sample: as for `extract_mesh_blockwise`.
        resolution: N.
        step: distance between grid points, world units.
        progress: called with ("density", done, N).
    Returns: the path. The file is written atomically.
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
                # x is reversed
                file.data[resolution - stop : resolution - start] = block[::-1]
                file.flush()
                if progress is not None:
                    progress("density", stop, resolution)
            file.voxel_size = 1.0
            file.add_label(f"raw density, step {step:.9g} world units, axes: -x, y, z")
            file.update_header_stats()
        # Atomic on one file system; the temporary file is in the same folder
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh in world coordinates."""

    vertices: np.ndarray  # [V, 3] float32
    faces: np.ndarray  # [F, 3] int, counter-clockwise seen from outside
    normals: np.ndarray  # [V, 3] float32, unit, outwards
    colors: np.ndarray | None = None  # [V, 3] uint8

    def save(self, path: str | Path) -> Path:
        """Write the mesh as .ply, .obj or .glb; see `save_mesh`."""
        return save_mesh(path, self.vertices, self.faces, self.colors, self.normals)


@dataclass(frozen=True, kw_only=True)
class MeshReport:
    """Results of the checks of a mesh as it is written."""

    vertices: int
    faces: int
    faces_extracted: int  # before the selection of a part and the decimation
    components_extracted: int
    components: int
    open_edges: int  # half-edges without a partner, see `EdgeCounts`
    shared_edges: int
    watertight: bool  # every edge belongs to exactly two faces, which traverse it in opposite directions
    volume: float  # enclosed volume, world units cubed
    outward: bool  # watertight and of positive volume: the normals point outwards
    normals_down_density: float  # fraction of probed vertices along whose normal the density decreases, 0..1
    bounds: list[list[float]]  # smallest and largest x, y, z, world units

    def write(self, path: str | Path, **more) -> None:
        """Write the report as JSON. `more` adds entries."""
        write_atomic(path, (json.dumps({**asdict(self), **more}, indent=1) + "\n").encode())


def export_mesh(
    field: Field, options: MeshOptions, progress: Progress | None = None
) -> tuple[Mesh, MeshReport]:
    """Extract the mesh of one field, and check it.

    Memory: the maps of two coordinates (134 MB at 512 points and 64 hidden units, 200 MB for layouts that
    have all three), a layer of the grid, and about 250 bytes per extracted face. The grid is never in memory
    as a whole.

    Args: progress: called with (stage, units done, units in all).
    Raises: ValueError if the level is not crossed, or for a border that leaves no points.

    >>> from eg3d_rlhf import load_generator, ws_of_seeds
    >>> generator = load_generator().generator
    >>> field = generator.field(ws_of_seeds(generator, [1]))
    >>> mesh, report = export_mesh(field, MeshOptions(resolution=32, colors=False))
    >>> report.components
    1
    """
    report_progress = progress or (lambda stage, done, total: None)
    grid = FieldGrid(field, options.resolution, options.border)
    vertices, faces = extract_field_mesh(
        grid, field.level if options.level is None else options.level, progress
    )
    extracted = len(faces)
    report_progress("parts", 0, 1)
    if options.component == "largest":
        vertices, faces, components = largest_part(vertices, faces)
    else:
        components, _ = parts(faces, len(vertices))
    report_progress("parts", 1, 1)
    if options.faces is not None:
        report_progress("decimation", 0, 1)
        vertices, faces = decimate(vertices, faces, options.faces)
        report_progress("decimation", 1, 1)
    colors = vertex_colors(field, vertices, progress) if options.colors else None
    report_progress("checks", 0, 1)
    mesh = Mesh(vertices, faces, vertex_normals(vertices, faces), colors)
    report = check_mesh(mesh, field, options, extracted, components)
    report_progress("checks", 1, 1)
    return mesh, report


def check_mesh(mesh: Mesh, field: Field, options: MeshOptions, extracted: int, components: int) -> MeshReport:
    """Measure a mesh. `extracted` and `components` count faces and parts before the selection of a part."""
    edges = count_edges(mesh.faces)
    volume = float(face_volumes(mesh.vertices, mesh.faces).sum())
    return MeshReport(
        vertices=len(mesh.vertices),
        faces=len(mesh.faces),
        faces_extracted=extracted,
        components_extracted=components,
        components=parts(mesh.faces, len(mesh.vertices))[0],
        open_edges=edges.open,
        shared_edges=edges.shared,
        watertight=edges.watertight,
        volume=volume,
        outward=edges.watertight and volume > 0,
        normals_down_density=normals_down_density(mesh, field, options),
        bounds=[mesh.vertices.min(axis=0).tolist(), mesh.vertices.max(axis=0).tolist()],
    )


@torch.no_grad()
def normals_down_density(mesh: Mesh, field: Field, options: MeshOptions) -> float:
    """Compute the fraction of vertices at which the density decreases along the outward normal.

    At most 20,000 evenly selected vertices are probed: the density outside is compared with the density
    inside. Vertices on the caps that close the surface at the border of the cube are left out, because the
    field continues there.
    """
    step = field.bounds.side / (options.resolution - 1)
    centre = np.asarray(field.bounds.centre, dtype=mesh.vertices.dtype)
    inside = (
        np.abs(mesh.vertices - centre).max(axis=1) < field.bounds.side * (0.5 - options.border) - 2 * step
    )
    chosen = np.flatnonzero(inside)
    chosen = chosen[:: max(1, len(chosen) // _PROBES)]
    if len(chosen) == 0:
        return 1.0  # only caps
    points = torch.from_numpy(mesh.vertices[chosen])
    offset = torch.from_numpy(mesh.normals[chosen]) * (_PROBE_STEP * step)
    return float((field.density(points + offset) < field.density(points - offset)).double().mean())


@torch.no_grad()
def vertex_colors(field: Field, vertices: np.ndarray, progress: Progress | None = None) -> np.ndarray:
    """Evaluate the colours [V, 3] uint8 of the radiance field at vertices [V, 3]."""
    colors = np.empty((len(vertices), 3), dtype=np.uint8)
    for start in range(0, len(vertices), _COLOR_CHUNK):
        part = torch.from_numpy(vertices[start : start + _COLOR_CHUNK])
        colors[start : start + len(part)] = (
            (field.colour(part)[0].cpu() * 255).round().to(torch.uint8).numpy()
        )
        if progress is not None:
            progress("colours", start + len(part), len(vertices))
    return colors


def shape_suffix(name: str) -> str:
    """Return '.ply', '.obj', '.glb' or '.mrc' for the name of a format, given with or without the dot.

    Raises: ValueError for another name.
    """
    suffix = "." + name.lower().removeprefix(".")
    if suffix not in SHAPE_SUFFIXES:
        raise ValueError(
            f"expected a shape format, one of {', '.join(SHAPE_SUFFIXES)}, got {name!r}. Choose one of them."
        )
    return suffix


def save_shape(
    path: str | Path, field: Field, options: MeshOptions, progress: Progress | None = None
) -> Path:
    """Write the shape of a field: the density cube (.mrc), or its surface as a mesh (.ply, .obj, .glb).

    An .mrc file uses only the resolution and the border of the options.
    Raises: ValueError for another suffix, or for a level that the density does not cross.
    """
    path = Path(path)
    suffix = shape_suffix(path.suffix)
    if suffix == ".mrc":
        grid = FieldGrid(field, options.resolution, options.border)
        return write_mrc(
            path, grid, options.resolution, field.bounds.side / (options.resolution - 1), progress
        )
    mesh, _ = export_mesh(field, options, progress)
    return mesh.save(path)
