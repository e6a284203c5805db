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
    BROKEN,
    FRONT_MEASURES,
    MEASURES,
    VOXEL,
    behind,
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

WORSE = 0.01  # of the whole head's volume: a head that was whole and has so much more error is harmed
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


def named(generator: Generator, seeds: Sequence[int]) -> np.ndarray:
    """The whole heads [N, n, n, n] that seeds name, signed distances."""
    return whole_grids(latents(seeds, generator.z_dim), POINTS)


def looked_at(shapes: np.ndarray, whole: np.ndarray) -> dict[str, np.ndarray]:
    """All that the figures need of shapes [N, n, n, n] beside the whole heads [N, n, n, n]
    of their latents.
    """
    back = behind(grid_points(shapes.shape[1]))
    return {
        **compared(shapes, whole),
        "utility": np.array([utility(*pair).total for pair in zip(shapes, whole, strict=True)]),
        "depth": np.stack([face_depth(values) for values in shapes]).astype(np.float32),
        "relief": np.stack([_relief(values) for values in shapes]).astype(np.float32),
        "solid": np.packbits(shapes[:, back] < 0, axis=1),
        "volume": (whole[:, back] < 0).sum(axis=1),
    }


def error(seen: Shapes) -> np.ndarray:
    """Volume error behind [N]: missing and extra together, shares of the whole head's volume there."""
    return seen["missing"] + seen["extra"]


def broken(before: Shapes) -> np.ndarray:
    """Which latents' untuned scans are broken [N]."""
    return error(before) > BROKEN


def repaired(before: np.ndarray, after: np.ndarray) -> float | None:
    """Share by which the mean error falls; negative where it rises. None where there is none."""
    return float(1 - after.mean() / before.mean()) if before.size and before.mean() > 0 else None


def made_worse(before: Shapes, after: Shapes) -> float | None:
    """Share of the whole latents that are worse by WORSE."""
    whole = ~broken(before)
    return float((error(after) > error(before) + WORSE)[whole].mean()) if whole.any() else None


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
    """How much faces differ: the deviation over latents of their relief, its mean over the window, voxels."""
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
    """Share of the whole head's volume behind that has become solid or empty [N]."""
    bits = np.unpackbits(np.bitwise_xor(before["solid"], after["solid"]).astype(np.uint8), axis=1)
    return bits.sum(axis=1) / before["volume"]


def figures(before: Shapes, after: Shapes) -> dict:
    """The figures of one network, or of what else became of the scans."""
    ill = broken(before)
    known = face_moved(before, after)
    fell = repaired(error(before)[ill], error(after)[ill])
    return {
        "repaired": fell,
        "repaired_ci95": interval(before, error(after)[None]) if fell is not None else None,
        "error_whole": _mean(error(after)[~ill]),
        "missing_broken": _mean(after["missing"][ill]),
        "extra_broken": _mean(after["extra"][ill]),
        "whole_made_worse": made_worse(before, after),
        "identity_kept": identity_kept(before, after),
        "face_moved_voxels": float(np.nanmedian(known)) if np.isfinite(known).any() else None,
        "variety": variety(after),
        "fscore_broken": _mean(after["fscore"][ill]),
        "fscore_whole": _mean(after["fscore"][~ill]),
        "utility": _mean(after["utility"]),
        "whole_share": float((error(after) <= BROKEN).mean()),
        "changed": _mean(changed(before, after)),
        **{f"{name}_broken": _mean(measure.values(after)[ill]) for name, measure in MEASURES.items()},
        **{name: _mean(measure.values(after)) for name, measure in FRONT_MEASURES.items()},
    }


def shape_frechet(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance of shapes' features [N, Q] to those of whole heads."""
    first, second = (FeatureStatistics(part.shape[1]).update(part) for part in (features, reference))
    return first.distance(second)


def interval(before: Shapes, after: np.ndarray) -> list[float] | None:
    """95 % interval of `repaired`, of the errors [S, N] of several training seeds: over seeds and broken
    latents.
    """
    ill = broken(before)
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
    "repaired": ("of the error of broken heads gone", ".1%"),
    "error_broken": ("volume error, broken", ".3f"),
    "shape_frechet": ("shape Fréchet", ".2f"),
    "whole_made_worse": ("whole heads made worse", ".1%"),
    "fscore_broken": ("F-score, broken", ".3f"),
    "face_moved_voxels": ("face moved, voxels", ".3f"),
    "identity_kept": ("identity kept", ".0%"),
    "variety": ("variety, voxels", ".3f"),
}


def compare(
    networks: Mapping[str, Path], before: Path | None, seeds: Sequence[int]
) -> tuple[dict[str, dict], int]:
    """Compute the figures of networks, by name, and of the one before tuning, which stands first.

    Returns: figures by name; the number of latents that are broken before.
    """
    first = load_generator(before).generator
    whole = named(first, seeds)
    columns = {}
    features = ShapeFeatures.load() if DEFAULT_ASSET.is_file() else None
    reference = features.of_grids(whole) if features else np.zeros((0, 0))
    start: Shapes = {}
    paths = {"before": None, **networks}
    for name, path in tqdm(paths.items(), desc="networks", unit="network", leave=False):
        shapes = scans(first if path is None else load_generator(path).generator, seeds)
        seen = looked_at(shapes, whole)
        start = start or seen
        distance = {"shape_frechet": shape_frechet(features.of_grids(shapes), reference)} if features else {}
        columns[name] = figures(start, seen) | distance
    return columns, int(broken(start).sum())
