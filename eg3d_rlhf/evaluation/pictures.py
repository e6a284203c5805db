"""The pictures that end a reward run: true heads, before and after, in colour and in shape, with what changed; a turntable; meshes.

Letters: R pixels per edge of a cell, T frames.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eg3d_rlhf.core.field import Field, RenderOptions, render_each
from eg3d_rlhf.core.seeds import JUDGE
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.experiments.media.rendering import png
from eg3d_rlhf.experiments.media.sheet import BLUE, SUPERSAMPLE, Row, Scale, View, look, paint, sheet, shrink, tint, to_uint8
from eg3d_rlhf.experiments.media.video import check_mp4, write_mp4
from eg3d_rlhf.generators import Generator, camera, device_of, latents, ws_of_seeds
from eg3d_rlhf.geometry.level_set import LevelSet
from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.geometry.mesh_export import save_mesh
from eg3d_rlhf.measures.surface import REACH, change_summary, displacement, median_change
from eg3d_rlhf.measures.true_heads import FitOptions, HeadPose, fit_heads, posed_sdf, resample, surface_points
from training.dataset import ImageFolderDataset
from training.heads.family import APPEARANCE_NAMES
from training.heads.render import cone_starts, march, pixel_rays, render_heads, shade, union_field
from training.heads.sdf import head_geometry
from training.progress import tqdm
from training.rendering.cameras import unpack_label
from training.storage import write_atomic

# The member of the true family that is nearest to a shape, to show beside it: fitted to the surface, coloured after the renderings.


_STEPS, _RATE, _POINTS = 60, 0.06, 800  # of the fit of colours
_CHUNK = 1 << 16  # points at once


@dataclass(frozen=True)
class TrueHead:
    pose: HeadPose  # of one head
    appearance: Tensor  # [1, A]

    def camera(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """cam2world [1, 4, 4] and intrinsics [1, 3, 3] of a camera [1, 25] as the head stands, before its shift and scale."""
        return _cameras(self.pose, label)

    def image(self, label: Tensor, resolution: int) -> Tensor:
        """[R, R, 3] in 0..1 from a camera [1, 25], on white."""
        return render_heads(self.pose.shape, self.appearance, *self.camera(label), resolution)[0][0].movedim(0, -1)

    @torch.no_grad()
    def surface(self, spec: SlabSpec) -> LevelSet:
        def density(points: Tensor) -> Tensor:
            return torch.cat([-posed_sdf(part[None], self.pose)[0] for part in points.split(_CHUNK)])

        cube = density(spec.points().reshape(-1, 3).to(self.appearance)).reshape(spec.shape)
        return LevelSet(cube=cube, spec=spec, level=0.0, density=density)


def _cameras(pose: HeadPose, label: Tensor) -> tuple[Tensor, Tensor]:
    cam2world, intrinsics = (matrix.to(pose.shape).repeat(len(pose.shape), 1, 1) for matrix in unpack_label(label))
    cam2world[:, :3, 3] = (cam2world[:, :3, 3] - pose.shift) / pose.log_scale.exp()
    return cam2world, intrinsics


def nearest(columns: Sequence[Sequence[LevelSet]], images: Tensor, label: Tensor) -> list[TrueHead | None]:
    """For each of N columns, the head nearest to the surfaces of all its shapes together; None where they have none.

    Args: images: [N, 3, R, R] in 0..1 from one camera label [1, 25], whose colours the heads take.
    """
    options = FitOptions()
    points = [torch.cat([surface_points(one.cube.float(), one.spec, options.back, one.level) for one in shapes]) for shapes in columns]
    filled = [i for i, found in enumerate(points) if len(found) >= options.points // 8]
    heads: list[TrueHead | None] = [None] * len(columns)
    if filled:
        pose, _ = fit_heads(torch.stack([resample(points[i], options.points, options.seed) for i in filled]), options)
        appearance = fit_colours(pose, images[filled], label)
        for row, i in enumerate(filled):
            heads[i] = TrueHead(HeadPose(*(value[row : row + 1] for value in pose)), appearance[row : row + 1])
    return heads


def fit_colours(pose: HeadPose, images: Tensor, label: Tensor) -> Tensor:
    """Appearances [N, A] with which posed heads look most like images [N, 3, R, R] in 0..1 where both are seen.

    Adam on the mean absolute difference at points of the heads that the camera sees.
    """
    (cam2world, intrinsics), g = _cameras(pose, label), head_geometry(pose.shape)
    field, resolution = union_field(g), images.shape[-1]
    with torch.no_grad():
        start, far = cone_starts(field, cam2world, intrinsics, resolution)
        origins, directions = pixel_rays(cam2world, intrinsics, resolution)
        t = march(field, origins, directions, start, far)  # [N, R * R]
        seen = torch.multinomial(t.isfinite().float() + 1e-9, _POINTS, replacement=True, generator=torch.Generator().manual_seed(0))
        at = seen[..., None].expand(-1, -1, 3)  # [N, P, 3]
        points = origins[:, None] + t.gather(1, seen)[..., None] * directions.gather(1, at)
        target = images.to(points).flatten(2).mT.gather(1, at)
    x, y, z = (axis.contiguous() for axis in points.unbind(-1))
    low = points.new_tensor([-1.0 if name.startswith("light") else 0.0 for name in APPEARANCE_NAMES])
    appearance = (0.5 * (low + 1)).repeat(len(images), 1).requires_grad_()
    optimiser = torch.optim.Adam([appearance], lr=_RATE)
    with torch.enable_grad():
        for _ in range(_STEPS):
            optimiser.zero_grad()
            colours = shade(field, x, y, z, g, dict(zip(APPEARANCE_NAMES, appearance.unsqueeze(-1).unbind(1), strict=True)))
            (colours - target).abs().mean().backward()
            optimiser.step()
            with torch.no_grad():
                appearance.copy_(appearance.clamp_max(1).maximum(low))
    return appearance.detach()


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

    def frame(yaw: float) -> np.ndarray:
        label = _camera(c, yaw)
        images = [
            colours(side.field, loaded.generator, label, o.film // 2, round(0.7 * o.samples), o.film)
            for side, loaded in zip(pair, (c.before, c.after), strict=True)
        ]
        coloured = Row(cells=[to_uint8(image.movedim(0, -1).cpu()) for image in images], captions=("before", "after"))
        return sheet("", [coloured, Row(cells=Look.at(pair, label, o.film).drawn(full))])

    return swung(frame, SWING, o.turns, "turntable")


def swung(frame: Callable[[float], np.ndarray], reach: float, turns: int, title: str) -> Iterator[np.ndarray]:
    """Frames by yaw, from -reach to reach radians in so many views, slower at the ends, and back."""
    frames = []
    for yaw in tqdm((reach * np.sin(np.pi / 2 * np.linspace(-1, 1, turns))).tolist(), desc=title, unit="frame"):
        frames.append(frame(yaw))
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


# What a generator makes, to look at: images beside real ones, and shapes from two views, with the numbers of the seeds.


COLUMNS = 8
THUMB = 112  # least pixels per edge of an image


def image_sheet(
    generator: Generator, dataset: ImageFolderDataset, seeds: Sequence[int], psi: float, samples: int = USUAL.samples
) -> np.ndarray:
    """Images of seeds beside as many of the data, each pair under one camera: uint8 [H, B, 3].

    The data's are drawn by the first seed.
    """
    chosen = np.random.RandomState(seeds[0]).permutation(len(dataset))[: len(seeds)]
    real = torch.stack([torch.from_numpy(dataset[int(i)][0]) for i in chosen]).float().expand(-1, 3, -1, -1) / 255
    labels = torch.from_numpy(dataset.get_labels()[chosen]).to(device_of(generator))
    fake = []
    with torch.no_grad():
        for seed, label in zip(tqdm(seeds, desc="images", unit="image"), labels.split(1), strict=True):
            z = latents([seed], generator.z_dim).to(label.device)
            field = generator.field(generator.mapping(z, label, truncation_psi=psi))
            fake.append(render_each(field, [label], RenderOptions(samples=samples), seed)[0].image[0].float().cpu() / 2 + 0.5)
    blocks = [
        sheet(title, _rows([to_uint8(picture.movedim(0, -1)) for picture in _enlarged(images)]))
        for title, images in ((f"{len(seeds)} generated, psi {psi:g}", torch.stack(fake)), (f"{len(real)} of the data", real))
    ]
    return np.concatenate(blocks, axis=1)


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, R, R] at a multiple of their size that is at least THUMB."""
    factor = max(1, -(-THUMB // images.shape[-1]))
    return torch.nn.functional.interpolate(images, scale_factor=factor, mode="bicubic") if factor > 1 else images


def shape_sheet(generator: Generator, seeds: Sequence[int], psi: float, o: PictureOptions = USUAL) -> np.ndarray:
    """Shapes of seeds, each from the front above a three-quarter view: uint8 [H, B, 3]."""
    front: list[np.ndarray] = []
    turned: list[np.ndarray] = []
    for seed in tqdm(seeds, desc="shapes", unit="shape"):
        with torch.no_grad():
            surface = LevelSet.of(generator.field(ws_of_seeds(generator, [seed], psi)), o.resolution)
        for yaw, views in ((0.0, front), (YAW, turned)):
            view = look(surface, camera(generator, yaw, PITCH), o.film * SUPERSAMPLE)
            views.append(to_uint8(shrink(paint(view)).cpu()))
    rows = []
    for start in range(0, len(seeds), COLUMNS):
        part = slice(start, start + COLUMNS)
        rows += [Row(cells=front[part], parted=start > 0), Row(cells=turned[part], captions=[f"seed {seed}" for seed in seeds[part]])]
    return sheet("", rows)


def _rows(cells: Sequence[np.ndarray]) -> list[Row]:
    return [Row(cells=cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
