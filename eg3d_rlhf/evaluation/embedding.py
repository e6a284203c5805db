"""Map of samples before and after tuning in the reward's feature space: the global feature, its principal
axes, separability, and the shapes.

The global feature is the vector that the reward network computes from its input, before its trunk.
Letters: N latents, F features, D, H, W grid points, R pixels.
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

MAP = "feature-map"  # keys of the three parts
APART = "separability"
SHAPES = "feature-shapes"
TITLE = "What the reward sees before and after tuning"
ROLES = ("before", "after")
UMAP_NEIGHBOURS = 15  # UMAP's default
# grid points per edge, pixels per render, yaw in radians, renders in a row of the sprite
RESOLUTION = 64
PIXELS = 96
YAW = 0.4
COLUMNS = 20
NO_UMAP = (
    "No UMAP: the package umap-learn is not installed. Install it (pip install umap-learn) and run again. The"
    " principal axes do not need it."
)


def jobs(comparison: Comparison) -> list[Job]:
    """Return the parts: map of the features, separability, and the renders of the interactive map (a job
    without a section on the page).
    """
    # The version is an input of the map: another one gives another layout.
    umap = umap_version()  # None leaves the UMAP plot out
    layouts = {"umap": plot_umap} if umap else {}
    layouts |= {"principal-axes": plot_principal, "reward-along-the-axis": plot_axis}
    return [
        comparison.job(
            MAP,
            "Map of the reward's global feature",
            feature_map,
            layouts,
            (*ROLES, "reward"),
            n=comparison.n,
            umap=umap,
        ),
        comparison.job(
            APART,
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
            shapes,
            roles=ROLES,
            n=comparison.n,
            resolution=RESOLUTION,
            pixels=PIXELS,
            yaw=YAW,
        ),
    ]


def umap_version() -> str | None:
    """Return the version of umap-learn; None if it is not installed."""
    return importlib.metadata.version("umap-learn") if importlib.util.find_spec("umap") else None


@torch.no_grad()
def features(
    comparison: Comparison, generator: LoadedGenerator, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute global features [N, F] and rewards [N] of seeds, and cache them for the parts that share
    them.
    """
    # The prefix keeps features apart from the scores in the same cache.
    cache_key = ("global feature", comparison.reward_hash, generator.hash, tuple(seeds), comparison.psi)
    if cache_key not in comparison.memory:
        batches = [
            (comparison.reward.network.features(x).cpu(), comparison.reward.score_observed(x).cpu())
            for x in comparison.observed(generator, seeds)
        ]
        comparison.memory[cache_key] = tuple(
            torch.cat(part).double().numpy() for part in zip(*batches, strict=True)
        )
    return comparison.memory[cache_key]


def principal_axes(untuned: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the principal axes of features [N, F].

    Returns: the mean [F], the two axes [2, F] of largest variance, and their shares [2] of the variance. The
        sign of an axis is arbitrary; its largest entry is made positive.
    """
    mean = untuned.mean(axis=0)
    _, values, axes = np.linalg.svd(untuned - mean, full_matrices=False)  # axes: [min(N, F), F]
    axes = axes[:2] * np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])[:, None]
    # The lower bound guards constant features, whose variance is 0.
    return mean, axes, values[:2] ** 2 / max(float((values**2).sum()), 1e-300)


def umap_layout(points: np.ndarray, seed: int) -> np.ndarray:
    """Compute the UMAP layout (McInnes et al. 2018) of points [N, F] in two dimensions; reproducible for a
    seed.
    """
    tqdm.write("UMAP: the first layout compiles for about 20 seconds.")
    import umap

    with warnings.catch_warnings():
        # UMAP warns that a fixed seed forces a single thread.
        warnings.simplefilter("ignore")
        fitted = umap.UMAP(n_neighbors=min(UMAP_NEIGHBOURS, len(points) - 1), random_state=seed, n_jobs=1)
        return fitted.fit_transform(points.astype(np.float32)).astype(np.float64)


def feature_map(comparison: Comparison, _folder: Path) -> Finding:
    """Place all samples by UMAP and on the untuned samples' principal axes, and correlate the reward with the
    axes.
    """
    seeds = comparison.seeds()
    features_by_role = {role: features(comparison, comparison.generators()[role], seeds) for role in ROLES}
    # The axes are those of the untuned samples; the tuned ones are projected onto them.
    mean, axes, shares = principal_axes(features_by_role["before"][0])
    positions = {
        "principal": {role: (values - mean) @ axes.T for role, (values, _) in features_by_role.items()}
    }
    along = {"first principal axis of the feature": positions["principal"]["before"][:, 0]}
    # One layout of both networks, so that positions are comparable.
    if umap_version():
        laid = umap_layout(np.concatenate([features_by_role[role][0] for role in ROLES]), comparison.seed)
        positions["umap"] = dict(zip(ROLES, np.split(laid, 2), strict=True))
        flat = positions["umap"]["before"]  # [N, 2]
        centre, main, _ = principal_axes(flat)
        along |= {
            "first axis of UMAP's layout": flat[:, 0],
            # The coordinate axes of a layout are arbitrary; its axis of largest variance is well defined.
            "main axis of UMAP's layout": (flat - centre) @ main[0],
        }
    ranks: list[dict] = []  # one row per axis
    for name, place in along.items():
        rho = (
            # A constant side has no ranks.
            spearman(place, features_by_role["before"][1])
            if np.ptp(features_by_role["before"][1]) and np.ptp(place)
            else (None, None, None)
        )
        ranks.append({"axis": name, **dict(zip(("spearman", "lo", "hi"), rho, strict=True))})
    points = [
        {
            "role": role,
            "seed": seed,
            "reward": float(features_by_role[role][1][i]),
            **{
                f"{name}_{axis}": float(where[role][i, j])
                for name, where in positions.items()
                for j, axis in enumerate("xy")
            },
        }
        for role in ROLES
        for i, seed in enumerate(seeds)
    ]
    data = {
        "points": points,
        "ranks": ranks,
        "shares": shares.tolist(),
        "features": len(mean),
        "layouts": sorted(positions, reverse=True),
    }
    facts = comparison.facts(seeds, (*ROLES, "reward"), RANK_INTERVAL)
    sentences = [
        *(
            (
                f"No rank correlation with the {row['axis']}: the reward or the axis is constant over these"
                " latents."
                if row["spearman"] is None
                else (
                    f"Spearman's rho of the reward with the {row['axis']}, untuned samples:"
                    f" {span(row['spearman'], row['lo'], row['hi'])}."
                )
            )
            for row in ranks
        ),
        (
            "The sign of an axis is arbitrary: only the size of rho counts. The first principal axis holds "
            f"{shares[0]:.0%} of the variance of {len(mean):,} features."
        ),
        (
            "The reward is computed from this feature. A large rho says that what varies most in it is what"
            " the reward ranks by; it does not say that the ranking is right."
        ),
        (
            NO_UMAP
            if umap_version() is None
            else (
                "UMAP preserves neighbourhoods. Distances between its clouds, their sizes and axes have no"
                " unit and change with the seed."
            )
        ),
    ]
    return Finding(facts=facts, data=data, rows=[*ranks, *points], says=sentences)


def separability(comparison: Comparison, _folder: Path) -> Finding:
    """Measure the share of same-network neighbours after tuning, and for the control, with a permutation
    test.
    """
    seeds = comparison.seeds()
    before, _ = features(comparison, comparison.before, seeds)  # [N, F]
    result_by_role = {
        role: paired_separability(
            # `paired`: the null distribution swaps the two networks of a latent.
            before,
            features(comparison, generator, seeds)[0],
            min(NEIGHBOURS, comparison.n // 2),
            PERMUTATIONS,
            comparison.seed,
        )
        for role, generator in comparison.generators().items()
        if role != "before"
    }
    rows = [
        {
            "role": role,
            "share": f.share,
            "p": f.p,
            "k": f.k,
            "chance_97.5": float(np.quantile(f.chance, 0.975)),
        }
        for role, f in result_by_role.items()
    ]
    sentences = []
    for role, f in result_by_role.items():
        conclusion = "not shown to be apart" if f.p >= 0.05 else "apart" if f.share > 0.9 else "partly apart"
        # The smallest p-value of a permutation test is 1 / (1 + permutations).
        sign = "<=" if f.p <= 1 / (1 + len(f.chance)) else "="
        sentences.append(
            f"Before and {role}: {f.share:.1%} of a sample's {f.k} nearest neighbours come from its own"
            f" network (50 % by chance; p {sign} {f.p:.2g}): the two are {conclusion}."
        )
    sentences += [
        (
            "Apart means that tuning moved samples further, as the reward sees them, than samples differ from"
            " each other. It does not say in which direction, nor that the shapes are better."
        ),
        *([NO_CONTROL] if comparison.control is None else []),
    ]
    facts = comparison.facts(seeds, (*ROLES, "control", "reward"), f"{TEST}, {PERMUTATIONS:,} permutations")
    return Finding(
        facts=facts, data={role: f.to_dict() for role, f in result_by_role.items()}, rows=rows, says=sentences
    )


@torch.no_grad()
def shapes(comparison: Comparison, folder: Path) -> Finding:
    """Render one sheet of shaded shapes, COLUMNS in a row: before and after of the first latent, of the
    second, ...
    """
    seeds = comparison.seeds()
    parts = [
        torch.cat(
            [
                shade(field.density_grid(SlabSpec.of(field.bounds, RESOLUTION)), YAW, PIXELS, field.level)
                for field in comparison.fields(generator, seeds)
            ]
        )
        for generator in (comparison.before, comparison.after)
    ]
    shape_renders = torch.stack(parts, dim=1).flatten(0, 2)  # [2N, R, R]
    # White cells fill the last row.
    rows = -(-len(shape_renders) // COLUMNS)  # rounded up
    white = torch.ones(rows * COLUMNS - len(shape_renders), PIXELS, PIXELS)  # [missing, R, R]
    # [rows, COLUMNS, R, R] -> [rows * R, COLUMNS * R]
    page = (
        torch.cat([shape_renders, white])
        .unflatten(0, (rows, COLUMNS))
        .transpose(1, 2)
        .reshape(rows * PIXELS, COLUMNS * PIXELS)
    )
    name = f"{SHAPES}.jpg"  # JPEG: the sheet is embedded in the page
    PIL.Image.fromarray((page.numpy() * 255).round().astype(np.uint8)).save(
        folder / name, quality=80, optimize=True
    )
    data = {
        "file": name,
        "pixels": PIXELS,
        "columns": COLUMNS,
        "rows": rows,
        "seeds": list(seeds),
        "roles": list(ROLES),
    }
    return Finding(facts=comparison.facts(seeds, ROLES), data=data, images={"shapes before and after": name})


def _scatter(axes, data: dict, layout: str) -> None:
    """Plot both networks' positions in one layout; those before tuning are coloured by their reward."""
    chosen = {role: [p for p in data["points"] if p["role"] == role] for role in ROLES}
    x = f"{layout}_x"
    y = f"{layout}_y"
    points_before = axes.scatter(
        [p[x] for p in chosen["before"]],
        [p[y] for p in chosen["before"]],
        c=[p["reward"] for p in chosen["before"]],
        s=14,
        label="before, coloured by reward",
    )
    axes.scatter(
        [p[x] for p in chosen["after"]],
        [p[y] for p in chosen["after"]],
        marker="x",
        s=14,
        linewidths=0.9,
        color=style.colour("after"),
        label="after",
    )
    axes.figure.colorbar(points_before, ax=axes, label="reward before")


@style.plot(7, xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)", title="UMAP of the global feature")
def plot_umap(axes, data: dict):
    """Plot the UMAP layout of both networks' features."""
    _scatter(axes, data, "umap")


@style.plot(7, title="Principal axes of the untuned samples")
def plot_principal(axes, data: dict):
    """Plot both networks on the untuned samples' principal axes."""
    _scatter(axes, data, "principal")
    axes.set(
        **{f"{x}label": f"axis {i + 1} ({data['shares'][i]:.0%} of the variance)" for i, x in enumerate("xy")}
    )


@style.plot(None, xlabel="position on the first principal axis", ylabel="reward before")
def plot_axis(axes, data: dict):
    """Plot the reward over the position on the first principal axis."""
    before = [p for p in data["points"] if p["role"] == "before"]
    axes.plot(
        [p["principal_x"] for p in before], [p["reward"] for p in before], ".", color=style.colour("before")
    )
    row = data["ranks"][0]  # the principal axis comes first
    rho = "" if row["spearman"] is None else f": rho {row['spearman']:.2f} [{row['lo']:.2f}, {row['hi']:.2f}]"
    axes.set(title=f"Reward along the main axis{rho}")


@style.plot(7, ylabel="permutations", title="Nearest-neighbour separability")
def plot_test(axes, data: dict):
    """Plot the permutation distribution and the observed share, per role."""
    for role, result in data.items():
        axes.hist(
            result["chance"], bins=30, color=style.colour(role), alpha=0.4, label=f"{role}: random swaps"
        )
        label = f"{role}: observed {result['share']:.3f}, p = {result['p']:.2g}"
        axes.axvline(result["share"], color=style.colour(role), linewidth=2, label=label)
    axes.set(xlabel=f"share of the {next(iter(data.values()))['k']} nearest neighbours from the own network")


def write(comparison: Comparison, out: Path, quiet: bool = False) -> dict:
    """Compute the parts that are missing and write the page; return all findings."""
    parts = jobs(comparison)
    findings = pages.run(parts, out, quiet=quiet)  # by key
    feature_points = findings[MAP].data
    sheet = findings[SHAPES].data  # file and layout of the sprite
    # The sprite is embedded, so that the page is one file.
    sprite = {**sheet, "uri": data_uri((out / "data" / sheet["file"]).read_bytes(), "image/jpeg")}
    titles = {"umap": "UMAP", "principal": "principal axes"}
    chart = points_section(
        feature_points["points"], [(name, titles[name]) for name in feature_points["layouts"]], sprite
    )
    introduction = (
        f"The global feature of the reward {comparison.reward_hash[:12]} for the same {comparison.n} held-out latents before"
        " and after tuning. Points at the end of the page show their shapes."
    )
    # The first sentence of each part is the summary.
    words = [findings[key].says[0] for key in (MAP, APART)]
    write_page(out / "index.html", TITLE, introduction, parts[:2], findings, words, chart)
    return findings
