"""Images against the data: Fréchet and kernel distances, precision and recall; and diversity of images and of shapes.

Letters: N images or latents, F features, R pixels.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.texts import absent_job, span
from eg3d_rlhf.generators import LoadedGenerator, camera, latents
from eg3d_rlhf.metrics import diversity
from eg3d_rlhf.metrics.feature_sets import MANIFOLD_NEIGHBOURS as NEIGHBOURS
from eg3d_rlhf.metrics.feature_sets import precision_recall
from eg3d_rlhf.metrics.features import load_features
from eg3d_rlhf.metrics.resampling import (
    METHOD,
    SAFE_SAMPLES,
    frechet_change_interval,
    frechet_interval,
    kernel_change_interval,
    kernel_interval,
)
from eg3d_rlhf.reports import style
from eg3d_rlhf.reports.jobs import Finding, Job, identity_of_file
from eg3d_rlhf.seeds import IMAGES
from training.dataset import ImageFolderDataset
from training.synthetic_heads import resolve_dataset

REALS_PER_FAKE = 4
RESAMPLES = 100
SLAB_CELLS = 32  # cells per edge that larger slabs are averaged to before they are compared


def jobs(c: Comparison) -> list[Job]:
    """Distances to the data, and diversity."""
    title = "Images against the data"
    many = {"inception": identity_of_file(c.inception)}
    first = absent_job(c, "image-distances", title, "No dataset is known: name it with --data.") if not c.data else Job(
        key="image-distances", version=2, title=title, compute=partial(distances, c),
        plots={"distances": plot_distances, "precision-recall": plot_precision_recall},
        inputs=c.inputs("before", "after", "control", data=c.data, mirror=c.mirror, images=c.images, **many),
    )
    return [first, Job(
        key="diversity", title="Diversity: do samples still differ from each other?", compute=partial(spread, c),
        plots={"pairwise": plot_spread}, inputs=c.inputs(n=c.n, **many),
    )]


def real_features(c: Comparison, network) -> tuple[np.ndarray, ImageFolderDataset]:
    """Features [M, F] of up to REALS_PER_FAKE * images reals drawn by --seed, and the dataset."""
    dataset = ImageFolderDataset(resolve_dataset(c.data), use_labels=True, xflip=c.mirror, c_dim=25)
    if dataset.resolution != c.before.G.img_resolution:
        size = c.before.G.img_resolution
        raise ValueError(f"--data: expected images of {size} pixels as the generator's, got {dataset.resolution}. Resize the data.")
    chosen = np.random.RandomState(c.seed).permutation(len(dataset))[: REALS_PER_FAKE * c.images]
    parts = []
    for start in range(0, len(chosen), 64):
        pixels = np.stack([dataset[int(i)][0] for i in chosen[start : start + 64]])
        images = torch.from_numpy(pixels).to(c.device).float().expand(-1, 3, -1, -1) / 127.5 - 1
        parts.append(network(images).cpu().numpy())
    return np.concatenate(parts), dataset


@torch.no_grad()
def fake_features(c: Comparison, generator: LoadedGenerator, cameras: np.ndarray, network) -> np.ndarray:
    """Features [N, F] of c.images fakes without truncation, under cameras of the data; latents, cameras and ray jitter alike for all."""
    G, seeds = generator.G, c.seeds(c.images, IMAGES)
    chosen = np.random.RandomState(c.seed).randint(len(cameras), size=c.images)
    parts = []
    for start in range(0, c.images, c.batch):
        part = seeds[start : start + c.batch]
        labels = torch.from_numpy(cameras[chosen[start : start + len(part)]]).to(c.device)
        with torch.random.fork_rng(devices=[c.device] if c.device.type == "cuda" else []):
            torch.manual_seed(part[0])
            images = G(latents(part, G.z_dim).to(c.device), labels, noise_mode="const")["image"]
        parts.append(network(images.expand(-1, 3, -1, -1)).cpu().numpy())
    return np.concatenate(parts)


def distances(c: Comparison, folder: Path) -> Finding:
    """All distances of all networks' images to the data's, and paired changes."""
    del folder
    network = load_features(c.inception, c.device)
    real, dataset = real_features(c, network)
    cameras = dataset.get_labels()
    fakes = {role: fake_features(c, generator, cameras, network) for role, generator in c.generators().items()}
    measures = {"kernel": (kernel_interval, kernel_change_interval)}
    if min(c.images, len(real)) > network.dim:
        measures = {"Fréchet": (frechet_interval, frechet_change_interval), **measures}
    rows, changes = [], []
    for name, (single, paired) in measures.items():
        for role, features in fakes.items():
            rows.append({"distance": name, "role": role, **single(features, real, RESAMPLES, c.seed)._asdict()})
            if role != "before":
                changes.append({"distance": name, "role": role, **paired(fakes["before"], features, real, RESAMPLES, c.seed)._asdict()})
    shown = []
    for role, features in fakes.items():
        found = precision_recall(features, real[: c.images])
        for name, interval in found.intervals().items():
            shown.append({"measure": name, "role": role, "value": getattr(found, name), "lo": interval.lo, "hi": interval.hi})
    facts = c.facts(
        c.seeds(c.images, IMAGES), ("before", "after", "control"), f"95 % {METHOD}, {RESAMPLES} resamples; Wilson for precision "
        f"and recall", unit=f"images against {len(real):,} of the data, features {network.name}", psi=1.0,
    )
    data = {"distances": rows, "changes": changes, "precision_recall": shown}
    return Finding(facts=facts, data=data, rows=[*rows, *({**r, "distance": f"{r['distance']}, change"} for r in changes), *shown],
                   says=_distance_says(c, rows, changes, shown, network.dim))


def _distance_says(c: Comparison, rows: list, changes: list, shown: list, dim: int) -> list[str]:
    says = []
    for change in changes:
        before = next(r for r in rows if r["distance"] == change["distance"] and r["role"] == "before")
        moved = "farther from" if change["lo"] > 0 else "nearer to" if change["hi"] < 0 else "neither shown nearer to nor farther from"
        says.append(
            f"{change['distance']} distance, {change['role']} minus before: {span(change['mean'], change['lo'], change['hi'], '+.4g')} on "
            f"{before['mean']:.4g}: images are {moved} the data."
        )
    after = {r["measure"]: r for r in shown if r["role"] == "after"}
    before = {r["measure"]: r for r in shown if r["role"] == "before"}
    says += [f"{name.capitalize()} {before[name]['value']:.3f} -> {after[name]['value']:.3f}." for name in after]
    says.append(f"Precision and recall count the data within the {NEIGHBOURS}rd neighbour's reach, at this number of images only.")
    if not any(r["distance"] == "Fréchet" for r in rows):
        says.append(f"No Fréchet distance: it needs more images than the {dim} features. Raise --images.")
    elif c.images < SAFE_SAMPLES * dim:
        says.append(f"With under {SAFE_SAMPLES * dim:,} images the Fréchet distances stay too high, their change less so. Raise --images.")
    says.append("Distances under these features do not compare with published FIDs, unless --inception names the usual network.")
    return says


@torch.no_grad()
def _frontal_features(c: Comparison, generator: LoadedGenerator, seeds: range, network) -> np.ndarray:
    parts = []
    for ws in c.ws(generator, seeds).split(c.batch):
        with torch.random.fork_rng(devices=[c.device] if c.device.type == "cuda" else []):
            torch.manual_seed(seeds[0])
            images = generator.G.synthesis(ws, camera(generator.G, n=len(ws)), noise_mode="const")["image"]
        parts.append(network(images.expand(-1, 3, -1, -1)).cpu().numpy())
    return np.concatenate(parts)


def _cells(slab: torch.Tensor) -> np.ndarray:
    """[N, cells] of slabs [N, 1, D, H, W], averaged where they are larger than SLAB_CELLS."""
    size = [min(edge, SLAB_CELLS) for edge in slab.shape[2:]]
    return functional.adaptive_avg_pool3d(slab, size).flatten(1).cpu().numpy()


def spread(c: Comparison, folder: Path) -> Finding:
    """Mean pairwise distances of the same latents' images and slabs, and their ratios to before."""
    del folder
    seeds, network = c.seeds(), load_features(c.inception, c.device)
    found: dict[str, dict[str, np.ndarray]] = {"image features": {}, "σ slabs": {}}
    for role, generator in c.generators().items():
        features = _frontal_features(c, generator, seeds, network)
        cells = np.concatenate([_cells(slab) for slab in c.slabs(generator, seeds)])
        for name, items in (("image features", features), ("σ slabs", cells)):
            found[name][role] = diversity.pairwise_distances(items)
    rows = []
    for name, roles in found.items():
        for role, matrix in roles.items():
            mean, lo, hi = diversity.mean_pairwise(matrix)
            ratio = diversity.pairwise_ratio(roles["before"], matrix)
            rows.append({"of": name, "role": role, "mean": mean, "lo": lo, "hi": hi, "ratio": ratio.mean, "ratio_lo": ratio.lo,
                         "ratio_hi": ratio.hi})
    says = []
    for row in (r for r in rows if r["role"] == "after"):
        kept = "less" if row["ratio_hi"] < 1 else "more" if row["ratio_lo"] > 1 else "neither shown more nor less"
        says.append(f"Mean pairwise distance of {row['of']}: {span(row['ratio'], row['ratio_lo'], row['ratio_hi'], '.3f')} times that "
                    f"before; samples are {kept} diverse.")
    says.append("Slabs are compared as the reward reads them, each on its own scale of 0 to 100. A collapse would show as a ratio near 0; "
                "less diversity alone does not say whether faults or good variety went.")
    return Finding(facts=c.facts(seeds, ("before", "after", "control"), diversity.METHOD), data={"rows": rows}, rows=rows, says=says)


def _points(axis, rows: list, value: str, lo: str, hi: str) -> None:
    """One point with its interval per row, named by role."""
    for i, row in enumerate(rows):
        error = [[max(0.0, row[value] - row[lo])], [max(0.0, row[hi] - row[value])]]
        axis.errorbar([i], [row[value]], yerr=error, fmt="o", capsize=4, color=style.colour(row["role"]))
    axis.set_xticks(range(len(rows)), [row["role"] for row in rows])
    axis.set_xlim(-0.5, len(rows) - 0.5)


def plot_distances(data: dict):
    """Distances to the data with intervals."""
    names = list(dict.fromkeys(row["distance"] for row in data["distances"]))
    drawn, axes = style.figure(columns=len(names))
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        _points(axis, [row for row in data["distances"] if row["distance"] == name], "mean", "lo", "hi")
        axis.set(ylabel=f"{name} distance, squared feature units", title=f"{name} distance to the data")
    return drawn


def plot_precision_recall(data: dict):
    """Precision and recall with intervals."""
    drawn, axes = style.figure(columns=2)
    for axis, name in zip(axes, ("precision", "recall"), strict=True):
        _points(axis, [row for row in data["precision_recall"] if row["measure"] == name], "value", "lo", "hi")
        axis.set(ylabel=f"{name}, share", title=name, ylim=(0, 1.02))
    return drawn


def plot_spread(data: dict):
    """Mean pairwise distances with intervals."""
    names = list(dict.fromkeys(row["of"] for row in data["rows"]))
    drawn, axes = style.figure(columns=len(names))
    for axis, name in zip(axes, names, strict=True):
        _points(axis, [row for row in data["rows"] if row["of"] == name], "mean", "lo", "hi")
        axis.set(ylabel="mean pairwise RMS difference", title=f"Diversity of {name}")
        axis.set_ylim(bottom=0)
    return drawn
