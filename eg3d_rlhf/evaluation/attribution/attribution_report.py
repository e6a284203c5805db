"""Jobs of the attribution report: which regions of the reward's input cause the change of the reward.

The jobs are: the regions, their Shapley values, other methods, a control with rewards of random weights, and
the attribution on the surface. shapley.py describes the methods.
Shapes: N latents, R regions, V vertices, F faces, P points per face, D, H, W grid points of the slab along z,
y, x.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import prefix_errors
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.attribution.attribution_study import CHECK_ORDERS, Study
from eg3d_rlhf.evaluation.attribution.regions import BACKGROUND, OTHER, Partition
from eg3d_rlhf.evaluation.attribution.settings import BOUND, BOXES, HEAD, LANDMARKS, PEOPLE
from eg3d_rlhf.evaluation.attribution.shapley import agreement, rank_correlation
from eg3d_rlhf.evaluation.paired import BOOTSTRAP, compute_column_means, contains_zero, span
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.media.rendering import png, tile
from eg3d_rlhf.experiments.pages import ColouredMesh, Finding, Job, Layer, identity_of_file, mesh_page
from eg3d_rlhf.geometry.mesh import extract_mesh
from training.storage import write_atomic

# Regions and Integrated Gradients on the surface: colours of a mesh's vertices, images, and an interactive
# page.


Colour = tuple[int, int, int]
# Twelve colours that differ in hue and lightness. The first ones are those of Okabe and Ito, which
# colour-blind readers can distinguish.
REGION_COLOURS: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (136, 34, 85),
    (153, 221, 255),
    (170, 170, 0),
    (119, 170, 221),
    (190, 190, 190),
)
GREY: Colour = (160, 160, 160)  # colour outside the slab
LOWERS = (0, 114, 178)  # colour of the most negative attribution, blue
NEUTRAL = (235, 235, 235)  # colour of the attribution 0
RAISES = (213, 94, 0)  # colour of the most positive attribution, orange
_SPLATS = 64  # points per face of a render
_LIGHT = np.array([0.35, 0.5, 0.8]) / np.linalg.norm([0.35, 0.5, 0.8])  # direction to the light, camera axes
SHOWN = 3  # number of latents on the page and in images
YAWS = (0.0, 0.6, 2.6)  # yaws of the views in an image, radians from frontal
PAGE = "surface-attribution.html"
_SCALE = 0.99  # quantile of |attribution| on a surface that gets the full colour


def region_colour(region_index: int) -> Colour:
    """Return the colour of the region with this index. The colours repeat after twelve regions."""
    return REGION_COLOURS[region_index % len(REGION_COLOURS)]


def slab_index(vertices: np.ndarray, spec: SlabSpec) -> np.ndarray:
    """Convert world positions [V, 3] (x, y, z) to fractional indices [V, 3] (z, y, x) of the slab.

    A slab with a skewed lattice (see `SlabSpec`) is treated as one with a straight lattice. The error is less
    than a voxel.
    """
    # index of the full grid at which the slab starts, along x, y, z
    first_index = np.array([start for start, _ in spec.index_ranges], dtype=np.float64)
    # Positions are converted to the unit cube, to indices of the full grid, and to indices of the slab.
    indices_xyz = ((vertices - np.array(spec.centre, dtype=vertices.dtype)) / spec.box_warp + 0.5) * (
        spec.resolution - 1
    ) - first_index
    return indices_xyz[:, ::-1]


def labels_at(vertices: np.ndarray, partition: Partition, spec: SlabSpec) -> np.ndarray:
    """Return the index of the region at each vertex [V]; it is -1 outside the slab.

    Args:
        vertices: world positions, [V, 3].
        partition: regions of the slab.
        spec: grid of the slab.
    """
    nearest_indices = np.round(slab_index(vertices, spec)).astype(np.int64)  # [V, 3], z, y, x
    is_inside = ((nearest_indices >= 0) & (nearest_indices < spec.shape)).all(axis=1)
    # Clipped only so that indexing is valid; `is_inside` masks these vertices.
    z, y, x = np.clip(nearest_indices, 0, np.array(spec.shape) - 1).T
    return np.where(is_inside, partition.labels.numpy()[z, y, x], -1)


def voxels_at(
    vertices: np.ndarray, voxel_attributions: torch.Tensor, spec: SlabSpec, radius: int = 1
) -> np.ndarray:
    """Return the attribution [V] of the voxels around each vertex; it is 0 outside the slab.

    It is the sum over (2 radius + 1)^3 voxels, interpolated trilinearly. The attribution of a single voxel
    would be noisy, since a surface that moves changes the voxels on both of its sides.

    Args:
        vertices: world positions, [V, 3].
        voxel_attributions: attribution of each voxel, [D, H, W].
        spec: grid of the slab.
        radius: number of voxels that are added on each side of the central voxel.
    """
    window_edge = 2 * radius + 1
    # The mean over a window times its volume is the sum. Voxels outside the slab count as 0.
    window_sums = (
        F.avg_pool3d(
            voxel_attributions.double()[None, None],
            window_edge,
            stride=1,
            padding=radius,
            count_include_pad=True,
        )
        * window_edge**3
    )
    # a copy, since torch rejects negative strides
    slab_indices = torch.from_numpy(slab_index(vertices, spec).copy())
    # last index along z, y, x
    last_indices = torch.tensor([axis_length - 1 for axis_length in spec.shape], dtype=torch.float64)
    # grid_sample needs positions in -1..1 in the order x, y, z, of shape [1, 1, 1, V, 3].
    sample_grid = (2 * slab_indices / last_indices - 1).flip(-1)[None, None, None]  # (x, y, z)
    return F.grid_sample(window_sums, sample_grid, align_corners=True, padding_mode="zeros").flatten().numpy()


def diverging_colours(attributions: np.ndarray, full_colour_attribution: float) -> np.ndarray:
    """Map attributions [V] to colours [V, 3] uint8: blue for negative, light grey for 0, orange for positive.

    Args:
        attributions: attributions at the vertices, [V].
        full_colour_attribution: absolute value >= 0 from which on a vertex gets the full blue or orange.
    """
    # The scale is 0 if all values are 0; 1e-12 avoids a division by zero.
    # [V, 1] in -1..1
    scaled_attributions = np.clip(attributions / max(full_colour_attribution, 1e-12), -1, 1)[:, None]
    end_colours = np.where(scaled_attributions < 0, np.array(LOWERS), np.array(RAISES))  # [V, 3]
    return np.round(NEUTRAL + (end_colours - NEUTRAL) * np.abs(scaled_attributions)).astype(np.uint8)


def region_colours(region_indices: np.ndarray) -> np.ndarray:
    """Map indices of regions [V] to colours [V, 3] uint8; the index -1 gets grey."""
    # Grey is the last entry of the table, which the index -1 selects.
    colour_table = np.array(
        [region_colour(region_index) for region_index in range(max(region_indices.max(initial=0) + 1, 1))]
        + [GREY],
        dtype=np.uint8,
    )
    return colour_table[region_indices]


def render_coloured_mesh(
    vertices: np.ndarray,
    faces: np.ndarray,
    colours: np.ndarray,
    yaw: float = 0.0,
    resolution: int = 320,
    half_width: float = 0.5,
    seed: int = 0,
) -> np.ndarray:
    """Render a coloured mesh with an orthographic camera, on a white background.

    Random points on every face are drawn as pixels; at each pixel the point nearest to the camera is visible.

    Args:
        vertices: positions of the vertices, [V, 3].
        faces: indices of each face's vertices, [F, 3].
        colours: colours of the vertices, [V, 3] uint8.
        yaw: rotation of the mesh about the vertical axis, radians.
        resolution: pixels per edge.
        half_width: half of the image's width, in world units.
        seed: seed of the random points.

    Returns: [resolution, resolution, 3] uint8.
    """
    # 1e-20 avoids a division by zero for degenerate faces, whose normal is zero.
    corners = vertices[faces].astype(np.float64)  # [F, 3, 3]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # [F, 3], not normalised
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    rng = np.random.default_rng(seed)  # the same points in every call
    barycentric_weights = rng.dirichlet(np.ones(3), size=_SPLATS)  # [P, 3], uniform barycentric coordinates
    # [F * P, 3]; every face has the same number of points, independent of its area
    surface_points = np.einsum("pk,fkc->fpc", barycentric_weights, corners).reshape(-1, 3)
    point_colours = np.einsum("pk,fkc->fpc", barycentric_weights, colours[faces].astype(np.float64)).reshape(
        -1, 3
    )
    # rotation about the vertical axis
    rotation = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    surface_points = surface_points @ rotation.T
    normals = np.repeat(normals @ rotation.T, _SPLATS, axis=0)  # one normal per point, [F * P, 3]
    # column in the image, [F * P]
    pixel_columns = np.floor((surface_points[:, 0] / half_width + 1) / 2 * resolution).astype(np.int64)
    # pixels, counted from the top
    pixel_rows = np.floor((1 - surface_points[:, 1] / half_width) / 2 * resolution).astype(np.int64)
    # Points outside the image and on faces that point away from the camera are not drawn.
    is_visible = (
        (pixel_columns >= 0)
        & (pixel_columns < resolution)
        & (pixel_rows >= 0)
        & (pixel_rows < resolution)
        & (normals[:, 2] > 0)
    )
    # Indices of the visible points, sorted such that the nearest to the camera is written last.
    draw_order = np.flatnonzero(is_visible)[np.argsort(surface_points[is_visible, 2])]
    brightness = 0.4 + 0.6 * np.clip(normals[draw_order] @ _LIGHT, 0, 1)  # ambient and diffuse part
    image = np.full((resolution, resolution, 3), 255, dtype=np.uint8)  # a white background
    image[pixel_rows[draw_order], pixel_columns[draw_order]] = np.clip(
        point_colours[draw_order] * brightness[:, None], 0, 255
    ).astype(np.uint8)
    return image


def surface(study: Study, folder: Path) -> Finding:
    """Show the attribution on the surfaces of the first latents.

    Writes an interactive page, <folder>/surface-attribution.html, and an image.
    """
    meshes = []  # meshes of the interactive page
    renders = []  # one list of views for each latent
    mesh_rows = []  # one row for each mesh
    skipped_meshes = []  # samples without a surface
    half_edge = study.cube_spec.box_warp / 2  # half the edge of the cube, world units
    for latent_index, seed in enumerate(study.seeds[:SHOWN]):
        for role in ("before", "after"):
            try:
                vertices, faces = extract_mesh(
                    study.density_of_cube(role, seed)[0], study.cube_spec, study.level
                )
            except ValueError:  # the sample has no surface
                skipped_meshes.append(f"seed {seed} {role}")
                continue
            vertex_attributions = voxels_at(vertices, study.integrated[latent_index].voxels, study.spec)
            # A quantile is used, since with the maximum a single extreme vertex would make all others pale.
            full_colour_attribution = float(np.quantile(np.abs(vertex_attributions), _SCALE))
            layers = _layers(study, latent_index, vertices, vertex_attributions, full_colour_attribution)
            meshes.append(
                ColouredMesh(name=f"seed {seed}, {role}", vertices=vertices, faces=faces, layers=layers)
            )
            extreme_vertices = {
                "highest": vertices[vertex_attributions.argmax()],
                "lowest": vertices[vertex_attributions.argmin()],
            }
            extreme_coordinates = {
                f"{extreme_name} {axis}": round(float(coordinate), 4)
                for extreme_name, vertex in extreme_vertices.items()
                for axis, coordinate in zip("xyz", vertex, strict=True)
            }
            mesh_rows.append(
                {
                    "seed": seed,
                    "mesh": role,
                    "vertices": len(vertices),
                    "full_colour": full_colour_attribution,
                    **extreme_coordinates,
                }
            )
            if role == "after":
                renders.append(
                    [
                        render_coloured_mesh(vertices, faces, layers[0].colours, yaw, half_width=half_edge)
                        for yaw in YAWS
                    ]
                )
    sentences = [
        (
            "Orange raises the reward, blue lowers it. The colour of a vertex shows the sum of Integrated"
            " Gradients over 3 x 3 x 3 voxels around it. Each mesh has its own scale (full colour in the"
            " table), so that colours of different meshes cannot be compared."
        ),
        "Voxels far from the surface are not shown here, but they are part of the regions' values.",
    ]
    if skipped_meshes:
        sentences.append(f"Not shown, because they have no surface: {', '.join(skipped_meshes)}.")
    image_by_caption = {}  # file name by caption
    if renders:
        # sum(..., []) joins the lists of views; the image has a row for each latent.
        write_atomic(folder / "surface-attribution.png", png(tile(sum(renders, []), len(YAWS))))
        image_by_caption = {
            f"Attribution on the tuned surface of seeds {study.seeds[0]}..: front, half turned, back.": (
                "surface-attribution.png"
            )
        }
    page_html = mesh_page(meshes, "Attribution on the surface", half_edge) if meshes else ""
    write_atomic(folder / PAGE, page_html.encode())
    facts = study.comparison.facts(study.seeds[:SHOWN], ("before", "after", "reward"))
    return Finding(
        facts=facts,
        data={"page": PAGE if meshes else None},
        rows=mesh_rows,
        says=sentences,
        images=image_by_caption,
    )


def _layers(
    study: Study,
    latent_index: int,
    vertices: np.ndarray,
    vertex_attributions: np.ndarray,
    full_colour_attribution: float,
) -> list[Layer]:
    """Return the layers of a mesh on the page: attribution, regions, and the shape without colours.

    Args:
        latent_index: index of the latent in the study.
        vertices: positions of the vertices, [V, 3].
        vertex_attributions: attribution at the vertices, [V].
        full_colour_attribution: absolute attribution that gets the full colour.
    """
    region_indices = labels_at(vertices, study.partitions[latent_index], study.spec)  # [V]
    legend = (
        (f"raises the reward (+{_short(full_colour_attribution)})", RAISES),
        ("no influence", NEUTRAL),
        (f"lowers it (-{_short(full_colour_attribution)})", LOWERS),
    )
    # The legend lists only regions that this surface has.
    region_legend = [
        (region_name, region_colour(region_index))
        for region_index, region_name in enumerate(study.names)
        if (region_indices == region_index).any()
    ]
    region_legend += [("outside the slab", GREY)] if (region_indices < 0).any() else []
    return [
        Layer(
            name="attribution",
            colours=diverging_colours(vertex_attributions, full_colour_attribution),
            legend=legend,
        ),
        Layer(name="regions", colours=region_colours(region_indices), legend=region_legend),
        Layer(name="shape alone", colours=np.full((len(vertices), 3), 225, dtype=np.uint8), legend=()),
    ]


def _short(magnitude: float) -> str:
    """Format a value >= 0 as a decimal number with two significant digits."""
    return "0" if magnitude == 0 else f"{magnitude:.{max(0, 1 - math.floor(math.log10(abs(magnitude))))}f}"


TITLE = "Which regions change the reward?"
KINDS = {
    BOXES: "fixed boxes of the slab",
    LANDMARKS: "boxes about each latent's landmarks",
    HEAD: "the entire head, divided about its landmarks",
    PEOPLE: "parts of the latent's ground-truth head (of the nearest vertex of its mesh)",
}
ROLES = ("before", "after", "reward")
_COLOURS = {
    "Shapley": "#0072B2",
    "Integrated Gradients": "#D55E00",
    "occlusion": "#009E73",
    "noise": "#999999",
}


def jobs(study: Study) -> list[Job]:
    """Return the jobs of the attribution report. Each job computes one section of the page.

    The regions are the first job, so that the user can check them while the attributions are computed.
    """
    study_settings = study.settings
    comparison = study.comparison
    file_inputs: dict = {"regions": study_settings.regions}
    if study_settings.regions not in KINDS:
        # For a user's label volume, its file and the file of its names are inputs of every job.
        with prefix_errors("--regions"):
            file_inputs["regions"] = [
                identity_of_file(path)
                for path in (study_settings.regions, Path(study_settings.regions).with_suffix(".json"))
            ]
    with prefix_errors("--landmarks"):
        file_inputs["landmarks"] = identity_of_file(study_settings.landmarks)
    # inputs of every job
    base_inputs = comparison.inputs(*ROLES, n=comparison.n, data=comparison.synthetic, **file_inputs)
    shapley_inputs = {
        **base_inputs,
        "method": study_settings.method,
        "permutations": study_settings.permutations,
        "gap_bound": study_settings.gap_bound,
    }
    # A job is computed again only if one of its inputs changes.
    integral_inputs = {
        **shapley_inputs,
        "orders": CHECK_ORDERS,
        "steps": study_settings.steps,
        "most_steps": study_settings.most_steps,
    }
    make_shapley_job = partial(
        Job, inputs=shapley_inputs, plots={"regions": plot_regions, "latents": plot_latents}
    )
    head_job = make_shapley_job(
        key="whole-head",
        title="The entire head in eight parts",
        compute=lambda folder: shapley(study.study_of_head_parts(), folder),
    )
    # Only slabs have positions, so there is no attribution on the surface for other observations. The product
    # with False is an empty list.
    surface_jobs = [
        Job(
            key="surface",
            title="Where on the surface",
            compute=partial(surface, study),
            inputs=integral_inputs,
        )
    ] * study.reads_slabs
    return [
        Job(
            key="regions", version=2, title="The regions", compute=partial(regions, study), inputs=base_inputs
        ),
        make_shapley_job(
            key="shapley", title="Shapley values of the regions", compute=partial(shapley, study)
        ),
        # Landmarks cover only the face; the parts of the head cover the changes elsewhere. The product with
        # False is an empty list.
        *[head_job] * (study_settings.regions == LANDMARKS),
        Job(
            key="methods",
            title="Do other methods agree?",
            compute=partial(methods, study),
            inputs=integral_inputs,
            plots={"means": plot_methods, "rank-correlation": plot_agreement},
        ),
        Job(
            key="redrawn-reward",
            title="The same with a reward of random weights",
            compute=partial(redrawn_reward, study),
            inputs={
                **shapley_inputs,
                "orders": CHECK_ORDERS,
                "draws": study_settings.randomisations,
                "checked": study_settings.checked,
            },
            plots={"rank-correlation": plot_redrawn},
        ),
        *surface_jobs,
    ]


def regions(study: Study, folder: Path) -> Finding:
    """Describe the regions by their numbers of voxels and by images on the meshes of the first latents.

    With --regions=landmarks, the eight parts of the head are described as a second partition.
    """
    comparison = study.comparison
    # Any other value of --regions is the path of the user's label volume.
    kind_text = KINDS.get(str(study.settings.regions), "your masks")
    count_rows = _counts(study)
    image_by_caption = draw_regions(study, folder, "regions.png") if study.reads_slabs else {}
    empty_regions = [count_row["region"] for count_row in count_rows if count_row["most"] == 0]
    sentences = [
        (
            f"{len(count_rows)} regions from {kind_text}. Every voxel of the slab belongs to one region;"
            " where two overlap, to the first in the table."
        ),
        (
            "The partition is a choice: with another partition, the same difference of the reward is divided"
            " in another way."
        ),
    ]
    if empty_regions:
        sentences.append(f"Regions without voxels, hence without influence: {', '.join(empty_regions)}.")
    if not image_by_caption:
        reason = (
            "None of the shown latents has a surface" if study.reads_slabs else "The reward reads no slab"
        )
        sentences.append(f"{reason}, so there is no image.")
    if study.settings.regions == LANDMARKS:
        head_study = study.study_of_head_parts()
        count_rows = [
            {"partition": partition_name, **count_row}
            for partition_name, partition_study in (("regions", study), ("entire head", head_study))
            for count_row in _counts(partition_study)
        ]
        image_by_caption |= draw_regions(
            head_study, folder, "whole-head.png", "The entire head in eight parts, "
        )
    return Finding(
        facts=comparison.facts(study.seeds, ("before",)),
        data={"names": list(study.names), "kind": kind_text},
        rows=count_rows,
        says=sentences,
        images=image_by_caption,
    )


def _counts(study: Study) -> list[dict]:
    """Count the voxels of each region. Return a row per region with the mean, smallest and largest number
    over latents.
    """
    # A region may have other voxels for each latent, for example if it depends on landmarks.
    counts_by_latent = np.array([partition.counts() for partition in study.partitions])  # [N, R]
    return [
        {
            "region": region_name,
            "voxels (mean)": float(region_counts.mean()),
            "least": int(region_counts.min()),
            "most": int(region_counts.max()),
            "colour": "#{:02x}{:02x}{:02x}".format(*region_colour(region_index)),
        }
        for region_index, (region_name, region_counts) in enumerate(
            zip(study.names, counts_by_latent.T, strict=True)
        )
    ]


def draw_regions(
    study: Study, folder: Path, image_name: str, caption_start: str = "Regions "
) -> dict[str, str]:
    """Render the regions on the meshes of the first latents before tuning, and write the image.

    Args:
        folder: folder of the image.
        image_name: file name of the image.
        caption_start: first words of the caption.

    Returns: the image's name by its caption; {} if no latent has a surface.
    """
    renders = []  # one list of views for each latent
    for latent_index, seed in enumerate(study.seeds[:SHOWN]):
        try:
            vertices, faces = extract_mesh(
                study.density_of_cube("before", seed)[0], study.cube_spec, study.level
            )
        except ValueError:  # the sample has no surface
            continue
        colours = region_colours(labels_at(vertices, study.partitions[latent_index], study.spec))
        renders.append(
            [
                render_coloured_mesh(vertices, faces, colours, yaw, half_width=study.cube_spec.box_warp / 2)
                for yaw in YAWS
            ]
        )
    if not renders:
        return {}
    # sum(..., []) joins the lists of views; the image has a row for each latent and a column for each yaw.
    write_atomic(folder / image_name, png(tile(sum(renders, []), len(YAWS))))
    caption = f"{caption_start}on the surface of seeds {study.seeds[0]}.. before tuning"
    return {
        f"{caption}: front, half turned, back; colours as in the table, grey: outside the slab.": image_name
    }


def shapley(study: Study, folder: Path) -> Finding:
    """Report the Shapley values of each latent and region, their means, and the efficiency gaps.

    The efficiency gap is the difference between the values' sum and the change of the reward.
    """
    attributions = study.shapley
    region_names = study.names
    comparison = study.comparison
    shapley_values = np.stack([attribution.values for attribution in attributions])  # [N, R]
    mean_by_region = compute_column_means(shapley_values)  # a mean with its interval for each region
    table_rows = [
        {
            "seed": seed,
            "region": region_name,
            "value": float(attribution.values[region_index]),
            "standard_error": None if attribution.errors is None else float(attribution.errors[region_index]),
            "difference": attribution.difference,
            "gap": attribution.gap,
        }
        for seed, attribution in zip(study.seeds, attributions, strict=True)
        for region_index, region_name in enumerate(region_names)
    ]
    largest_gap = max(attribution.relative_gap for attribution in attributions)  # of all latents
    # mean change of the reward
    mean_difference = bootstrap_mean_interval([attribution.difference for attribution in attributions])
    finding_data = {
        "names": list(region_names),
        "values": shapley_values.tolist(),
        "means": mean_by_region,
        "method": study.settings.method,
        "seeds": list(study.seeds),
        "errors": (
            None
            if attributions[0].errors is None
            else [
                attribution.errors.tolist() for attribution in attributions if attribution.errors is not None
            ]
        ),
        "difference": mean_difference._asdict(),
        "largest_relative_gap": largest_gap,
        "gaps": [attribution.gap for attribution in attributions],
    }
    interval = f"means: {BOOTSTRAP}" + (
        "" if attributions[0].errors is None else "; bars per latent: standard error of sampling"
    )
    return Finding(
        facts=comparison.facts(study.seeds, ROLES, interval),
        data=finding_data,
        rows=table_rows,
        says=_describe_shapley(study, shapley_values, mean_by_region, mean_difference, largest_gap),
    )


def _describe_shapley(
    study: Study, shapley_values: np.ndarray, region_means: list[dict], mean_difference, largest_gap: float
) -> list[str]:
    """Describe the change of the reward, and the regions that contribute to it, in sentences.

    Args:
        shapley_values: Shapley values, [N, R].
        region_means: for each region its mean Shapley value with an interval: the keys mean, lo and hi.
        mean_difference: mean change of the reward with its interval, a `MeanInterval`.
        largest_gap: largest efficiency gap of a latent, as a share of its reward difference.
    """
    # indices of the regions by the absolute value of their mean contribution, largest first
    largest_first = np.argsort([-abs(region_mean["mean"]) for region_mean in region_means])
    # Regions whose interval excludes zero, so that the sign of the mean contribution is clear.
    clear_regions = [
        region_index
        for region_index in largest_first
        if not contains_zero(region_means[region_index]["lo"], region_means[region_index]["hi"])
    ]
    study_settings = study.settings
    method_text = (
        f"all {2 ** len(study.names):,} coalitions"
        if study_settings.method == "exact"
        else f"{study_settings.permutations} permutations ({study_settings.method})"
    )
    sentences = [
        (
            f"The reward changes by {span(*mean_difference)} on average; Shapley values from {method_text}"
            f" divide that among {len(study.names)} regions. The largest efficiency gap is {largest_gap:.1e}"
            f" of a latent's difference (an error above {study_settings.gap_bound:g})."
        ),
    ]
    # Shapley values sum to the difference, so the shares sum to 100 %.
    if study_settings.regions == PEOPLE:
        mean_by_region = dict(
            zip(study.names, (region_mean["mean"] for region_mean in region_means), strict=True)
        )
        shares_text = ", ".join(
            f"the {region_name} {mean_value / mean_difference.mean:.0%}"
            for region_name, mean_value in sorted(
                mean_by_region.items(), key=lambda name_and_mean: -name_and_mean[1]
            )
        )
        sentences.append(f"This change divides into: {shares_text}. {bundled.DAMAGED}")
    if clear_regions:
        clear_texts = "; ".join(
            f"{study.names[region_index]} {span(*region_means[region_index].values())}"
            for region_index in clear_regions[:4]
        )
        sentences.append(f"Regions whose mean contribution differs from zero, largest first: {clear_texts}.")
        # number of latents in which the region with the largest mean has the largest contribution
        latent_count = int((np.abs(shapley_values).argmax(axis=1) == largest_first[0]).sum())
        voxel_share = np.mean(
            [
                partition.counts()[largest_first[0]] / partition.labels.numel()
                for partition in study.partitions
            ]
        )
        sentences.append(
            f"{study.names[largest_first[0]].capitalize()}, with {voxel_share:.0%} of the voxels, contributes"
            f" most in {latent_count} of {len(shapley_values)} latents."
        )
        # OTHER and BACKGROUND contain the voxels outside the named regions, so the partition explains little.
        if study.names[largest_first[0]] in (OTHER, BACKGROUND):
            below_text = "the parts of the entire head and " if study_settings.regions == LANDMARKS else ""
            sentences.append(
                "Most of the change lies outside the named regions, so that this partition explains little"
                f" of it: look at {below_text}the surface below, or divide that part with masks of your own"
                " (--regions=FILE)."
            )
    else:
        sentences.append(
            "No region's mean contribution differs from zero over these latents. More latents (--n) give"
            " narrower intervals."
        )
    sentences.append(
        "A contribution states how much a region changes this reward, not that the change of the shape is"
        " good there. Large regions contain more voxels."
    )
    return sentences


def methods(study: Study, folder: Path) -> Finding:
    """Report the mean attributions by four methods, and the rank correlations between the methods.

    The methods are Shapley values, Integrated Gradients, occlusion, and Shapley values of shuffled changes
    ("noise"). The finding also states whether the Integrated Gradients are complete, that is, if they sum to
    the change of the reward.
    """
    attributions_by_method = study.methods
    region_names = study.names
    comparison = study.comparison
    means_by_method = {
        method: compute_column_means(method_values)
        for method, method_values in attributions_by_method.items()
    }
    method_pairs = agreement(attributions_by_method)  # one entry per pair of methods
    table_rows = [
        {
            "seed": seed,
            "region": region_name,
            **{
                method: float(method_values[latent_index, region_index])
                for method, method_values in attributions_by_method.items()
            },
        }
        for latent_index, seed in enumerate(study.seeds)
        for region_index, region_name in enumerate(region_names)
    ]
    integral_rows: list[dict] = [
        {
            "seed": seed,
            "steps": gradients.steps,
            "gap": gradients.gap,
            "share": gradients.tried[-1][1],  # gap of the last integral, as a share of the difference
            "complete": gradients.complete,
            "tried": [list(steps_and_gap) for steps_and_gap in gradients.tried],
        }
        for seed, gradients in zip(study.seeds, study.integrated, strict=True)
    ]
    complete_count = sum(integral_row["complete"] for integral_row in integral_rows)  # number of latents
    # largest gap, as a share of the difference
    largest_gap = max(integral_row["share"] for integral_row in integral_rows)
    step_counts = [integral_row["steps"] for integral_row in integral_rows]
    integral_text = (
        f"Integrated Gradients add up to within {BOUND:.0%} of the reward difference for {complete_count} of"
        f" {len(integral_rows)} latents (largest gap {largest_gap:.2%}) with {min(step_counts)} to"
        f" {max(step_counts)} steps; the count was raised automatically from {study.settings.steps} for"
        f" {sum(len(integral_row['tried']) > 1 for integral_row in integral_rows)} of them."
    )
    # Latents whose integral has not converged are reported.
    if complete_count < len(integral_rows):
        integral_text += " The others do not add up: raise --most-steps, or interpret them with care."
    sentences = [integral_text, *_describe_agreement(method_pairs)]
    sentences.append(
        'For "noise", each region\'s change is shuffled among its voxels, so that the amount of change is the'
        " same, but its shape is lost. If a method agrees with noise as well as with the other methods, it"
        " measures how much a region changed, not how its shape changed. Occlusion replaces one region of the"
        " tuned slab at a time, so that regions which act together count more than once or not at all."
    )
    finding_data = {
        "names": list(region_names),
        "means": means_by_method,
        "agreement": method_pairs,
        "integrated": integral_rows,
    }
    return Finding(
        facts=comparison.facts(study.seeds, ROLES, f"means, and mean rank correlations: {BOOTSTRAP}"),
        data=finding_data,
        rows=table_rows,
        says=sentences,
    )


def _interval(mean_interval: dict) -> str:
    """Format a mean with its interval.

    Args: mean_interval: the mean and the ends of its interval, with the keys mean, lo and hi.
    """
    return span(mean_interval["mean"], mean_interval["lo"], mean_interval["hi"], ".2f")


def _describe_agreement(method_pairs: list[dict]) -> list[str]:
    """Describe the rank correlation of each method with Shapley values, in sentences.

    Args: method_pairs: result of `shapley.agreement`.
    """
    sentences = []
    for method_pair in method_pairs:
        # The other pairs are only plotted.
        if method_pair["first"] != "Shapley":
            continue
        spearman_mean = method_pair["spearman"]["mean"]
        kendall_mean = method_pair["kendall"]["mean"]  # None if Spearman's correlation is None
        if spearman_mean is None:
            sentences.append(
                f"{method_pair['second']}: no rank correlation, since all values of one of the methods are"
                " equal."
            )
            continue
        overall_correlation = method_pair["spearman"]["overall"]
        sentences.append(
            f"Shapley and {method_pair['second']}: Spearman {_interval(spearman_mean)} per latent (Kendall"
            f" {_interval(kendall_mean)}),"
            f" {'none' if overall_correlation is None else f'{overall_correlation:.2f}'} between the means"
            " over latents."
        )
    return sentences


def redrawn_reward(study: Study, folder: Path) -> Finding:
    """Correlate attributions by the trained reward with attributions by rewards with random weights."""
    study_settings = study.settings
    comparison = study.comparison
    latent_count = min(study_settings.checked, len(study.seeds))
    # [checked, R]
    trained_attributions = np.stack([attribution.values for attribution in study.shapley[:latent_count]])
    table_rows = []  # one row for each random weights and latent
    mean_signed_correlations = []  # mean over latents, by random weights
    mean_size_correlations = []  # the same of absolute values
    # An attribution that is similar with random weights does not come from training (Adebayo et al. 2018).
    for randomisation_index in range(study_settings.randomisations):
        random_attributions = study.attribute_randomised(randomisation_index)  # [checked, R]
        # with signs
        signed_correlations = [
            rank_correlation(trained_values, random_values)
            for trained_values, random_values in zip(trained_attributions, random_attributions, strict=True)
        ]
        # The absolute values correlate also for random networks, see `_describe_randomised`.
        size_correlations = [
            rank_correlation(np.abs(trained_values), np.abs(random_values))
            for trained_values, random_values in zip(trained_attributions, random_attributions, strict=True)
        ]
        table_rows += [
            {
                "randomisation": randomisation_index,
                "seed": study.seeds[latent_index],
                "spearman": signed_correlation,
                "spearman_of_sizes": size_correlation,
            }
            for latent_index, (signed_correlation, size_correlation) in enumerate(
                zip(signed_correlations, size_correlations, strict=True)
            )
        ]
        # Random weights for which all attributions are constant have no correlation.
        mean_signed_correlations += (
            [float(np.mean(defined_correlations))]
            if (
                defined_correlations := [
                    signed_correlation
                    for signed_correlation in signed_correlations
                    if signed_correlation is not None
                ]
            )
            else []
        )
        mean_size_correlations += (
            [float(np.mean(defined_correlations))]
            if (
                defined_correlations := [
                    size_correlation for size_correlation in size_correlations if size_correlation is not None
                ]
            )
            else []
        )
    finding_data = {
        "by_randomisation": mean_signed_correlations,
        "sizes": mean_size_correlations,
        "randomisations": study_settings.randomisations,
        "latents": latent_count,
        "mean": bootstrap_mean_interval(mean_signed_correlations)._asdict()
        if mean_signed_correlations
        else None,
        "mean_of_sizes": bootstrap_mean_interval(mean_size_correlations)._asdict()
        if mean_size_correlations
        else None,
    }
    facts = comparison.facts(
        study.seeds[:latent_count],
        ROLES,
        f"95 % percentile bootstrap over {len(mean_signed_correlations)} draws of weights, 10,000 resamples",
    )
    return Finding(facts=facts, data=finding_data, rows=table_rows, says=_describe_randomised(finding_data))


def _describe_randomised(finding_data: dict) -> list[str]:
    """Describe the correlation with rewards of random weights, in sentences.

    Args: finding_data: data of the finding of `redrawn_reward`.
    """
    # None if no random weights have a correlation
    if finding_data["mean"] is None:
        return [
            "Every reward with random weights attributes the same to all regions, so there is no rank"
            " correlation."
        ]
    mean_correlation, lo, hi = finding_data["mean"].values()
    # An interval without zero means that the attributions have similar ranks without any training.
    if contains_zero(lo, hi):
        conclusion = (
            "its interval contains zero, so this control does not show that the attributions are independent"
            " of the training"
        )
    else:
        conclusion = (
            "its interval excludes zero, so a part of the attribution comes from the slabs or the"
            " architecture, not from training"
        )
    sentences = [
        (
            "Spearman correlation between the trained reward's attributions and those of"
            f" {len(finding_data['by_randomisation'])} rewards with random weights:"
            f" {span(mean_correlation, lo, hi, '.2f')}; {conclusion}."
        ),
        (
            f"With {len(finding_data['by_randomisation'])} random weights, a correlation that is smaller than"
            " the interval's width cannot be detected."
        ),
    ]
    if finding_data["mean_of_sizes"] is not None:
        size_text = _interval(finding_data["mean_of_sizes"])
        sentences.append(
            f"Absolute values correlate by {size_text}. This need not be near zero, since every network"
            " reacts more to regions that changed more."
        )
    return sentences


def _order(region_means: list[dict]) -> np.ndarray:
    """Return the indices of the regions sorted by mean, the largest last, since bars are drawn upwards."""
    return np.argsort([region_mean["mean"] for region_mean in region_means])


def _bar_size(bar_count: int) -> tuple[float, float]:
    """Return the width and height in inches of a plot with `bar_count` bars."""
    return (6.4, 0.9 + 0.34 * bar_count)


def plot_regions(finding_data: dict):
    """Plot the mean contribution of each region with its interval.

    Args: finding_data: data of the finding of `shapley`.
    """
    figure, axes = style.figure(size=_bar_size(len(finding_data["names"])))
    region_order = _order(finding_data["means"])
    sorted_means = [finding_data["means"][region_index] for region_index in region_order]
    mean_values = np.array([region_mean["mean"] for region_mean in sorted_means])
    error_bars = [
        mean_values - [region_mean["lo"] for region_mean in sorted_means],
        [region_mean["hi"] for region_mean in sorted_means] - mean_values,
    ]
    # Contributions that raise the reward have another colour than those that lower it.
    colours = [
        style.colour("after") if mean_value > 0 else style.colour("before") for mean_value in mean_values
    ]
    axes.barh(
        [finding_data["names"][region_index] for region_index in region_order],
        mean_values,
        xerr=error_bars,
        color=colours,
        error_kw={"ecolor": "#777777", "elinewidth": 1.2},
    )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set(
        xlabel="mean contribution to the change of the reward",
        title=f"Shapley values ({finding_data['method']})",
    )
    return figure


def plot_latents(finding_data: dict):
    """Plot the Shapley value of every latent for each region.

    Args: finding_data: data of the finding of `shapley`.
    """
    figure, axes = style.figure(size=_bar_size(len(finding_data["names"])))
    region_order = _order(finding_data["means"])
    shapley_values = np.asarray(finding_data["values"])  # [N, R]
    # Points of one region are spread vertically, so that they do not cover one another.
    offsets = np.linspace(-0.28, 0.28, len(shapley_values))
    for row_index, region_index_of_row in enumerate(region_order):
        standard_errors = (
            None
            if finding_data["errors"] is None
            else [latent_errors[region_index_of_row] for latent_errors in finding_data["errors"]]
        )
        axes.errorbar(
            shapley_values[:, region_index_of_row],
            row_index + offsets,
            xerr=standard_errors,
            fmt="o",
            markersize=3,
            color=style.colour("before"),
            elinewidth=0.8,
        )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(
        range(len(region_order)), [finding_data["names"][region_index] for region_index in region_order]
    )
    axes.set(xlabel="contribution to the change of the reward", title="One point per latent")
    return figure


def plot_methods(finding_data: dict):
    """Plot the mean attribution of each region by each method.

    Args: finding_data: data of the finding of `methods`.
    """
    region_count = len(finding_data["names"])
    figure, axes = style.figure(size=(6.4, 0.9 + 0.5 * region_count))  # inches
    region_order = _order(finding_data["means"]["Shapley"])
    # The bars of a region take 0.8 of the distance between regions.
    bar_height = 0.8 / len(finding_data["means"])
    for method_index, (method, region_means) in enumerate(finding_data["means"].items()):
        # Regions are 1 apart; the methods of a region are stacked downwards.
        y_positions = np.arange(region_count) + 0.4 - bar_height * (method_index + 0.5)
        axes.barh(
            y_positions,
            [region_means[region_index]["mean"] for region_index in region_order],
            height=bar_height,
            color=_COLOURS.get(method, "#777777"),
            label=method,
        )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(
        range(region_count), [finding_data["names"][region_index] for region_index in region_order]
    )
    axes.set(xlabel="mean attribution", title="Four methods")
    axes.legend(fontsize=7)
    return figure


def plot_agreement(finding_data: dict):
    """Plot the mean rank correlations of all pairs of methods, with intervals.

    Args: finding_data: data of the finding of `methods`.
    """
    # Pairs with a method whose values are all equal have no correlation.
    method_pairs = [
        method_pair
        for method_pair in finding_data["agreement"]
        if method_pair["spearman"]["mean"] is not None
    ]
    figure, axes = style.figure(size=(6.4, 0.9 + 0.4 * max(len(method_pairs), 1)))  # inches
    # Both kinds of correlation of a pair are drawn side by side, 0.24 apart.
    for vertical_shift, correlation_kind, colour in (
        (0.12, "spearman", "#0072B2"),
        (-0.12, "kendall", "#D55E00"),
    ):
        pair_means = [method_pair[correlation_kind]["mean"] for method_pair in method_pairs]
        mean_values = np.array([pair_mean["mean"] for pair_mean in pair_means])
        error_bars = [
            mean_values - [pair_mean["lo"] for pair_mean in pair_means],
            [pair_mean["hi"] for pair_mean in pair_means] - mean_values,
        ]
        axes.errorbar(
            mean_values,
            np.arange(len(method_pairs)) + vertical_shift,
            xerr=error_bars,
            fmt="o",
            markersize=4,
            color=colour,
            label=correlation_kind,
        )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(
        range(len(method_pairs)),
        [f"{method_pair['first']} / {method_pair['second']}" for method_pair in method_pairs],
    )
    axes.set(xlim=(-1.05, 1.05), xlabel="rank correlation, mean over latents", title="Agreement of methods")
    axes.legend(fontsize=7)
    return figure


def plot_redrawn(finding_data: dict):
    """Plot the rank correlation with each reward of random weights, and the mean with its interval.

    Args: finding_data: data of the finding of `redrawn_reward`.
    """
    figure, axes = style.figure(size=(6.4, 2.2))  # inches
    for row_index, (values_key, mean_key) in enumerate(
        (("by_randomisation", "mean"), ("sizes", "mean_of_sizes"))
    ):
        axes.plot(
            finding_data[values_key],
            [row_index] * len(finding_data[values_key]),
            "o",
            markersize=4,
            alpha=0.5,
            color=style.colour("noise"),
        )
        # The mean is drawn slightly above the points of its row.
        if finding_data[mean_key] is not None:
            mean_interval = finding_data[mean_key]
            axes.errorbar(
                [mean_interval["mean"]],
                [row_index + 0.18],
                xerr=[
                    [mean_interval["mean"] - mean_interval["lo"]],
                    [mean_interval["hi"] - mean_interval["mean"]],
                ],
                fmt="D",
                color=style.colour("reward"),
                label=None if row_index else "mean, 95 % interval",
            )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks([0, 1], ["with signs", "sizes alone"])
    axes.set(
        xlim=(-1.05, 1.05),
        ylim=(-0.5, 1.6),
        xlabel="Spearman correlation with the trained reward's attribution, one point per draw",
        title="Rewards with random weights",
    )
    if finding_data["mean"] is not None:
        axes.legend(fontsize=7)
    return figure
