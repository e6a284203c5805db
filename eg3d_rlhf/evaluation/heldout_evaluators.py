"""What judges a reward run at its end, before against after on held-out latents: the whole heads that latents
name, the annotator without noise, distances to the data, and measures of geometry that share nothing with the
annotator.

Every change gets a verdict from its 95 % interval. Letters: N latents.
"""

import functools
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import ASSETS, file_hash
from eg3d_rlhf.core.field import Bounds
from eg3d_rlhf.core.seeds import EVALUATION, GEOMETRY, IMAGES, SHAPES, VALIDATION
from eg3d_rlhf.core.statistics import paired_summary, wilson_interval
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.evaluation.filters import FILTERS, best_filter, tried
from eg3d_rlhf.evaluation.geometry import view_measures
from eg3d_rlhf.evaluation.images import images_of, open_data
from eg3d_rlhf.experiments.store import Store, json_hash
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.measures.distances import FeatureStatistics, collect
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.measures.image_metrics import real_batches
from eg3d_rlhf.measures.measure import Measure
from eg3d_rlhf.measures.people import shape_grids
from eg3d_rlhf.measures.resampling import frechet_change_interval
from eg3d_rlhf.measures.shape_features import DEFAULT_ASSET, ShapeFeatures
from eg3d_rlhf.rewards.reward import load_reward
from torch_utils import build
from training.synthetic_heads import resolve_dataset

FAKES = 500  # images per Fréchet distance
HEADS = 64  # latents whose shapes stand beside their whole heads
CHOOSING = 24  # validation latents on which the filter is chosen
MAPPED = 160  # latents behind the shape Fréchet distance
RESAMPLES = 60  # of a Fréchet distance's change
REALS_AT_ONCE = 64  # images of the data that the features' network reads
ROLES = ("before", "after")

VIEWS = (  # of MultiViewMeasures
    Measure("photometric reprojection error", attrgetter("photometric"), "lower", "L1 of 0..2"),
    Measure("depth disagreement", attrgetter("depth"), "lower", "share of the camera distance"),
    Measure("normal disagreement (degrees)", attrgetter("normal"), "lower", "degrees"),
)
SHAPE_FRECHET = Measure("shape Fréchet", None, "lower", "squared distance of normal maps' features")
FRECHET = Measure("Fréchet", None, "lower", "squared distance of images' features")


def measured(measure: Measure, before: float, after: float, change: dict) -> dict:
    """A line of `geometry` of the summary; `change` holds at least mean, mean_lo and mean_hi of
    after - before.
    """
    upwards = measure.better == "higher"
    better = after >= before if upwards else after <= before
    return {
        "name": measure.name,
        "before": float(before),
        "after": float(after),
        "better": bool(better),
        "higher_is_better": upwards,
        "paired": change,
        "outcome": measure.outcome(change["mean_lo"], change["mean_hi"]),
    }


# What is seen of one network: arrays, from which the figures follow. Each is computed once, wherever it is
# asked for (`seen`).

Seen = dict[str, np.ndarray]


def _ground_truth(c: Comparison, generator: LoadedGenerator) -> Seen:
    """Ground-truth heads of all latents below, which are then on the disk, and the solid share of each."""
    seeds = [*EVALUATION.take(HEADS), *VALIDATION.take(CHOOSING)]
    return {"solid": (heads.ground_truth(generator.generator, seeds) < 0).mean(axis=(1, 2, 3))}


def _heads(c: Comparison, generator: LoadedGenerator) -> Seen:
    seeds = EVALUATION.take(HEADS)
    return heads.looked_at(
        heads.scans(generator.generator, seeds), heads.ground_truth(generator.generator, seeds)
    )


def _post_processed(c: Comparison, generator: LoadedGenerator) -> Seen:
    """What the best filters make of the scans, chosen on validation latents: of those that spare whole
    latents, and of all (`any_...`).
    """
    chosen, held = (
        (heads.scans(generator.generator, seeds), heads.ground_truth(generator.generator, seeds))
        for seeds in (VALIDATION.take(CHOOSING), EVALUATION.take(HEADS))
    )
    found: Seen = {}
    trial = tried(*chosen)
    for prefix, spares in (("", True), ("any_", False)):
        name = best_filter(trial, spares=spares)
        shapes = np.stack([FILTERS[name](values) for values in held[0]])
        found |= {f"{prefix}{key}": value for key, value in heads.looked_at(shapes, held[1]).items()}
        found[f"{prefix}method"] = np.array([list(FILTERS).index(name)])
    return found


def _images(c: Comparison, generator: LoadedGenerator) -> Seen:
    network = load_features(c.inception, c.device)
    dataset = open_data(c)
    chosen = np.random.RandomState(IMAGES.first).randint(len(dataset), size=FAKES)
    cameras = dataset.get_labels()
    return {"features": collect(network, images_of(c, generator, cameras, IMAGES.take(FAKES), chosen))[1]}


def _data(c: Comparison, _generator: LoadedGenerator) -> Seen:
    network = load_features(c.inception, c.device)
    return {
        "features": collect(
            network, (images.to(c.device) for images in real_batches(open_data(c), REALS_AT_ONCE))
        )[1]
    }


def _views(c: Comparison, generator: LoadedGenerator) -> Seen:
    views = view_measures(c, generator, GEOMETRY.all)
    return {measure.name: measure.values(views) for measure in VIEWS}


@torch.no_grad()
def _normal_maps(c: Comparison, generator: LoadedGenerator) -> Seen:
    """Features of normal maps."""
    features = ShapeFeatures.load()
    return {
        "features": np.concatenate(
            [features.of_grids(shape_grids(f)) for f in c.fields(generator, SHAPES.take(MAPPED), psi=1.0)]
        )
    }


PARTS: dict[str, Callable[[Comparison, LoadedGenerator], Seen]] = {  # those that take longest first
    "ground truth": _ground_truth,
    "images": _images,
    "post-processing": _post_processed,
    "heads": _heads,
    "normal maps": _normal_maps,
    "data": _data,
    "views": _views,
}
NEEDS = {"post-processing": "ground truth", "heads": "ground truth"}  # else two processes would make them
_OF_THE_FAMILY = ("ground truth", "images", "post-processing", "heads", "data")
_OF_ONE_NETWORK = ("ground truth", "post-processing", "data")


def parts_of(c: Comparison) -> list[tuple[str, str]]:
    """(part, network's role) of everything that the judges of a comparison see."""
    missing = {*(() if c.synthetic else _OF_THE_FAMILY), *(("normal maps",) if unmapped(c) else ())}
    return [
        (part, role)
        for part in PARTS
        if part not in missing
        for role in ("before", *(() if part in _OF_ONE_NETWORK else ("after",)))
    ]


def seen(c: Comparison, part: str, role: str = "before") -> Seen:
    """What a part sees of the network before or after tuning; kept in the comparison, and of the bundled
    network on the disk.
    """
    case = ("judges", part, role)
    if case not in c.memory:
        compute = partial(PARTS[part], c, c.generators()[role])
        inputs = _inputs(c) if role == "before" else None
        store = Store(build.cache_dir().parent / "judges", renew=True)
        c.memory[case] = (
            compute() if inputs is None else store.arrays(part.replace(" ", "-"), inputs, compute)
        )
    return c.memory[case]


def _inputs(c: Comparison) -> dict | None:
    """All that a part of the bundled network depends on; None for networks and data that are not the bundled
    ones.
    """
    if (
        c.before.hash != _bundled_hash()
        or c.data != bundled.DATA
        or c.inception is not None
        or c.device.type != "cpu"
    ):
        return None
    return {
        "generator": c.before.hash,
        "sampling": [c.n, c.seed, c.psi, c.batch, c.mirror],
        "data": file_hash(resolve_dataset(c.data)),
        "code": _sources(),
        "numerics": [
            torch.__version__,
            np.__version__,
            torch.backends.cpu.get_cpu_capability(),
            build.available("triplane_decode", "cpu"),
        ],
    }


@functools.cache
def _bundled_hash() -> str:
    return load_reward(bundled.REWARD).provenance["generator"]


@functools.cache
def _sources() -> str:
    """Hash of our code and assets: whatever changes in them may change a value."""
    root = Path(__file__).resolve().parents[2]
    code = (path for room in ("eg3d_rlhf", "training", "torch_utils") for path in (root / room).rglob("*.*"))
    files = {str(path.relative_to(root)): path for path in code if path.suffix in (".py", ".cpp", ".h")}
    files |= {path.name: path for path in ASSETS.glob("*.safetensors")}
    return json_hash({name: file_hash(path) for name, path in files.items()})


# Figures of before against after.


def _statistics(features: np.ndarray, batch: int) -> FeatureStatistics:
    """Of features in the batches in which they were made,
    so that rounding does not depend on who made them.
    """
    found = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), batch):
        found.update(features[start : start + batch])
    return found


def blind_pairs(c: Comparison) -> dict:
    """Share of held-out latents whose tuned shape the annotator prefers without noise; an exact tie counts
    half.
    """
    before, tuned = (seen(c, "heads", role)["utility"] for role in ROLES)
    wins = int((tuned > before).sum())
    ties = int((tuned == before).sum())
    low, high = wilson_interval(wins + ties // 2, len(before))
    return {
        "win_rate": (wins + 0.5 * ties) / len(before),
        "win_rate_ci95": [low, high],
        "win_rate_n": len(before),
        "win_rate_ties": ties,
        "utility_before": float(before.mean()),
        "utility_after": float(tuned.mean()),
    }


def figures_of_heads(c: Comparison) -> dict:
    """What tuning made of held-out scans, against the whole heads that their latents name."""
    return heads.figures(*(seen(c, "heads", role) for role in ROLES))


def against_ground_truth(c: Comparison) -> dict:
    """The same beside what the best filters make of the scans."""
    before = seen(c, "heads")
    processed = seen(c, "post-processing")
    strongest = {
        key.removeprefix("any_"): value for key, value in processed.items() if key.startswith("any_")
    }
    columns = {
        "before": heads.figures(before, before),
        "after": figures_of_heads(c),
        "post_processing": heads.figures(before, processed),
        "strongest_post_processing": heads.figures(before, strongest),
    }
    names = {"post_processing": _method_name(processed), "strongest_post_processing": _method_name(strongest)}
    tuned = columns["after"]
    intact = columns["before"]["fscore_intact"]
    return {
        "heads_n": HEADS,
        "heads_seeds": [EVALUATION.take(HEADS)[0], EVALUATION.take(HEADS)[-1]],
        "heads_psi": 1.0,
        "defective_n": int(heads.defective(before).sum()),
        "error_reduction": tuned["error_reduction"],
        "error_reduction_ci95": tuned["error_reduction_ci95"],
        "error_reduction_by_post_processing": columns["post_processing"]["error_reduction"],
        "post_processing_methods": names,
        "post_processing_chosen_on": CHOOSING,
        "intact_degraded": tuned["intact_degraded"],
        "identity_kept": tuned["identity_kept"],
        "face_moved_voxels": tuned["face_moved_voxels"],
        "variety_before": columns["before"]["variety"],
        "variety_after": tuned["variety"],
        "fscore_back_of_head": {
            "before": columns["before"]["fscore_defective"],
            "after": tuned["fscore_defective"],
            "intact": intact,
        },
        "heads": columns,
    }


def _method_name(found: Seen) -> str:
    return list(FILTERS)[int(found["method"][0])]


def frechet(c: Comparison) -> dict:
    network = load_features(c.inception, c.device)
    real = seen(c, "data")["features"]
    fakes = [seen(c, "images", role)["features"] for role in ROLES]
    of_data = _statistics(real, REALS_AT_ONCE)
    before, tuned = (_statistics(features, c.batch).distance(of_data) for features in fakes)
    record = {
        "frechet_before": before,
        "frechet_after": tuned,
        "frechet_ratio": tuned / before,
        "frechet_features": network.name,
        "frechet_images": FAKES,
    }
    if min(FAKES, len(real)) > network.dim:  # an Inception's 2048 features ask for more images
        found = frechet_change_interval(fakes[0], fakes[1], real, RESAMPLES)
        record |= {
            "frechet_change_ci95": [found.lo, found.hi],
            "frechet_outcome": FRECHET.outcome(found.lo, found.hi),
        }
    return record


def geometry(c: Comparison) -> dict:
    """Measures that the annotator never used; 'better' compares means, the verdict is that of the paired
    interval beside it.
    """
    rows = []
    for measure in VIEWS:
        old, new = (seen(c, "views", role)[measure.name] for role in ROLES)
        rows.append(measured(measure, old.mean(), new.mean(), paired_summary(old, new)._asdict()))
    return {"geometry_n": GEOMETRY.count, "geometry": rows}


def shapes(c: Comparison) -> dict:
    """The Fréchet distance of shapes to true heads, of features of normal maps; where it is not measured,
    why.
    """
    if why := unmapped(c):
        return {"shapes_missing": why, "geometry": []}
    both = [seen(c, "normal maps", role)["features"] for role in ROLES]
    true = ShapeFeatures.load().true.double().numpy()
    distances = [heads.shape_frechet(part, true) for part in both]
    change = frechet_change_interval(both[0], both[1], true, RESAMPLES)
    paired = {
        "mean": change.mean,
        "mean_lo": change.lo,
        "mean_hi": change.hi,
        "confidence": 0.95,
        "n": MAPPED,
        "n_true": len(true),
    }
    return {
        "shapes_n": MAPPED,
        "shapes_psi": 1.0,
        "geometry": [measured(SHAPE_FRECHET, distances[0], distances[1], paired)],
    }


def unmapped(c: Comparison) -> str:
    """Why there is no shape Fréchet distance for these networks; '' where there is one."""
    bounds = c.before.generator.bounds
    if bounds != Bounds():
        return f"its features know the unit cube alone, not {bounds}"
    return "" if DEFAULT_ASSET.is_file() else f"no {DEFAULT_ASSET.name}; make it by python -m builders.shapes"
