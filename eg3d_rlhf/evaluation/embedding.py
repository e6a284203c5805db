"""Map samples before and after tuning in the feature space of the reward.

The global feature is the vector that the reward network computes from its input, before its last layers (the
trunk). The page shows maps of this feature, tests if the two networks' samples can be separated by it, and
renders the shapes of the samples.
Shapes: N latents, F features, R pixels per edge.
"""

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.core.statistics import RANK_INTERVAL, spearman
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.paired import NO_CONTROL, span
from eg3d_rlhf.experiments import pages, style
from eg3d_rlhf.experiments.media.sheet import shade
from eg3d_rlhf.experiments.pages import Finding, Job, data_uri, points_section, write_page
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.measures.feature_sets import NEIGHBOURS, PERMUTATIONS, TEST, paired_separability
from training.progress import tqdm

MAP = "feature-map"  # key of the job of the maps
SEPARABILITY = "separability"  # key of the job of the test
SHAPES = "feature-shapes"  # key of the job of the renders
TITLE = "What the reward sees before and after tuning"
ROLES = ("before", "after")
UMAP_NEIGHBOURS = 15  # UMAP's default
RESOLUTION = 64  # grid points per edge
PIXELS = 96  # pixels per edge of a render
YAW = 0.4  # yaw of a render, in radians from frontal
COLUMNS = 20  # renders in a row of the sheet
NO_UMAP = (
    "There is no UMAP map, since the package umap-learn is not installed. Install it (pip install umap-learn)"
    " and run the report again. The principal axes do not need it."
)


def jobs(comparison: Comparison) -> list[Job]:
    """Return the jobs of the page: map of the features, separability, and the renders of the interactive map.

    The job of the renders has no section of its own on the page.
    """
    # The version of UMAP is an input of the map, since another version gives another layout.
    installed_umap = umap_version()  # None leaves the UMAP plot out
    plot_by_name = {"umap": plot_umap} if installed_umap else {}
    plot_by_name |= {"principal-axes": plot_principal, "reward-along-the-axis": plot_axis}
    return [
        comparison.job(
            MAP,
            "Map of the reward's global feature",
            feature_map,
            plot_by_name,
            (*ROLES, "reward"),
            n=comparison.n,
            umap=installed_umap,
        ),
        comparison.job(
            SEPARABILITY,
            "Are tuned samples separable from untuned ones?",
            separability,
            {"test": plot_test},
            (*ROLES, "control", "reward"),
            n=comparison.n,
            k=min(NEIGHBOURS, comparison.n // 2),
            permutations=PERMUTATIONS,
        ),
        comparison.job(
            SHAPES,
            "Shapes of the map",
            render_sheet,
            roles=ROLES,
            n=comparison.n,
            resolution=RESOLUTION,
            pixels=PIXELS,
            yaw=YAW,
        ),
    ]


def umap_version() -> str | None:
    """Return the version of the package umap-learn, or None if it is not installed."""
    return importlib.metadata.version("umap-learn") if importlib.util.find_spec("umap") else None


@torch.no_grad()
def global_features(
    comparison: Comparison, generator: LoadedGenerator, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the global features and the rewards of a generator's samples.

    Several jobs use the same values, so they are computed once and cached.
    Returns: two arrays: the global features [N, F], and the rewards [N].
    """
    # The first entry distinguishes these keys from the keys of the scores in the same cache.
    cache_key = ("global feature", comparison.reward_hash, generator.hash, tuple(seeds), comparison.psi)
    if cache_key not in comparison.memory:
        batches = [
            (
                comparison.reward.network.features(observed_batch).cpu(),
                comparison.reward.score_observed(observed_batch).cpu(),
            )
            for observed_batch in comparison.observed(generator, seeds)
        ]
        comparison.memory[cache_key] = tuple(
            torch.cat(batch_values).double().numpy() for batch_values in zip(*batches, strict=True)
        )
    return comparison.memory[cache_key]


def principal_axes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the two principal axes of points.

    The sign of an axis is arbitrary, so it is chosen such that the axis' largest entry is positive.

    Args: points: coordinates of the points, [N, F].
    Returns: three arrays. The first is the mean of the points, [F]. The second holds the two axes of largest
        variance, [2, F]. The third holds the axes' shares of the variance, [2].
    """
    mean_point = points.mean(axis=0)  # [F]
    _, singular_values, axis_vectors = np.linalg.svd(
        points - mean_point, full_matrices=False
    )  # axes: [min(N, F), F]
    axis_vectors = (
        axis_vectors[:2]
        * np.sign(axis_vectors[np.arange(2), np.abs(axis_vectors[:2]).argmax(axis=1)])[:, None]
    )
    # 1e-300 avoids a division by zero if all points are equal.
    return mean_point, axis_vectors, singular_values[:2] ** 2 / max(float((singular_values**2).sum()), 1e-300)


def umap_layout(points: np.ndarray, seed: int) -> np.ndarray:
    """Compute the UMAP layout [N, 2] of points [N, F] (McInnes et al. 2018, arXiv 1802.03426).

    Args: seed: seed of the layout; the same seed gives the same layout.
    """
    tqdm.write("UMAP: the first layout compiles for about 20 seconds.")
    import umap

    with warnings.catch_warnings():
        # UMAP warns that it uses a single thread because of the fixed seed, which is intended.
        warnings.simplefilter("ignore")
        umap_model = umap.UMAP(n_neighbors=min(UMAP_NEIGHBOURS, len(points) - 1), random_state=seed, n_jobs=1)
        return umap_model.fit_transform(points.astype(np.float32)).astype(np.float64)


def feature_map(comparison: Comparison, _folder: Path) -> Finding:
    """Map all samples by UMAP and by the principal axes, and correlate the reward with the axes.

    The principal axes are those of the samples before tuning.
    """
    seeds = comparison.seeds()  # N held-out latents
    features_by_role = {
        role: global_features(comparison, comparison.generators()[role], seeds) for role in ROLES
    }
    # Both networks' samples are projected onto the principal axes of the samples before tuning.
    mean_feature, principal_vectors, variance_shares = principal_axes(features_by_role["before"][0])
    positions_by_layout = {
        "principal": {
            role: (features - mean_feature) @ principal_vectors.T
            for role, (features, _) in features_by_role.items()
        }
    }
    positions_by_axis = {
        "first principal axis of the feature": positions_by_layout["principal"]["before"][:, 0]
    }
    # Both networks' samples are in the same layout, so that their positions can be compared.
    if umap_version():
        layout_positions = umap_layout(
            np.concatenate([features_by_role[role][0] for role in ROLES]), comparison.seed
        )
        positions_by_layout["umap"] = dict(zip(ROLES, np.split(layout_positions, 2), strict=True))
        layout_before = positions_by_layout["umap"]["before"]  # [N, 2]
        layout_centre, main_axes, _ = principal_axes(layout_before)
        positions_by_axis |= {
            "first axis of UMAP's layout": layout_before[:, 0],
            # The coordinate axes of a layout are arbitrary, but its axis of largest variance is not.
            "main axis of UMAP's layout": (layout_before - layout_centre) @ main_axes[0],
        }
    correlation_rows: list[dict] = []  # one row per axis
    for axis_name, axis_positions in positions_by_axis.items():
        rho_with_interval = (
            # There is no rank correlation if all rewards or all positions are equal (np.ptp is 0).
            spearman(axis_positions, features_by_role["before"][1])
            if np.ptp(features_by_role["before"][1]) and np.ptp(axis_positions)
            else (None, None, None)
        )
        correlation_rows.append(
            {"axis": axis_name, **dict(zip(("spearman", "lo", "hi"), rho_with_interval, strict=True))}
        )
    point_rows = [
        {
            "role": role,
            "seed": seed,
            "reward": float(features_by_role[role][1][seed_index]),
            **{
                f"{layout_name}_{axis}": float(positions_by_role[role][seed_index, axis_index])
                for layout_name, positions_by_role in positions_by_layout.items()
                for axis_index, axis in enumerate("xy")
            },
        }
        for role in ROLES
        for seed_index, seed in enumerate(seeds)
    ]
    finding_data = {
        "points": point_rows,
        "ranks": correlation_rows,
        "shares": variance_shares.tolist(),
        "features": len(mean_feature),
        "layouts": sorted(positions_by_layout, reverse=True),
    }
    facts = comparison.facts(seeds, (*ROLES, "reward"), RANK_INTERVAL)
    sentences = [
        *(
            (
                f"No rank correlation with the {correlation_row['axis']}: the reward or the axis is constant"
                " over these latents."
                if correlation_row["spearman"] is None
                else (
                    f"Spearman's rho of the reward with the {correlation_row['axis']}, untuned samples:"
                    f" {span(correlation_row['spearman'], correlation_row['lo'], correlation_row['hi'])}."
                )
            )
            for correlation_row in correlation_rows
        ),
        (
            "The sign of an axis is arbitrary: only the size of rho counts. The first principal axis holds "
            f"{variance_shares[0]:.0%} of the variance of {len(mean_feature):,} features."
        ),
        (
            "The reward is computed from this feature. A large rho means that the reward ranks by the"
            " direction in which the feature varies most. It does not mean that the ranking is right."
        ),
        (
            NO_UMAP
            if umap_version() is None
            else (
                "UMAP preserves neighbourhoods. The distances between clusters, their sizes, and the axes"
                " have no unit, and change with the seed."
            )
        ),
    ]
    return Finding(facts=facts, data=finding_data, rows=[*correlation_rows, *point_rows], says=sentences)


def separability(comparison: Comparison, _folder: Path) -> Finding:
    """Test whether the samples before tuning can be separated from those of the tuned network and of the
    control.

    The statistic is the share of a sample's nearest neighbours that come from the same network.
    """
    seeds = comparison.seeds()  # N held-out latents
    features_before, _ = global_features(comparison, comparison.before, seeds)  # [N, F]
    result_by_role = {
        role: paired_separability(
            # The test is paired: the permutations exchange the two networks of single latents.
            features_before,
            global_features(comparison, generator, seeds)[0],
            min(NEIGHBOURS, comparison.n // 2),
            PERMUTATIONS,
            comparison.seed,
        )
        for role, generator in comparison.generators().items()
        if role != "before"
    }
    table_rows = [
        {
            "role": role,
            "share": role_result.share,
            "p": role_result.p,
            "k": role_result.k,
            "chance_97.5": float(np.quantile(role_result.chance, 0.975)),
        }
        for role, role_result in result_by_role.items()
    ]
    sentences = []
    for role, role_result in result_by_role.items():
        conclusion = (
            "not shown to be apart"
            if role_result.p >= 0.05
            else "apart"
            if role_result.share > 0.9
            else "partly apart"
        )
        # The smallest p-value of a permutation test is 1 / (1 + permutations).
        comparison_sign = "<=" if role_result.p <= 1 / (1 + len(role_result.chance)) else "="
        sentences.append(
            f"Before and {role}: {role_result.share:.1%} of a sample's {role_result.k} nearest neighbours"
            f" come from its own network (50 % by chance; p {comparison_sign} {role_result.p:.2g}): the two"
            f" are {conclusion}."
        )
    sentences += [
        (
            "Apart means that tuning moved the samples further in the feature space of the reward than"
            " samples differ from each other. It does not mean that the shapes are better."
        ),
        *([NO_CONTROL] if comparison.control is None else []),
    ]
    facts = comparison.facts(seeds, (*ROLES, "control", "reward"), f"{TEST}, {PERMUTATIONS:,} permutations")
    return Finding(
        facts=facts,
        data={role: role_result.to_dict() for role, role_result in result_by_role.items()},
        rows=table_rows,
        says=sentences,
    )


@torch.no_grad()
def render_sheet(comparison: Comparison, folder: Path) -> Finding:
    """Render the shapes of all latents into one image, with COLUMNS shapes in a row.

    The shapes of a latent before and after tuning are adjacent. The page shows parts of the image.
    """
    seeds = comparison.seeds()  # N held-out latents
    renders_by_network = [
        torch.cat(
            [
                shade(
                    field.density_grid(SlabSpec.from_bounds(field.bounds, RESOLUTION)),
                    YAW,
                    PIXELS,
                    field.level,
                )
                for field in comparison.fields(generator, seeds)
            ]
        )
        for generator in (comparison.before, comparison.after)
    ]
    shape_renders = torch.stack(renders_by_network, dim=1).flatten(0, 2)  # [2N, R, R]
    # White cells fill the last row, so that it has COLUMNS cells.
    row_count = -(-len(shape_renders) // COLUMNS)  # -(-a // b) is a / b rounded up
    empty_cells = torch.ones(row_count * COLUMNS - len(shape_renders), PIXELS, PIXELS)  # [missing, R, R]
    # [rows, COLUMNS, R, R] -> [rows * R, COLUMNS * R]
    sheet = (
        torch.cat([shape_renders, empty_cells])
        .unflatten(0, (row_count, COLUMNS))
        .transpose(1, 2)
        .reshape(row_count * PIXELS, COLUMNS * PIXELS)
    )
    image_name = f"{SHAPES}.jpg"  # JPEG: the sheet is embedded in the page
    PIL.Image.fromarray((sheet.numpy() * 255).round().astype(np.uint8)).save(
        folder / image_name, quality=80, optimize=True
    )
    finding_data = {
        "file": image_name,
        "pixels": PIXELS,
        "columns": COLUMNS,
        "rows": row_count,
        "seeds": list(seeds),
        "roles": list(ROLES),
    }
    return Finding(
        facts=comparison.facts(seeds, ROLES),
        data=finding_data,
        images={"shapes before and after": image_name},
    )


def _scatter(axes, finding_data: dict, layout: str) -> None:
    """Plot the samples before and after tuning in one layout.

    Samples before tuning are coloured by their reward.
    Args:
        finding_data: data of the finding of `feature_map`.
        layout: name of the layout, "umap" or "principal".
    """
    points_by_role = {
        role: [point for point in finding_data["points"] if point["role"] == role] for role in ROLES
    }
    x_key = f"{layout}_x"
    y_key = f"{layout}_y"
    points_before = axes.scatter(
        [point[x_key] for point in points_by_role["before"]],
        [point[y_key] for point in points_by_role["before"]],
        c=[point["reward"] for point in points_by_role["before"]],
        s=14,
        label="before, coloured by reward",
    )
    # Tuned samples are crosses, so that they differ from the coloured points before tuning.
    axes.scatter(
        [point[x_key] for point in points_by_role["after"]],
        [point[y_key] for point in points_by_role["after"]],
        marker="x",
        s=14,
        linewidths=0.9,
        color=style.colour("after"),
        label="after",
    )
    axes.figure.colorbar(points_before, ax=axes, label="reward before")


@style.plot(7, xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)", title="UMAP of the global feature")
def plot_umap(axes, finding_data: dict):
    """Plot the UMAP layout of the features before and after tuning.

    Args: finding_data: data of the finding of `feature_map`.
    """
    _scatter(axes, finding_data, "umap")


@style.plot(7, title="Principal axes of the untuned samples")
def plot_principal(axes, finding_data: dict):
    """Plot the samples before and after tuning on the principal axes of those before tuning.

    Args: finding_data: data of the finding of `feature_map`.
    """
    _scatter(axes, finding_data, "principal")
    axes.set(
        **{
            f"{axis_name}label": f"axis {axis_index + 1} ({finding_data['shares'][axis_index]:.0%} of the"
            " variance)"
            for axis_index, axis_name in enumerate("xy")
        }
    )


@style.plot(None, xlabel="position on the first principal axis", ylabel="reward before")
def plot_axis(axes, finding_data: dict):
    """Plot the reward over the position on the first principal axis.

    Args: finding_data: data of the finding of `feature_map`.
    """
    points_before = [point for point in finding_data["points"] if point["role"] == "before"]
    axes.plot(
        [point["principal_x"] for point in points_before],
        [point["reward"] for point in points_before],
        ".",
        color=style.colour("before"),
    )
    correlation_row = finding_data["ranks"][0]  # the principal axis comes first
    rho_text = (
        ""
        if correlation_row["spearman"] is None
        else f": rho {span(correlation_row['spearman'], correlation_row['lo'], correlation_row['hi'], '.2f')}"
    )
    axes.set(title=f"Reward along the main axis{rho_text}")


@style.plot(7, ylabel="permutations", title="Nearest-neighbour separability")
def plot_test(axes, result_by_role: dict):
    """Plot for each role the permutation distribution and the observed share of neighbours from the own
    network.

    Args: result_by_role: data of the finding of `separability`: the result of the test for each role.
    """
    for role, role_result in result_by_role.items():
        axes.hist(
            role_result["chance"], bins=30, color=style.colour(role), alpha=0.4, label=f"{role}: random swaps"
        )
        observed_label = f"{role}: observed {role_result['share']:.3f}, p = {role_result['p']:.2g}"
        axes.axvline(role_result["share"], color=style.colour(role), linewidth=2, label=observed_label)
    # All roles have the same number of neighbours.
    neighbour_count = next(iter(result_by_role.values()))["k"]
    axes.set(xlabel=f"share of the {neighbour_count} nearest neighbours from the own network")


def write(comparison: Comparison, page_folder: Path, quiet: bool = False) -> dict:
    """Compute the missing findings, write the page, and return all findings by key.

    Args: quiet: True hides the progress.
    """
    jobs_of_page = jobs(comparison)
    finding_by_key = pages.run(jobs_of_page, page_folder, quiet=quiet)  # by key
    feature_points = finding_by_key[MAP].data
    sheet_data = finding_by_key[SHAPES].data  # file name of the image with the shapes, and its layout
    # The image is embedded, so that the page is a single file.
    sprite = {
        **sheet_data,
        "uri": data_uri((page_folder / "data" / sheet_data["file"]).read_bytes(), "image/jpeg"),
    }
    title_by_layout = {"umap": "UMAP", "principal": "principal axes"}
    chart_html = points_section(
        feature_points["points"],
        [(layout_name, title_by_layout[layout_name]) for layout_name in feature_points["layouts"]],
        sprite,
    )
    introduction = (
        f"The global feature of the reward {comparison.reward_hash[:12]} for the same {comparison.n} held-out"
        " latents before and after tuning. Points at the end of the page show their shapes."
    )
    # The summary consists of the first sentence of each section. The renders have no section.
    summary_sentences = [finding_by_key[key].says[0] for key in (MAP, SEPARABILITY)]
    write_page(
        page_folder / "index.html",
        TITLE,
        introduction,
        jobs_of_page[:2],
        finding_by_key,
        summary_sentences,
        chart_html,
    )
    return finding_by_key
