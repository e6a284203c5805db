"""The pictures that end a reward run: true heads, before and after, in colour and in shape, with what changed; a turntable; meshes.

Letters: R pixels per edge of a cell, T frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eg3d_rlhf.core.field import Field, RenderOptions, render_each
from eg3d_rlhf.core.seeds import JUDGE
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.true_heads import TrueHead, nearest
from eg3d_rlhf.experiments.media.rendering import png
from eg3d_rlhf.experiments.media.sheet import Row, Scale, sheet, to_uint8
from eg3d_rlhf.experiments.media.video import check_mp4, write_mp4
from eg3d_rlhf.generators import Generator, camera
from eg3d_rlhf.geometry.level_set import LevelSet
from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.measures.surface_change import REACH, change_summary, displacement, median_change
from eg3d_rlhf.measures.surface_view import BLUE, SUPERSAMPLE, View, look, paint, shrink, tint
from training.storage import write_atomic

COMPARISON, TURNTABLE = "comparison.png", "turntable.mp4"
CHANGED = 64  # latents in the median change of the surface
YAW, PITCH = 0.45, -0.08  # radians from frontal
TRIMMED = 0.11  # share of a rendering that is cut off at the left, and at the right
NAMES = 150  # pixels beside the rows
OWN_PIXELS = 128  # images up to this size are rendered from the field at a cell's size; larger ones come from the super-resolution
SCALES = (0.5, 1.0, 2.0, REACH)  # voxels of 64^3 at full colour
SWING, FPS = 0.9, 15  # radians from frontal; pictures per second
GHOST = 0.45  # opacity of what has vanished


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How large the pictures are."""

    shown: int = 6  # latents in the comparison, >= 1
    meshes: int = 3  # of them with meshes
    resolution: int = 128  # grid points per edge of the cube that finds the surfaces, >= 8
    cell: int = 256  # pixels per edge of a rendering in the comparison, >= 16
    film: int = 208  # and in the turntable
    rays: int = 192  # per edge of the coloured renderings, enlarged to a cell
    turns: int = 20  # views from one side to the other, >= 2
    samples: int = 48  # per ray in each pass: what is seen is the network, not the sampler

    def __post_init__(self) -> None:
        least = {"shown": 1, "meshes": 0, "resolution": 8, "cell": 16, "film": 16, "rays": 4, "turns": 2, "samples": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"PictureOptions: expected {name} >= {value}, got {getattr(self, name)}. Raise it.")


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
    """comparison.png, turntable.mp4 and meshes/ of the first latents of the judge's; returns the names of what was written."""
    seeds = JUDGE.take(o.shown)
    pairs, label = sides(c, seeds, o.resolution), _camera(c, YAW)
    looks = [Look.at(pair, label, o.cell * SUPERSAMPLE) for pair in tqdm(pairs, desc="shapes before and after", unit="head")]
    full = full_scale([look.moved for look in looks])
    write_atomic(folder / COMPARISON, png(comparison(c, pairs, looks, full, o)))
    written = [COMPARISON]
    try:
        check_mp4(folder / TURNTABLE)
        write_mp4(folder / TURNTABLE, turntable(c, pairs[0], full, o), FPS, "2M")
        written.append(TURNTABLE)
    except (ValueError, OSError) as error:
        print(f"No {TURNTABLE}: {error}")
    save_meshes(pairs[: o.meshes], seeds[: o.meshes], folder / "meshes")
    return [*written, "meshes/*.ply"]


def sides(c: Comparison, seeds: Sequence[int], resolution: int) -> list[tuple[Side, Side]]:
    """Before and after of every latent."""
    both = [zip(c.ws(loaded, seeds).split(1), [loaded.generator] * len(seeds), strict=True) for loaded in (c.before, c.after)]
    before, after = ([Side.of(generator, ws, resolution) for ws, generator in part] for part in both)
    return list(zip(before, after, strict=True))


def surface_change(c: Comparison, seeds: Sequence[int]) -> dict:
    """Median and quartiles over latents of the median change of the surface within the head, voxels of 64^3."""
    medians = []
    with torch.no_grad():
        for seed in tqdm(seeds, desc="change of the surface", unit="shape"):
            before, after = (LevelSet.of(g.generator.field(c.ws(g, [seed])), 64) for g in (c.before, c.after))
            medians.append(median_change(before, after))
    return {"surface_change_voxels": change_summary(medians)}


def _camera(c: Comparison, yaw: float) -> Tensor:
    return camera(c.before.generator, yaw, PITCH)


@dataclass(frozen=True)
class Look:
    """One latent's shapes from one camera."""

    before: View
    after: View
    moved: Tensor  # [M] how far each point that the second view shows has moved, voxels
    vanished: Tensor  # [R, R] bool: what stood before the tuned surface and has no counterpart within REACH

    @classmethod
    def at(cls, pair: tuple[Side, Side], label: Tensor, resolution: int) -> "Look":
        """Both shapes from a camera [1, 25]."""
        before, after = (look(side.surface, label, resolution) for side in pair)
        vanished = torch.zeros_like(before.hit)
        vanished[before.hit] = displacement(pair[1].surface, before.points, before.normals).abs() >= REACH
        moved = displacement(pair[0].surface, after.points, after.normals)
        return cls(before, after, moved, vanished & (before.depth < after.depth))

    def drawn(self, full: float, factor: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The shape before, and after with its change tinted and what vanished as a blue ghost over it: uint8, shrunk by `factor`."""
        tinted = paint(self.after, tint(self.moved, full))
        tinted = torch.where(self.vanished[..., None], torch.lerp(tinted, paint(self.before, BLUE), GHOST), tinted)
        first, second = (to_uint8(shrink(picture, factor).cpu()) for picture in (paint(self.before), tinted))
        return first, second


def full_scale(moved: Sequence[Tensor]) -> float:
    """Voxels at full colour: the first of SCALES that leaves at most a twentieth of the points beyond it."""
    size = float(torch.cat(list(moved)).abs().double().quantile(0.95)) if sum(map(len, moved)) else 0.0
    return next((scale for scale in SCALES if scale >= size), SCALES[-1])


@torch.no_grad()
def colours(field: Field, generator: Generator, label: Tensor, rays: int, samples: int, cell: int) -> Tensor:
    """What a camera sees of a field of one shape: [3, R, R] in 0..1 with a cell's pixels, from more rays and samples than in training.

    Networks with large images keep their own number of rays, which their super-resolution expects.
    """
    own = generator.img_resolution <= OWN_PIXELS
    (out,) = render_each(field, [label], RenderOptions(resolution=rays if own else None, samples=samples))
    image = ((out.raw if own else out.image)[:, :3].float() / 2 + 0.5).clamp(0, 1)
    return torch.nn.functional.interpolate(image, (cell, cell), mode="bicubic", antialias=True)[0]


def comparison(c: Comparison, pairs: Sequence[tuple[Side, Side]], looks: Sequence[Look], full: float, o: PictureOptions) -> np.ndarray:
    """The picture, uint8: one of the judge's latents per column, and the nearest true heads above where the family is known.

    Args: looks: of the pairs, at SUPERSAMPLE times a cell's pixels.
    """
    label, rows, cell = _camera(c, YAW), [], o.cell
    images = [
        torch.stack([colours(pair[i].field, loaded.generator, label, o.rays, o.samples, cell) for pair in pairs])
        for i, loaded in enumerate((c.before, c.after))
    ]
    drawn = [look.drawn(full, SUPERSAMPLE) for look in looks]
    if c.synthetic:
        heads = nearest([[side.surface for side in pair] for pair in pairs], torch.stack(images).mean(dim=0), label)
        views = [_true_views(head, pair[0].surface, label, cell) for head, pair in zip(heads, pairs, strict=True)]
        rows += _group("True heads", "the nearest of\nthe family that\nit learned from", [v[0] for v in views], [v[1] for v in views])
    for i, (name, more) in enumerate((("Before", "pretrained"), ("After", "tuned with the\nreward; the same\nlatents"))):
        coloured = [to_uint8(image.movedim(0, -1).cpu()) for image in images[i]]
        rows += _group(name, more, coloured, [pair[i] for pair in drawn], parted=bool(rows))
    rows[-1] = replace(rows[-1], captions=[f"seed {seed}" for seed in JUDGE.take(len(pairs))])
    words = (f"-{full:g}: removed", "unchanged", f"added: +{full:g}")
    bar = to_uint8(tint(torch.linspace(-full, full, 2 * cell), full))
    scale = Scale(colours=bar, words=words, title="The surface moved by, in voxels of a cube with 64 per edge:")
    return sheet("", rows, names=NAMES, scale=scale, note=f"first {len(pairs)} held-out latents, psi {c.psi:g}")


def _group(name: str, more: str, coloured: Sequence[np.ndarray], shaped: Sequence[np.ndarray], parted: bool = False) -> list[Row]:
    """A row in colour and one of shapes under one name, without what stands empty beside heads."""
    cut = round(TRIMMED * coloured[0].shape[1])
    first, second = ([cell[:, cut:-cut] for cell in cells] for cells in (coloured, shaped))
    return [Row(cells=first, name=name, more=more, parted=parted, spans=2), Row(cells=second)]


def _true_views(head: TrueHead | None, like: LevelSet, label: Tensor, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """A true head in colour, and its shape as those of the networks are drawn; white where there is none."""
    if head is None:
        return (np.full((cell, cell, 3), 255, dtype=np.uint8),) * 2
    shape = paint(look(head.surface(like.spec), label, cell * SUPERSAMPLE))
    return to_uint8(head.image(label, cell).cpu()), to_uint8(shrink(shape).cpu())


def turntable(c: Comparison, pair: tuple[Side, Side], full: float, o: PictureOptions) -> Iterator[np.ndarray]:
    """Frames of one latent swung from side to side and back: before beside after, colour above shape."""
    swing = SWING * np.sin(np.pi / 2 * np.linspace(-1, 1, o.turns))
    frames = []
    for yaw in tqdm(swing.tolist(), desc="turntable", unit="frame"):
        label = _camera(c, yaw)
        images = [
            colours(side.field, loaded.generator, label, o.film // 2, round(0.7 * o.samples), o.film)
            for side, loaded in zip(pair, (c.before, c.after), strict=True)
        ]
        coloured = Row(cells=[to_uint8(image.movedim(0, -1).cpu()) for image in images], captions=("before", "after"))
        frames.append(sheet("", [coloured, Row(cells=Look.at(pair, label, o.film).drawn(full))]))
        yield frames[-1]
    yield from frames[-2:0:-1]


def save_meshes(pairs: Sequence[tuple[Side, Side]], seeds: Sequence[int], folder: Path) -> None:
    """seedS-before.ply and seedS-after.ply of every latent."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, pair in zip(seeds, pairs, strict=True):
        for name, side in zip(("before", "after"), pair, strict=True):
            try:
                save_mesh(folder / f"seed{seed}-{name}.ply", *extract_mesh(side.surface.cube, side.surface.spec, side.surface.level))
            except ValueError as error:  # a sample without a surface: say so, keep the rest
                print(f"No mesh for seed {seed} ({name}): {error}")
