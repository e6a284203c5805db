"""Evaluate a reward run at its end: the network before tuning against the tuned one, on held-out latents.

The evaluators are the ground-truth heads of the latents, the simulated annotator without noise, Fréchet
distances to the data, and geometry measures that share nothing with the annotator. The 95 % interval of each
change decides whether it is called better, worse or open. Letters: N latents.
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
from eg3d_rlhf.evaluation.filters import FILTERS, best_filter, evaluate_filters
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
HEADS = 64  # latents whose shapes are compared with their ground-truth heads
CHOOSING = 24  # validation latents on which the post-processing method is chosen
MAPPED = 160  # latents of the shape Fréchet distance
RESAMPLES = 60  # bootstrap resamples of the change of a Fréchet distance
REALS_AT_ONCE = 64  # images of the data that the features' network reads
ROLES = ("before", "after")  # networks that are compared

# disagreement between rendered views of one shape: name, value, better direction, unit
VIEWS = (
    Measure("photometric reprojection error", attrgetter("photometric"), "lower", "L1 of 0..2"),
    Measure("depth disagreement", attrgetter("depth"), "lower", "share of the camera distance"),
    Measure("normal disagreement (degrees)", attrgetter("normal"), "lower", "degrees"),
)
# distances of sets; they have no value of a single latent
SHAPE_FRECHET = Measure("shape Fréchet", None, "lower", "squared distance of normal maps' features")
FRECHET = Measure("Fréchet", None, "lower", "squared distance of images' features")


def measured(measure: Measure, before: float, after: float, change: dict) -> dict:
    """Return an entry of the summary's `geometry`.

    Args: change: paired change after - before, with at least mean, mean_lo and mean_hi.
    """
    upwards = measure.better == "higher"
    # `better` compares the two means alone; `outcome` takes the interval into account
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


# Measurements of one network: arrays from which the figures follow. `seen` computes each of them once.

Seen = dict[str, np.ndarray]


def _ground_truth(comparison: Comparison, generator: LoadedGenerator) -> Seen:
    """Return the solid share [N] of the ground-truth heads of all latents that other parts use.

    The purpose is the side effect: `heads.ground_truth_heads` writes the heads to the disk, where parts in other
    processes find them.
    """
    seeds = [*EVALUATION.take(HEADS), *VALIDATION.take(CHOOSING)]
    return {"solid": (heads.ground_truth_heads(generator.generator, seeds) < 0).mean(axis=(1, 2, 3))}


def _heads(comparison: Comparison, generator: LoadedGenerator) -> Seen:
    seeds = EVALUATION.take(HEADS)
    return heads.measure_heads(
        heads.sample_shapes(generator.generator, seeds), heads.ground_truth_heads(generator.generator, seeds)
    )


def _post_processed(comparison: Comparison, generator: LoadedGenerator) -> Seen:
    """Measure the untuned shapes after the best label-free post-processing.

    Two methods are chosen on validation latents: the best of those that leave intact heads alone, and the
    best of all, whose keys begin with `any_`.
    """
    chosen, held = (
        (
            heads.sample_shapes(generator.generator, seeds),
            heads.ground_truth_heads(generator.generator, seeds),
        )
        for seeds in (VALIDATION.take(CHOOSING), EVALUATION.take(HEADS))
    )
    measurements: Seen = {}
    trial = evaluate_filters(*chosen)
    for prefix, spares in (("", True), ("any_", False)):
        name = best_filter(trial, spares_intact=spares)
        shapes = np.stack([FILTERS[name](values) for values in held[0]])
        measurements |= {
            f"{prefix}{key}": value for key, value in heads.measure_heads(shapes, held[1]).items()
        }
        # arrays alone are stored, so the method is kept as its number in FILTERS
        measurements[f"{prefix}method"] = np.array([list(FILTERS).index(name)])
    return measurements


def _images(comparison: Comparison, generator: LoadedGenerator) -> Seen:
    network = load_features(comparison.inception, comparison.device)
    dataset = open_data(comparison)
    # which cameras of the data are used, by a fixed seed
    chosen = np.random.RandomState(IMAGES.first).randint(len(dataset), size=FAKES)
    cameras = dataset.get_labels()
    # the same latents and cameras for every network, so that the change of the distance is paired
    return {
        "features": collect(network, images_of(comparison, generator, cameras, IMAGES.take(FAKES), chosen))[1]
    }


def _data(comparison: Comparison, _generator: LoadedGenerator) -> Seen:
    network = load_features(comparison.inception, comparison.device)
    return {
        "features": collect(
            network,
            (images.to(comparison.device) for images in real_batches(open_data(comparison), REALS_AT_ONCE)),
        )[1]
    }


def _views(comparison: Comparison, generator: LoadedGenerator) -> Seen:
    views = view_measures(comparison, generator, GEOMETRY.all)
    return {measure.name: measure.values(views) for measure in VIEWS}


@torch.no_grad()
def _normal_maps(comparison: Comparison, generator: LoadedGenerator) -> Seen:
    """Return the features [N, Q] of the shapes' normal maps."""
    features = ShapeFeatures.load()
    return {
        # field by field, since the grids of all latents need much memory
        "features": np.concatenate(
            [
                features.of_grids(shape_grids(f))
                for f in comparison.fields(generator, SHAPES.take(MAPPED), psi=1.0)
            ]
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
# without this order two processes would compute the ground-truth heads at the same time
NEEDS = {"post-processing": "ground truth", "heads": "ground truth"}
_OF_THE_FAMILY = ("ground truth", "images", "post-processing", "heads", "data")  # for synthetic heads alone
_OF_ONE_NETWORK = ("ground truth", "post-processing", "data")  # the same for both networks


def parts_of(comparison: Comparison) -> list[tuple[str, str]]:
    """List (part, role of the network) of everything that the evaluators of a comparison measure."""
    missing = {
        *(() if comparison.synthetic else _OF_THE_FAMILY),
        *(("normal maps",) if unmapped(comparison) else ()),
    }
    return [
        (part, role)
        for part in PARTS
        if part not in missing
        for role in ("before", *(() if part in _OF_ONE_NETWORK else ("after",)))
    ]


def seen(comparison: Comparison, part: str, role: str = "before") -> Seen:
    """Return the measurements of a part of the network before or after tuning.

    They are computed once and kept in the comparison's memory; those of the bundled network are also kept
    on the disk, since every demo run needs the same ones.
    """
    # worker processes of the summary fill the memory under the same key
    case = ("evaluators", part, role)
    if case not in comparison.memory:
        compute = partial(PARTS[part], comparison, comparison.generators()[role])
        inputs = _inputs(comparison) if role == "before" else None
        store = Store(build.cache_dir().parent / "evaluators", renew=True)
        comparison.memory[case] = (
            compute() if inputs is None else store.arrays(part.replace(" ", "-"), inputs, compute)
        )
    return comparison.memory[case]


def _inputs(comparison: Comparison) -> dict | None:
    """Return all that a part of the bundled network depends on; None for other networks or data."""
    # on the disk are only results of the bundled network with its own data on the CPU
    if (
        comparison.before.hash != _bundled_hash()
        or comparison.data != bundled.DATA
        or comparison.inception is not None  # the user's own feature network
        or comparison.device.type != "cpu"  # other devices round differently
    ):
        return None
    return {
        "generator": comparison.before.hash,
        "sampling": [
            comparison.n,
            comparison.seed,
            comparison.psi,
            comparison.batch,
            comparison.mirror,
        ],  # settings that select latents and images
        "data": file_hash(resolve_dataset(comparison.data)),
        "code": _sources(),
        # another torch, instruction set or op may round differently, which bitwise comparisons would show
        "numerics": [
            torch.__version__,
            np.__version__,
            torch.backends.cpu.get_cpu_capability(),
            build.available("triplane_decode", "cpu"),
        ],
    }


@functools.cache
def _bundled_hash() -> str:
    # the bundled reward records the hash of the generator from which its labels came
    return load_reward(bundled.REWARD).provenance["generator"]


@functools.cache
def _sources() -> str:
    """Return a hash of this project's code and assets, since any change of them may change a value."""
    root = Path(__file__).resolve().parents[2]
    packages = ("eg3d_rlhf", "training", "torch_utils")
    code = (path for package in packages for path in (root / package).rglob("*.*"))
    files = {str(path.relative_to(root)): path for path in code if path.suffix in (".py", ".cpp", ".h")}
    files |= {path.name: path for path in ASSETS.glob("*.safetensors")}
    return json_hash({name: file_hash(path) for name, path in files.items()})


# Figures of before against after.


def _statistics(features: np.ndarray, batch: int) -> FeatureStatistics:
    """Return the statistics of features [N, Q], added in the batches in which they were computed.

    Sums of floats depend on their grouping: with the same batches, features from the disk give the same
    bits as features that were just computed.
    """
    statistics = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), batch):
        statistics.update(features[start : start + batch])
    return statistics


def blind_pairs(comparison: Comparison) -> dict:
    """Compute the share of held-out latents whose tuned shape the noise-free simulated annotator prefers.

    An exact tie counts one half.
    """
    before, tuned = (seen(comparison, "heads", role)["utility"] for role in ROLES)  # [N] each
    wins = int((tuned > before).sum())
    ties = int((tuned == before).sum())
    # Wilson's interval needs a whole number of successes, so an odd tie is dropped here
    low, high = wilson_interval(wins + ties // 2, len(before))
    return {
        "win_rate": (wins + 0.5 * ties) / len(before),  # share of latents
        "win_rate_ci95": [low, high],
        "win_rate_n": len(before),
        "win_rate_ties": ties,
        "utility_before": float(before.mean()),  # 1: the ground-truth head
        "utility_after": float(tuned.mean()),
    }


def figures_of_heads(comparison: Comparison) -> dict:
    """Compute the figures of the tuned held-out shapes against the ground-truth heads of their latents."""
    return heads.compute_metrics(*(seen(comparison, "heads", role) for role in ROLES))


def against_ground_truth(comparison: Comparison) -> dict:
    """Compute the figures of tuning beside those of the best label-free post-processing methods."""
    before = seen(comparison, "heads")
    processed = seen(comparison, "post-processing")
    # `processed` also holds the any_... arrays, which `heads.compute_metrics` does not read
    strongest = {
        key.removeprefix("any_"): value for key, value in processed.items() if key.startswith("any_")
    }
    # every column is measured against the same untuned shapes
    columns = {
        "before": heads.compute_metrics(before, before),
        "after": figures_of_heads(comparison),
        "post_processing": heads.compute_metrics(before, processed),
        "strongest_post_processing": heads.compute_metrics(before, strongest),
    }
    names = {"post_processing": _method_name(processed), "strongest_post_processing": _method_name(strongest)}
    tuned = columns["after"]
    intact = columns["before"]["fscore_intact"]
    return {
        "heads_n": HEADS,
        "heads_seeds": [EVALUATION.take(HEADS)[0], EVALUATION.take(HEADS)[-1]],  # first and last
        "heads_psi": 1.0,  # a truncated latent has no ground-truth head
        "defective_n": int(heads.find_defective(before).sum()),
        "error_reduction": tuned["error_reduction"],
        "error_reduction_ci95": tuned["error_reduction_ci95"],
        "error_reduction_by_post_processing": columns["post_processing"]["error_reduction"],
        "post_processing_methods": names,
        "post_processing_chosen_on": CHOOSING,  # number of validation latents
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


def _method_name(measurements: Seen) -> str:
    return list(FILTERS)[int(measurements["method"][0])]


def frechet(comparison: Comparison) -> dict:
    """Compute the Fréchet distances of images to the data before and after tuning, and their ratio."""
    network = load_features(comparison.inception, comparison.device)
    real = seen(comparison, "data")["features"]
    fakes = [seen(comparison, "images", role)["features"] for role in ROLES]
    # each in the batches in which its features were computed, see `_statistics`
    of_data = _statistics(real, REALS_AT_ONCE)
    before, tuned = (_statistics(features, comparison.batch).distance(of_data) for features in fakes)
    record = {
        "frechet_before": before,
        "frechet_after": tuned,
        "frechet_ratio": tuned / before,  # below 1: closer to the data
        "frechet_features": network.name,
        "frechet_images": FAKES,
    }
    # fewer images than features make a singular covariance: Inception's 2048 features need more than FAKES
    if min(FAKES, len(real)) > network.dim:
        change = frechet_change_interval(fakes[0], fakes[1], real, RESAMPLES)
        record |= {
            "frechet_change_ci95": [change.lo, change.hi],
            "frechet_outcome": FRECHET.outcome(change.lo, change.hi),
        }
    return record


def geometry(comparison: Comparison) -> dict:
    """Compute the geometry measures, none of which the simulated annotator uses.

    `better` compares means; `outcome` follows from the paired interval.
    """
    rows = []
    for measure in VIEWS:
        old, new = (seen(comparison, "views", role)[measure.name] for role in ROLES)  # [N] each
        rows.append(measured(measure, old.mean(), new.mean(), paired_summary(old, new)._asdict()))
    return {"geometry_n": GEOMETRY.count, "geometry": rows}


def shapes(comparison: Comparison) -> dict:
    """Compute the Fréchet distance between shapes and ground-truth heads, over features of normal maps.

    Where it cannot be measured, `shapes_missing` holds the reason.
    """
    if why := unmapped(comparison):
        return {"shapes_missing": why, "geometry": []}
    both = [seen(comparison, "normal maps", role)["features"] for role in ROLES]  # [N, Q] each
    # features of ground-truth heads that no latent of the evaluation names; they come with the asset
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


def unmapped(comparison: Comparison) -> str:
    """Return the reason why these networks have no shape Fréchet distance; '' where they have one."""
    bounds = comparison.before.generator.bounds
    if bounds != Bounds():
        # the features were trained on normal maps of shapes in the default bounds
        return f"its features cover only shapes in {Bounds()}, and these shapes lie in {bounds}"
    if DEFAULT_ASSET.is_file():
        return ""
    return f"{DEFAULT_ASSET.name} does not exist. Make it with: python -m builders.shapes"
