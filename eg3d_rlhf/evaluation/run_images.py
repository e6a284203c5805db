"""The pictures that end a reward run: the same latents from in front and from behind, before and after; a
turntable; meshes.

Latents are shown by rule: of the first `POOL` of the judge's seeds, ordered by their rewards before tuning,
those at equal steps from the lowest to the highest (of six: lowest, 20 %, 40 %, 60 %, 80 %, highest). Of
heads of people, what the strongest filter without labels makes of the untuned shape stands beside, and the
whole head that the latent names. Loose parts are drawn as they are.

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
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.evaluation import heldout_evaluators as judges
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
CHOSEN = "latents of the pictures"  # in a comparison's memory
POOL = judges.HEADS  # of the judge's latents, among which the rule chooses
CHANGED = 64  # latents in the median change of the surface
# radians from frontal, from in front
YAW = 0.45
PITCH = -0.08
BEHIND = (math.pi - 0.4, -0.2)  # yaw and pitch, from behind
CROP = (0.13, 0.09, 0.87, 0.85)  # of a rendering: left, top, right, bottom, as shares
NAMES = 150  # pixels beside the rows
# images up to this size are rendered from the field at a cell's size; larger ones come from the
# super-resolution
OWN_PIXELS = 128
# points per edge on which filters work; voxels
GRID = 64
SMOOTHED = 0.7
FRAME_MS = 90
WEBP_QUALITY = 80


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How large the pictures are."""

    shown: int = 6  # latents in the comparison, >= 1
    meshes: int = 3  # of them with meshes
    resolution: int = 128  # grid points per edge of the cube that finds the surfaces, >= 8
    cell: int = 256  # pixels per edge of a rendering in the comparison, >= 16
    film: int = 320  # in the turntable
    thumb: int = 208  # and in a contact sheet
    rays: int = 128  # per edge of the coloured renderings, enlarged to a cell
    turns: int = 28  # views around, >= 2
    samples: int = 48  # per ray in each pass: what is seen is the network, not the sampler


USUAL = PictureOptions()


@dataclass(frozen=True)
class Side:
    """One latent under one network."""

    field: Field
    surface: LevelSet

    @classmethod
    def of(cls, generator: Generator, ws: Tensor, resolution: int) -> "Side":
        """The shape of ws [1, L, W]."""
        with torch.no_grad():
            field = generator.field(ws)
            return cls(field, LevelSet.of(field, resolution))


def write_pictures(c: Comparison, folder: Path, o: PictureOptions = USUAL) -> list[str]:
    """comparison.png, turntable.webp and meshes/ of the chosen latents; returns the names of what was
    written.
    """
    seeds = chosen(c, o.shown)
    columns = [
        Column.of(c, seed, o.resolution) for seed in tqdm(seeds, desc="shapes before and after", unit="head")
    ]
    write_atomic(folder / COMPARISON, png(comparison(c, columns, o)))
    write_atomic(folder / TURNTABLE, webp(turntable(c, columns[0], o)))
    save_meshes(
        [(column.before, column.after) for column in columns[: o.meshes]],
        seeds[: o.meshes],
        folder / "meshes",
    )
    return [COMPARISON, TURNTABLE, "meshes/*.ply"]


def judged_psi(c: Comparison) -> float:
    """The truncation at which shapes are shown: none where a latent names a head, which a truncated one does
    not.
    """
    return 1.0 if c.of_people else c.psi


def chosen(c: Comparison, shown: int = USUAL.shown) -> list[int]:
    """Seeds by the rule above, lowest reward before tuning first; kept in the comparison's memory, with which
    another process may start.
    """
    if CHOSEN not in c.memory:
        pool = EVALUATION.take(POOL)
        ranked = c.scores(c.before, pool, judged_psi(c)).argsort(stable=True).tolist()
        c.memory[CHOSEN] = [pool[ranked[round(place)]] for place in np.linspace(0, len(pool) - 1, shown)]
    return c.memory[CHOSEN]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One latent: under both networks, and, of people, what else it is shown beside."""

    seed: int
    before: Side
    after: Side
    filtered: LevelSet | None = None
    head: people.Head | None = None  # that the latent names
    whole: LevelSet | None = None  # its surface on a grid

    @classmethod
    @torch.no_grad()
    def of(cls, c: Comparison, seed: int, resolution: int) -> "Column":
        before, after = (
            Side.of(g.generator, c.ws(g, [seed], judged_psi(c)), resolution) for g in (c.before, c.after)
        )
        if not c.of_people:
            return cls(seed=seed, before=before, after=after)
        z = latents([seed], c.before.generator.z_dim)
        (head,) = people.named_people(z)
        whole = of_grid(people_mesh.whole_grids(z, GRID)[0])
        return cls(
            seed=seed,
            before=before,
            after=after,
            filtered=filtered(before.field, filter_name(c)),
            head=head,
            whole=whole,
        )


def filter_name(c: Comparison) -> str:
    """The strongest of the filters that need no labels, chosen on validation latents, whatever it does to
    whole heads.
    """
    return list(FILTERS)[int(judges.seen(c, "post-processing")["any_method"][0])]


def filtered(field: Field, name: str) -> LevelSet:
    """What a filter makes of the one shape of a field; a filter leaves steps of its grid, which are smoothed
    away for the eye.
    """
    values = FILTERS[name](shape_grids(field, GRID)[0])
    near = np.abs(values)[np.diff(np.sign(values), axis=2, append=1) != 0]
    edge = 2 * float(np.median(near)) if near.size else 1.0
    return of_grid(scipy.ndimage.gaussian_filter(np.clip(values, -edge, edge), SMOOTHED))


def of_grid(values: np.ndarray) -> LevelSet:
    """The surface of values [n, n, n] at voxels' middles, negative inside: between them by cubic splines,
    else the grid's steps show.
    """
    n = len(values)
    cube = torch.from_numpy(
        -scipy.ndimage.zoom(values, (2 * n - 1) / n, order=3).transpose(2, 1, 0).copy()
    ).float()
    spec = SlabSpec.cube(2 * n - 1, (n - 1) / n)
    return LevelSet(
        cube=cube, spec=spec, level=0.0, density=lambda points: sample(cube[None], spec, points)[0]
    )


def surface_change(c: Comparison, seeds: Sequence[int]) -> dict:
    """Median and quartiles over latents of the median change of the surface within the head,
    voxels of 64^3.
    """
    medians = []
    with torch.no_grad():
        for seed in tqdm(seeds, desc="change of the surface", unit="shape"):
            before, after = (LevelSet.of(g.generator.field(c.ws(g, [seed])), 64) for g in (c.before, c.after))
            medians.append(median_change(before, after))
    return {"surface_change_voxels": change_summary(medians)}


@torch.no_grad()
def colours(field: Field, generator: Generator, label: Tensor, rays: int, samples: int, cell: int) -> Tensor:
    """What a camera sees of a field of one shape: [3, R, R] in 0..1 with a cell's pixels, from more rays and
    samples than in training.

    Networks with large images keep their own number of rays, which their super-resolution expects.
    """
    own = generator.img_resolution <= OWN_PIXELS
    (out,) = render_each(field, [label], RenderOptions(resolution=rays if own else None, samples=samples))
    image = ((out.raw if own else out.image)[:, :3].float() / 2 + 0.5).clamp(0, 1)
    return torch.nn.functional.interpolate(image, (cell, cell), mode="bicubic", antialias=True)[0]


def view_of_head(head: people.Head, whole: LevelSet, label: Tensor, resolution: int) -> View:
    """What a camera [1, 25] sees of a whole head, by its mesh, lit as networks' shapes are; what is occluded
    by its surface on a grid.
    """
    basis = people.load_basis()
    cam2world, intrinsics = unpack_label(label.cpu())
    triangle, weights, _ = people.rasterise(
        head.vertices, basis.triangles, cam2world[0].numpy(), float(intrinsics[0, 0, 0]), resolution
    )
    hit = triangle >= 0
    corners = basis.triangles[triangle[hit]]
    points, normals = (
        torch.from_numpy(np.einsum("pcd,pc->pd", values[corners], weights[hit])).float()
        for values in (head.vertices, head.normals)
    )
    origins, directions = (
        rays[0][torch.from_numpy(hit).flatten()] for rays in RaySampler()(cam2world, intrinsics, resolution)
    )
    depth = torch.full(hit.shape, torch.inf)
    depth[torch.from_numpy(hit)] = (points - origins).norm(dim=1)
    normals = torch.nn.functional.normalize(normals, dim=1)
    axes = cam2world[0, :3, :3] * torch.tensor([1.0, -1.0, -1.0])
    return View(depth, points, normals, light(whole, points, normals, axes, directions))


def _clay(view: View, factor: int = SUPERSAMPLE) -> np.ndarray:
    return _cropped(to_uint8(shrink(paint(view), factor).cpu()))


def _cropped(cell: np.ndarray) -> np.ndarray:
    left, top, right, bottom = (round(share * len(cell)) for share in CROP)
    return cell[top:bottom, left:right]


def comparison(c: Comparison, columns: Sequence[Column], o: PictureOptions = USUAL) -> np.ndarray:
    """The picture, uint8: one latent per column; its photograph beside its back, before and after; then what
    else was made of it.
    """
    g = c.before.generator
    fine = o.cell * SUPERSAMPLE
    front = camera(g, YAW, PITCH)
    behind = camera(g, *BEHIND)

    def photographs(generator: Generator, sides: Sequence[Side]) -> list[np.ndarray]:
        images = [colours(side.field, generator, front, o.rays, o.samples, o.cell) for side in sides]
        return [_cropped(to_uint8(image.movedim(0, -1).cpu())) for image in images]

    def shapes(surfaces: Sequence[LevelSet], label: Tensor) -> list[np.ndarray]:
        return [_clay(look(surface, label, fine)) for surface in surfaces]

    def group(name: str, more: str, *cells: list[np.ndarray]) -> list[Row]:
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
        photographs(c.before.generator, before),
        shapes(bare, behind),
    )
    rows += group(
        "After",
        "tuned with the\nreward; the same\nlatents",
        photographs(c.after.generator, after),
        shapes(tuned, behind),
    )
    if c.of_people:
        smoothed = [column.filtered for column in columns if column.filtered is not None]
        heads = [
            view_of_head(column.head, column.whole, behind, fine)
            for column in columns
            if column.head and column.whole
        ]
        rows += group(
            "Post-processing",
            "the strongest\nwithout labels; it\ndegrades intact heads",
            shapes(smoothed, behind),
        )
        rows += group("Ground truth", "of the same\nlatents", [_clay(view) for view in heads])
    rows += group("Front", "before, after", shapes(bare, front), shapes(tuned, front))
    rows[0] = replace(rows[0], parted=False)
    rows[-1] = replace(rows[-1], captions=[f"seed {column.seed}" for column in columns])
    return sheet("", rows, names=NAMES, note=caption(c, len(columns)))


def caption(c: Comparison, shown: int) -> str:
    """What the picture shows, and by which rule."""
    rule = (
        f"{shown} of {POOL} held-out latents, at equal steps of reward before tuning, lowest to highest; psi"
        f" {judged_psi(c):g}."
    )
    if not c.of_people:
        return rule
    strongest = f"Post-processing: {filter_name(c)}, the strongest of {len(FILTERS)}."
    return (
        f"{rule} {strongest} {bundled.DAMAGED} Eyes at the back are ghosts of those in front, an artefact"
        " of tri-planes."
    )


def turntable(c: Comparison, column: Column, o: PictureOptions = USUAL) -> Iterator[np.ndarray]:
    """Frames of one latent turned once around, from in front over its back: before beside after."""
    for yaw in tqdm((2 * np.pi * np.arange(o.turns) / o.turns).tolist(), desc="turntable", unit="frame"):
        label = camera(c.before.generator, yaw, PITCH)
        cells = [_clay(look(side.surface, label, o.film), 1) for side in (column.before, column.after)]
        yield sheet("", [Row(cells=cells, captions=("before", "after"))])


def webp(frames: Iterator[np.ndarray]) -> bytes:
    """A film that repeats."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    stream = io.BytesIO()
    first.save(
        stream, "WEBP", save_all=True, append_images=others, duration=FRAME_MS, loop=0, quality=WEBP_QUALITY
    )
    return stream.getvalue()


def swung(frame: Callable[[float], np.ndarray], reach: float, turns: int, title: str) -> Iterator[np.ndarray]:
    """Frames by yaw, from -reach to reach radians in so many views, slower at the ends, and back."""
    frames = []
    for yaw in tqdm(
        (reach * np.sin(np.pi / 2 * np.linspace(-1, 1, turns))).tolist(), desc=title, unit="frame"
    ):
        frames.append(frame(yaw))
        yield frames[-1]
    yield from frames[-2:0:-1]


PER_ROW = 5  # pairs


def pairs_sheet(c: Comparison, count: int, o: PictureOptions = USUAL) -> np.ndarray:
    """Shapes from behind before and after, side by side in an order by coin, for somebody to say which is
    better; the answers at the foot.

    The latents are the first of the judge's whose untuned scans are broken.
    """
    pool = EVALUATION.take(POOL)
    ill = heads.defective(judges.seen(c, "heads"))
    seeds = [seed for seed, defective in zip(pool, ill, strict=True) if defective][:count]
    if len(seeds) < count:
        raise ValueError(
            f"--pairs: expected at most {len(seeds)}, of so many defective heads among {POOL}, got {count}."
            " Ask for fewer."
        )
    swapped = np.random.default_rng(seeds[0]).random(count) < 0.5
    label = camera(c.before.generator, *BEHIND)
    cells = []
    for seed, swap in zip(tqdm(seeds, desc="pairs", unit="pair"), swapped, strict=True):
        both = [Side.of(g.generator, c.ws(g, [seed], 1.0), o.resolution) for g in (c.before, c.after)]
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
    """seedS-before.ply and seedS-after.ply of every latent."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, pair in zip(seeds, pairs, strict=True):
        for name, side in zip(("before", "after"), pair, strict=True):
            try:
                save_mesh(
                    folder / f"seed{seed}-{name}.ply",
                    *extract_mesh(side.surface.cube, side.surface.spec, side.surface.level),
                )
            except ValueError as error:  # a sample without a surface: say so, keep the rest
                print(f"No mesh for seed {seed} ({name}): {error}")


# What a generator makes, to look at: images beside real ones, and shapes from both sides, with the numbers of
# the seeds.


COLUMNS = 8
THUMB = 112  # least pixels per edge of an image


def image_sheet(
    generator: Generator,
    dataset: ImageFolderDataset,
    seeds: Sequence[int],
    psi: float,
    samples: int = USUAL.samples,
) -> np.ndarray:
    """Images of seeds beside as many of the data, each pair under one camera: uint8 [H, B, 3].

    The data's are drawn by the first seed.
    """
    chosen = np.random.RandomState(seeds[0]).permutation(len(dataset))[: len(seeds)]
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
            fake.append(
                render_each(field, [label], RenderOptions(samples=samples), seed)[0].image[0].float().cpu()
                / 2
                + 0.5
            )
    blocks = [
        sheet(title, _rows([to_uint8(picture.movedim(0, -1)) for picture in _enlarged(images)]))
        for title, images in (
            (f"{len(seeds)} generated, psi {psi:g}", torch.stack(fake)),
            (f"{len(real)} of the data", real),
        )
    ]
    return np.concatenate(blocks, axis=1)


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, R, R] at a multiple of their size that is at least THUMB."""
    factor = max(1, -(-THUMB // images.shape[-1]))
    return (
        torch.nn.functional.interpolate(images, scale_factor=factor, mode="bicubic") if factor > 1 else images
    )


def shape_sheet(
    generator: Generator, seeds: Sequence[int], psi: float, o: PictureOptions = USUAL
) -> np.ndarray:
    """Shapes of seeds, each from in front above the same from behind: uint8 [H, B, 3]."""
    front: list[np.ndarray] = []
    behind: list[np.ndarray] = []
    for seed in tqdm(seeds, desc="shapes", unit="shape"):
        with torch.no_grad():
            surface = LevelSet.of(generator.field(ws_of_seeds(generator, [seed], psi)), o.resolution)
        for place, views in (((YAW, PITCH), front), (BEHIND, behind)):
            views.append(_clay(look(surface, camera(generator, *place), o.thumb * SUPERSAMPLE)))
    rows = []
    for start in range(0, len(seeds), COLUMNS):
        part = slice(start, start + COLUMNS)
        rows += [
            Row(cells=front[part], parted=start > 0),
            Row(cells=behind[part], captions=[f"seed {seed}" for seed in seeds[part]]),
        ]
    return sheet("", rows, note=f"{len(seeds)} shapes from the front and from the back, psi {psi:g}.")


def _rows(cells: Sequence[np.ndarray]) -> list[Row]:
    return [Row(cells=cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
