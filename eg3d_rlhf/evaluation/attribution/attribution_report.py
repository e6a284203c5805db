"""Parts of the attribution report: regions, Shapley values, other methods, a check with re-drawn weights, and
the surface.

Letters: N latents, R regions, K draws, V vertices, F faces, P points, D, H, W = grid points of the slab along
z, y, x.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import naming
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.attribution.attribution_study import CHECK_ORDERS, Study
from eg3d_rlhf.evaluation.attribution.regions import BACKGROUND, OTHER, Partition
from eg3d_rlhf.evaluation.attribution.settings import BOUND, BOXES, HEAD, LANDMARKS, PEOPLE
from eg3d_rlhf.evaluation.attribution.shapley import agreement, rank_correlation
from eg3d_rlhf.evaluation.paired import BOOTSTRAP, contains_zero, compute_column_means, span
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.media.rendering import png, tile
from eg3d_rlhf.experiments.pages import ColouredMesh, Finding, Job, Layer, identity_of_file, mesh_page
from eg3d_rlhf.geometry.mesh import extract_mesh
from training.storage import write_atomic

# Regions and Integrated Gradients of single voxels on the surface: colours of a mesh's vertices, images,
# and an interactive page.


Colour = tuple[int, int, int]
# Twelve colours that differ in hue and lightness, Okabe and Ito's first.
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
GREY: Colour = (160, 160, 160)  # outside the slab
LOWERS = (0, 114, 178)  # ends and middle of the diverging colour scale
NEUTRAL = (235, 235, 235)
RAISES = (213, 94, 0)
_SPLATS = 64  # points per face of a render
_LIGHT = np.array([0.35, 0.5, 0.8]) / np.linalg.norm([0.35, 0.5, 0.8])  # direction to the light, camera axes
SHOWN = 3  # latents on the page and in images
YAWS = (0.0, 0.6, 2.6)  # radians, of the views in an image
PAGE = "surface-attribution.html"
_SCALE = 0.99  # quantile of |attribution| on a surface that gets the full colour


def region_colour(index: int) -> Colour:
    """Return the colour of a region; the colours repeat after twelve."""
    return REGION_COLOURS[index % len(REGION_COLOURS)]


def slab_index(vertices: np.ndarray, spec: SlabSpec) -> np.ndarray:
    """Convert world positions [V, 3] to fractional slab indices [V, 3] (z, y, x).

    A skewed lattice is treated as a straight one, which is less than a voxel off.
    """
    # The slab starts at this index of the full lattice, along x, y, z.
    first = np.array([start for start, _ in spec.index_ranges], dtype=np.float64)
    # World -> unit cube -> indices of the full lattice -> indices of the slab
    xyz = ((vertices - np.array(spec.centre, dtype=vertices.dtype)) / spec.box_warp + 0.5) * (
        spec.resolution - 1
    ) - first
    return xyz[:, ::-1]


def labels_at(vertices: np.ndarray, partition: Partition, spec: SlabSpec) -> np.ndarray:
    """Return the region of the voxel nearest to each vertex, [V]; -1 outside the slab."""
    index = np.round(slab_index(vertices, spec)).astype(np.int64)  # [V, 3], z, y, x
    inside = ((index >= 0) & (index < spec.shape)).all(axis=1)
    # Clipped only so that indexing is valid; `inside` masks these vertices.
    z, y, x = np.clip(index, 0, np.array(spec.shape) - 1).T
    return np.where(inside, partition.labels.numpy()[z, y, x], -1)


def voxels_at(vertices: np.ndarray, voxels: torch.Tensor, spec: SlabSpec, reach: int = 1) -> np.ndarray:
    """Return the attribution of the voxels about each vertex, [V].

    This is the sum over (2 reach + 1)^3 voxels, trilinear in between; 0 outside the slab. A surface moves
    through the voxels on both of its sides, so the attribution of a single voxel would be noisy.
    """
    size = 2 * reach + 1
    # Average pooling times the window's volume is the sum; padding with zeros counts as attribution 0.
    sums = (
        F.avg_pool3d(voxels.double()[None, None], size, stride=1, padding=reach, count_include_pad=True)
        * size**3
    )
    index = torch.from_numpy(slab_index(vertices, spec).copy())
    limits = torch.tensor([n - 1 for n in spec.shape], dtype=torch.float64)  # last index along z, y, x
    # grid_sample expects -1..1 in the order x, y, z; [1, 1, 1, V, 3]
    grid = (2 * index / limits - 1).flip(-1)[None, None, None]  # (x, y, z)
    return F.grid_sample(sums, grid, align_corners=True, padding_mode="zeros").flatten().numpy()


def diverging(values: np.ndarray, scale: float) -> np.ndarray:
    """Map values to colours [V, 3] uint8: blue at -scale, light at 0, orange at +scale."""
    # A constant zero attribution has scale 0.
    share = np.clip(values / max(scale, 1e-12), -1, 1)[:, None]  # [V, 1] in -1..1
    towards = np.where(share < 0, np.array(LOWERS), np.array(RAISES))
    return np.round(NEUTRAL + (towards - NEUTRAL) * np.abs(share)).astype(np.uint8)


def by_region(labels: np.ndarray) -> np.ndarray:
    """Map region labels [V] to colours [V, 3] uint8; grey for -1."""
    # Grey is the last entry, which index -1 selects.
    table = np.array(
        [region_colour(i) for i in range(max(labels.max(initial=0) + 1, 1))] + [GREY], dtype=np.uint8
    )
    return table[labels]


def render_coloured_mesh(
    vertices: np.ndarray,
    faces: np.ndarray,
    colours: np.ndarray,
    yaw: float = 0.0,
    resolution: int = 320,
    half: float = 0.5,
    seed: int = 0,
) -> np.ndarray:
    """Render a coloured mesh from the front, turned by `yaw` radians: [resolution, resolution, 3] uint8 on
    white.

    The projection is orthographic. Random points on every face are splatted, the nearest to the camera are
    kept, and the light comes from above.
    """
    # The lower bound guards degenerate faces, whose normal is zero.
    corners = vertices[faces].astype(np.float64)  # [F, 3, 3]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(3), size=_SPLATS)  # [P, 3], uniform barycentric coordinates
    # [F * P, 3]; every face gets the same number of points, independent of its area
    points = np.einsum("pk,fkc->fpc", shares, corners).reshape(-1, 3)
    tones = np.einsum("pk,fkc->fpc", shares, colours[faces].astype(np.float64)).reshape(-1, 3)
    # Rotation about the vertical axis
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    points = points @ turn.T
    normals = np.repeat(normals @ turn.T, _SPLATS, axis=0)  # one normal per point, [F * P, 3]
    column = np.floor((points[:, 0] / half + 1) / 2 * resolution).astype(np.int64)
    row = np.floor((1 - points[:, 1] / half) / 2 * resolution).astype(np.int64)
    # Back faces are dropped; the row index grows downwards.
    shown = (column >= 0) & (column < resolution) & (row >= 0) & (row < resolution) & (normals[:, 2] > 0)
    # indices into the F * P points
    order = np.flatnonzero(shown)[np.argsort(points[shown, 2])]  # the nearest to the camera is written last
    light = 0.4 + 0.6 * np.clip(normals[order] @ _LIGHT, 0, 1)
    out = np.full((resolution, resolution, 3), 255, dtype=np.uint8)  # a white background
    out[row[order], column[order]] = np.clip(tones[order] * light[:, None], 0, 255).astype(np.uint8)
    return out


def surface(study: Study, folder: Path) -> Finding:
    """Show the attribution per vertex on the first latents' meshes: an interactive page
    (<folder>/surface-attribution.html) and an image.
    """
    meshes = []  # of the interactive page
    renders = []
    rows = []
    missing = []  # meshes without a surface
    half = study.cube_spec.box_warp / 2  # half the edge of the cube, world units
    for i, seed in enumerate(study.seeds[:SHOWN]):
        for role in ("before", "after"):
            try:
                vertices, faces = extract_mesh(study.cube(role, seed)[0], study.cube_spec, study.level)
            except ValueError:  # no surface to colour
                missing.append(f"seed {seed} {role}")
                continue
            values = voxels_at(vertices, study.integrated[i].voxels, study.spec)
            # A quantile, not the maximum: a single extreme vertex would make all others pale.
            scale = float(np.quantile(np.abs(values), _SCALE))
            layers = _layers(study, i, vertices, values, scale)
            meshes.append(
                ColouredMesh(name=f"seed {seed}, {role}", vertices=vertices, faces=faces, layers=layers)
            )
            ends = {"highest": vertices[values.argmax()], "lowest": vertices[values.argmin()]}
            positions = {
                f"{name} {axis}": round(float(v), 4)
                for name, vertex in ends.items()
                for axis, v in zip("xyz", vertex, strict=True)
            }
            rows.append(
                {"seed": seed, "mesh": role, "vertices": len(vertices), "full_colour": scale, **positions}
            )
            if role == "after":
                renders.append(
                    [render_coloured_mesh(vertices, faces, layers[0].colours, yaw, half=half) for yaw in YAWS]
                )
    sentences = [
        (
            "Orange raises the reward, blue lowers it: the sum of Integrated Gradients over the 3 x 3 x 3"
            " voxels about a vertex. Each mesh has its own scale (full colour in the table), so colours"
            " compare places of a head, not heads."
        ),
        "Voxels far from the surface are not shown here; the table of regions counts them all.",
    ]
    sentences += [f"Not shown, because they have no surface: {', '.join(missing)}."] if missing else []
    images = {}
    if renders:
        write_atomic(folder / "surface-attribution.png", png(tile(sum(renders, []), len(YAWS))))
        images = {
            f"Attribution on the tuned surface of seeds {study.seeds[0]}..: front, half turned, back.": (
                "surface-attribution.png"
            )
        }
    page = mesh_page(meshes, "Attribution on the surface", half) if meshes else ""
    write_atomic(folder / PAGE, page.encode())
    facts = study.c.facts(study.seeds[:SHOWN], ("before", "after", "reward"))
    return Finding(
        facts=facts, data={"page": PAGE if meshes else None}, rows=rows, says=sentences, images=images
    )


def _layers(study: Study, i: int, vertices: np.ndarray, values: np.ndarray, scale: float) -> list[Layer]:
    """Return the layers of one mesh on the page: attribution, regions, and the bare shape."""
    labels = labels_at(vertices, study.partitions[i], study.spec)  # [V]
    ends = (
        (f"raises the reward (+{_short(scale)})", RAISES),
        ("no influence", NEUTRAL),
        (f"lowers it (-{_short(scale)})", LOWERS),
    )
    # The legend lists only the regions that this surface meets.
    names = [(name, region_colour(k)) for k, name in enumerate(study.names) if (labels == k).any()]
    names += [("outside the slab", GREY)] if (labels < 0).any() else []
    return [
        Layer(name="attribution", colours=diverging(values, scale), legend=ends),
        Layer(name="regions", colours=by_region(labels), legend=names),
        Layer(name="shape alone", colours=np.full((len(vertices), 3), 225, dtype=np.uint8), legend=()),
    ]


def _short(value: float) -> str:
    """Format a value with two significant digits."""
    return "0" if value == 0 else f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"


TITLE = "Which regions does the reward like?"
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
    """Return the parts of the report; the regions come first, since they are plotted before anything is
    computed.
    """
    s = study.settings
    c = study.c
    files: dict = {"regions": s.regions}
    if s.regions not in KINDS:
        # A user's label volume: its identity and that of its names are inputs of every part.
        with naming("--regions"):
            files["regions"] = [
                identity_of_file(path) for path in (s.regions, Path(s.regions).with_suffix(".json"))
            ]
    with naming("--landmarks"):
        files["landmarks"] = identity_of_file(s.landmarks)
    base = c.inputs(*ROLES, n=c.n, data=c.synthetic, **files)  # inputs of every part
    shared = {**base, "method": s.method, "permutations": s.permutations, "gap_bound": s.gap_bound}
    # A part is computed again only if one of its inputs changes.
    integral = {**shared, "orders": CHECK_ORDERS, "steps": s.steps, "most_steps": s.most_steps}
    divided = partial(Job, inputs=shared, plots={"regions": plot_regions, "latents": plot_latents})
    head_job = divided(
        key="whole-head",
        title="The entire head in eight parts",
        compute=lambda folder: shapley(study.of_the_head(), folder),
    )
    # Only slabs have positions, so only they give an attribution on the surface.
    surface_jobs = [
        Job(key="surface", title="Where on the surface", compute=partial(surface, study), inputs=integral)
    ] * study.reads_slabs
    return [
        Job(key="regions", version=2, title="The regions", compute=partial(regions, study), inputs=base),
        divided(key="shapley", title="Shapley values of the regions", compute=partial(shapley, study)),
        # Landmarks cover the face alone; the parts of the head show where the rest of the change lies.
        *[head_job] * (s.regions == LANDMARKS),
        Job(
            key="methods",
            title="Do other methods agree?",
            compute=partial(methods, study),
            inputs=integral,
            plots={"means": plot_methods, "rank-correlation": plot_agreement},
        ),
        Job(
            key="redrawn-reward",
            title="The same with a reward of random weights",
            compute=partial(redrawn_reward, study),
            inputs={**shared, "orders": CHECK_ORDERS, "draws": s.randomisations, "checked": s.checked},
            plots={"rank-correlation": plot_redrawn},
        ),
        *surface_jobs,
    ]


def regions(study: Study, folder: Path) -> Finding:
    """Describe the partition: voxels per region, and images of the first latents' meshes from three sides.

    With landmarks, the eight parts of the head follow as a second partition.
    """
    c = study.c
    kind = KINDS.get(str(study.settings.regions), "your masks")
    rows = _counts(study)
    images = draw_regions(study, folder, "regions.png") if study.reads_slabs else {}
    empty = [row["region"] for row in rows if row["most"] == 0]
    sentences = [
        (
            f"{len(rows)} regions from {kind}; where two overlap, the first in the table wins. Every voxel of"
            " the slab belongs to one."
        ),
        (
            "The partition is a choice: a value says what a region contributes, and another partition divides"
            " the same difference otherwise."
        ),
    ]
    sentences += [f"Empty, and so without any influence: {', '.join(empty)}."] if empty else []
    if not images:
        missing = (
            "None of the shown latents has a surface" if study.reads_slabs else "The reward reads no slab"
        )
        sentences.append(f"{missing}, so there is no image.")
    if study.settings.regions == LANDMARKS:
        head = study.of_the_head()
        rows = [
            {"partition": name, **row}
            for name, part in (("regions", study), ("entire head", head))
            for row in _counts(part)
        ]
        images |= draw_regions(head, folder, "whole-head.png", "The entire head in eight parts, ")
    return Finding(
        facts=c.facts(study.seeds, ("before",)),
        data={"names": list(study.names), "kind": kind},
        rows=rows,
        says=sentences,
        images=images,
    )


def _counts(study: Study) -> list[dict]:
    """Count the voxels of each region: mean, least and most over the latents."""
    # The same regions may hold different voxels for each latent, for example about landmarks.
    # Voxels per latent and region
    counts = np.array([p.counts() for p in study.partitions])  # [N, R]
    return [
        {
            "region": region,
            "voxels (mean)": float(region_counts.mean()),
            "least": int(region_counts.min()),
            "most": int(region_counts.max()),
            "colour": "#{:02x}{:02x}{:02x}".format(*region_colour(i)),
        }
        for i, (region, region_counts) in enumerate(zip(study.names, counts.T, strict=True))
    ]


def draw_regions(study: Study, folder: Path, name: str, what: str = "Regions ") -> dict[str, str]:
    """Show a partition on the meshes of the first latents.

    Returns: the image's name by its caption; {} if no latent has a surface.
    """
    renders = []
    for i, seed in enumerate(study.seeds[:SHOWN]):
        try:
            vertices, faces = extract_mesh(study.cube("before", seed)[0], study.cube_spec, study.level)
        except ValueError:  # a sample without a surface has nothing to draw on
            continue
        colours = by_region(labels_at(vertices, study.partitions[i], study.spec))
        renders.append(
            [
                render_coloured_mesh(vertices, faces, colours, yaw, half=study.cube_spec.box_warp / 2)
                for yaw in YAWS
            ]
        )
    if not renders:
        return {}
    # One row per latent, one column per yaw
    write_atomic(folder / name, png(tile(sum(renders, []), len(YAWS))))
    where = f"{what}on the surface of seeds {study.seeds[0]}.. before tuning"
    return {f"{where}: front, half turned, back; colours as in the table, grey: outside the slab.": name}


def shapley(study: Study, folder: Path) -> Finding:
    """Report Shapley values per latent and region, their means with intervals, and the efficiency gaps."""
    attributions = study.shapley
    names = study.names
    c = study.c
    values = np.stack([a.values for a in attributions])  # [N, R]
    means = compute_column_means(values)  # one mean with its interval per region
    rows = [
        {
            "seed": seed,
            "region": name,
            "value": float(a.values[i]),
            "standard_error": None if a.errors is None else float(a.errors[i]),
            "difference": a.difference,
            "gap": a.gap,
        }
        for seed, a in zip(study.seeds, attributions, strict=True)
        for i, name in enumerate(names)
    ]
    gap = max(a.relative_gap for a in attributions)  # the worst latent's
    total = bootstrap_mean_interval([a.difference for a in attributions])  # mean change of the reward
    data = {
        "names": list(names),
        "values": values.tolist(),
        "means": means,
        "method": study.settings.method,
        "seeds": list(study.seeds),
        "errors": (
            None
            if attributions[0].errors is None
            else [a.errors.tolist() for a in attributions if a.errors is not None]
        ),
        "difference": total._asdict(),
        "largest_relative_gap": gap,
        "gaps": [a.gap for a in attributions],
    }
    interval = f"means: {BOOTSTRAP}" + (
        "" if attributions[0].errors is None else "; bars per latent: standard error of sampling"
    )
    return Finding(
        facts=c.facts(study.seeds, ROLES, interval),
        data=data,
        rows=rows,
        says=_shapley_says(study, values, means, total, gap),
    )


def _shapley_says(study: Study, values: np.ndarray, means: list[dict], total, gap: float) -> list[str]:
    """Describe the change of the reward and the regions that contribute to it."""
    # Regions by the size of their mean contribution, largest first
    order = np.argsort([-abs(m["mean"]) for m in means])
    # An interval without zero: the sign of the mean contribution is established over these latents.
    clear = [i for i in order if not contains_zero(means[i]["lo"], means[i]["hi"])]
    s = study.settings
    how = (
        f"all {2 ** len(study.names):,} coalitions"
        if s.method == "exact"
        else f"{s.permutations} permutations ({s.method})"
    )
    sentences = [
        (
            f"The reward changes by {span(*total)} on average; Shapley values from {how} divide that among"
            f" {len(study.names)} regions. The largest efficiency gap is {gap:.1e} of a latent's difference"
            f" (an error above {s.gap_bound:g})."
        ),
    ]
    # Shares of the total: Shapley values sum to the difference, so these sum to 100 %.
    if s.regions == PEOPLE:
        parts = dict(zip(study.names, (m["mean"] for m in means), strict=True))
        shares = ", ".join(
            f"the {name} {value / total.mean:.0%}"
            for name, value in sorted(parts.items(), key=lambda p: -p[1])
        )
        sentences.append(f"This change divides into: {shares}. {bundled.DAMAGED}")
    if clear:
        listed = "; ".join(f"{study.names[i]} {span(*means[i].values())}" for i in clear[:4])
        sentences.append(f"Regions whose mean contribution differs from zero, largest first: {listed}.")
        # The number of latents in which the region with the largest mean is also the largest
        first = int((np.abs(values).argmax(axis=1) == order[0]).sum())
        share = np.mean([p.counts()[order[0]] / p.labels.numel() for p in study.partitions])
        sentences.append(
            f"{study.names[order[0]].capitalize()}, with {share:.0%} of the voxels, contributes most in"
            f" {first} of {len(values)} latents."
        )
        # The remainder is no named region, so such a partition explains little.
        if study.names[order[0]] in (OTHER, BACKGROUND):
            below = "the parts of the entire head and " if s.regions == LANDMARKS else ""
            sentences.append(
                "Most of the change lies outside the named regions, so that this partition explains little"
                f" of it: look at {below}the surface below, or divide that part with masks of your own"
                " (--regions=FILE)."
            )
    else:
        sentences.append("No region's mean contribution differs from zero over these latents: raise --n.")
    sentences.append(
        "A contribution says where this reward sees the change, not that the change is good there. Large"
        " regions contain more voxels."
    )
    return sentences


def methods(study: Study, folder: Path) -> Finding:
    """Report the mean attribution by four methods, the completeness of the integral, and the rank
    correlations of the methods.
    """
    attributions = study.methods
    names = study.names
    c = study.c
    means = {method: compute_column_means(values) for method, values in attributions.items()}
    pairs = agreement(attributions)  # one entry per pair of methods
    rows = [
        {
            "seed": seed,
            "region": name,
            **{method: float(values[n, i]) for method, values in attributions.items()},
        }
        for n, seed in enumerate(study.seeds)
        for i, name in enumerate(names)
    ]
    ig: list[dict] = [
        {
            "seed": seed,
            "steps": g.steps,
            "gap": g.gap,
            "share": g.tried[-1][1],
            "complete": g.complete,
            "tried": [list(t) for t in g.tried],
        }
        for seed, g in zip(study.seeds, study.integrated, strict=True)
    ]
    complete = sum(entry["complete"] for entry in ig)  # number of latents
    worst = max(entry["share"] for entry in ig)  # largest gap, as a share of the difference
    steps = [entry["steps"] for entry in ig]
    text = (
        f"Integrated Gradients add up to within {BOUND:.0%} of the reward difference for {complete} of"
        f" {len(ig)} latents (largest gap {worst:.2%}) with {min(steps)} to {max(steps)} steps; the count"
        f" rose from {study.settings.steps} by itself for {sum(len(entry['tried']) > 1 for entry in ig)}."
    )
    # A quadrature that did not converge is reported, not hidden.
    if complete < len(ig):
        text += " The others stay incomplete: raise --most-steps, or interpret them with that reservation."
    sentences = [text, *_pair_says(pairs)]
    sentences.append(
        "For noise, each region's change is shuffled among its voxels: the same amount of change without its"
        " shape. A method that agrees with it as well as with the others measures how much a region changed,"
        " not how its shape changed. Occlusion counts only the last step into the tuned slab, so that regions"
        " which act together count more than once or not at all."
    )
    data = {"names": list(names), "means": means, "agreement": pairs, "integrated": ig}
    return Finding(
        facts=c.facts(study.seeds, ROLES, f"means, and mean rank correlations: {BOOTSTRAP}"),
        data=data,
        rows=rows,
        says=sentences,
    )


def _interval(mean: dict) -> str:
    """Format a mean with its interval."""
    return span(mean["mean"], mean["lo"], mean["hi"], ".2f")


def _pair_says(pairs: list[dict]) -> list[str]:
    """Describe the rank correlation of each method with Shapley values."""
    sentences = []
    for pair in pairs:
        # The other pairs stand in the figure alone.
        if pair["first"] != "Shapley":
            continue
        mean = pair["spearman"]["mean"]
        tau = pair["kendall"]["mean"]  # None together with Spearman's
        if mean is None:
            sentences.append(f"{pair['second']}: no ranks to compare, since one side is constant.")
            continue
        overall = pair["spearman"]["overall"]
        sentences.append(
            f"Shapley and {pair['second']}: Spearman {_interval(mean)} per latent (Kendall {_interval(tau)}),"
            f" {'none' if overall is None else f'{overall:.2f}'} between the means over latents."
        )
    return sentences


def redrawn_reward(study: Study, folder: Path) -> Finding:
    """Correlate attributions by the trained reward with those by rewards with re-drawn weights."""
    s = study.settings
    c = study.c
    count = min(s.checked, len(study.seeds))
    trained = np.stack([a.values for a in study.shapley[:count]])  # [checked, R]
    rows = []
    signed_means = []
    sizes = []
    # Adebayo et al. 2018: an attribution that survives random weights does not come from training.
    for draw in range(s.randomisations):
        random = study.redrawn(draw)  # [checked, R]
        rho = [rank_correlation(a, b) for a, b in zip(trained, random, strict=True)]  # with signs
        # Without signs: sizes correlate also for random networks, see `_redrawn_says`.
        # of the sizes alone
        size = [rank_correlation(np.abs(a), np.abs(b)) for a, b in zip(trained, random, strict=True)]
        rows += [
            {"randomisation": draw, "seed": study.seeds[i], "spearman": r, "spearman_of_sizes": z}
            for i, (r, z) in enumerate(zip(rho, size, strict=True))
        ]
        # A draw whose attributions are all constant has no correlation.
        signed_means += [float(np.mean(known))] if (known := [r for r in rho if r is not None]) else []
        sizes += [float(np.mean(known))] if (known := [z for z in size if z is not None]) else []
    data = {
        "by_randomisation": signed_means,
        "sizes": sizes,
        "randomisations": s.randomisations,
        "latents": count,
        "mean": bootstrap_mean_interval(signed_means)._asdict() if signed_means else None,
        "mean_of_sizes": bootstrap_mean_interval(sizes)._asdict() if sizes else None,
    }
    facts = c.facts(
        study.seeds[:count],
        ROLES,
        f"95 % percentile bootstrap over {len(signed_means)} draws of weights, 10,000 resamples",
    )
    return Finding(facts=facts, data=data, rows=rows, says=_redrawn_says(data))


def _redrawn_says(data: dict) -> list[str]:
    """Describe the correlation with rewards of random weights."""
    # Every draw was constant
    if data["mean"] is None:
        return [
            "Every reward with re-drawn weights attributes the same to all regions, so there are no ranks to"
            " compare."
        ]
    mean, lo, hi = data["mean"].values()
    if contains_zero(lo, hi):
        conclusion = (
            "its interval contains zero: as far as this check shows, the attributions come from what the"
            " reward has learned"
        )
    else:
        conclusion = (
            "its interval excludes zero: part of the attribution comes from slabs or architecture, not from"
            " training"
        )
    sentences = [
        (
            "Spearman correlation between the trained reward's attributions and those of"
            f" {len(data['by_randomisation'])} rewards with re-drawn weights: {span(mean, lo, hi, '.2f')};"
            f" {conclusion}."
        ),
        (
            f"With {len(data['by_randomisation'])} draws a correlation within the interval's width of zero"
            " would not be detected."
        ),
    ]
    if data["mean_of_sizes"] is not None:
        size = _interval(data["mean_of_sizes"])
        sentences.append(
            f"Sizes without signs correlate by {size}: any network reacts more where more changed, so this"
            " need not be near zero."
        )
    return sentences


def _order(means: list[dict]) -> np.ndarray:
    """Return the regions' order by mean, the largest last, since bars are drawn upwards."""
    return np.argsort([m["mean"] for m in means])


def _bar_size(count: int) -> tuple[float, float]:
    """Return the size in inches of a plot with `count` bars."""
    # Inches: the height grows with the number of bars.
    return (6.4, 0.9 + 0.34 * count)


def plot_regions(data: dict):
    """Plot the mean contribution of each region with its interval."""
    figure, axes = style.figure(size=_bar_size(len(data["names"])))
    order = _order(data["means"])
    means = [data["means"][i] for i in order]
    middle = np.array([m["mean"] for m in means])
    spread = [middle - [m["lo"] for m in means], [m["hi"] for m in means] - middle]
    colours = [style.colour("after") if v > 0 else style.colour("before") for v in middle]
    axes.barh(
        [data["names"][i] for i in order],
        middle,
        xerr=spread,
        color=colours,
        error_kw={"ecolor": "#777777", "elinewidth": 1.2},
    )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set(
        xlabel="mean contribution to the change of the reward", title=f"Shapley values ({data['method']})"
    )
    return figure


def plot_latents(data: dict):
    """Plot every latent's value per region."""
    figure, axes = style.figure(size=_bar_size(len(data["names"])))
    order = _order(data["means"])
    values = np.asarray(data["values"])  # [N, R]
    # Points of one region are spread vertically, so that they do not cover one another.
    offsets = np.linspace(-0.28, 0.28, len(values))
    for row, region in enumerate(order):
        error = None if data["errors"] is None else [latent[region] for latent in data["errors"]]
        axes.errorbar(
            values[:, region],
            row + offsets,
            xerr=error,
            fmt="o",
            markersize=3,
            color=style.colour("before"),
            elinewidth=0.8,
        )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(len(order)), [data["names"][i] for i in order])
    axes.set(xlabel="contribution to the change of the reward", title="One point per latent")
    return figure


def plot_methods(data: dict):
    """Plot the mean attribution of each region by each method."""
    count = len(data["names"])
    figure, axes = style.figure(size=(6.4, 0.9 + 0.5 * count))
    order = _order(data["means"]["Shapley"])
    # The bars of one region share 0.8 of its line.
    thick = 0.8 / len(data["means"])
    for k, (method, means) in enumerate(data["means"].items()):
        y_positions = np.arange(count) + 0.4 - thick * (k + 0.5)
        axes.barh(
            y_positions,
            [means[i]["mean"] for i in order],
            height=thick,
            color=_COLOURS.get(method, "#777777"),
            label=method,
        )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(count), [data["names"][i] for i in order])
    axes.set(xlabel="mean attribution", title="Four methods")
    axes.legend(fontsize=7)
    return figure


def plot_agreement(data: dict):
    """Plot the mean rank correlations of all pairs of methods, with intervals."""
    # Pairs with a constant method have no correlation.
    pairs = [p for p in data["agreement"] if p["spearman"]["mean"] is not None]
    figure, axes = style.figure(size=(6.4, 0.9 + 0.4 * max(len(pairs), 1)))
    for shift, kind, colour in ((0.12, "spearman", "#0072B2"), (-0.12, "kendall", "#D55E00")):
        means = [p[kind]["mean"] for p in pairs]
        middle = np.array([m["mean"] for m in means])
        spread = [middle - [m["lo"] for m in means], [m["hi"] for m in means] - middle]
        axes.errorbar(
            middle,
            np.arange(len(pairs)) + shift,
            xerr=spread,
            fmt="o",
            markersize=4,
            color=colour,
            label=kind,
        )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks(range(len(pairs)), [f"{p['first']} / {p['second']}" for p in pairs])
    axes.set(xlim=(-1.05, 1.05), xlabel="rank correlation, mean over latents", title="Agreement of methods")
    axes.legend(fontsize=7)
    return figure


def plot_redrawn(data: dict):
    """Plot the rank correlation with each reward of random weights, and the mean with its interval."""
    figure, axes = style.figure(size=(6.4, 2.2))
    for row, (key, mean) in enumerate((("by_randomisation", "mean"), ("sizes", "mean_of_sizes"))):
        axes.plot(
            data[key], [row] * len(data[key]), "o", markersize=4, alpha=0.5, color=style.colour("noise")
        )
        # The mean is drawn slightly above the points of its row.
        if data[mean] is not None:
            m = data[mean]
            axes.errorbar(
                [m["mean"]],
                [row + 0.18],
                xerr=[[m["mean"] - m["lo"]], [m["hi"] - m["mean"]]],
                fmt="D",
                color=style.colour("reward"),
                label=None if row else "mean, 95 % interval",
            )
    axes.axvline(0, color=style.colour("noise"), linewidth=1)
    axes.set_yticks([0, 1], ["with signs", "sizes alone"])
    axes.set(
        xlim=(-1.05, 1.05),
        ylim=(-0.5, 1.6),
        xlabel="Spearman correlation with the trained reward's attribution, one point per draw",
        title="Re-drawn weights",
    )
    if data["mean"] is not None:
        axes.legend(fontsize=7)
    return figure
