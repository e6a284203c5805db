"""Render the images and write the meshes that end a reward run.

They show the same latents from the front and from the back, before and after tuning, and a turntable. A rule
selects the latents: the first `POOL` evaluation seeds are ordered by their rewards before tuning, and those
at equal steps from the lowest to the highest are shown (of six: lowest, 20 %, 40 %, 60 %, 80 %, highest). For
heads of people, the comparison also shows the untuned shape after the strongest label-free post-processing,
and the ground-truth head of the latent. Loose parts of a shape are rendered, not removed.

Letters: R pixels per edge of a cell, n grid points along x, y, z.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
from PIL import Image
from torch import Tensor

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.field import Field, RenderOptions, render_each
from eg3d_rlhf.core.seeds import EVALUATION
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import heads, heldout_evaluators
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.filters import FILTERS
from eg3d_rlhf.experiments.media.rendering import png
from eg3d_rlhf.experiments.media.sheet import (
    SUPERSAMPLE,
    Row,
    View,
    light,
    look,
    paint,
    sheet,
    shrink,
    to_uint8,
)
from eg3d_rlhf.generators import Generator, camera, device_of, latents, ws_of_seeds
from eg3d_rlhf.geometry.level_set import LevelSet, sample
from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.measures.people import shape_grids
from eg3d_rlhf.measures.surface import change_summary, median_change
from training.dataset import ImageFolderDataset
from training.heads import people, people_mesh
from training.progress import tqdm
from training.rendering.cameras import RaySampler, unpack_label
from training.storage import write_atomic

COMPARISON = "comparison.png"
TURNTABLE = "turntable.webp"
PAIRS = "pairs.png"
CHOSEN = "latents of the images"  # key in a comparison's memory
POOL = heldout_evaluators.HEADS  # number of evaluation latents among which the rule selects
CHANGED = 64  # latents in the median change of the surface
# camera of the front view: radians from frontal
YAW = 0.45
PITCH = -0.08
BACK_VIEW = (math.pi - 0.4, -0.2)  # yaw and pitch of the back view, radians
CROP = (0.13, 0.09, 0.87, 0.85)  # part of a render that is shown: left, top, right, bottom, as shares
NAMES = 150  # width of the row headings, pixels
# images up to this size are rendered from the field at a cell's size; larger ones come from the
# super-resolution
OWN_PIXELS = 128
GRID = 64  # points per edge of the grids of post-processing
SMOOTHED = 0.7  # voxels; standard deviation of the Gaussian that removes the grid's steps
FRAME_MS = 90  # of the turntable, milliseconds per frame
WEBP_QUALITY = 80  # 0 to 100


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Sizes of the images."""

    shown: int = 6  # latents in the comparison, >= 1
    meshes: int = 3  # latents of which meshes are written, at most `shown`
    resolution: int = 128  # grid points per edge from which surfaces are extracted, >= 8
    cell: int = 256  # pixels per edge of a render in the comparison, >= 16
    film: int = 320  # pixels per edge of a render in the turntable
    thumb: int = 208  # pixels per edge of a render in a contact sheet
    rays: int = 128  # per edge of the colour renders, which are resized to a cell
    turns: int = 28  # views of the turntable, >= 2
    samples: int = 48  # per ray in each pass: enough that sampling noise is not visible


USUAL = ImageOptions()


@dataclass(frozen=True)
class Side:
    """Field and surface of one latent under one network."""

    field: Field
    surface: LevelSet

    @classmethod
    def of(cls, generator: Generator, ws: Tensor, resolution: int) -> "Side":
        """Extract the shape of ws [1, L, W] on `resolution` grid points per edge."""
        with torch.no_grad():
            field = generator.field(ws)
            return cls(field, LevelSet.of(field, resolution))


def write_pictures(comparison: Comparison, folder: Path, o: ImageOptions = USUAL) -> list[str]:
    """Write comparison.png, turntable.webp and meshes/ of the chosen latents; return the files' names."""
    seeds = chosen(comparison, o.shown)
    columns = [
        Column.from_seed(comparison, seed, o.resolution)
        for seed in tqdm(seeds, desc="shapes before and after", unit="head")
    ]
    write_atomic(folder / COMPARISON, png(comparison_image(comparison, columns, o)))
    write_atomic(folder / TURNTABLE, webp(turntable(comparison, columns[0], o)))
    save_meshes(
        [(column.before, column.after) for column in columns[: o.meshes]],
        seeds[: o.meshes],
        folder / "meshes",
    )
    return [COMPARISON, TURNTABLE, "meshes/*.ply"]


def evaluation_psi(comparison: Comparison) -> float:
    """Return the truncation psi at which shapes are shown.

    Heads of people are not truncated (psi 1), since a truncated latent has no ground-truth head.
    """
    return 1.0 if comparison.of_people else comparison.psi


def chosen(comparison: Comparison, shown: int = USUAL.shown) -> list[int]:
    """Select seeds by the module's rule, lowest reward before tuning first.

    They are kept in the comparison's memory. A worker process has no reward, and starts with that memory.
    """
    if CHOSEN not in comparison.memory:
        pool = EVALUATION.take(POOL)
        # a stable sort: equal rewards keep the order of their seeds on every machine
        ranked = (
            comparison.scores(comparison.before, pool, evaluation_psi(comparison))
            .argsort(stable=True)
            .tolist()
        )
        comparison.memory[CHOSEN] = [
            pool[ranked[round(place)]] for place in np.linspace(0, len(pool) - 1, shown)
        ]
    return comparison.memory[CHOSEN]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One latent under both networks; for heads of people, also post-processed and as ground truth."""

    seed: int
    before: Side
    after: Side
    filtered: LevelSet | None = None  # the untuned shape after post-processing
    head: people.Head | None = None  # the ground truth, as a mesh
    ground_truth: LevelSet | None = None  # the surface of `head` on a grid

    @classmethod
    @torch.no_grad()
    def from_seed(cls, comparison: Comparison, seed: int, resolution: int) -> "Column":
        """Extract all shapes of a latent that the comparison shows."""
        before, after = (
            Side.of(g.generator, comparison.ws(g, [seed], evaluation_psi(comparison)), resolution)
            for g in (comparison.before, comparison.after)
        )
        if not comparison.of_people:
            return cls(seed=seed, before=before, after=after)
        z = latents([seed], comparison.before.generator.z_dim)
        (head,) = people.named_people(z)
        ground_truth = level_set_from_grid(people_mesh.whole_grids(z, GRID)[0])
        return cls(
            seed=seed,
            before=before,
            after=after,
            filtered=filtered(before.field, filter_name(comparison)),
            head=head,
            ground_truth=ground_truth,
        )


def filter_name(comparison: Comparison) -> str:
    """Return the name of the strongest label-free post-processing method, chosen on validation latents.

    The choice ignores how much the method degrades intact heads.
    """
    return list(FILTERS)[int(heldout_evaluators.seen(comparison, "post-processing")["any_method"][0])]


def filtered(field: Field, name: str) -> LevelSet:
    """Apply a post-processing method to the single shape of a field, and smooth the result for display.

    The methods work on voxels, whose steps would otherwise look like defects of the shape.
    """
    values = FILTERS[name](shape_grids(field, GRID)[0])  # [n, n, n], negative inside
    # values beside a change of sign along z show the scale of this method's output, which differs by method
    near = np.abs(values)[np.diff(np.sign(values), axis=2, append=1) != 0]
    edge = 2 * float(np.median(near)) if near.size else 1.0
    # clipping keeps large values far from the surface from moving it in the Gaussian
    return level_set_from_grid(scipy.ndimage.gaussian_filter(np.clip(values, -edge, edge), SMOOTHED))


def level_set_from_grid(values: np.ndarray) -> LevelSet:
    """Return the surface of values [n, n, n] at voxels' centres, negative inside.

    Cubic splines interpolate between the voxels; linear interpolation would show the grid's steps.
    """
    n = len(values)
    # a level set is positive inside, and its cube has the axes z, y, x: [2 n - 1, 2 n - 1, 2 n - 1]
    cube = torch.from_numpy(
        -scipy.ndimage.zoom(values, (2 * n - 1) / n, order=3).transpose(2, 1, 0).copy()
    ).float()
    # the outermost voxels' centres lie half a voxel inside the unit cube, hence the edge (n - 1) / n
    spec = SlabSpec.cube(2 * n - 1, (n - 1) / n)
    return LevelSet(
        cube=cube, spec=spec, level=0.0, density=lambda points: sample(cube[None], spec, points)[0]
    )


def surface_change(comparison: Comparison, seeds: Sequence[int]) -> dict:
    """Summarise by how much tuning moved surfaces: median and quartiles over latents, in voxels of 64^3.

    A latent's value is the median change of its surface within the head.
    """
    medians = []
    with torch.no_grad():
        for seed in tqdm(seeds, desc="change of the surface", unit="shape"):
            before, after = (
                LevelSet.of(g.generator.field(comparison.ws(g, [seed])), 64)
                for g in (comparison.before, comparison.after)
            )
            medians.append(median_change(before, after))
    return {"surface_change_voxels": change_summary(medians)}


@torch.no_grad()
def colours(field: Field, generator: Generator, label: Tensor, rays: int, samples: int, cell: int) -> Tensor:
    """Render a field of one shape: [3, R, R] in 0..1 with a cell's pixels.

    More rays and samples are used than in training. Networks with large images keep their number of rays,
    which their super-resolution expects.
    """
    without_sr = generator.img_resolution <= OWN_PIXELS
    options = RenderOptions(resolution=rays if without_sr else None, samples=samples)
    (out,) = render_each(field, [label], options)
    image = out.raw if without_sr else out.image
    image = (image[:, :3].float() / 2 + 0.5).clamp(0, 1)  # [1, 3, H, W], from -1..1 to 0..1
    return torch.nn.functional.interpolate(image, (cell, cell), mode="bicubic", antialias=True)[0]


def view_of_head(head: people.Head, surface: LevelSet, label: Tensor, resolution: int) -> View:
    """Render the view of a ground-truth head from a camera [1, 25], lit as networks' shapes are.

    Depth and normals come from the mesh; ambient occlusion comes from `surface`, the head on a grid.
    """
    basis = people.load_basis()
    cam2world, intrinsics = unpack_label(label.cpu())
    triangle, weights, _ = people.rasterise(
        head.vertices, basis.triangles, cam2world[0].numpy(), float(intrinsics[0, 0, 0]), resolution
    )
    hit = triangle >= 0  # [R, R]
    corners = basis.triangles[triangle[hit]]  # [P, 3] vertices at the P pixels that show the head
    points, normals = (
        torch.from_numpy(np.einsum("pcd,pc->pd", values[corners], weights[hit])).float()
        for values in (head.vertices, head.normals)
    )
    # rays [1, R R, 3] -> [P, 3]
    origins, directions = (
        rays[0][torch.from_numpy(hit).flatten()] for rays in RaySampler()(cam2world, intrinsics, resolution)
    )
    depth = torch.full(hit.shape, torch.inf)
    depth[torch.from_numpy(hit)] = (points - origins).norm(dim=1)
    normals = torch.nn.functional.normalize(normals, dim=1)
    # EG3D's cameras have y down and z forward; the light's axes have y up and z backward
    axes = cam2world[0, :3, :3] * torch.tensor([1.0, -1.0, -1.0])
    return View(depth, points, normals, light(surface, points, normals, axes, directions))


def _clay(view: View, factor: int = SUPERSAMPLE) -> np.ndarray:
    """Paint a shape without colours, reduce it by `factor`, and crop it: uint8 [H, B, 3]."""
    return _cropped(to_uint8(shrink(paint(view), factor).cpu()))


def _cropped(cell: np.ndarray) -> np.ndarray:
    left, top, right, bottom = (round(share * len(cell)) for share in CROP)
    return cell[top:bottom, left:right]


def comparison_image(comparison: Comparison, columns: Sequence[Column], o: ImageOptions = USUAL) -> np.ndarray:
    """Return the comparison, uint8 [H, B, 3], with one latent per column.

    The rows show colour image and back before and after tuning, post-processing and ground truth for heads of
    people, and the front of both shapes.
    """
    g = comparison.before.generator
    fine = o.cell * SUPERSAMPLE
    front = camera(g, YAW, PITCH)
    back = camera(g, *BACK_VIEW)

    def colour_images(generator: Generator, sides: Sequence[Side]) -> list[np.ndarray]:
        images = [colours(side.field, generator, front, o.rays, o.samples, o.cell) for side in sides]
        return [_cropped(to_uint8(image.movedim(0, -1).cpu())) for image in images]

    def shapes(surfaces: Sequence[LevelSet], label: Tensor) -> list[np.ndarray]:
        # rendered at SUPERSAMPLE times the cell's size and reduced, against aliasing
        return [_clay(look(surface, label, fine)) for surface in surfaces]

    def group(name: str, more: str, *cells: list[np.ndarray]) -> list[Row]:
        # the heading stands in the first row and spans all rows of the group
        first, *others = cells
        return [
            Row(cells=first, name=name, more=more, spans=len(cells), parted=True),
            *(Row(cells=part) for part in others),
        ]

    before = [column.before for column in columns]
    after = [column.after for column in columns]
    bare = [side.surface for side in before]
    tuned = [side.surface for side in after]
    rows = group(
        "Before",
        "image, and shape\nfrom the back",
        colour_images(comparison.before.generator, before),
        shapes(bare, back),
    )
    rows += group(
        "After",
        "tuned with the\nreward; the same\nlatents",
        colour_images(comparison.after.generator, after),
        shapes(tuned, back),
    )
    if comparison.of_people:
        smoothed = [column.filtered for column in columns if column.filtered is not None]
        head_views = [
            view_of_head(column.head, column.ground_truth, back, fine)
            for column in columns
            if column.head and column.ground_truth
        ]
        rows += group(
            "Label-free",
            "post-processing,\nthe strongest; it\ndegrades intact heads",
            shapes(smoothed, back),
        )
        rows += group("Ground truth", "of the same\nlatents", [_clay(view) for view in head_views])
    rows += group("Front", "before, after", shapes(bare, front), shapes(tuned, front))
    # no line above the first group; the seeds stand below the last row
    rows[0] = replace(rows[0], parted=False)
    rows[-1] = replace(rows[-1], captions=[f"seed {column.seed}" for column in columns])
    return sheet("", rows, names=NAMES, note=caption(comparison, len(columns)))


def caption(comparison: Comparison, shown: int) -> str:
    """Describe the comparison image and the rule that selected its latents."""
    rule = (
        f"{shown} of {POOL} held-out latents, at equal steps of reward before tuning, lowest to highest; psi"
        f" {evaluation_psi(comparison):g}."
    )
    if not comparison.of_people:
        return rule
    strongest = f"Post-processing: {filter_name(comparison)}, the strongest of {len(FILTERS)}."
    return (
        f"{rule} {strongest} {bundled.DAMAGED} Eyes at the back are ghosts of those in front, an artefact"
        " of tri-planes."
    )


def turntable(comparison: Comparison, column: Column, o: ImageOptions = USUAL) -> Iterator[np.ndarray]:
    """Render one latent through a full turn from the front; each frame shows before beside after."""
    for yaw in tqdm((2 * np.pi * np.arange(o.turns) / o.turns).tolist(), desc="turntable", unit="frame"):
        label = camera(comparison.before.generator, yaw, PITCH)
        cells = [_clay(look(side.surface, label, o.film), 1) for side in (column.before, column.after)]
        yield sheet("", [Row(cells=cells, captions=("before", "after"))])


def webp(frames: Iterator[np.ndarray]) -> bytes:
    """Encode frames as an animated WebP that repeats without end."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    stream = io.BytesIO()
    first.save(
        stream, "WEBP", save_all=True, append_images=others, duration=FRAME_MS, loop=0, quality=WEBP_QUALITY
    )
    return stream.getvalue()


def swung(frame: Callable[[float], np.ndarray], reach: float, turns: int, title: str) -> Iterator[np.ndarray]:
    """Render a swing from yaw -reach to +reach radians and back; `turns` views in one direction.

    Views lie closer together at the ends, so that the movement slows down there.
    """
    frames = []
    for yaw in tqdm(
        (reach * np.sin(np.pi / 2 * np.linspace(-1, 1, turns))).tolist(), desc=title, unit="frame"
    ):
        frames.append(frame(yaw))
        yield frames[-1]
    # the way back reuses the frames, without the two ends, which would show twice
    yield from frames[-2:0:-1]


PER_ROW = 5  # pairs per row of the sheet


def pairs_sheet(comparison: Comparison, count: int, o: ImageOptions = USUAL) -> np.ndarray:
    """Return a sheet of `count` pairs for a blind test: backs before and after tuning in random order.

    The note below the pairs names the tuned shape of each. The latents are the first of the evaluation
    seeds whose untuned heads are defective.
    Raises: ValueError where there are fewer than `count` such latents.
    """
    pool = EVALUATION.take(POOL)
    is_defective = heads.find_defective(heldout_evaluators.seen(comparison, "heads"))
    seeds = [seed for seed, defective in zip(pool, is_defective, strict=True) if defective][:count]
    if len(seeds) < count:
        raise ValueError(
            f"--pairs: expected at most {len(seeds)}, the number of defective heads among {POOL}, got"
            f" {count}. Use a smaller number."
        )
    # the order depends on the seeds alone, so a repeated call makes the same sheet
    swapped = np.random.default_rng(seeds[0]).random(count) < 0.5
    label = camera(comparison.before.generator, *BACK_VIEW)
    cells = []  # two for each pair: left, right
    for seed, swap in zip(tqdm(seeds, desc="pairs", unit="pair"), swapped, strict=True):
        both = [
            Side.of(g.generator, comparison.ws(g, [seed], 1.0), o.resolution)
            for g in (comparison.before, comparison.after)
        ]
        cells += [
            _clay(look(side.surface, label, o.thumb * SUPERSAMPLE)) for side in (both[::-1] if swap else both)
        ]
    names = [f"{number} {side}" for number in range(1, count + 1) for side in ("left", "right")]
    parts = [slice(i, i + 2 * PER_ROW) for i in range(0, 2 * count, 2 * PER_ROW)]
    rows = [Row(cells=cells[part], captions=names[part], parted=part.start > 0) for part in parts]
    answers = ", ".join(f"{number} {'left' if swap else 'right'}" for number, swap in enumerate(swapped, 1))
    return sheet(
        "Which of each pair is the better shape?",
        rows,
        note=f"The same latent before and after tuning, psi 1. Tuned: {answers}.",
    )


def save_meshes(pairs: Sequence[tuple[Side, Side]], seeds: Sequence[int], folder: Path) -> None:
    """Write seedS-before.ply and seedS-after.ply for the seed S of every latent."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, pair in zip(seeds, pairs, strict=True):
        for name, side in zip(("before", "after"), pair, strict=True):
            try:
                save_mesh(
                    folder / f"seed{seed}-{name}.ply",
                    *extract_mesh(side.surface.cube, side.surface.spec, side.surface.level),
                )
            except ValueError as error:
                # a sample without a surface has no mesh; the other latents are still written
                print(f"No mesh for seed {seed} ({name}): {error}")


# Contact sheets of one generator: images beside real ones, and shapes from both sides with their seeds.


COLUMNS = 8  # cells per row
THUMB = 112  # least pixels per edge of an image in the sheet


def image_sheet(
    generator: Generator,
    dataset: ImageFolderDataset,
    seeds: Sequence[int],
    psi: float,
    samples: int = USUAL.samples,
) -> np.ndarray:
    """Return generated images beside as many images of the data: uint8 [H, B, 3].

    The images at the same place of both halves share one camera. The first seed selects those of the data.
    """
    # without replacement: no image of the data is shown twice
    chosen = np.random.RandomState(seeds[0]).permutation(len(dataset))[: len(seeds)]
    # grey images [N, 1, H, W] -> [N, 3, H, W], 0..1
    real = (
        torch.stack([torch.from_numpy(dataset[int(i)][0]) for i in chosen]).float().expand(-1, 3, -1, -1)
        / 255
    )
    labels = torch.from_numpy(dataset.get_labels()[chosen]).to(device_of(generator))
    fake = []
    with torch.no_grad():
        for seed, label in zip(tqdm(seeds, desc="images", unit="image"), labels.split(1), strict=True):
            z = latents([seed], generator.z_dim).to(label.device)
            field = generator.field(generator.mapping(z, label, truncation_psi=psi))
            # from -1..1 to 0..1; on the CPU, so that the device never holds all images
            fake.append(
                render_each(field, [label], RenderOptions(samples=samples), seed)[0].image[0].float().cpu()
                / 2
                + 0.5
            )
    blocks = [
        sheet(title, _rows([to_uint8(image.movedim(0, -1)) for image in _enlarged(images)]))
        for title, images in (
            (f"{len(seeds)} generated, psi {psi:g}", torch.stack(fake)),
            (f"{len(real)} of the data", real),
        )
    ]
    return np.concatenate(blocks, axis=1)


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    """Enlarge images [N, 3, R, R] by the least whole factor that makes their edge at least THUMB pixels."""
    # -(-a // b) is a / b rounded up; images that are large enough keep their pixels
    factor = max(1, -(-THUMB // images.shape[-1]))
    return (
        torch.nn.functional.interpolate(images, scale_factor=factor, mode="bicubic") if factor > 1 else images
    )


def shape_sheet(
    generator: Generator, seeds: Sequence[int], psi: float, o: ImageOptions = USUAL
) -> np.ndarray:
    """Return a sheet of the shapes of seeds, each front above its back: uint8 [H, B, 3]."""
    front: list[np.ndarray] = []
    back: list[np.ndarray] = []
    for seed in tqdm(seeds, desc="shapes", unit="shape"):
        with torch.no_grad():
            surface = LevelSet.of(generator.field(ws_of_seeds(generator, [seed], psi)), o.resolution)
        for place, views in (((YAW, PITCH), front), (BACK_VIEW, back)):
            views.append(_clay(look(surface, camera(generator, *place), o.thumb * SUPERSAMPLE)))
    rows = []
    for start in range(0, len(seeds), COLUMNS):
        part = slice(start, start + COLUMNS)
        rows += [
            Row(cells=front[part], parted=start > 0),
            Row(cells=back[part], captions=[f"seed {seed}" for seed in seeds[part]]),
        ]
    return sheet("", rows, note=f"{len(seeds)} shapes from the front and from the back, psi {psi:g}.")


def _rows(cells: Sequence[np.ndarray]) -> list[Row]:
    return [Row(cells=cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
