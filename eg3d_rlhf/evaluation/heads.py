"""What tuning made of heads of people: held-out scans before and after, against the whole heads that their
latents name.

Of these measures an annotator knows completeness, attached growth, floaters and the face
(eg3d_rlhf/preferences/annotator.py), from which labels, rewards and the early stop follow; F-score, identity
and variety nobody reads before the end of a run.
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

WORSE = 0.01  # of the ground-truth head's volume: an intact head and has so much more error is harmed
CUTOFF = 14
AT_ONCE = 8
POINTS = 64  # n
LEAST = 0.5  # of a face's window must show a surface

Shapes = Mapping[str, np.ndarray]  # what `looked_at` saw of N shapes


@torch.no_grad()
def scans(generator: Generator, seeds: Sequence[int], psi: float = 1.0) -> np.ndarray:
    """The generator's shapes [N, n, n, n] of seeds, negative inside. At psi 1 a latent names the whole head
    beside it.
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
    """Compute all that the figures need of shapes [N, n, n, n], given the ground-truth heads [N, n, n, n] of
    their latents.
    """
    back = back_of_head(grid_points(shapes.shape[1]))
    return {
        **compared(shapes, targets),
        "utility": np.array([utility(*pair).total for pair in zip(shapes, targets, strict=True)]),
        "depth": np.stack([face_depth(values) for values in shapes]).astype(np.float32),
        "relief": np.stack([_relief(values) for values in shapes]).astype(np.float32),
        "solid": np.packbits(shapes[:, back] < 0, axis=1),
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
    """How far each face's surface has moved along the view, its median over the window [N], voxels; NaN where
    a face is gone.
    """
    moved = np.abs(after["depth"] - before["depth"]).reshape(len(before["depth"]), -1)
    known = np.isfinite(moved).any(axis=1)
    return (
        np.array([np.nanmedian(row) if seen else np.nan for row, seen in zip(moved, known, strict=True)])
        / VOXEL
    )


def _relief(values: np.ndarray) -> np.ndarray:
    """`face_relief`, NaN where there is too little of a face."""
    depth = face_depth(values)
    return face_relief(values) if np.isfinite(depth).mean() >= LEAST else np.full_like(depth, np.nan)


def variety(seen: Shapes) -> float | None:
    """How much faces differ: the standard deviation over latents of their relief, its mean over the window,
    voxels.
    """
    enough = np.isfinite(seen["relief"]).sum(axis=0) > 1
    return float(np.nanstd(seen["relief"][:, enough], axis=0).mean() / VOXEL) if enough.any() else None


def identity_kept(before: Shapes, after: Shapes) -> float | None:
    """Share of latents whose face is still likest to its own before; a face that is gone is none."""
    there, left = (
        np.isfinite(seen["relief"]).reshape(len(seen["relief"]), -1).max(axis=1) for seen in (before, after)
    )
    if not there.all():
        return None
    known = list(before["relief"])
    kept = np.zeros(len(known), dtype=bool)
    for i in np.flatnonzero(left):
        kept[i] = np.argmax([relief_correlation(after["relief"][i], other) for other in known]) == i
    return float(kept.mean())


def changed(before: Shapes, after: Shapes) -> np.ndarray:
    """Return the share of the ground-truth head's back-of-head volume that has become solid or empty [N]."""
    bits = np.unpackbits(np.bitwise_xor(before["solid"], after["solid"]).astype(np.uint8), axis=1)
    return bits.sum(axis=1) / before["volume"]


def figures(before: Shapes, after: Shapes) -> dict:
    """The figures of one network, or of what else became of the scans."""
    ill = defective(before)
    known = face_moved(before, after)
    reduction = error_reduction(error(before)[ill], error(after)[ill])
    return {
        "error_reduction": reduction,
        "error_reduction_ci95": interval(before, error(after)[None]) if reduction is not None else None,
        "error_intact": _mean(error(after)[~ill]),
        "missing_defective": _mean(after["missing"][ill]),
        "extra_defective": _mean(after["extra"][ill]),
        "intact_degraded": intact_degraded(before, after),
        "identity_kept": identity_kept(before, after),
        "face_moved_voxels": float(np.nanmedian(known)) if np.isfinite(known).any() else None,
        "variety": variety(after),
        "fscore_defective": _mean(after["fscore"][ill]),
        "fscore_intact": _mean(after["fscore"][~ill]),
        "utility": _mean(after["utility"]),
        "intact_share": float((error(after) <= DEFECTIVE).mean()),
        "changed": _mean(changed(before, after)),
        **{f"{name}_defective": _mean(measure.values(after)[ill]) for name, measure in MEASURES.items()},
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
    ill = defective(before)
    first = error(before)[ill]
    then = after[:, ill]
    if not ill.any():
        return None
    found = two_way_interval(
        lambda seeds, items: 1 - then[np.ix_(seeds, items)].mean() / first[items].mean(), *then.shape
    )
    return [found.lo, found.hi]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


# Networks side by side: ablations, and further training seeds.

TABLE = {  # figure: words and form
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
    targets = ground_truth(first, seeds)
    columns = {}
    features = ShapeFeatures.load() if DEFAULT_ASSET.is_file() else None
    reference = features.of_grids(targets) if features else np.zeros((0, 0))
    start: Shapes = {}
    paths = {"before": None, **networks}
    for name, path in tqdm(paths.items(), desc="networks", unit="network", leave=False):
        shapes = scans(first if path is None else load_generator(path).generator, seeds)
        seen = looked_at(shapes, targets)
        start = start or seen
        distance = {"shape_frechet": shape_frechet(features.of_grids(shapes), reference)} if features else {}
        columns[name] = figures(start, seen) | distance
    return columns, int(defective(start).sum())
