"""Measure how tuning changed heads of people: held-out shapes before and after against their ground truth.

The simulated annotator (eg3d_rlhf/preferences/annotator.py) uses completeness, attached growth, floaters and
the face. Labels, rewards and the early stop depend on it. F-score, identity and variety are computed only
after a run has ended, so no part of tuning depends on them.
Letters: N latents, S training seeds; n grid points; R, C rows and columns of the face's window.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from eg3d_rlhf.core.statistics import two_way_interval
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
from training.heads.people_mesh import grid_points, whole_grids
from training.progress import tqdm

# share of the ground-truth head's volume: an intact head whose error grows by more counts as degraded
WORSE = 0.01
CUTOFF = 14  # synthesis layers that truncation affects
AT_ONCE = 8  # shapes per batch; bounds memory
POINTS = 64  # n
LEAST = 0.5  # least share of a face's window that must show a surface

Shapes = Mapping[str, np.ndarray]  # measurements of N shapes by name, as `looked_at` returns them


@torch.no_grad()
def scans(generator: Generator, seeds: Sequence[int], psi: float = 1.0) -> np.ndarray:
    """Return the generator's shapes [N, n, n, n] of seeds, negative inside.

    Only at psi 1 is a shape comparable with `ground_truth` of the same seed: truncation changes the latent.
    """
    z = latents(seeds, generator.z_dim).to(device_of(generator))
    grids = []
    for part in z.split(AT_ONCE):
        ws = generator.mapping(
            part, camera(generator, n=len(part)), truncation_psi=psi, truncation_cutoff=CUTOFF
        )
        grids.append(np.asarray(shape_grids(generator.field(ws), POINTS)))
    return np.concatenate(grids)


def ground_truth(generator: Generator, seeds: Sequence[int]) -> np.ndarray:
    """Return the ground-truth heads [N, n, n, n] of seeds, signed distances."""
    return whole_grids(latents(seeds, generator.z_dim), POINTS)


def looked_at(shapes: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Measure shapes [N, n, n, n] against the ground-truth heads [N, n, n, n] of their latents.

    The result holds everything that `figures` needs, so that grids need not be kept.
    """
    back = back_of_head(grid_points(shapes.shape[1]))  # [n, n, n], bool
    return {
        **compared(shapes, targets),
        "utility": np.array([utility(*pair).total for pair in zip(shapes, targets, strict=True)]),
        "depth": np.stack([face_depth(values) for values in shapes]).astype(np.float32),
        "relief": np.stack([_relief(values) for values in shapes]).astype(np.float32),
        "solid": np.packbits(shapes[:, back] < 0, axis=1),  # one bit per voxel: the store keeps every arm
        "volume": (targets[:, back] < 0).sum(axis=1),
    }


def error(seen: Shapes) -> np.ndarray:
    """Return the back-of-head volume error [N]: missing and extra together, shares of the ground-truth head's
    volume there.
    """
    return seen["missing"] + seen["extra"]


def defective(before: Shapes) -> np.ndarray:
    """Return a mask [N] of the latents whose untuned heads are defective."""
    return error(before) > DEFECTIVE


def error_reduction(before: np.ndarray, after: np.ndarray) -> float | None:
    """Return the relative reduction of the mean error, negative where it rises; None where there was no
    error.
    """
    return float(1 - after.mean() / before.mean()) if before.size and before.mean() > 0 else None


def intact_degraded(before: Shapes, after: Shapes) -> float | None:
    """Return the share of the intact heads whose error grew by more than WORSE."""
    intact = ~defective(before)
    return float((error(after) > error(before) + WORSE)[intact].mean()) if intact.any() else None


def face_moved(before: Shapes, after: Shapes) -> np.ndarray:
    """Return the distance [N] by which each face's surface moved along the view.

    It is the median over the face's window, in voxels, and NaN where no pixel shows a surface in both.
    """
    moved = np.abs(after["depth"] - before["depth"]).reshape(len(before["depth"]), -1)  # [N, R C]
    # nanmedian warns about rows without a finite value, so those are left out
    known = np.isfinite(moved).any(axis=1)
    return (
        np.array([np.nanmedian(row) if seen else np.nan for row, seen in zip(moved, known, strict=True)])
        / VOXEL
    )


def _relief(values: np.ndarray) -> np.ndarray:
    """Return `face_relief` [R, C], all NaN where less than LEAST of the window shows a surface."""
    depth = face_depth(values)
    return face_relief(values) if np.isfinite(depth).mean() >= LEAST else np.full_like(depth, np.nan)


def variety(seen: Shapes) -> float | None:
    """Return the variety of faces, in voxels; None where no pixel shows two faces.

    It is the standard deviation of the relief over latents, averaged over the window.
    """
    # a standard deviation needs two faces at a pixel
    enough = np.isfinite(seen["relief"]).sum(axis=0) > 1  # [R, C]
    return float(np.nanstd(seen["relief"][:, enough], axis=0).mean() / VOXEL) if enough.any() else None


def identity_kept(before: Shapes, after: Shapes) -> float | None:
    """Return the share of latents whose face after tuning is most similar to its own face before tuning.

    A face that has vanished counts as not kept. The result is None if a face was missing before tuning,
    since there is nothing to compare with.
    """
    # a relief is NaN in all pixels or has finite ones, so the maximum says whether there is a face  # [N]
    there, left = (
        np.isfinite(seen["relief"]).reshape(len(seen["relief"]), -1).max(axis=1) for seen in (before, after)
    )
    if not there.all():
        return None
    known = list(before["relief"])
    kept = np.zeros(len(known), dtype=bool)
    # each face after tuning is matched against all N faces before, not against its own alone
    for i in np.flatnonzero(left):
        kept[i] = np.argmax([relief_correlation(after["relief"][i], other) for other in known]) == i
    return float(kept.mean())


def changed(before: Shapes, after: Shapes) -> np.ndarray:
    """Return the share of the ground-truth head's back-of-head volume that has become solid or empty [N]."""
    # packbits pads both with the same zeros, which the exclusive or removes
    bits = np.unpackbits(np.bitwise_xor(before["solid"], after["solid"]).astype(np.uint8), axis=1)
    return bits.sum(axis=1) / before["volume"]


def figures(before: Shapes, after: Shapes) -> dict:
    """Compute the figures of one network, or of another treatment of the same shapes, as JSON values."""
    # the untuned shapes decide which latents count as defective, for every arm alike
    is_defective = defective(before)
    known = face_moved(before, after)
    reduction = error_reduction(error(before)[is_defective], error(after)[is_defective])
    return {
        "error_reduction": reduction,  # share of the error before
        "error_reduction_ci95": interval(before, error(after)[None]) if reduction is not None else None,
        # shares of the ground-truth head's back-of-head volume
        "error_intact": _mean(error(after)[~is_defective]),
        "missing_defective": _mean(after["missing"][is_defective]),
        "extra_defective": _mean(after["extra"][is_defective]),
        "intact_degraded": intact_degraded(before, after),
        "identity_kept": identity_kept(before, after),  # share of latents
        "face_moved_voxels": float(np.nanmedian(known)) if np.isfinite(known).any() else None,
        "variety": variety(after),  # voxels
        "fscore_defective": _mean(after["fscore"][is_defective]),
        "fscore_intact": _mean(after["fscore"][~is_defective]),
        "utility": _mean(after["utility"]),
        # share of all latents whose error is small after the treatment
        "intact_share": float((error(after) <= DEFECTIVE).mean()),
        "changed": _mean(changed(before, after)),
        **{
            f"{name}_defective": _mean(measure.values(after)[is_defective])
            for name, measure in MEASURES.items()
        },
        **{name: _mean(measure.values(after)) for name, measure in FRONT_MEASURES.items()},
    }


def shape_frechet(features: np.ndarray, reference: np.ndarray) -> float:
    """Return the Fréchet distance of shapes' features [N, Q] to those of ground-truth heads."""
    first, second = (FeatureStatistics(part.shape[1]).update(part) for part in (features, reference))
    return first.distance(second)


def interval(before: Shapes, after: np.ndarray) -> list[float] | None:
    """Return the 95 % interval of `error_reduction` of the errors [S, N] of several training seeds, over
    seeds and defective latents.
    """
    is_defective = defective(before)
    first = error(before)[is_defective]
    then = after[:, is_defective]
    if not is_defective.any():
        return None
    # a ratio of means, not a mean of ratios: single heads with a small error would dominate the latter
    ci95 = two_way_interval(
        lambda seeds, items: 1 - then[np.ix_(seeds, items)].mean() / first[items].mean(), *then.shape
    )
    return [ci95.lo, ci95.hi]


def _mean(values: np.ndarray) -> float | None:
    # no latent is defective, or none is intact: JSON gets null, not NaN
    return float(values.mean()) if values.size else None


# Networks side by side: ablations, and further training seeds.

TABLE = {  # figure: (heading, format)
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
    networks: Mapping[str, Path], before: Path | None, seeds: Sequence[int]
) -> tuple[dict[str, dict], int]:
    """Compute the figures of networks, by name, and of the one before tuning, which stands first.

    Returns: figures by name; the number of latents whose heads are defective before.
    """
    first = load_generator(before).generator
    targets = ground_truth(first, seeds)  # [N, n, n, n]
    columns = {}
    features = ShapeFeatures.load() if DEFAULT_ASSET.is_file() else None
    reference = features.of_grids(targets) if features else np.zeros((0, 0))
    start: Shapes = {}
    paths = {"before": None, **networks}
    for name, path in tqdm(paths.items(), desc="networks", unit="network", leave=False):
        shapes = scans(first if path is None else load_generator(path).generator, seeds)
        seen = looked_at(shapes, targets)
        start = start or seen  # the network before tuning stands first in `paths`
        distance = {"shape_frechet": shape_frechet(features.of_grids(shapes), reference)} if features else {}
        columns[name] = figures(start, seen) | distance
    return columns, int(defective(start).sum())
