"""Compare images: their distance to the data, their diversity, and how far those of the same latent changed.

Letters: N images or latents, F features, R pixels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from eg3d_rlhf.core.field import Field, render_each
from eg3d_rlhf.core.seeds import IMAGES
from eg3d_rlhf.core.statistics import bootstrap_mean_interval
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.paired import BOOTSTRAP, NO_CONTROL, ROLES, span
from eg3d_rlhf.experiments import style
from eg3d_rlhf.experiments.pages import Finding, Job, identity_of_file
from eg3d_rlhf.generators import LoadedGenerator, camera, latents
from eg3d_rlhf.measures import feature_sets, resampling
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.measures.image_similarity import load_identity, load_lpips, psnr, ssim
from eg3d_rlhf.measures.measure import Measure
from eg3d_rlhf.rewards.observations import SigmaSlab
from training.dataset import ImageFolderDataset
from training.synthetic_heads import resolve_dataset

REALS_PER_FAKE = 4  # images of the data per generated image, at most
RESAMPLES = 100  # of the distances' intervals
SLABS = "σ slabs"
SLAB_CELLS = 32  # cells per edge; larger slabs are averaged to this size before they are compared
YAW = 0.3  # radians from frontal: a view that shows more of the shape than the frontal one
NO_LPIPS = (
    "LPIPS is left out: no weights are bundled. Give them with --lpips=FILE, a TorchScript file that is"
    " called as f(a, b)."
)
NO_IDENTITY = (
    "Identity drift is left out: it needs a network that embeds faces, and none is bundled. Give one with"
    " --identity=FILE, a TorchScript file that maps images [N, 3, H, W] in [-1, 1] to embeddings [N, F]."
)


def jobs(comparison: Comparison) -> list[Job]:
    """Return the parts: distances to the data, diversity, appearance drift, and identity drift if a network
    is given.
    """
    inception = identity_of_file(comparison.inception)
    title = "Images against the data"  # also of the part without a dataset
    moved = {"similarity": plot_similarity}  # both drift parts have this plot
    identity = "Does a latent keep its identity?"
    return [
        # A part that cannot be computed stays on the page with the reason.
        (
            comparison.job(
                "image-distances",
                title,
                distances,
                {"distances": plot_distances, "precision-recall": plot_precision_recall},
                ROLES,
                version=2,
                data=comparison.data,
                mirror=comparison.mirror,
                images=comparison.images,
                inception=inception,
            )
            if comparison.data
            else comparison.absent("image-distances", title, "No dataset is known. Give it with --data.")
        ),
        comparison.job(
            "diversity",
            "Diversity: do samples still differ from each other?",
            spread,
            {"pairwise": plot_spread},
            n=comparison.n,
            inception=inception,
        ),
        comparison.job(
            "appearance-drift",
            "Do images of the same latent look the same?",
            appearance_drift,
            moved,
            ROLES,
            n=comparison.n,
            lpips=identity_of_file(comparison.lpips),
        ),
        (
            comparison.job(
                "identity-drift",
                identity,
                identity_drift,
                moved,
                ROLES,
                n=comparison.n,
                identity=identity_of_file(comparison.identity),
            )
            if comparison.identity is not None
            else comparison.absent("identity-drift", identity, NO_IDENTITY)
        ),
    ]


def open_data(comparison: Comparison) -> ImageFolderDataset:
    """Open the dataset, with cameras. Raises: ValueError if its images do not have the generator's size."""
    dataset = ImageFolderDataset(
        resolve_dataset(comparison.data), use_labels=True, xflip=comparison.mirror, c_dim=25
    )
    if dataset.resolution != comparison.before.generator.img_resolution:
        size = comparison.before.generator.img_resolution  # pixels per edge
        raise ValueError(
            f"--data: expected images of {size} pixels as the generator's, got {dataset.resolution}. Resize"
            " the data."
        )
    return dataset


def real_features(comparison: Comparison, network) -> tuple[np.ndarray, ImageFolderDataset]:
    """Compute features [M, F] of up to REALS_PER_FAKE * images reals, sampled by --seed, and return the
    dataset, too.
    """
    dataset = open_data(comparison)
    chosen = np.random.RandomState(comparison.seed).permutation(len(dataset))[
        : REALS_PER_FAKE * comparison.images
    ]
    parts = []  # features [<= 64, F] of batches of the data
    for start in range(0, len(chosen), 64):
        pixels = np.stack([dataset[int(i)][0] for i in chosen[start : start + 64]])
        # [B, C, R, R] uint8 -> [B, 3, R, R] in [-1, 1]; grey images are repeated
        images = torch.from_numpy(pixels).to(comparison.device).float().expand(-1, 3, -1, -1) / 127.5 - 1
        parts.append(network(images).cpu().numpy())
    return np.concatenate(parts), dataset


def images_of(
    comparison: Comparison,
    generator: LoadedGenerator,
    cameras: np.ndarray,
    seeds: Sequence[int],
    chosen: np.ndarray,
) -> Iterator[torch.Tensor]:
    """Yield images [<= batch, 3, R, R] of seeds without truncation.

    Seed i is rendered under (and conditioned on) cameras[chosen[i]] of cameras [M, 25].
    """
    for start in range(0, len(seeds), comparison.batch):
        part = seeds[start : start + comparison.batch]
        # The mapping is conditioned on the camera that renders, as in EG3D's training.
        labels = torch.from_numpy(cameras[chosen[start : start + len(part)]]).to(comparison.device)
        with torch.no_grad():
            field = generator.generator.field(  # ws of the mapping, untruncated
                generator.generator.mapping(
                    latents(part, generator.generator.z_dim).to(comparison.device), labels
                )
            )
        yield render_each(field, [labels], seed=part[0])[0].image


def fake_features(
    comparison: Comparison, generator: LoadedGenerator, cameras: np.ndarray, network
) -> np.ndarray:
    """Compute features [N, F] of c.images generated images under cameras of the data.

    Latents, cameras and ray jitter are the same for all networks.
    """
    # The seed alone decides the cameras, so that networks are compared in pairs.
    chosen = np.random.RandomState(comparison.seed).randint(len(cameras), size=comparison.images)
    batches = images_of(comparison, generator, cameras, comparison.seeds(comparison.images, IMAGES), chosen)
    return np.concatenate([network(images.expand(-1, 3, -1, -1)).cpu().numpy() for images in batches])


def distances(comparison: Comparison, _folder: Path) -> Finding:
    """Measure all distances of all networks' images to the data's, and their paired changes."""
    network = load_features(comparison.inception, comparison.device)
    real, dataset = real_features(comparison, network)  # [M, F]
    cameras = dataset.get_labels()  # [M, 25]
    fakes = {
        role: fake_features(comparison, generator, cameras, network)
        for role, generator in comparison.generators().items()
    }
    measures = {"kernel": (resampling.kernel_interval, resampling.kernel_change_interval)}
    # The covariance of fewer images than features is singular, so a Fréchet distance would be meaningless.
    if min(comparison.images, len(real)) > network.dim:
        measures = {"Fréchet": (resampling.frechet_interval, resampling.frechet_change_interval), **measures}
    rows = []
    changes = []  # against before, paired by latent and camera
    # single: interval of one distance; paired: interval of a change against before
    for name, (single, paired) in measures.items():
        for role, features in fakes.items():
            rows.append(
                {
                    "distance": name,
                    "role": role,
                    **single(features, real, RESAMPLES, comparison.seed)._asdict(),
                }
            )
            if role != "before":
                changes.append(
                    {
                        "distance": name,
                        "role": role,
                        **paired(fakes["before"], features, real, RESAMPLES, comparison.seed)._asdict(),
                    }
                )
    # As many reals as generated images: both sides' manifolds have the same density of samples.
    counts = {
        role: feature_sets.precision_recall(features, real[: comparison.images])
        for role, features in fakes.items()
    }
    shown = [
        {"measure": name, "role": role, "value": getattr(counted, name), "lo": interval.lo, "hi": interval.hi}
        for role, counted in counts.items()
        for name, interval in counted.intervals().items()
    ]
    facts = comparison.facts(
        comparison.seeds(comparison.images, IMAGES),
        ROLES,
        f"95 % {resampling.METHOD}, {RESAMPLES} resamples; Wilson for precision and recall",
        unit=f"images against {len(real):,} of the data, features {network.name}",
        psi=1.0,
    )
    data = {"distances": rows, "changes": changes, "precision_recall": shown}
    return Finding(
        facts=facts,
        data=data,
        rows=[*rows, *({**r, "distance": f"{r['distance']}, change"} for r in changes), *shown],
        says=_distance_says(comparison, rows, changes, shown, network.dim),
    )


def _distance_says(comparison: Comparison, rows: list, changes: list, shown: list, dim: int) -> list[str]:
    """Describe the changes of the distances, precision and recall, and their limits."""
    sentences = []
    for change in changes:
        # A change is relative to the distance before tuning.
        before = next(r for r in rows if r["distance"] == change["distance"] and r["role"] == "before")
        moved = (
            "farther from"
            if change["lo"] > 0
            else "nearer to"
            if change["hi"] < 0
            else "neither shown nearer to nor farther from"
        )
        sentences.append(
            f"{change['distance']} distance, {change['role']} minus before:"
            f" {span(change['mean'], change['lo'], change['hi'], '+.4g')} on {before['mean']:.4g}: images are"
            f" {moved} the data."
        )
    # Precision and recall have intervals, but no paired test here.
    old, new = (
        {r["measure"]: r["value"] for r in shown if r["role"] == role} for role in ("before", "after")
    )
    sentences += [f"{name.capitalize()} {old[name]:.3f} -> {value:.3f}." for name, value in new.items()]
    reach = f"the {feature_sets.MANIFOLD_NEIGHBOURS}rd neighbour's reach"
    sentences.append(f"Precision and recall count the data within {reach}, at this number of images only.")
    if not any(r["distance"] == "Fréchet" for r in rows):
        sentences.append(
            f"No Fréchet distance: it needs more images than the {dim} features. Raise --images."
        )
    # The Fréchet distance is biased upwards for few samples.
    elif comparison.images < resampling.SAFE_SAMPLES * dim:
        few = f"With under {resampling.SAFE_SAMPLES * dim:,} images"
        sentences.append(f"{few} the Fréchet distances stay too high, their change less so. Raise --images.")
    sentences.append(
        "Distances under these features do not compare with published FIDs, unless --inception names the"
        " usual network."
    )
    return sentences


def views(
    comparison: Comparison,
    generator: LoadedGenerator,
    seeds: range,
    yaw: float = 0.0,
    jitter: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield images [<= batch, 3, R, R] of seeds.

    Args: jitter: seed of the ray jitter of every batch; None: the first seed of the batch.
    """
    for start, field in zip(
        range(0, len(seeds), comparison.batch), comparison.fields(generator, seeds), strict=True
    ):
        yield image_from(generator, field, yaw, seeds[start] if jitter is None else jitter)


@torch.no_grad()
def image_from(generator: LoadedGenerator, field: Field, yaw: float, jitter: int) -> torch.Tensor:
    """Render images [N, 3, R, R] of a field; torch's global random state is kept.

    This is not `render_each`: EG3D's pose sampler draws random numbers before the rays do.
    """
    with torch.random.fork_rng(
        devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    ):
        torch.manual_seed(jitter)  # of the rays' stratified samples
        return field.render(camera(generator.generator, yaw=yaw)).image


def _cells(seen: torch.Tensor) -> np.ndarray:
    """Flatten observations [N, ...] to [N, cells]; slabs [N, 1, D, H, W] are averaged if they are larger than
    SLAB_CELLS.
    """
    # Five axes: a slab. Pairwise distances of full slabs would take much memory.
    if seen.ndim == 5:
        depth, height, width = (min(edge, SLAB_CELLS) for edge in seen.shape[2:])
        seen = functional.adaptive_avg_pool3d(seen, (depth, height, width))
    return seen.flatten(1).cpu().numpy()


def spread(comparison: Comparison, _folder: Path) -> Finding:
    """Compare the mean pairwise distances of the same latents' images and slabs, and their ratios to
    before.
    """
    seeds = comparison.seeds()
    network = load_features(comparison.inception, comparison.device)
    shapes = (
        SLABS
        if comparison.reward.observation.kind == SigmaSlab.kind
        else f"what the reward reads ({comparison.reward.observation.kind})"
    )
    distances_by_kind: dict[str, dict[str, np.ndarray]] = {"image features": {}, shapes: {}}
    for role, generator in comparison.generators().items():
        # The same jitter for all latents: their distances should not include the sampler's noise.
        frontal = views(comparison, generator, seeds, jitter=seeds[0])  # batches of images
        # [N, F]
        features = np.concatenate([network(images.expand(-1, 3, -1, -1)).cpu().numpy() for images in frontal])
        cells = np.concatenate([_cells(seen) for seen in comparison.observed(generator, seeds)])  # [N, cells]
        for name, items in (("image features", features), (shapes, cells)):
            distances_by_kind[name][role] = feature_sets.pairwise_distances(items)
    rows: list[dict] = []
    for name, roles in distances_by_kind.items():
        for role, matrix in roles.items():
            ratio = feature_sets.pairwise_ratio(roles["before"], matrix)  # to the diversity before tuning
            rows.append(
                {
                    "of": name,
                    "role": role,
                    **feature_sets.mean_pairwise(matrix)._asdict(),
                    "ratio": ratio.mean,
                    "ratio_lo": ratio.lo,
                    "ratio_hi": ratio.hi,
                }
            )
    sentences = []
    for row in (r for r in rows if r["role"] == "after"):
        kept = (
            "less"
            if row["ratio_hi"] < 1
            else "more"
            if row["ratio_lo"] > 1
            else "neither shown more nor less"
        )
        sentences.append(
            f"Mean pairwise distance of {row['of']}:"
            f" {span(row['ratio'], row['ratio_lo'], row['ratio_hi'], '.3f')} times that before; samples are"
            f" {kept} diverse."
        )
    if shapes == SLABS:
        sentences.append("Slabs are compared as the reward reads them, each normalised to 0 to 100.")
    sentences.append(
        "A collapse would show as a ratio near 0. Less diversity alone does not say whether defects or good"
        " variety disappeared."
    )
    return Finding(
        facts=comparison.facts(seeds, ROLES, feature_sets.METHOD),
        data={"rows": rows},
        rows=rows,
        says=sentences,
    )


def renderings(comparison: Comparison, generator: LoadedGenerator, seeds: range, yaw: float) -> torch.Tensor:
    """Render images [N, 3, R, R] on the CPU, with constant noise and the same ray jitter in every call."""
    return torch.cat(
        [images.float().clamp(-1, 1).cpu() for images in views(comparison, generator, seeds, yaw)]
    )


def _drift(
    comparison: Comparison, table: Sequence[Measure], yaw: float, meaning: str, *missing: str
) -> Finding:
    """Compare images before with those of each network by the measures of `table`.

    'other latent' pairs each image before with the next latent's, as the value of unrelated images.
    """
    seeds = comparison.seeds()
    images = {
        role: renderings(comparison, generator, seeds, yaw)
        for role, generator in comparison.generators().items()
    }
    first = images.pop("before").split(comparison.batch)  # batches of the reference images
    # roll by one: image i meets image i - 1.
    images["other latent"] = torch.cat(first).roll(1, 0)
    data = {measure.name: dict[str, list[float]]() for measure in table}
    rows = []
    sentences = []
    for measure in table:
        name = measure.name
        texts = {}  # role -> mean with interval
        for role, other in images.items():
            pairs = zip(first, other.split(comparison.batch), strict=True)
            # [N]; float64 for the bootstrap
            values = np.concatenate(
                [measure.values(a.to(comparison.device), b.to(comparison.device)) for a, b in pairs]
            ).astype(np.float64)
            data[name][role] = values.tolist()
            interval = bootstrap_mean_interval(values)  # over latents
            rows.append({"measure": name, "against": role, **interval._asdict()})
            texts[role] = span(*interval, ".3f")
        beside = f"; control {texts['control']}" if "control" in texts else ""
        sentences.append(
            f"{name}, before against after: {texts['after']}{beside}; against another latent"
            f" {texts['other latent']}."
        )
    return Finding(
        facts=comparison.facts(seeds, ROLES, BOOTSTRAP),
        data={"measures": data, "rows": rows},
        rows=rows,
        says=[*sentences, meaning, *missing],
    )


def appearance_drift(comparison: Comparison, _folder: Path) -> Finding:
    """Compare images of the same latent before and after by PSNR, SSIM and, if weights are given, LPIPS."""
    table = [Measure("PSNR, dB", psnr, "higher", "dB"), Measure("SSIM", ssim, "higher", "-1..1")]
    if comparison.lpips is not None:
        table.append(Measure("LPIPS", load_lpips(comparison.lpips, comparison.device), "lower", "distance"))
    missing = [
        *([NO_LPIPS] if comparison.lpips is None else []),
        *([NO_CONTROL] if comparison.control is None else []),
    ]
    meaning = (
        "Drift is change, not harm: a better shape has to look different. The control shows how much change"
        " happens without the reward; another latent shows the value of unrelated images."
    )
    return _drift(comparison, table, YAW, meaning, *missing)


def identity_drift(comparison: Comparison, _folder: Path) -> Finding:
    """Compare the given network's embeddings by cosine similarity, in the frontal view."""
    assert comparison.identity is not None  # `jobs` makes this part only with a network
    embed = load_identity(comparison.identity, comparison.device)  # images -> unit embeddings [N, F]
    meaning = (
        "Identity is what this network was trained to distinguish; outside its domain the figure means"
        " little."
    )
    # Embeddings have unit length, so their product is the cosine.
    return _drift(
        comparison,
        [Measure("cosine similarity", lambda a, b: (embed(a) * embed(b)).sum(dim=1), "higher", "-1..1")],
        0.0,
        meaning,
    )


def _panels(rows: list[dict], of: str, value: str = "mean", **look: Any):
    """Draw one panel for each value of the column `of`, with a point and its interval per row, named by role.

    Args: look: settings of the axes, in which '{}' stands for the value.
    """
    names = list(dict.fromkeys(row[of] for row in rows))  # in the order of the rows
    figure, axes = style.figure(columns=len(names))
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        panel_rows = [row for row in rows if row[of] == name]
        for i, row in enumerate(panel_rows):
            style.interval(axis, i, row, row["role"], value)
        axis.set_xticks(range(len(panel_rows)), [row["role"] for row in panel_rows])
        axis.set(
            xlim=(-0.5, len(panel_rows) - 0.5),
            **{key: v.format(name) if isinstance(v, str) else v for key, v in look.items()},
        )
    return figure


def plot_distances(data: dict):
    """Plot the distances to the data with their intervals."""
    return _panels(
        data["distances"],
        "distance",
        ylabel="{} distance, squared feature units",
        title="{} distance to the data",
    )


def plot_precision_recall(data: dict):
    """Plot precision and recall with their intervals."""
    return _panels(
        data["precision_recall"], "measure", "value", ylabel="{}, share", title="{}", ylim=(0, 1.02)
    )


def plot_spread(data: dict):
    """Plot the diversity of images and of the reward's input."""
    return _panels(
        data["rows"], "of", ylabel="mean pairwise RMS difference", title="Diversity of {}", ylim=(0, None)
    )


def plot_similarity(data: dict):
    """Plot the distributions of similarity to the image before, per measure and role."""
    figure, axes = style.figure(columns=len(data["measures"]))
    for axis, (name, roles) in zip(np.atleast_1d(axes), data["measures"].items(), strict=True):
        parts = axis.violinplot(list(roles.values()), showextrema=False)  # one body per role
        for i, (body, role) in enumerate(zip(parts["bodies"], roles, strict=True)):
            body.set_facecolor(style.colour(role))
            body.set_alpha(0.5)
            # The mean with its interval on top of the distribution
            row = next(r for r in data["rows"] if r["measure"] == name and r["against"] == role)
            style.interval(axis, i + 1, row, role, markersize=4)
        axis.set_xticks(range(1, len(roles) + 1), list(roles))
        axis.set(ylabel=name, title=f"{name}, against before")
    return figure
