"""Images: their distance to the data, how much they differ from each other, and how far those of the same
latent have moved.

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

REALS_PER_FAKE = 4
RESAMPLES = 100
SLABS = "σ slabs"
SLAB_CELLS = 32  # cells per edge that larger slabs are averaged to before they are compared
YAW = 0.3  # radians from frontal: a view that shows the shape
NO_LPIPS = (
    "LPIPS is left out: no weights are bundled. Name them with --lpips=FILE, a TorchScript file that is"
    " called as f(a, b)."
)
NO_IDENTITY = (
    "Identity drift is left out: it needs a network that embeds faces, and none is bundled. Name one with"
    " --identity=FILE, a TorchScript file that maps images [N, 3, H, W] in [-1, 1] to embeddings [N, F]."
)


def jobs(c: Comparison) -> list[Job]:
    """Distances to the data, diversity, appearance drift, and identity drift where a network is named."""
    inception = identity_of_file(c.inception)
    title = "Images against the data"
    moved = {"similarity": plot_similarity}
    identity = "Does a latent keep its identity?"
    return [
        (
            c.job(
                "image-distances",
                title,
                distances,
                {"distances": plot_distances, "precision-recall": plot_precision_recall},
                ROLES,
                version=2,
                data=c.data,
                mirror=c.mirror,
                images=c.images,
                inception=inception,
            )
            if c.data
            else c.absent("image-distances", title, "No dataset is known: name it with --data.")
        ),
        c.job(
            "diversity",
            "Diversity: do samples still differ from each other?",
            spread,
            {"pairwise": plot_spread},
            n=c.n,
            inception=inception,
        ),
        c.job(
            "appearance-drift",
            "Do images of the same latent look the same?",
            appearance_drift,
            moved,
            ROLES,
            n=c.n,
            lpips=identity_of_file(c.lpips),
        ),
        (
            c.job(
                "identity-drift",
                identity,
                identity_drift,
                moved,
                ROLES,
                n=c.n,
                identity=identity_of_file(c.identity),
            )
            if c.identity is not None
            else c.absent("identity-drift", identity, NO_IDENTITY)
        ),
    ]


def open_data(c: Comparison) -> ImageFolderDataset:
    """The dataset, with cameras. Raises: ValueError where its images are not of the generator's size."""
    dataset = ImageFolderDataset(resolve_dataset(c.data), use_labels=True, xflip=c.mirror, c_dim=25)
    if dataset.resolution != c.before.generator.img_resolution:
        size = c.before.generator.img_resolution
        raise ValueError(
            f"--data: expected images of {size} pixels as the generator's, got {dataset.resolution}. Resize"
            " the data."
        )
    return dataset


def real_features(c: Comparison, network) -> tuple[np.ndarray, ImageFolderDataset]:
    """Features [M, F] of up to REALS_PER_FAKE * images reals drawn by --seed, and the dataset."""
    dataset = open_data(c)
    chosen = np.random.RandomState(c.seed).permutation(len(dataset))[: REALS_PER_FAKE * c.images]
    parts = []
    for start in range(0, len(chosen), 64):
        pixels = np.stack([dataset[int(i)][0] for i in chosen[start : start + 64]])
        images = torch.from_numpy(pixels).to(c.device).float().expand(-1, 3, -1, -1) / 127.5 - 1
        parts.append(network(images).cpu().numpy())
    return np.concatenate(parts), dataset


def images_of(
    c: Comparison, generator: LoadedGenerator, cameras: np.ndarray, seeds: Sequence[int], chosen: np.ndarray
) -> Iterator[torch.Tensor]:
    """Images [<= batch, 3, R, R] of seeds without truncation, seed i under (and conditioned on)
    cameras[chosen[i]] of cameras [M, 25].
    """
    for start in range(0, len(seeds), c.batch):
        part = seeds[start : start + c.batch]
        labels = torch.from_numpy(cameras[chosen[start : start + len(part)]]).to(c.device)
        with torch.no_grad():
            field = generator.generator.field(
                generator.generator.mapping(latents(part, generator.generator.z_dim).to(c.device), labels)
            )
        yield render_each(field, [labels], seed=part[0])[0].image


def fake_features(c: Comparison, generator: LoadedGenerator, cameras: np.ndarray, network) -> np.ndarray:
    """Features [N, F] of c.images fakes under cameras of the data; latents, cameras and ray jitter alike for
    all networks.
    """
    chosen = np.random.RandomState(c.seed).randint(len(cameras), size=c.images)
    drawn = images_of(c, generator, cameras, c.seeds(c.images, IMAGES), chosen)
    return np.concatenate([network(images.expand(-1, 3, -1, -1)).cpu().numpy() for images in drawn])


def distances(c: Comparison, _folder: Path) -> Finding:
    """All distances of all networks' images to the data's, and paired changes."""
    network = load_features(c.inception, c.device)
    real, dataset = real_features(c, network)
    cameras = dataset.get_labels()
    fakes = {
        role: fake_features(c, generator, cameras, network) for role, generator in c.generators().items()
    }
    measures = {"kernel": (resampling.kernel_interval, resampling.kernel_change_interval)}
    if min(c.images, len(real)) > network.dim:
        measures = {"Fréchet": (resampling.frechet_interval, resampling.frechet_change_interval), **measures}
    rows = []
    changes = []
    for name, (single, paired) in measures.items():
        for role, features in fakes.items():
            rows.append(
                {"distance": name, "role": role, **single(features, real, RESAMPLES, c.seed)._asdict()}
            )
            if role != "before":
                changes.append(
                    {
                        "distance": name,
                        "role": role,
                        **paired(fakes["before"], features, real, RESAMPLES, c.seed)._asdict(),
                    }
                )
    counts = {
        role: feature_sets.precision_recall(features, real[: c.images]) for role, features in fakes.items()
    }
    shown = [
        {"measure": name, "role": role, "value": getattr(found, name), "lo": interval.lo, "hi": interval.hi}
        for role, found in counts.items()
        for name, interval in found.intervals().items()
    ]
    facts = c.facts(
        c.seeds(c.images, IMAGES),
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
        says=_distance_says(c, rows, changes, shown, network.dim),
    )


def _distance_says(c: Comparison, rows: list, changes: list, shown: list, dim: int) -> list[str]:
    says = []
    for change in changes:
        before = next(r for r in rows if r["distance"] == change["distance"] and r["role"] == "before")
        moved = (
            "farther from"
            if change["lo"] > 0
            else "nearer to"
            if change["hi"] < 0
            else "neither shown nearer to nor farther from"
        )
        says.append(
            f"{change['distance']} distance, {change['role']} minus before:"
            f" {span(change['mean'], change['lo'], change['hi'], '+.4g')} on {before['mean']:.4g}: images are"
            f" {moved} the data."
        )
    old, new = (
        {r["measure"]: r["value"] for r in shown if r["role"] == role} for role in ("before", "after")
    )
    says += [f"{name.capitalize()} {old[name]:.3f} -> {value:.3f}." for name, value in new.items()]
    reach = f"the {feature_sets.MANIFOLD_NEIGHBOURS}rd neighbour's reach"
    says.append(f"Precision and recall count the data within {reach}, at this number of images only.")
    if not any(r["distance"] == "Fréchet" for r in rows):
        says.append(f"No Fréchet distance: it needs more images than the {dim} features. Raise --images.")
    elif c.images < resampling.SAFE_SAMPLES * dim:
        few = f"With under {resampling.SAFE_SAMPLES * dim:,} images"
        says.append(f"{few} the Fréchet distances stay too high, their change less so. Raise --images.")
    says.append(
        "Distances under these features do not compare with published FIDs, unless --inception names the"
        " usual network."
    )
    return says


def views(
    c: Comparison, generator: LoadedGenerator, seeds: range, yaw: float = 0.0, jitter: int | None = None
) -> Iterator[torch.Tensor]:
    """Images [<= batch, 3, R, R] of seeds.

    Args: jitter: seed of the ray jitter of every batch; None: the first of its latents.
    """
    for start, field in zip(range(0, len(seeds), c.batch), c.fields(generator, seeds), strict=True):
        yield image_from(generator, field, yaw, seeds[start] if jitter is None else jitter)


@torch.no_grad()
def image_from(generator: LoadedGenerator, field: Field, yaw: float, jitter: int) -> torch.Tensor:
    """Images [N, 3, R, R] of a field; torch's own state stays. Not `render_each`: EG3D's pose sampler draws
    first, then the rays do.
    """
    with torch.random.fork_rng(
        devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    ):
        torch.manual_seed(jitter)
        return field.render(camera(generator.generator, yaw=yaw)).image


def _cells(seen: torch.Tensor) -> np.ndarray:
    """[N, cells] of observations [N, ...]; slabs [N, 1, D, H, W] are averaged where they are larger than
    SLAB_CELLS.
    """
    if seen.ndim == 5:
        depth, height, width = (min(edge, SLAB_CELLS) for edge in seen.shape[2:])
        seen = functional.adaptive_avg_pool3d(seen, (depth, height, width))
    return seen.flatten(1).cpu().numpy()


def spread(c: Comparison, _folder: Path) -> Finding:
    """Mean pairwise distances of the same latents' images and slabs, and their ratios to before."""
    seeds = c.seeds()
    network = load_features(c.inception, c.device)
    shapes = (
        SLABS
        if c.reward.observation.kind == SigmaSlab.kind
        else f"what the reward reads ({c.reward.observation.kind})"
    )
    found: dict[str, dict[str, np.ndarray]] = {"image features": {}, shapes: {}}
    for role, generator in c.generators().items():
        frontal = views(c, generator, seeds, jitter=seeds[0])
        features = np.concatenate([network(images.expand(-1, 3, -1, -1)).cpu().numpy() for images in frontal])
        cells = np.concatenate([_cells(seen) for seen in c.observed(generator, seeds)])
        for name, items in (("image features", features), (shapes, cells)):
            found[name][role] = feature_sets.pairwise_distances(items)
    rows: list[dict] = []
    for name, roles in found.items():
        for role, matrix in roles.items():
            ratio = feature_sets.pairwise_ratio(roles["before"], matrix)
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
    says = []
    for row in (r for r in rows if r["role"] == "after"):
        kept = (
            "less"
            if row["ratio_hi"] < 1
            else "more"
            if row["ratio_lo"] > 1
            else "neither shown more nor less"
        )
        says.append(
            f"Mean pairwise distance of {row['of']}:"
            f" {span(row['ratio'], row['ratio_lo'], row['ratio_hi'], '.3f')} times that before; samples are"
            f" {kept} diverse."
        )
    if shapes == SLABS:
        says.append("Slabs are compared as the reward reads them, each on its own scale of 0 to 100.")
    says.append(
        "A collapse would show as a ratio near 0; less diversity alone does not say whether faults or good"
        " variety went."
    )
    return Finding(
        facts=c.facts(seeds, ROLES, feature_sets.METHOD), data={"rows": rows}, rows=rows, says=says
    )


def renderings(c: Comparison, generator: LoadedGenerator, seeds: range, yaw: float) -> torch.Tensor:
    """Images [N, 3, R, R] on the CPU, with constant noise and the same ray jitter in every call."""
    return torch.cat([images.float().clamp(-1, 1).cpu() for images in views(c, generator, seeds, yaw)])


def _drift(c: Comparison, table: Sequence[Measure], yaw: float, meaning: str, *missing: str) -> Finding:
    """Values per measure and pair of networks. 'other latent' pairs each image before with
    the next latent's.
    """
    seeds = c.seeds()
    images = {role: renderings(c, generator, seeds, yaw) for role, generator in c.generators().items()}
    first = images.pop("before").split(c.batch)
    images["other latent"] = torch.cat(first).roll(1, 0)
    data = {measure.name: dict[str, list[float]]() for measure in table}
    rows = []
    says = []
    for measure in table:
        name = measure.name
        texts = {}
        for role, other in images.items():
            pairs = zip(first, other.split(c.batch), strict=True)
            values = np.concatenate(
                [measure.values(a.to(c.device), b.to(c.device)) for a, b in pairs]
            ).astype(np.float64)
            data[name][role] = values.tolist()
            interval = bootstrap_mean_interval(values)
            rows.append({"measure": name, "against": role, **interval._asdict()})
            texts[role] = span(*interval, ".3f")
        beside = f"; control {texts['control']}" if "control" in texts else ""
        says.append(
            f"{name}, before against after: {texts['after']}{beside}; against another latent"
            f" {texts['other latent']}."
        )
    return Finding(
        facts=c.facts(seeds, ROLES, BOOTSTRAP),
        data={"measures": data, "rows": rows},
        rows=rows,
        says=[*says, meaning, *missing],
    )


def appearance_drift(c: Comparison, _folder: Path) -> Finding:
    """PSNR, SSIM and, where weights are named, LPIPS between images of the same latent before and after."""
    table = [Measure("PSNR, dB", psnr, "higher", "dB"), Measure("SSIM", ssim, "higher", "-1..1")]
    if c.lpips is not None:
        table.append(Measure("LPIPS", load_lpips(c.lpips, c.device), "lower", "distance"))
    missing = [*([NO_LPIPS] if c.lpips is None else []), *([NO_CONTROL] if c.control is None else [])]
    meaning = (
        "Drift is change, not harm: a better shape has to look different. The control says how much goes on"
        " without the reward; another latent says what no likeness at all looks like."
    )
    return _drift(c, table, YAW, meaning, *missing)


def identity_drift(c: Comparison, _folder: Path) -> Finding:
    """Cosine similarity of the named network's embeddings, frontal view."""
    assert c.identity is not None  # the job is made where it is named
    embed = load_identity(c.identity, c.device)
    meaning = (
        "What counts as identity is what this network was trained to tell apart; outside its domain the"
        " figure means little."
    )
    return _drift(
        c,
        [Measure("cosine similarity", lambda a, b: (embed(a) * embed(b)).sum(dim=1), "higher", "-1..1")],
        0.0,
        meaning,
    )


def _panels(rows: list[dict], of: str, value: str = "mean", **look: Any):
    """One panel for each entry of the column `of`, with a point and its interval per row, named by role.

    Args: look: '{}' is the entry.
    """
    names = list(dict.fromkeys(row[of] for row in rows))
    drawn, axes = style.figure(columns=len(names))
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        own = [row for row in rows if row[of] == name]
        for i, row in enumerate(own):
            style.interval(axis, i, row, row["role"], value)
        axis.set_xticks(range(len(own)), [row["role"] for row in own])
        axis.set(
            xlim=(-0.5, len(own) - 0.5),
            **{key: v.format(name) if isinstance(v, str) else v for key, v in look.items()},
        )
    return drawn


def plot_distances(data: dict):
    return _panels(
        data["distances"],
        "distance",
        ylabel="{} distance, squared feature units",
        title="{} distance to the data",
    )


def plot_precision_recall(data: dict):
    return _panels(
        data["precision_recall"], "measure", "value", ylabel="{}, share", title="{}", ylim=(0, 1.02)
    )


def plot_spread(data: dict):
    return _panels(
        data["rows"], "of", ylabel="mean pairwise RMS difference", title="Diversity of {}", ylim=(0, None)
    )


def plot_similarity(data: dict):
    drawn, axes = style.figure(columns=len(data["measures"]))
    for axis, (name, roles) in zip(np.atleast_1d(axes), data["measures"].items(), strict=True):
        parts = axis.violinplot(list(roles.values()), showextrema=False)
        for i, (body, role) in enumerate(zip(parts["bodies"], roles, strict=True)):
            body.set_facecolor(style.colour(role))
            body.set_alpha(0.5)
            row = next(r for r in data["rows"] if r["measure"] == name and r["against"] == role)
            style.interval(axis, i + 1, row, role, markersize=4)
        axis.set_xticks(range(1, len(roles) + 1), list(roles))
        axis.set(ylabel=name, title=f"{name}, against before")
    return drawn
