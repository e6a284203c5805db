"""From a field to a file: isosurface, largest part, decimation, checks and colours (.ply, .obj, .glb), or the
density itself (.mrc).

Letters: V vertices, F faces, N grid points per axis, X, Y, Z = along x, y, z, P points, J hidden units,
S = cells along a brick's edge.
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

# The surface of a field on a cube of grid points, without the density away from it. In the separable form
# h_j = A_j[x, y] + B_j[x, z] + C_j[y, z] the extremes of the maps over a brick's index ranges bound every h_j
# in it, and softplus rises, so that over the brick
#     sum_j max(w_j, 0) softplus(max h_j) + min(w_j, 0) softplus(min h_j) + b  >=  sigma
#         >=  the same with max h_j and min h_j exchanged.
# A brick whose bound lies on one side of the level holds no surface and is neither evaluated nor meshed. Both
# bounds are densities of the same form on the grid of bricks, with 2 J hidden units. Nothing is guessed: the
# surface is that of the whole volume.

OUTSIDE = -1000.0  # raw density of a trimmed border, as EG3D's shape extraction sets it
# of sum |w| softplus: 64 rounding errors of float32, for the difference between a bound and the density
# itself
_ROUNDING = 2.0**-17
_REFINE_SHARE = 0.15  # of the bricks left undecided, above which finer bounds save more than they cost
_DENSE_ROWS = 65  # rows of y in one call then
# of a layer's bricks left undecided, above which evaluating all of it in one call is faster
_DENSE_SHARE = 0.5


class FieldGrid:
    """A field on a cube of grid points, given out in ranges of x: what `extract_mesh_blockwise` and
    `write_mrc` read.

    Args:
        field: the field.
        resolution: grid points per axis, >= 2, on the corners of the scene cube.
        border: share of the cube's edge that is trimmed from each face, 0 <= border < 0.5; trimmed points
            hold `OUTSIDE`.
    Raises: ValueError where the border leaves nothing.
    """

    def __init__(self, field: Field, resolution: int, border: float = 0.0):
        assert len(field) == 1 and 0 <= border < 0.5
        self.field = field
        self.resolution = resolution
        # of the densities given out so far, a trimmed border's apart
        self.low = float("inf")
        self.high = float("-inf")
        self.axes: Sequence[torch.Tensor] = SlabSpec.of(field.bounds, resolution).axes()
        self.trim = int(border * resolution)  # points from each face that hold `OUTSIDE`
        # grid points along each axis that are not trimmed
        self.inside = slice(self.trim, resolution - self.trim)
        if resolution - 2 * self.trim < 2:
            raise ValueError(
                f"FieldGrid: expected at least 2 points inside the border, got a border of {border:g} on"
                f" {resolution} points."
            )

    @torch.no_grad()
    def separable(self, *axes: torch.Tensor) -> SeparableDensity | None:
        """The density at x, y, z, else of the points that are not trimmed, as maps; None where the planes
        have no such form.
        """
        x, y, z = axes or (axis[self.inside] for axis in self.axes)
        return self.field.separable(x, y, z) if isinstance(self.field, SeparableField) else None

    @torch.no_grad()
    def _block(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Raw density [X, Y, Z] on the CPU at the product of world coordinates x [X], y [Y], z [Z]."""
        density = self.separable(x, y, z)
        if density is None and isinstance(self.field, ProductField):
            block = self.field.density_product(x, y, z)[0].cpu()
        elif density is None:
            points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1).reshape(-1, 3)
            block = self.field.density(points)[0].cpu().reshape(len(x), len(y), len(z))
        else:
            block = slab_density(density.maps, density.w, density.b, density.shape).cpu()
        self.low = min(self.low, float(block.min()))
        self.high = max(self.high, float(block.max()))
        return block

    def __call__(self, x: slice) -> torch.Tensor:
        """Raw density [x, Y, Z] of the grid points with these x indices."""
        low = self.inside.start
        high = self.inside.stop
        start = max(x.start, low)
        stop = min(x.stop, high)
        if low == 0:
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
    """The surface sigma = level of a field's grid, the same as `extract_mesh_blockwise` gives; closed at the
    border of the volume.

    A field without separable form, or on a GPU (which evaluates everything sooner than many small parts),
    goes through `extract_mesh_blockwise`.

    Args: progress: called with ("density", x indices done, X).
    Returns: vertices [V, 3] float32 in world coordinates, faces [F, 3] int32 wound counter-clockwise seen
        from outside.
    Raises: ValueError when sigma is not finite or the level is not crossed.
    """
    density = grid.separable()
    if density is None or density.w.device.type != "cpu" or (grid.trim and level <= OUTSIDE):
        return extract_mesh_blockwise(
            grid, grid.axes, level, progress=progress, between=lambda: (grid.low, grid.high)
        )
    bounds = bound_bricks(density, level)
    axes = [axis[grid.inside].double().numpy() for axis in grid.axes]
    builder = SurfaceBuilder(axes, float(level))
    threads = torch.get_num_threads()
    # in each of as many threads: thousands of small operations would spend their time in barriers
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
        for x in range(grid.resolution):  # no surface but caps was found: which densities are there?
            grid(slice(x, x + 1))
        check_crossed(grid.low, grid.high, level)
    return builder.finish()


@dataclass(frozen=True)
class BrickBounds:
    """What the bounds tell of a grid."""

    undecided: np.ndarray  # bool [bricks along x, along y, along z]: may hold a part of the surface
    any_below: bool  # some brick lies below the level for certain
    any_above: bool


def bound_bricks(density: SeparableDensity, level: float) -> BrickBounds:
    """Bounds of all bricks; where they leave much undecided, also those of half the size."""
    coarse = bounds_of_size(density, level, BRICK)
    if coarse.undecided.mean() <= _REFINE_SHARE:
        return coarse
    fine = bounds_of_size(density, level, BRICK // 2)
    halves = np.zeros([2 * n for n in coarse.undecided.shape], dtype=bool)
    halves[tuple(slice(n) for n in fine.undecided.shape)] = fine.undecided
    x, y, z = coarse.undecided.shape
    undecided = coarse.undecided & halves.reshape(x, 2, y, 2, z, 2).any(axis=(1, 3, 5))
    return BrickBounds(undecided, coarse.any_below or fine.any_below, coarse.any_above or fine.any_above)


def bounds_of_size(density: SeparableDensity, level: float, size: int) -> BrickBounds:
    """Bounds of the bricks with `size` cells along an edge.

    Raises: ValueError where a map holds NaN or infinity.
    """
    low, high = zip(*(_map_extremes(m, density.shape, size) for m in density.maps), strict=True)
    for least, greatest in zip(low, high, strict=True):
        check_finite(float(least.min()), float(greatest.max()))
    w = torch.cat([density.w.clamp(min=0), density.w.clamp(max=0)])  # [2 J]
    x, y, z = (bricks_along(n, size) for n in density.shape)
    shape = (x, y, z)
    upper = slab_density(
        [torch.cat(pair, dim=1) for pair in zip(high, low, strict=True)], w, density.b, shape
    )
    lower = slab_density(
        [torch.cat(pair, dim=1) for pair in zip(low, high, strict=True)], w, density.b, shape
    )
    reach = sum(m.abs().amax(dim=(0, 2, 3)) for m in (*low, *high))  # [J], no less than any |h_j|
    slack = _ROUNDING * (
        float((density.w.abs() * (reach + 1)).sum()) + abs(float(density.b)) + max(abs(level), 1.0)
    )
    whole = np.ones((), dtype=bool)
    for axis, points in enumerate(density.shape):
        first = np.arange(shape[axis]) * size
        whole = whole & np.expand_dims(
            (first > 0) & (first + size <= points), tuple(i for i in range(3) if i != axis)
        )
    below = (upper < level - slack).numpy()
    above = (lower > level + slack).numpy()
    undecided = ~(below | (above & whole))  # next to the outside, a brick above the level has its cap
    return BrickBounds(undecided, bool(below.any()), bool(above.any()))


def _map_extremes(values: torch.Tensor, shape: Sequence[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A map's least and greatest values over the grid points of each brick, its faces included:
    [bricks, J, bricks, 1] and so on.
    """
    low = values
    high = values
    for dim, points in ((0, shape[0]), (2, shape[1]), (3, shape[2])):
        if values.shape[dim] == 1:
            continue
        # in grid points of the volume; the outside repeats its neighbour
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
    """Density of the undecided bricks, layer by layer. Every grid point keeps the value that it was first
    given, so that no seam opens.
    """

    def __init__(self, density: SeparableDensity, outside: float, pool: ThreadPoolExecutor):
        self._density = density
        self._outside = outside
        self._pool = pool
        # of what was evaluated
        self.low = np.inf
        self.high = -np.inf
        sides = [padded(n) for n in density.shape[1:]]
        self._layer = np.full((BRICK + 1, *sides), outside, dtype=np.float32)
        self._shared = self._layer[0].copy()  # last plane of the layer before, NaN where it was not evaluated

    def layer(self, number: int, wanted: np.ndarray) -> np.ndarray:
        """Layer [S + 1, padded Y, padded Z]; holds the density in the bricks `wanted`, old or no values
        elsewhere.
        """
        points_x, points_y, points_z = self._density.shape
        first = number * BRICK - 1  # x index of the layer's first plane; -1 is outside
        planes = slice(max(first, 0), min(first + BRICK + 1, points_x))
        inner = (slice(1, points_y + 1), slice(1, points_z + 1))
        self._layer[-1][inner] = np.nan
        if wanted.mean() > _DENSE_SHARE:
            # two rows or more
            rows = [slice(y, min(y + _DENSE_ROWS, points_y)) for y in range(0, points_y - 1, _DENSE_ROWS - 1)]
            columns = [[slice(0, points_z)]] * len(rows)
        else:
            chosen = np.flatnonzero(wanted.any(axis=1)).tolist()
            rows = [_points(row, points_y) for row in chosen]
            columns = [_runs(wanted[row], points_z) for row in chosen]
        self._fill(first, planes, rows, columns)
        if first + BRICK + 1 > points_x:
            self._layer[points_x - first :] = self._outside
        known = ~np.isnan(self._shared)
        self._layer[0][known] = self._shared[known]
        self._shared = self._layer[-1].copy()
        return self._layer

    def _fill(self, first: int, x: slice, rows: list[slice], columns: list[list[slice]]) -> None:
        """Evaluate ranges of y, each at its runs of z, and put them into the layer, in order."""
        more = int(x.stop - x.start == 1)  # at one point along an axis the maps cannot be told apart
        part = functools.partial(self._density.part, slice(x.start - more, x.stop))
        for y, runs, sampled in zip(rows, columns, self._pool.map(part, rows, columns), strict=True):
            values = sampled.numpy()[more:]
            self.low = min(self.low, float(values.min()))
            self.high = max(self.high, float(values.max()))
            target = self._layer[x.start - first : x.stop - first, y.start + 1 : y.stop + 1]
            end = 0
            for run in runs:
                start = end
                end = end + run.stop - run.start
                target[:, :, run.start + 1 : run.stop + 1] = values[:, :, start:end]


def _points(brick: int, points: int) -> slice:
    """Indices, at least two, of the grid points in one brick of a row."""
    stop = min(brick * BRICK + BRICK, points)
    return slice(max(min(brick * BRICK - 1, stop - 2), 0), stop)


def _runs(wanted: np.ndarray, points: int) -> list[slice]:
    """Runs of indices, two points or more in all, of the grid points in the chosen bricks of a row."""
    # first chosen brick, first that is not
    change = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).reshape(-1, 2)
    runs = [slice(max(first * BRICK - 1, 0), min(stop * BRICK, points)) for first, stop in change.tolist()]
    if len(runs) == 1 and runs[0].stop - runs[0].start == 1:
        return [slice(points - 2, points)]
    return runs


MESH_SUFFIXES = (".ply", ".obj", ".glb")
_PROBES = 20000  # vertices at which the normals are held against the density
_PROBE_STEP = 0.25  # distance of the two probes from the surface, in grid steps
_COLOR_CHUNK = 1 << 18  # vertices coloured between two calls of the progress function
SHAPE_SUFFIXES = (*MESH_SUFFIXES, ".mrc")


def check_mesh_suffix(path: str | Path, who: str = "save_mesh") -> Path:
    """The path, where its suffix names a mesh format; ValueError otherwise."""
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
    """Write the mesh as .ply (binary), .obj or .glb, by the suffix, atomically; folders are made as needed.

    Args: vertices [V, 3] world coordinates; faces [F, 3]; colors [V, 3] uint8; normals [V, 3] of unit length,
        pointing outwards.
    Returns: the path written.
    Raises: ValueError for another suffix.
    """
    import trimesh

    path = check_mesh_suffix(path)
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

    Section i, row j, column k hold the point with x index N - 1 - i, y index j and z index k: EG3D flips x
    and stores z fastest. One cell is one unit of length, as in EG3D's files; a label in the header names the
    world step.

    Args: sample as for `extract_mesh_blockwise`; resolution N; step: world units between grid points;
        progress: ("density", done, N).
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


def export_mesh(
    field: Field, options: MeshOptions, progress: Progress | None = None
) -> tuple[Mesh, MeshReport]:
    """Mesh of one field, and its checks.

    Memory: the maps of two coordinates (134 MB at 512 points and 64 hidden units, 200 MB where a layout has
    all three), a layer of the grid, and about 250 bytes per extracted face; the grid is never held as a
    whole.

    Args: progress: called with (stage, units done, units in all).
    Raises: ValueError when the level is not crossed, or for a border that leaves nothing.

    >>> from eg3d_rlhf import load_generator, ws_of_seeds
    >>> generator = load_generator().generator
    >>> field = generator.field(ws_of_seeds(generator, [1]))
    >>> mesh, report = export_mesh(field, MeshOptions(resolution=32, colors=False))
    >>> report.components
    1
    """
    tell = progress or (lambda stage, done, total: None)
    grid = FieldGrid(field, options.resolution, options.border)
    vertices, faces = extract_field_mesh(
        grid, field.level if options.level is None else options.level, progress
    )
    extracted = len(faces)
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
    report = check_mesh(mesh, field, options, extracted, components)
    tell("checks", 1, 1)
    return mesh, report


def check_mesh(mesh: Mesh, field: Field, options: MeshOptions, extracted: int, components: int) -> MeshReport:
    """Measure a mesh; `found` faces in `components` parts were extracted."""
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
    """Share of (at most 20,000, evenly chosen) vertices at which the density outside, along the normal, is
    below the density inside.

    Vertices on the caps that close the surface at the border of the cube are left out: there the field does
    not end.
    """
    step = field.bounds.side / (options.resolution - 1)
    centre = np.asarray(field.bounds.centre, dtype=mesh.vertices.dtype)
    inside = (
        np.abs(mesh.vertices - centre).max(axis=1) < field.bounds.side * (0.5 - options.border) - 2 * step
    )
    chosen = np.flatnonzero(inside)
    chosen = chosen[:: max(1, len(chosen) // _PROBES)]
    if len(chosen) == 0:
        return 1.0
    points = torch.from_numpy(mesh.vertices[chosen])
    offset = torch.from_numpy(mesh.normals[chosen]) * (_PROBE_STEP * step)
    return float((field.density(points + offset) < field.density(points - offset)).double().mean())


@torch.no_grad()
def vertex_colors(field: Field, vertices: np.ndarray, progress: Progress | None = None) -> np.ndarray:
    """Colours [V, 3] uint8 of the radiance field at vertices [V, 3]."""
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
    """'.ply', '.obj', '.glb' or '.mrc' from a format's name, with or without the dot.

    Raises: ValueError for another one.
    """
    suffix = "." + name.lower().removeprefix(".")
    if suffix not in SHAPE_SUFFIXES:
        raise ValueError(
            f"expected a shape format of {', '.join(SHAPE_SUFFIXES)}, got {name!r}. Choose one of them."
        )
    return suffix


def save_shape(
    path: str | Path, field: Field, options: MeshOptions, progress: Progress | None = None
) -> Path:
    """Write the shape of a field: the density cube (.mrc), or its surface as a mesh (.ply, .obj, .glb).

    Of the options an .mrc has use for the resolution and the border only.
    Raises: ValueError for another suffix, or a level that the density does not cross.
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
