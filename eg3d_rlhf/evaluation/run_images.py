"""Render the images and write the meshes at the end of a run of train.py with a reward.

The comparison image shows the same latents before and after tuning, from the front and from the back. The
turntable shows one latent from all sides. A rule selects the latents: the first `POOL` evaluation seeds are
sorted by their rewards before tuning, and latents at equal steps from the lowest to the highest reward are
shown (of six latents: the lowest, at 20 %, 40 %, 60 % and 80 % of the order, and the highest). For synthetic
heads, the comparison image also shows the untuned shape after the strongest label-free post-processing, and
the ground-truth head of the latent. Loose parts of a shape are rendered, not removed.

Shapes: R pixels per edge of a cell (one render in an image), H x B pixels of a composed image, n grid points
along x, y, z.
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
from training import rehearsal
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
YAW = 0.45  # yaw of the front view, radians from frontal
PITCH = -0.08  # pitch of the front view, radians from frontal
BACK_VIEW = (math.pi - 0.4, -0.2)  # yaw and pitch of the back view, radians
CROP = (0.13, 0.09, 0.87, 0.85)  # part of a render that is shown: left, top, right, bottom, as shares
NAMES = 150  # width of the row headings, pixels
# A generator of images up to this size is rendered from its field with the cell's number of rays; images of
# larger generators come from their super-resolution.
OWN_PIXELS = 128
GRID = 64  # points per edge of the grids of post-processing
SMOOTHED = 0.7  # voxels; standard deviation of the Gaussian that removes the grid's steps
FRAME_MS = 90  # of the turntable, milliseconds per frame
WEBP_QUALITY = 80  # 0 to 100


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Sizes of the images."""

    shown: int = 6  # number of latents in the comparison image, >= 1
    meshes: int = 3  # number of latents of which meshes are written, at most `shown`
    resolution: int = 128  # grid points per edge from which surfaces are extracted, >= 8
    cell: int = 256  # pixels per edge of a render in the comparison, >= 16
    film: int = 320  # pixels per edge of a render in the turntable
    thumb: int = 208  # pixels per edge of a render in a contact sheet
    rays: int = 128  # rays per edge of the colour renders, which are resized to a cell
    turns: int = 28  # number of views of the turntable, >= 2
    samples: int = 48  # samples per ray in each pass, enough that sampling noise is not visible


USUAL = ImageOptions()


@dataclass(frozen=True)
class Side:
    """Density field and extracted surface of the shape that one network generates from a latent."""

    field: Field
    surface: LevelSet

    @classmethod
    def from_ws(cls, generator: Generator, ws: Tensor, resolution: int) -> "Side":
        """Create the density field of ws [1, L, W], and extract its surface on `resolution` grid points per
        edge.
        """
        with torch.no_grad():
            field = generator.field(ws)
            return cls(field, LevelSet.from_field(field, resolution))


def write_images(comparison: Comparison, folder: Path, image_options: ImageOptions = USUAL) -> list[str]:
    """Write comparison.png, turntable.webp and meshes/ of some evaluation latents.

    The latents are selected at equal steps from the lowest to the highest reward before tuning.

    Returns: the names of the files, relative to `folder`.
    """
    seeds = choose_latents(comparison, image_options.shown)
    with rehearsal.timed(rehearsal.SUMMARY, "comparison image"):
        columns = [
            Column.from_seed(comparison, seed, image_options.resolution)
            for seed in tqdm(
                rehearsal.first(seeds, rehearsal.LATENTS), desc="shapes before and after", unit="head"
            )
        ]
        write_atomic(folder / COMPARISON, png(comparison_image(comparison, columns, image_options)))
    with rehearsal.timed(rehearsal.SUMMARY, "turntable"):
        write_atomic(folder / TURNTABLE, webp(turntable(comparison, columns[0], image_options)))
    save_meshes(
        [(column.before, column.after) for column in columns[: image_options.meshes]],
        [column.seed for column in columns[: image_options.meshes]],
        folder / "meshes",
    )
    return [COMPARISON, TURNTABLE, "meshes/*.ply"]


def evaluation_psi(comparison: Comparison) -> float:
    """Return the truncation psi of the images.

    It is 1 for synthetic heads, since a truncated latent has no ground-truth head; else the comparison's psi.
    """
    return 1.0 if comparison.of_people else comparison.psi


def choose_latents(comparison: Comparison, latent_count: int = USUAL.shown) -> list[int]:
    """Select the seeds of the images: evaluation latents at equal steps from the lowest to the highest reward
    before tuning.

    The seeds are stored in the comparison's memory. A worker process, which has no reward, gets this memory.

    Args: latent_count: number of seeds to select.
    """
    if CHOSEN not in comparison.memory:
        # seeds among which the rule selects
        pool_seeds = rehearsal.first(EVALUATION.take(POOL), rehearsal.LATENTS)
        # A stable sort: seeds of equal rewards keep their order on every machine.
        ranked_indices = (
            comparison.scores(comparison.before, pool_seeds, evaluation_psi(comparison))
            .argsort(stable=True)
            .tolist()
        )
        comparison.memory[CHOSEN] = [
            pool_seeds[ranked_indices[round(selected_rank)]]
            for selected_rank in np.linspace(0, len(pool_seeds) - 1, latent_count)
        ]
    return comparison.memory[CHOSEN]


@dataclass(frozen=True, kw_only=True)
class Column:
    """Shapes of one latent in the comparison image.

    Both networks' shapes are shown. For synthetic heads, the untuned shape after post-processing and the
    ground-truth head are shown as well.
    """

    seed: int
    before: Side
    after: Side
    post_processed: LevelSet | None = None  # the untuned shape after post-processing
    head: people.Head | None = None  # the ground truth, as a mesh
    ground_truth: LevelSet | None = None  # the surface of `head` on a grid

    @classmethod
    @torch.no_grad()
    def from_seed(cls, comparison: Comparison, seed: int, resolution: int) -> "Column":
        """Extract all shapes of a latent that the comparison image shows.

        Args: resolution: grid points per edge from which surfaces are extracted.
        """
        side_before, side_after = (
            Side.from_ws(
                network.generator, comparison.ws(network, [seed], evaluation_psi(comparison)), resolution
            )
            for network in (comparison.before, comparison.after)
        )
        if not comparison.of_people:
            return cls(seed=seed, before=side_before, after=side_after)
        z = latents([seed], comparison.before.generator.z_dim)  # [1, Z]
        # The ground truth is shown as a mesh; its grid is needed for the ambient occlusion.
        (head,) = people.heads_from_latents(z)
        ground_truth = level_set_from_grid(people_mesh.ground_truth_grids(z, GRID)[0])
        return cls(
            seed=seed,
            before=side_before,
            after=side_after,
            post_processed=post_process(side_before.field, filter_name(comparison)),
            head=head,
            ground_truth=ground_truth,
        )


def filter_name(comparison: Comparison) -> str:
    """Return the name of the strongest label-free post-processing method.

    It is chosen on validation latents as the method with the smallest error of defective heads. The choice
    ignores how much the method degrades intact heads.
    """
    return list(FILTERS)[int(heldout_evaluators.measure_part(comparison, "post-processing")["any_method"][0])]


def post_process(field: Field, filter_name: str) -> LevelSet:
    """Apply a post-processing method to the single shape of a field, and smooth the result for display.

    The methods work on voxels. Without the smoothing, the steps between voxels would look like defects.
    Args: filter_name: name of the method in FILTERS.
    """
    filtered_values = FILTERS[filter_name](shape_grids(field, GRID)[0])  # [n, n, n], negative inside
    # The scale of the values differs by method. It is measured where the sign changes along z, which is at
    # the surface; append=1 keeps the number of voxels.
    surface_magnitudes = np.abs(filtered_values)[np.diff(np.sign(filtered_values), axis=2, append=1) != 0]
    clip_value = 2 * float(np.median(surface_magnitudes)) if surface_magnitudes.size else 1.0
    # Values are clipped, so that large values far from the surface do not move it through the Gaussian.
    return level_set_from_grid(
        scipy.ndimage.gaussian_filter(np.clip(filtered_values, -clip_value, clip_value), SMOOTHED)
    )


def level_set_from_grid(shape_values: np.ndarray) -> LevelSet:
    """Return the surface of a shape that is given by values at the centres of voxels.

    Cubic splines interpolate between the voxels, since linear interpolation would show the steps of the grid.

    Args: shape_values: [n, n, n] along x, y, z, negative inside.
    """
    edge_points = len(shape_values)
    # A level set is positive inside, and its grid has the axes z, y, x: [2 n - 1, 2 n - 1, 2 n - 1].
    level_set_grid = torch.from_numpy(
        -scipy.ndimage.zoom(shape_values, (2 * edge_points - 1) / edge_points, order=3)
        .transpose(2, 1, 0)
        .copy()
    ).float()
    # The centres of the outermost voxels lie half a voxel inside the unit cube, so the grid's edge has the
    # length (n - 1) / n.
    spec = SlabSpec.cube(2 * edge_points - 1, (edge_points - 1) / edge_points)
    return LevelSet(
        cube=level_set_grid,
        spec=spec,
        level=0.0,
        density=lambda query_points: sample(level_set_grid[None], spec, query_points)[0],
    )


def surface_change(comparison: Comparison, seeds: Sequence[int]) -> dict:
    """Measure by how much tuning moved the surfaces of the latents' shapes, in voxels of a 64^3 grid.

    The value of a latent is the median change of its surface within the head.

    Returns: {"surface_change_voxels": median, quartiles and number of the latents' values}.
    """
    median_changes = []  # voxels, one for each latent
    with torch.no_grad():
        for seed in tqdm(seeds, desc="change of the surface", unit="shape"):
            surface_before, surface_after = (
                LevelSet.from_field(network.generator.field(comparison.ws(network, [seed])), 64)
                for network in (comparison.before, comparison.after)
            )
            median_changes.append(median_change(surface_before, surface_after))
    return {"surface_change_voxels": change_summary(median_changes)}


@torch.no_grad()
def render_colours(
    field: Field,
    generator: Generator,
    camera_label: Tensor,
    rays_per_edge: int,
    samples_per_ray: int,
    cell_pixels: int,
) -> Tensor:
    """Render a field of one shape in colour, [3, R, R] in 0..1.

    More rays and samples are used than in training. A generator with super-resolution keeps its number of
    rays, which its super-resolution expects.

    Args:
        camera_label: camera, [1, 25].
        rays_per_edge: rays per edge, for generators without super-resolution.
        samples_per_ray: samples per ray in each pass.
        cell_pixels: R, pixels per edge of the result.
    """
    # A network whose renders are smaller than its images has a super-resolution, which sets the colours.
    raw_resolution = getattr(generator.module, "neural_rendering_resolution", generator.img_resolution)
    lacks_super_resolution = raw_resolution == generator.img_resolution <= OWN_PIXELS
    render_options = RenderOptions(
        resolution=rays_per_edge if lacks_super_resolution else None, samples=samples_per_ray
    )
    (rendering,) = render_each(field, [camera_label], render_options)
    image = rendering.raw if lacks_super_resolution else rendering.image
    image = (image[:, :3].float() / 2 + 0.5).clamp(0, 1)  # [1, 3, H, W], from -1..1 to 0..1
    return torch.nn.functional.interpolate(image, (cell_pixels, cell_pixels), mode="bicubic", antialias=True)[
        0
    ]


def view_of_head(head: people.Head, surface: LevelSet, camera_label: Tensor, resolution: int) -> View:
    """Render a ground-truth head from a camera, with the same light as the shapes of networks.

    Depth and normals come from the mesh of the head. Ambient occlusion comes from the head on a grid.

    Args:
        head: mesh of the head.
        surface: the same head on a grid.
        camera_label: camera, [1, 25].
        resolution: pixels per edge.
    """
    basis = people.load_basis()
    cam2world, intrinsics = unpack_label(camera_label.cpu())  # [1, 4, 4], [1, 3, 3]
    triangle_index, barycentric_weights, _ = people.rasterise(
        head.vertices, basis.triangles, cam2world[0].numpy(), float(intrinsics[0, 0, 0]), resolution
    )
    is_head = triangle_index >= 0  # [R, R]; the triangle is -1 at pixels of the background
    # [P, 3] vertices at the P pixels that show the head
    corner_vertices = basis.triangles[triangle_index[is_head]]
    surface_points, normals = (
        torch.from_numpy(
            np.einsum("pcd,pc->pd", vertex_values[corner_vertices], barycentric_weights[is_head])
        ).float()
        for vertex_values in (head.vertices, head.normals)
    )
    # rays [1, R R, 3] -> [P, 3]
    origins, directions = (
        rays[0][torch.from_numpy(is_head).flatten()]
        for rays in RaySampler()(cam2world, intrinsics, resolution)
    )
    depth = torch.full(is_head.shape, torch.inf)  # infinite where no surface is hit
    depth[torch.from_numpy(is_head)] = (surface_points - origins).norm(dim=1)
    normals = torch.nn.functional.normalize(normals, dim=1)  # interpolated normals are shorter than 1
    # EG3D's camera axes have y down and z forward; the axes of the light have y up and z backward.
    camera_axes = cam2world[0, :3, :3] * torch.tensor([1.0, -1.0, -1.0])
    return View(
        depth, surface_points, normals, light(surface, surface_points, normals, camera_axes, directions)
    )


def _clay(view: View, reduction_factor: int = SUPERSAMPLE) -> np.ndarray:
    """Shade a shape in a single colour, reduce the image by a factor, and crop it: uint8 [H, B, 3]."""
    return _cropped(to_uint8(shrink(paint(view), reduction_factor).cpu()))


def _cropped(square_render: np.ndarray) -> np.ndarray:
    """Crop a square render to the part that CROP states, which leaves out empty margins."""
    left, top, right, bottom = (round(share * len(square_render)) for share in CROP)  # pixels
    return square_render[top:bottom, left:right]


def comparison_image(
    comparison: Comparison, columns: Sequence[Column], image_options: ImageOptions = USUAL
) -> np.ndarray:
    """Return the comparison image, uint8 [H, B, 3], with one column for each latent.

    The rows show, before and after tuning, the colour image and the shape from the back. For synthetic heads,
    rows with post-processing and ground truth follow. The last rows show the front of both shapes.
    """
    generator = comparison.before.generator
    fine_pixels = image_options.cell * SUPERSAMPLE
    front_camera = camera(generator, YAW, PITCH)
    back_camera = camera(generator, *BACK_VIEW)

    def colour_images(generator: Generator, sides: Sequence[Side]) -> list[np.ndarray]:
        images = [
            render_colours(
                side.field,
                generator,
                front_camera,
                image_options.rays,
                image_options.samples,
                image_options.cell,
            )
            for side in sides
        ]
        return [_cropped(to_uint8(image.movedim(0, -1).cpu())) for image in images]

    def shapes(surfaces: Sequence[LevelSet], camera_label: Tensor) -> list[np.ndarray]:
        # rendered with SUPERSAMPLE times the pixels and then reduced, to avoid aliasing
        return [_clay(look(surface, camera_label, fine_pixels)) for surface in surfaces]

    def row_group(heading: str, subtitle: str, *cell_rows: list[np.ndarray]) -> list[Row]:
        # The heading is in the first row, and spans all rows of the group.
        first_cells, *other_cells = cell_rows
        return [
            Row(cells=first_cells, name=heading, more=subtitle, spans=len(cell_rows), parted=True),
            *(Row(cells=row_cells) for row_cells in other_cells),
        ]

    sides_before = [column.before for column in columns]
    sides_after = [column.after for column in columns]
    surfaces_before = [side.surface for side in sides_before]
    surfaces_after = [side.surface for side in sides_after]
    sheet_rows = row_group(
        "Before",
        "image, and shape\nfrom the back",
        colour_images(comparison.before.generator, sides_before),
        shapes(surfaces_before, back_camera),
    )
    sheet_rows += row_group(
        "After",
        "tuned with the\nreward; the same\nlatents",
        colour_images(comparison.after.generator, sides_after),
        shapes(surfaces_after, back_camera),
    )
    if comparison.of_people:
        filtered_surfaces = [column.post_processed for column in columns if column.post_processed is not None]
        head_views = [
            view_of_head(column.head, column.ground_truth, back_camera, fine_pixels)
            for column in columns
            if column.head and column.ground_truth
        ]
        sheet_rows += row_group(
            "Label-free",
            "post-processing,\nthe strongest; it\ndegrades intact heads",
            shapes(filtered_surfaces, back_camera),
        )
        sheet_rows += row_group("Ground truth", "of the same\nlatents", [_clay(view) for view in head_views])
    sheet_rows += row_group(
        "Front", "before, after", shapes(surfaces_before, front_camera), shapes(surfaces_after, front_camera)
    )
    # There is no line above the first group. The seeds are written below the last row.
    sheet_rows[0] = replace(sheet_rows[0], parted=False)
    sheet_rows[-1] = replace(sheet_rows[-1], captions=[f"seed {column.seed}" for column in columns])
    return sheet("", sheet_rows, name_width=NAMES, note=describe_comparison(comparison, len(columns)))


def describe_comparison(comparison: Comparison, latent_count: int) -> str:
    """Return the text below the comparison image: the rule that selected its latents, and the baselines.

    Args: latent_count: number of latents in the image.
    """
    rule_text = (
        f"{latent_count} of {POOL} held-out latents, at equal steps of reward before tuning, lowest to"
        f" highest; psi {evaluation_psi(comparison):g}."
    )
    if not comparison.of_people:
        return rule_text
    post_processing_text = f"Post-processing: {filter_name(comparison)}, the strongest of {len(FILTERS)}."
    return (
        f"{rule_text} {post_processing_text} {bundled.DAMAGED} Eyes at the back are ghosts of those in front,"
        " an artefact of tri-planes."
    )


def turntable(
    comparison: Comparison, column: Column, image_options: ImageOptions = USUAL
) -> Iterator[np.ndarray]:
    """Yield the frames of the turntable: one latent through a full turn, which starts from the front.

    Each frame shows the shapes before and after tuning side by side.
    """
    for yaw in tqdm(
        rehearsal.first((2 * np.pi * np.arange(image_options.turns) / image_options.turns).tolist()),
        desc="turntable",
        unit="frame",
    ):
        camera_label = camera(comparison.before.generator, yaw, PITCH)
        cell_images = [
            _clay(look(side.surface, camera_label, image_options.film), 1)
            for side in (column.before, column.after)
        ]
        yield sheet("", [Row(cells=cell_images, captions=("before", "after"))])


def webp(frames: Iterator[np.ndarray]) -> bytes:
    """Encode frames as an animated WebP image that repeats without end."""
    first_frame, *other_frames = (Image.fromarray(frame) for frame in frames)
    webp_buffer = io.BytesIO()
    # loop=0: the animation repeats without end.
    first_frame.save(
        webp_buffer,
        "WEBP",
        save_all=True,
        append_images=other_frames,
        duration=FRAME_MS,
        loop=0,
        quality=WEBP_QUALITY,
    )
    return webp_buffer.getvalue()


def swing_frames(
    render_frame: Callable[[float], np.ndarray], largest_yaw: float, view_count: int, bar_text: str
) -> Iterator[np.ndarray]:
    """Yield the frames of a camera that swings from one side to the other and back.

    The views are closer together at the ends, so that the movement slows down there.

    Args:
        render_frame: function that renders the frame at a yaw in radians.
        largest_yaw: largest yaw, in radians to both sides of the front.
        view_count: number of views from one side to the other.
        bar_text: text of the progress bar.
    """
    frames = []  # kept for the way back
    for yaw in tqdm(
        (largest_yaw * np.sin(np.pi / 2 * np.linspace(-1, 1, view_count))).tolist(),
        desc=bar_text,
        unit="frame",
    ):
        frames.append(render_frame(yaw))
        yield frames[-1]
    # The way back reuses the frames without the first and the last one, which would be shown twice.
    yield from frames[-2:0:-1]


PER_ROW = 5  # pairs per row of the sheet


def pairs_sheet(comparison: Comparison, pair_count: int, image_options: ImageOptions = USUAL) -> np.ndarray:
    """Return an image of pairs of shapes for a blind test: the backs before and after tuning in random order.

    The note below the pairs states which shapes are tuned. The latents are the first evaluation seeds whose
    heads are defective before tuning.

    Args: pair_count: number of pairs.
    Raises: ValueError if there are fewer than `pair_count` such latents.
    """
    pool_seeds = EVALUATION.take(POOL)
    is_defective = heads.find_defective(heldout_evaluators.measure_part(comparison, "heads"))
    seeds = [
        seed for seed, is_head_defective in zip(pool_seeds, is_defective, strict=True) if is_head_defective
    ][:pair_count]
    if len(seeds) < pair_count:
        raise ValueError(
            f"--pairs={pair_count} exceeds the {len(seeds)} defective heads among {POOL} evaluation latents."
            f" Lower --pairs to at most {len(seeds)}."
        )
    # The random order depends on the seeds alone, so a repeated call makes the same image.
    tuned_is_left = np.random.default_rng(seeds[0]).random(pair_count) < 0.5
    camera_label = camera(comparison.before.generator, *BACK_VIEW)
    cell_images = []  # two for each pair: left, right
    for seed, is_left in zip(tqdm(seeds, desc="pairs", unit="pair"), tuned_is_left, strict=True):
        sides = [
            Side.from_ws(network.generator, comparison.ws(network, [seed], 1.0), image_options.resolution)
            for network in (comparison.before, comparison.after)
        ]
        cell_images += [
            _clay(look(side.surface, camera_label, image_options.thumb * SUPERSAMPLE))
            for side in (sides[::-1] if is_left else sides)
        ]
    captions = [
        f"{pair_number} {side}" for pair_number in range(1, pair_count + 1) for side in ("left", "right")
    ]
    # Each row has PER_ROW pairs, and each pair has two cells.
    row_slices = [slice(i, i + 2 * PER_ROW) for i in range(0, 2 * pair_count, 2 * PER_ROW)]
    sheet_rows = [
        Row(cells=cell_images[row_slice], captions=captions[row_slice], parted=row_slice.start > 0)
        for row_slice in row_slices
    ]
    answer_text = ", ".join(
        f"{pair_number} {'left' if is_left else 'right'}"
        for pair_number, is_left in enumerate(tuned_is_left, 1)
    )
    return sheet(
        "Which of each pair is the better shape?",
        sheet_rows,
        note=f"The same latent before and after tuning, psi 1. Tuned: {answer_text}.",
    )


def save_meshes(side_pairs: Sequence[tuple[Side, Side]], seeds: Sequence[int], folder: Path) -> None:
    """Write seedS-before.ply and seedS-after.ply for the seed S of every latent.

    Args: side_pairs: for each latent the shapes before and after tuning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing_meshes = []  # texts "SEED (before)"
    for seed, side_pair in zip(seeds, side_pairs, strict=True):
        for role, side in zip(("before", "after"), side_pair, strict=True):
            try:
                save_mesh(
                    folder / f"seed{seed}-{role}.ply",
                    *extract_mesh(side.surface.cube, side.surface.spec, side.surface.level),
                )
            except ValueError as error:
                # A sample without a surface has no mesh. The meshes of the other latents are still written.
                missing_meshes.append(f"{seed} ({role})")
                last_error = error
    if missing_meshes:
        print(f"No mesh for the seeds {', '.join(missing_meshes)}. The reason of the last: {last_error}")


# Contact sheets of one generator: generated images beside real images, and shapes from both sides with their
# seeds.


COLUMNS = 8  # cells per row
THUMB = 112  # smallest number of pixels per edge of an image in a sheet


def image_sheet(
    generator: Generator,
    dataset: ImageFolderDataset,
    seeds: Sequence[int],
    psi: float,
    samples_per_ray: int = USUAL.samples,
) -> np.ndarray:
    """Return an image with generated images on the left and as many images of the data on the right.

    Images at the same position of both halves have the same camera. The first seed also selects the images of
    the data.

    Args:
        dataset: images of the data with their cameras.
        seeds: seeds of the generated images.
        psi: truncation.
        samples_per_ray: samples per ray in each pass.

    Returns: uint8 [H, B, 3].
    """
    # A permutation, so that no image of the data is shown twice.
    image_indices = np.random.RandomState(seeds[0]).permutation(len(dataset))[: len(seeds)]
    # grey images [N, 1, H, W] -> [N, 3, H, W], 0..1
    real_images = (
        torch.stack([torch.from_numpy(dataset[int(image_index)][0]) for image_index in image_indices])
        .float()
        .expand(-1, 3, -1, -1)
        / 255
    )
    camera_labels = torch.from_numpy(dataset.get_labels()[image_indices]).to(device_of(generator))
    generated_images = []  # [3, R, R] each, 0..1
    with torch.no_grad():
        for seed, camera_label in zip(
            tqdm(seeds, desc="images", unit="image"), camera_labels.split(1), strict=True
        ):
            z = latents([seed], generator.z_dim).to(camera_label.device)  # [1, Z]
            field = generator.field(generator.mapping(z, camera_label, truncation_psi=psi))
            # from -1..1 to 0..1; on the CPU, so that the device never holds all images
            generated_images.append(
                render_each(field, [camera_label], RenderOptions(samples=samples_per_ray), seed)[0]
                .image[0]
                .float()
                .cpu()
                / 2
                + 0.5
            )
    half_images = [
        sheet(block_title, _rows([to_uint8(image.movedim(0, -1)) for image in _enlarged(images)]))
        for block_title, images in (
            (f"{len(seeds)} generated, psi {psi:g}", torch.stack(generated_images)),
            (f"{len(real_images)} of the data", real_images),
        )
    ]
    return np.concatenate(half_images, axis=1)


def _enlarged(image_batch: torch.Tensor) -> torch.Tensor:
    """Enlarge images [N, 3, R, R] by the smallest integer factor with which they have THUMB pixels per edge.

    Images that have as many pixels already are returned unchanged.
    """
    # -(-a // b) is a / b rounded up. Images that are large enough are not changed.
    enlargement_factor = max(1, -(-THUMB // image_batch.shape[-1]))
    return (
        torch.nn.functional.interpolate(image_batch, scale_factor=enlargement_factor, mode="bicubic")
        if enlargement_factor > 1
        else image_batch
    )


def shape_sheet(
    generator: Generator, seeds: Sequence[int], psi: float, image_options: ImageOptions = USUAL
) -> np.ndarray:
    """Render the shapes of seeds into one image, uint8 [H, B, 3]. Each back is below its front.

    Args:
        psi: truncation.
        image_options: sizes of the image.
    """
    front_cells: list[np.ndarray] = []
    back_cells: list[np.ndarray] = []
    for seed in tqdm(seeds, desc="shapes", unit="shape"):
        with torch.no_grad():
            surface = LevelSet.from_field(
                generator.field(ws_of_seeds(generator, [seed], psi)), image_options.resolution
            )
        for yaw_and_pitch, view_cells in (((YAW, PITCH), front_cells), (BACK_VIEW, back_cells)):
            view_cells.append(
                _clay(look(surface, camera(generator, *yaw_and_pitch), image_options.thumb * SUPERSAMPLE))
            )
    # Each row of fronts is followed by a row of the same shapes' backs.
    sheet_rows = []
    for start in range(0, len(seeds), COLUMNS):
        row_slice = slice(start, start + COLUMNS)
        sheet_rows += [
            Row(cells=front_cells[row_slice], parted=start > 0),
            Row(cells=back_cells[row_slice], captions=[f"seed {seed}" for seed in seeds[row_slice]]),
        ]
    return sheet("", sheet_rows, note=f"{len(seeds)} shapes from the front and from the back, psi {psi:g}.")


def _rows(cells: Sequence[np.ndarray]) -> list[Row]:
    """Divide cells into rows of COLUMNS cells."""
    return [Row(cells=cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
