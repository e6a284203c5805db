"""Measure the network before tuning and the tuned network on held-out latents, for the summary of a run.

The evaluators are the ground-truth heads of the latents, the simulated annotator without noise, Fréchet
distances to the data, and geometry measures that share nothing with the annotator. The 95 % interval of each
change decides whether the outcome of the change is called better, worse or open (undecided).
Shapes: N latents, Q features.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
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
from eg3d_rlhf.evaluation.filters import FILTERS, best_post_processing, evaluate_filters
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
from training import rehearsal
from training.synthetic_heads import resolve_dataset

FAKES = 500  # images per Fréchet distance
HEADS = 64  # latents whose shapes are compared with their ground-truth heads
CHOOSING = 24  # validation latents on which the post-processing method is chosen
MAPPED = 160  # latents of the shape Fréchet distance
RESAMPLES = 60  # bootstrap resamples of the change of a Fréchet distance
REALS_AT_ONCE = 64  # images of the data that the features' network reads
ROLES = ("before", "after")  # networks that are compared

# Disagreement between rendered views of one shape. The arguments are: name, function that returns the values,
# better direction, unit.
VIEWS = (
    Measure("photometric reprojection error", attrgetter("photometric"), "lower", "L1 of 0..2"),
    Measure("depth disagreement", attrgetter("depth"), "lower", "share of the camera distance"),
    Measure("normal disagreement (degrees)", attrgetter("normal"), "lower", "degrees"),
)
# Distances between sets of samples; a single latent has no such value, hence the function is None.
SHAPE_FRECHET = Measure("shape Fréchet", None, "lower", "squared distance of normal maps' features")
FRECHET = Measure("Fréchet", None, "lower", "squared distance of images' features")


def metric_entry(measure: Measure, mean_before: float, mean_after: float, paired_change: dict) -> dict:
    """Return the entry of a measure in the list "geometry" of summary.json.

    Args:
        measure: the measure.
        mean_before: mean before tuning.
        mean_after: mean after tuning.
        paired_change: paired change after - before, with at least the keys mean, mean_lo and mean_hi.
    """
    higher_is_better = measure.better == "higher"
    # "better" compares the two means alone; "outcome" takes the interval into account.
    is_better = mean_after >= mean_before if higher_is_better else mean_after <= mean_before
    return {
        "name": measure.name,
        "before": float(mean_before),
        "after": float(mean_after),
        "better": bool(is_better),
        "higher_is_better": higher_is_better,
        "paired": paired_change,
        "outcome": measure.outcome(paired_change["mean_lo"], paired_change["mean_hi"]),
    }


# Measurements of one network: arrays from which the metrics are computed. `measure_part` computes each of
# them once.

Measured = dict[str, np.ndarray]


def _first(seeds: range) -> Sequence[int]:
    """Return the seeds of all latents; in a rehearsal those of the first latents alone."""
    return rehearsal.first(seeds, rehearsal.LATENTS)


def _ground_truth(comparison: Comparison, generator: LoadedGenerator) -> Measured:
    """Write the ground-truth heads of all evaluated latents to the disk, and return the solid share of each,
    [N].

    The purpose is the side effect of `heads.ground_truth_heads`, which writes the heads to a cache on the
    disk. The other entries of PARTS run in other processes and read them there.
    """
    seeds = [*_first(EVALUATION.take(HEADS)), *_first(VALIDATION.take(CHOOSING))]
    return {"solid": (heads.ground_truth_heads(generator.generator, seeds) < 0).mean(axis=(1, 2, 3))}


def _heads(comparison: Comparison, generator: LoadedGenerator) -> Measured:
    """Measure the shapes of the evaluation latents against their ground-truth heads."""
    seeds = _first(EVALUATION.take(HEADS))
    return heads.measure_heads(
        heads.sample_shapes(generator.generator, seeds), heads.ground_truth_heads(generator.generator, seeds)
    )


def _post_processed(comparison: Comparison, generator: LoadedGenerator) -> Measured:
    """Measure the untuned shapes after the best label-free post-processing methods.

    Two methods are chosen on validation latents: the best method that leaves intact heads alone, and the best
    of all methods. The keys of the latter begin with "any_".
    """
    validation_heads, evaluation_heads = (
        (
            heads.sample_shapes(generator.generator, seeds),
            heads.ground_truth_heads(generator.generator, seeds),
        )
        for seeds in (_first(VALIDATION.take(CHOOSING)), _first(EVALUATION.take(HEADS)))
    )
    measurements: Measured = {}
    filter_results = evaluate_filters(*validation_heads)
    for key_prefix, spares_intact in (("", True), ("any_", False)):
        filter_name = best_post_processing(filter_results, spares_intact=spares_intact)
        # [N, n, n, n]
        shapes = np.stack([FILTERS[filter_name](shape_values) for shape_values in evaluation_heads[0]])
        measurements |= {
            f"{key_prefix}{array_name}": measured_array
            for array_name, measured_array in heads.measure_heads(shapes, evaluation_heads[1]).items()
        }
        # Only arrays can be stored, so the method is stored as its index in FILTERS.
        measurements[f"{key_prefix}method"] = np.array([list(FILTERS).index(filter_name)])
    return measurements


def _images(comparison: Comparison, generator: LoadedGenerator) -> Measured:
    """Compute the features [FAKES, Q] of generated images that are rendered from cameras of the dataset."""
    feature_network = load_features(comparison.inception, comparison.device)
    dataset = open_data(comparison)
    # A fixed seed selects the cameras of the data under which the images are rendered.
    camera_indices = np.random.RandomState(IMAGES.first).randint(len(dataset), size=FAKES)
    cameras = dataset.get_labels()
    seeds = _first(IMAGES.take(FAKES))
    # All networks have the same latents and cameras, so that the change of the distance is paired. `collect`
    # returns the features as its second value.
    return {
        "features": collect(
            feature_network,
            images_of(comparison, generator, cameras, seeds, camera_indices[: len(seeds)]),
        )[1]
    }


def _data(comparison: Comparison, _generator: LoadedGenerator) -> Measured:
    """Compute the features of the images of the data, [number of images, Q]."""
    feature_network = load_features(comparison.inception, comparison.device)
    dataset = open_data(comparison)
    # a rehearsal reads one batch
    image_count = len(rehearsal.first(range(len(dataset)), REALS_AT_ONCE))
    batches = itertools.islice(real_batches(dataset, REALS_AT_ONCE), math.ceil(image_count / REALS_AT_ONCE))
    return {"features": collect(feature_network, (images.to(comparison.device) for images in batches))[1]}


def _views(comparison: Comparison, generator: LoadedGenerator) -> Measured:
    """Compute the disagreement between views, [N] for each measure of VIEWS."""
    view_measurements = view_measures(comparison, generator, _first(GEOMETRY.seeds))
    return {measure.name: measure.values(view_measurements) for measure in VIEWS}


@torch.no_grad()
def _normal_maps(comparison: Comparison, generator: LoadedGenerator) -> Measured:
    """Return the features [N, Q] of the shapes' normal maps."""
    shape_features = ShapeFeatures.load()
    return {
        # field by field, since the grids of all latents together need much memory
        "features": np.concatenate(
            [
                shape_features.of_grids(shape_grids(field))
                for field in comparison.fields(generator, _first(SHAPES.take(MAPPED)), psi=1.0)
            ]
        )
    }


PARTS: dict[str, Callable[[Comparison, LoadedGenerator], Measured]] = {  # those that take longest first
    "ground truth": _ground_truth,
    "images": _images,
    "post-processing": _post_processed,
    "heads": _heads,
    "normal maps": _normal_maps,
    "data": _data,
    "views": _views,
}
# Part -> part that must be finished before, since two processes would otherwise compute the ground-truth
# heads at the same time.
NEEDS = {"post-processing": "ground truth", "heads": "ground truth"}
# parts that exist for synthetic heads only
_OF_THE_FAMILY = ("ground truth", "images", "post-processing", "heads", "data")
# parts whose result is the same for both networks, so that they are measured once
_OF_ONE_NETWORK = ("ground truth", "post-processing", "data")


def list_parts(comparison: Comparison) -> list[tuple[str, str]]:
    """List (name in PARTS, role of the network) of all measurements that a comparison needs."""
    # Parts are left out if they need synthetic heads, or features that do not fit these shapes.
    missing_parts = {
        *(() if comparison.synthetic else _OF_THE_FAMILY),
        *(("normal maps",) if missing_shape_features(comparison) else ()),
    }
    return [
        (part_name, role)
        for part_name in PARTS
        if part_name not in missing_parts
        for role in ("before", *(() if part_name in _OF_ONE_NETWORK else ("after",)))
    ]


def measure_part(comparison: Comparison, part_name: str, role: str = "before") -> Measured:
    """Return the measurements that one function of PARTS makes of the network before or after tuning.

    They are computed once, and stored in the comparison's memory. Measurements of the bundled network are
    also stored on the disk, since every run of the demo needs them.

    Args:
        part_name: key of the function in PARTS.
        role: "before" or "after".
    """
    # The summary's worker processes store their results in the memory under the same key.
    cache_key = ("evaluators", part_name, role)
    if cache_key not in comparison.memory:
        compute = partial(PARTS[part_name], comparison, comparison.generators()[role])
        store_inputs = _inputs(comparison) if role == "before" else None
        store = Store(build.cache_dir().parent / "evaluators", renew=True)
        if rehearsal.active():
            # The real run reads what is stored. The arrays of a rehearsal are too small to be stored.
            kind = part_name.replace(" ", "-")
            if store_inputs is not None and store.find(kind, store_inputs) is not None:
                comparison.memory[cache_key] = store.load_arrays(kind, store_inputs)
            store_inputs = None
    if cache_key not in comparison.memory:
        comparison.memory[cache_key] = (
            compute()
            if store_inputs is None
            else store.arrays(part_name.replace(" ", "-"), store_inputs, compute)
        )
    return comparison.memory[cache_key]


def _inputs(comparison: Comparison) -> dict | None:
    """Return all that the measurements of the bundled network depend on, as JSON values.

    Return None for other networks, data, feature networks or devices, whose results are not stored on the
    disk.
    """
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
        # Another version of torch, another instruction set or another implementation of an op may round
        # differently, so that a stored result would not be bitwise identical.
        "numerics": [
            torch.__version__,
            np.__version__,
            torch.backends.cpu.get_cpu_capability(),
            build.available("triplane_decode", "cpu"),
        ],
    }


@functools.cache
def _bundled_hash() -> str:
    """Return the SHA-256 of the bundled generator's file."""
    # The bundled reward records the hash of the generator whose samples were labelled.
    return load_reward(bundled.REWARD).provenance["generator"]


@functools.cache
def _sources() -> str:
    """Return a hash of this project's code and assets, since any change of them may change a value."""
    repository_root = Path(__file__).resolve().parents[2]  # the folder that contains the packages
    package_names = ("eg3d_rlhf", "training", "torch_utils")
    code_paths = (
        source_path for package in package_names for source_path in (repository_root / package).rglob("*.*")
    )
    path_by_name = {
        str(source_path.relative_to(repository_root)): source_path
        for source_path in code_paths
        if source_path.suffix in (".py", ".cpp", ".h")
    }
    path_by_name |= {source_path.name: source_path for source_path in ASSETS.glob("*.safetensors")}
    return json_hash(
        {source_name: file_hash(source_path) for source_name, source_path in path_by_name.items()}
    )


# Metrics that compare the network before tuning with the tuned network.


def _statistics(features: np.ndarray, batch_size: int) -> FeatureStatistics:
    """Return the statistics of features [N, Q], which are added in batches of the given size.

    The rounding of a sum depends on how its terms are grouped. With the batch size in which the features were
    computed, features from the disk give bitwise the same statistics as features that were just computed.
    """
    feature_statistics = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), batch_size):
        feature_statistics.update(features[start : start + batch_size])
    return feature_statistics


def blind_pairs(comparison: Comparison) -> dict:
    """Compute the share of held-out latents whose tuned shape the simulated annotator without noise prefers.

    A latent whose shapes have equal utility counts one half.

    Returns: entries of summary.json: "win_rate" with its interval, the numbers of latents and of ties, and
        the mean utilities.
    """
    # [N] each
    utility_before, utility_after = (measure_part(comparison, "heads", role)["utility"] for role in ROLES)
    win_count = int((utility_after > utility_before).sum())  # number of latents
    tie_count = int((utility_after == utility_before).sum())  # number of latents
    # Wilson's interval needs an integer number of successes, so half of the ties is rounded down.
    win_rate_low, win_rate_high = wilson_interval(win_count + tie_count // 2, len(utility_before))
    return {
        "win_rate": (win_count + 0.5 * tie_count) / len(utility_before),  # share of latents
        "win_rate_ci95": [win_rate_low, win_rate_high],
        "win_rate_n": len(utility_before),
        "win_rate_ties": tie_count,
        "utility_before": float(utility_before.mean()),  # 1: the ground-truth head
        "utility_after": float(utility_after.mean()),
    }


def compute_head_metrics(comparison: Comparison) -> dict:
    """Compute the metrics of the tuned held-out shapes against the ground-truth heads of their latents.

    Returns: dict of JSON values by the name of the metric, see `heads.compute_metrics`.
    """
    return heads.compute_metrics(*(measure_part(comparison, "heads", role) for role in ROLES))


def against_ground_truth(comparison: Comparison) -> dict:
    """Compute the metrics of tuning and of the best label-free post-processing methods against ground-truth
    heads.

    Returns: entries of summary.json. "heads" holds all metrics before tuning, after tuning, and after either
        post-processing method; the other entries repeat the most important ones.
    """
    measurements_before = measure_part(comparison, "heads")
    processed_measurements = measure_part(comparison, "post-processing")
    # `processed_measurements` also holds the any_... arrays, which `heads.compute_metrics` does not read
    strongest_measurements = {
        array_name.removeprefix("any_"): measured_array
        for array_name, measured_array in processed_measurements.items()
        if array_name.startswith("any_")
    }
    # Every column is measured against the same untuned shapes.
    metrics_by_column = {
        "before": heads.compute_metrics(measurements_before, measurements_before),
        "after": compute_head_metrics(comparison),
        "post_processing": heads.compute_metrics(measurements_before, processed_measurements),
        "strongest_post_processing": heads.compute_metrics(measurements_before, strongest_measurements),
    }
    method_names = {
        "post_processing": _method_name(processed_measurements),
        "strongest_post_processing": _method_name(strongest_measurements),
    }
    tuned_metrics = metrics_by_column["after"]
    intact_fscore = metrics_by_column["before"]["fscore_intact"]
    return {
        "heads_n": HEADS,
        "heads_seeds": [EVALUATION.take(HEADS)[0], EVALUATION.take(HEADS)[-1]],  # first and last
        "heads_psi": 1.0,  # a truncated latent has no ground-truth head
        "defective_n": int(heads.find_defective(measurements_before).sum()),
        "error_reduction": tuned_metrics["error_reduction"],
        "error_reduction_ci95": tuned_metrics["error_reduction_ci95"],
        "error_reduction_by_post_processing": metrics_by_column["post_processing"]["error_reduction"],
        "post_processing_methods": method_names,
        "post_processing_chosen_on": CHOOSING,  # number of validation latents
        "intact_degraded": tuned_metrics["intact_degraded"],
        "identity_kept": tuned_metrics["identity_kept"],
        "face_moved_voxels": tuned_metrics["face_moved_voxels"],
        "variety_before": metrics_by_column["before"]["variety"],
        "variety_after": tuned_metrics["variety"],
        "fscore_back_of_head": {
            "before": metrics_by_column["before"]["fscore_defective"],
            "after": tuned_metrics["fscore_defective"],
            "intact": intact_fscore,
        },
        "heads": metrics_by_column,
    }


def _method_name(measurements: Measured) -> str:
    """Return the name of the post-processing method whose index in FILTERS was stored."""
    return list(FILTERS)[int(measurements["method"][0])]


def frechet(comparison: Comparison) -> dict:
    """Compute the Fréchet distances of images to the data before and after tuning, and their ratio.

    Returns: entries of summary.json whose names begin with "frechet_". The interval of the change is left out
        if there are fewer images than features.
    """
    feature_network = load_features(comparison.inception, comparison.device)
    real_features = measure_part(comparison, "data")["features"]
    fake_features = [measure_part(comparison, "images", role)["features"] for role in ROLES]
    # Each set is added in the batches in which its features were computed, see `_statistics`.
    data_statistics = _statistics(real_features, REALS_AT_ONCE)
    distance_before, distance_after = (
        _statistics(features, comparison.batch).distance(data_statistics) for features in fake_features
    )
    frechet_metrics = {
        "frechet_before": distance_before,
        "frechet_after": distance_after,
        "frechet_ratio": distance_after / distance_before,  # below 1: closer to the data
        "frechet_features": feature_network.name,
        "frechet_images": FAKES,
    }
    # With fewer images than features the covariance is singular, so the interval would be meaningless. With
    # Inception's 2048 features there are too few images.
    if min(FAKES, len(real_features)) > feature_network.dim:
        change_interval = frechet_change_interval(
            fake_features[0], fake_features[1], real_features, RESAMPLES
        )
        frechet_metrics |= {
            "frechet_change_ci95": [change_interval.lo, change_interval.hi],
            "frechet_outcome": FRECHET.outcome(change_interval.lo, change_interval.hi),
        }
    return frechet_metrics


def geometry(comparison: Comparison) -> dict:
    """Compute the disagreement between views, which the simulated annotator does not use.

    In each entry of the returned list "geometry", "better" compares the means, and "outcome" is decided by
    the interval of the paired change.

    Returns: entries of summary.json: "geometry", a list with an entry for each measure of VIEWS, and
        "geometry_n", the number of latents.
    """
    metric_entries = []
    for measure in VIEWS:
        # [N] each
        values_before, values_after = (
            measure_part(comparison, "views", role)[measure.name] for role in ROLES
        )
        metric_entries.append(
            metric_entry(
                measure,
                values_before.mean(),
                values_after.mean(),
                paired_summary(values_before, values_after)._asdict(),
            )
        )
    return {"geometry_n": GEOMETRY.count, "geometry": metric_entries}


def shapes(comparison: Comparison) -> dict:
    """Compute the Fréchet distance between shapes and ground-truth heads in features of normal maps.

    If it cannot be measured, the entry "shapes_missing" holds the reason.

    Returns: entries of summary.json: "geometry", a list with the entry of this distance, and the number of
        shapes.
    """
    if missing_reason := missing_shape_features(comparison):
        return {"shapes_missing": missing_reason, "geometry": []}
    # [N, Q] each
    features_by_role = [measure_part(comparison, "normal maps", role)["features"] for role in ROLES]
    # The asset also holds the features of ground-truth heads, which belong to other latents than these.
    true_features = ShapeFeatures.load().true.double().numpy()
    distance_by_network = [heads.shape_frechet(features, true_features) for features in features_by_role]
    change_interval = frechet_change_interval(
        features_by_role[0], features_by_role[1], true_features, RESAMPLES
    )
    paired_change = {
        "mean": change_interval.mean,
        "mean_lo": change_interval.lo,
        "mean_hi": change_interval.hi,
        "confidence": 0.95,
        "n": MAPPED,
        "n_true": len(true_features),
    }
    return {
        "shapes_n": MAPPED,
        "shapes_psi": 1.0,
        "geometry": [
            metric_entry(SHAPE_FRECHET, distance_by_network[0], distance_by_network[1], paired_change)
        ],
    }


def missing_shape_features(comparison: Comparison) -> str:
    """Return the reason why these networks have no shape Fréchet distance, or '' if they have one."""
    bounds = comparison.before.generator.bounds
    if bounds != Bounds():
        # the features were trained on normal maps of shapes in the default bounds
        return f"its features are only valid for shapes in {Bounds()}, but these shapes lie in {bounds}"
    if DEFAULT_ASSET.is_file():
        return ""
    return f"{DEFAULT_ASSET.name} does not exist. Make it with: python -m builders.shapes"
