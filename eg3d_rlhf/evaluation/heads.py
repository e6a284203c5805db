"""Measure how tuning changed synthetic heads: held-out shapes are compared with their ground-truth heads.

Labels, rewards and the early stop depend on the simulated annotator (eg3d_rlhf/preferences/annotator.py),
which uses completeness, attached growth, floaters and the face. F-score, identity and variety are computed
only after a run has ended, so no part of tuning depends on them.
Shapes: N latents, S training seeds, n grid points per edge, R and C rows and columns of the face's window,
Q features of the shape network.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core.statistics import two_way_interval
from eg3d_rlhf.experiments.network_before import network_before
from eg3d_rlhf.generators import Generator, camera, device_of, latents, load_generator
from eg3d_rlhf.measures.distances import FeatureStatistics
from eg3d_rlhf.measures.people import (
    DEFECTIVE,
    FRONT_MEASURES,
    MEASURES,
    VOXEL,
    back_of_head,
    compared,
    face_depth,
    face_relief,
    relief_correlation,
    shape_grids,
)
from eg3d_rlhf.measures.shape_features import DEFAULT_ASSET, ShapeFeatures
from eg3d_rlhf.preferences.annotator import utility
from training.heads.people_mesh import grid_points, ground_truth_grids
from training.progress import tqdm

# An intact head is degraded if its error grows by more than this share of the ground-truth head's volume.
WORSE = 0.01
CUTOFF = 14  # synthesis layers that truncation affects
AT_ONCE = 8  # shapes per batch; bounds memory
POINTS = 64  # n, grid points per edge
MIN_SHARE = 0.5  # smallest share of the face's window that must show a surface, else there is no relief

Measured = Mapping[str, np.ndarray]  # measurements of N shapes by name, as `measure_heads` returns them


@torch.no_grad()
def sample_shapes(generator: Generator, seeds: Sequence[int], psi: float = 1.0) -> np.ndarray:
    """Generate the shapes of seeds: values [N, n, n, n], negative inside.

    A shape can be compared with the ground-truth head of its seed only at psi 1, since truncation changes the
    latent.
    """
    z = latents(seeds, generator.z_dim).to(device_of(generator))  # [N, Z]
    grids = []
    for z_batch in z.split(AT_ONCE):
        ws = generator.mapping(
            z_batch, camera(generator, n=len(z_batch)), truncation_psi=psi, truncation_cutoff=CUTOFF
        )
        grids.append(np.asarray(shape_grids(generator.field(ws), POINTS)))
    return np.concatenate(grids)


def ground_truth_heads(generator: Generator, seeds: Sequence[int]) -> np.ndarray:
    """Return the ground-truth heads of seeds: signed distances [N, n, n, n], negative inside."""
    return ground_truth_grids(latents(seeds, generator.z_dim), POINTS)


def measure_heads(shapes: np.ndarray, ground_truth: np.ndarray) -> dict[str, np.ndarray]:
    """Measure shapes against the ground-truth heads of their latents.

    The result contains everything that `compute_metrics` needs, so that the grids can be dropped.

    Args:
        shapes: values, negative inside, [N, n, n, n].
        ground_truth: ground-truth heads, [N, n, n, n].

    Returns: measurements by name; the first dimension of each is N.
    """
    is_back = back_of_head(grid_points(shapes.shape[1]))  # [n, n, n], bool
    return {
        **compared(shapes, ground_truth),
        "utility": np.array(
            [utility(*shape_and_head).total for shape_and_head in zip(shapes, ground_truth, strict=True)]
        ),
        "depth": np.stack([face_depth(shape_values) for shape_values in shapes]).astype(np.float32),
        "relief": np.stack([face_relief_or_nan(shape_values) for shape_values in shapes]).astype(np.float32),
        # one bit for each voxel at the back, since the store keeps these arrays of every arm
        "solid": np.packbits(shapes[:, is_back] < 0, axis=1),
        "volume": (ground_truth[:, is_back] < 0).sum(axis=1),
    }


def back_of_head_error(measurements: Measured) -> np.ndarray:
    """Return the back-of-head volume error [N].

    It is the sum of the missing and the extra volume at the back of the head, as a share of the volume that
    the ground-truth head has there.

    Args: measurements: result of `measure_heads`.
    """
    return measurements["missing"] + measurements["extra"]


def find_defective(measurements_before: Measured) -> np.ndarray:
    """Return a mask [N] of the latents whose heads are defective before tuning.

    Args: measurements_before: result of `measure_heads` for the shapes before tuning.
    """
    return back_of_head_error(measurements_before) > DEFECTIVE


def error_reduction(errors_before: np.ndarray, errors_after: np.ndarray) -> float | None:
    """Return the relative reduction of the mean error, 1 - mean after / mean before.

    It is negative if the error rises. Return None if there are no heads, or if they had no error before.
    Args: errors_before, errors_after: errors of the same heads, 1-D.
    """
    if not errors_before.size or not errors_before.mean() > 0:
        return None
    return float(1 - errors_after.mean() / errors_before.mean())


def intact_degraded(measurements_before: Measured, measurements_after: Measured) -> float | None:
    """Return the share of the intact heads whose error grew by more than WORSE, in the unit of
    `back_of_head_error`.

    Return None if no head was intact before.

    Args: measurements_before, measurements_after: results of `measure_heads`.
    """
    is_intact = ~find_defective(measurements_before)
    is_degraded = back_of_head_error(measurements_after) > back_of_head_error(measurements_before) + WORSE
    return float(is_degraded[is_intact].mean()) if is_intact.any() else None


def face_distance_moved(measurements_before: Measured, measurements_after: Measured) -> np.ndarray:
    """Return the distance [N] by which the surface of each face moved along the view, in voxels.

    The distance is the median over the face's window. It is NaN if no pixel shows a surface both times.

    Args: measurements_before, measurements_after: results of `measure_heads`.
    """
    depth_change = np.abs(measurements_after["depth"] - measurements_before["depth"])  # [N, R, C]
    distances = depth_change.reshape(len(depth_change), -1)  # [N, R C]
    # nanmedian warns about rows without a finite value, so it is not called for these.
    has_surface = np.isfinite(distances).any(axis=1)
    median_distances = [
        np.nanmedian(latent_distances) if has_finite else np.nan
        for latent_distances, has_finite in zip(distances, has_surface, strict=True)
    ]
    return np.array(median_distances) / VOXEL


def face_relief_or_nan(shape_values: np.ndarray) -> np.ndarray:
    """Compute the relief [R, C] of a face from the values of its shape, [n, n, n].

    All pixels are NaN if less than MIN_SHARE of the face's window shows a surface.
    """
    depth = face_depth(shape_values)
    return (
        face_relief(shape_values) if np.isfinite(depth).mean() >= MIN_SHARE else np.full_like(depth, np.nan)
    )


def variety(measurements: Measured) -> float | None:
    """Return the variety of faces in voxels, or None if no pixel of the window shows a face in two or more
    latents.

    The variety is the standard deviation of the relief over latents, averaged over the window.

    Args: measurements: result of `measure_heads`.
    """
    # The standard deviation at a pixel needs two faces there.
    has_two_faces = np.isfinite(measurements["relief"]).sum(axis=0) > 1  # [R, C]
    if not has_two_faces.any():
        return None
    return float(np.nanstd(measurements["relief"][:, has_two_faces], axis=0).mean() / VOXEL)


def identity_kept(measurements_before: Measured, measurements_after: Measured) -> float | None:
    """Return the share of latents whose face keeps its identity.

    A face keeps its identity if, of all faces before tuning, the face of its own latent is the most similar
    one to it after tuning. A face that has vanished has lost its identity. Return None if a face was missing
    before tuning, since there is nothing to compare with.

    Args: measurements_before, measurements_after: results of `measure_heads`.
    """
    # [N]; `_relief` is NaN in all pixels if there is no face, so one finite pixel means that there is a face.
    has_face_before, has_face_after = (
        np.isfinite(measurements["relief"]).reshape(len(measurements["relief"]), -1).max(axis=1)
        for measurements in (measurements_before, measurements_after)
    )
    if not has_face_before.all():
        return None
    reliefs_before = list(measurements_before["relief"])  # N reliefs, [R, C] each
    is_kept = np.zeros(len(reliefs_before), dtype=bool)  # [N]
    # Each face after tuning is compared with all N faces before tuning.
    for latent_index in np.flatnonzero(has_face_after):
        correlations = [
            relief_correlation(measurements_after["relief"][latent_index], relief)
            for relief in reliefs_before
        ]
        # True if the most similar face is the one of the same latent
        is_kept[latent_index] = np.argmax(correlations) == latent_index
    return float(is_kept.mean())


def changed_share(measurements_before: Measured, measurements_after: Measured) -> np.ndarray:
    """Return the volume at the back of each head that has become solid or empty, [N].

    The unit is the volume that the ground-truth head has at the back.

    Args: measurements_before, measurements_after: results of `measure_heads`.
    """
    # packbits fills the last byte with zeros in both arrays, so the exclusive or is zero there.
    changed_bits = np.unpackbits(
        np.bitwise_xor(measurements_before["solid"], measurements_after["solid"]).astype(np.uint8), axis=1
    )
    return changed_bits.sum(axis=1) / measurements_before["volume"]


def compute_metrics(measurements_before: Measured, measurements_after: Measured) -> dict:
    """Compute the metrics of one network, or of another treatment of the same shapes.

    Args:
        measurements_before: measurements of the shapes before tuning.
        measurements_after: measurements of the shapes after tuning, or after another treatment.

    Returns: dict of JSON values by the name of the metric.
    """
    # The untuned shapes decide which latents count as defective, so that it is the same for every arm.
    is_defective = find_defective(measurements_before)
    moved_distances = face_distance_moved(measurements_before, measurements_after)
    error_after = back_of_head_error(measurements_after)
    mean_reduction = error_reduction(
        back_of_head_error(measurements_before)[is_defective], error_after[is_defective]
    )
    # [None]: a single training seed, [1, N]
    reduction_interval = (
        error_reduction_interval(measurements_before, error_after[None])
        if mean_reduction is not None
        else None
    )
    return {
        "error_reduction": mean_reduction,  # relative to the error before
        "error_reduction_ci95": reduction_interval,
        # shares of the ground-truth head's back-of-head volume
        "error_intact": _mean(error_after[~is_defective]),
        "missing_defective": _mean(measurements_after["missing"][is_defective]),
        "extra_defective": _mean(measurements_after["extra"][is_defective]),
        "intact_degraded": intact_degraded(measurements_before, measurements_after),
        "identity_kept": identity_kept(measurements_before, measurements_after),  # share of latents
        "face_moved_voxels": float(np.nanmedian(moved_distances))
        if np.isfinite(moved_distances).any()
        else None,
        "variety": variety(measurements_after),  # voxels
        "fscore_defective": _mean(measurements_after["fscore"][is_defective]),
        "fscore_intact": _mean(measurements_after["fscore"][~is_defective]),
        "utility": _mean(measurements_after["utility"]),
        # share of all latents whose error is small after the treatment
        "intact_share": float((error_after <= DEFECTIVE).mean()),
        "changed": _mean(changed_share(measurements_before, measurements_after)),
        **{
            f"{measure_name}_defective": _mean(measure.values(measurements_after)[is_defective])
            for measure_name, measure in MEASURES.items()
        },
        **{
            measure_name: _mean(measure.values(measurements_after))
            for measure_name, measure in FRONT_MEASURES.items()
        },
    }


def shape_frechet(features: np.ndarray, reference_features: np.ndarray) -> float:
    """Compute the Fréchet distance between features [N, Q] of shapes and features of ground-truth heads."""
    shape_statistics = FeatureStatistics(features.shape[1]).update(features)
    reference_statistics = FeatureStatistics(reference_features.shape[1]).update(reference_features)
    return shape_statistics.distance(reference_statistics)


def error_reduction_interval(measurements_before: Measured, errors_by_seed: np.ndarray) -> list[float] | None:
    """Return the 95 % interval of `error_reduction` over training seeds and defective heads.

    Args:
        measurements_before: measurements of the shapes before tuning.
        errors_by_seed: back-of-head volume errors after tuning with each training seed, [S, N].

    Returns: [low, high], or None if no head was defective before.
    """
    is_defective = find_defective(measurements_before)
    errors_before = back_of_head_error(measurements_before)[is_defective]
    errors_after = errors_by_seed[:, is_defective]
    if not is_defective.any():
        return None
    # A ratio of means is used. A mean of ratios would be dominated by single heads with a small error.
    reduction_interval = two_way_interval(
        lambda seed_indices, head_indices: (
            1 - errors_after[np.ix_(seed_indices, head_indices)].mean() / errors_before[head_indices].mean()
        ),
        *errors_after.shape,
    )
    return [reduction_interval.lo, reduction_interval.hi]


def _mean(metric_values: np.ndarray) -> float | None:
    """Return the mean, or None if there are no values, for example if no head is defective."""
    # JSON has no NaN.
    return float(metric_values.mean()) if metric_values.size else None


# Comparison of several networks, for example of ablations or of further training seeds.

TABLE = {  # metric -> (heading, format)
    "error_reduction": ("error reduction, defective heads", ".1%"),
    "error_defective": ("back-of-head volume error, defective heads", ".3f"),
    "shape_frechet": ("shape Fréchet", ".2f"),
    "intact_degraded": ("intact heads degraded", ".1%"),
    "fscore_defective": ("back-of-head F-score, defective heads", ".3f"),
    "face_moved_voxels": ("face moved, voxels", ".3f"),
    "identity_kept": ("identity kept", ".0%"),
    "variety": ("variety, voxels", ".3f"),
}


def compare(
    path_by_network: Mapping[str, Path], before_path: Path | None, seeds: Sequence[int]
) -> tuple[dict[str, dict], int]:
    """Compute the metrics of several tuned networks and of the network before tuning.

    Args:
        path_by_network: network files by name.
        before_path: network file before tuning; None selects the network from which the runs began.
        seeds: seeds of the latents.

    Returns: metrics by name, of which "before" is the first; and the number of latents whose heads are
        defective before tuning.
    """
    generator_before = load_generator(before_path or network_before(path_by_network.values())).generator
    ground_truth = ground_truth_heads(generator_before, seeds)  # [N, n, n, n]
    metrics_by_network = {}
    shape_features = ShapeFeatures.load() if DEFAULT_ASSET.is_file() else None
    # [N, Q]
    reference_features = shape_features.of_grids(ground_truth) if shape_features else np.zeros((0, 0))
    measurements_before: Measured = {}
    path_by_name = {"before": None, **path_by_network}
    for network_name, network_path in tqdm(
        path_by_name.items(), desc="networks", unit="network", leave=False
    ):
        shapes = sample_shapes(
            generator_before if network_path is None else load_generator(network_path).generator, seeds
        )
        measurements = measure_heads(shapes, ground_truth)
        # the network before tuning is the first of `path_by_name`
        measurements_before = measurements_before or measurements
        metrics_by_network[network_name] = compute_metrics(measurements_before, measurements)
        if shape_features:
            frechet_distance = shape_frechet(shape_features.of_grids(shapes), reference_features)
            metrics_by_network[network_name]["shape_frechet"] = frechet_distance
    return metrics_by_network, int(find_defective(measurements_before).sum())
