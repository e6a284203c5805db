"""A programmatic annotator: says which of two heads has the better geometry from the raw density cube alone.

utility(sigma) = sum_f w_f * p_f with p_f = s((median_f - x_f) / scale_f) / s(median_f / scale_f), s(t) = 1 / (1 + exp(-t)), for every
feature x_f of sigma_features.py (0 is ideal, larger is worse), so each part lies in (0, 1], is 1 without the defect, about 1/2 at the
calibration's median (where that is a few scales from 0), and falls strictly with the defect.
Labels follow Bradley and Terry (1952): P(a preferred over b) = 1 / (1 + exp(-(u_a - u_b) / T)).

Shape letters: S = samples, P = pairs; a cube is [D=z, H=y, W=x].
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import ndimage
from scipy.optimize import brentq
from scipy.special import expit

from training.heads.family import SHAPE_COUNT
from training.heads.sdf import head_sdf

# Defects of a head's geometry, on the volume cut at raw sigma = LEVEL. Height maps (the first crossing seen from the front and from either
# side, to sub-voxel precision) carry the surface measures; the occupancy carries components and symmetry. Every feature is oriented so
# that 0 is the ideal and larger is worse, is finite for any input, and is independent of the grid's resolution up to sampling error.
# Letters: D = z voxels, H = y voxels, W = x voxels, all with increasing coordinate; U, V = axes of a height map. World: a cube about
# the origin, x right, y up, z to the camera; eyes near y = 0, chin near -0.2, crown near 0.25.


LEVEL = 10.0  # raw sigma of the surface
MIN_COMPONENT = 4  # voxels; anything smaller is sampling dust
HEAD_BOTTOM = -0.22  # world y; neck and shoulders below count for floaters alone
FACE_BACK = -0.10  # world z; surfaces behind it are rarely seen in training and are left out of the side and symmetry measures
CURVATURE_CAP = 80.0  # 1/world unit, about a radius of one voxel at 64^3; beyond it a crease counts as a crease
CURVATURE_WINDOW = 0.08  # world units; curvature is compared with its mean over this window
TRIM = 0.8  # share of the surface, smoothest first, whose roughness counts
DENT_WIDTH = 0.09  # world units; pits narrower than this are filled by the morphological closing
DENT_MARGIN = 0.005  # world units; shallower pits belong to a face
HEIGHT_CAP = 0.10  # world units; one gross left-right mismatch counts no more than this
CRUST = 0.08  # world units; a face at least this thick is solid
NOSE_OVER_CHEEK = 0.04  # world units at which the margin saturates
CHEEK_OVER_EYE = 0.005  # an eyeball fills most of its socket; only the inner corner lies back
NOSE_WINDOW = (0.0, 0.05, -0.10, 0.0)  # |x| from, |x| to, y from, y to
CHEEK_WINDOW = (0.035, 0.09, -0.08, -0.025)
EYE_WINDOW = (0.02, 0.05, -0.01, 0.04)
FACE_WINDOW = (0.0, 0.09, -0.16, 0.18)
RELIEF_WINDOW = (0.0, 0.07, -0.15, 0.045)  # eyes to chin: what makes a face
RELIEF_SMOOTHING = 0.02  # world units; relief is what stands out from the surface smoothed by a Gaussian of this deviation
RELIEF_MATCH = 0.85  # correlation with the average face from which on a face is one; heads of the family lie above

FEATURES = (
    "floater_volume", "floater_count", "roughness_front", "roughness_side", "holes", "dents",
    "asymmetry_depth", "asymmetry_occupancy", "depth_order", "hollowness", "face",
)


class HeightMap(NamedTuple):
    """First crossing of the surface along one axis, looking from its high-coordinate end."""

    height: np.ndarray  # [U, V] float64 world coordinate along the viewing axis; 0 where not `hit`
    hit: np.ndarray  # [U, V] bool
    thickness: np.ndarray  # [U, V] float64 world length of the first solid run behind the surface; 0 where not `hit`


@dataclass(frozen=True, kw_only=True)
class Grid:
    """World axes of a [D, H, W] cube with corner-aligned samples."""

    shape: tuple[int, int, int]
    box_warp: float = 1.0  # side of the cube in world units

    @property
    def spacing(self) -> tuple[float, float, float]:
        """World length of a voxel along z, y, x."""
        return tuple(self.box_warp / (n - 1) for n in self.shape)  # type: ignore[return-value]

    def axis(self, index: int) -> np.ndarray:
        """World coordinates of one axis (0 = z, 1 = y, 2 = x), float64 [n]."""
        return np.linspace(-self.box_warp / 2, self.box_warp / 2, self.shape[index])

    @property
    def head(self) -> np.ndarray:
        """Mask [H, W] of what is above HEAD_BOTTOM."""
        return np.broadcast_to((self.axis(1) >= HEAD_BOTTOM)[:, None], self.shape[1:])

    def window(self, box: tuple[float, float, float, float], side: int = 0) -> np.ndarray:
        """Mask [H, W] of |x| and y ranges; `side` -1 or +1 keeps one half in x, 0 keeps both."""
        y, x = self.axis(1)[:, None], self.axis(2)[None, :]
        mask = (np.abs(x) >= box[0]) & (np.abs(x) <= box[1]) & (y >= box[2]) & (y <= box[3])
        return mask & (x * side >= 0) if side else mask


def components(inside: np.ndarray) -> tuple[np.ndarray, float, int]:
    """Largest 6-connected component [D, H, W] bool, volume share of the rest (0..1), and how many others exceed dust."""
    labels, count = ndimage.label(inside)
    if count <= 1:
        return inside, 0.0, 0
    sizes = np.bincount(labels.ravel())[1:]  # [count]
    largest = int(sizes.argmax())
    others = np.delete(sizes, largest)
    others = others[others >= MIN_COMPONENT]
    return labels == largest + 1, float(others.sum() / sizes.sum()), int(others.size)


def height_map(sigma: np.ndarray, body: np.ndarray, coordinates: np.ndarray) -> HeightMap:
    """First crossing of LEVEL along axis 0, seen from its high end; linear interpolation between the two samples around it.

    Args: `sigma` [A, U, V] raw density, `body` [A, U, V] bool component, `coordinates` [A] increasing world coordinates.
    """
    count, spacing = body.shape[0], coordinates[1] - coordinates[0]
    hit = np.asarray(body.any(axis=0))  # [U, V]
    first = count - 1 - body[::-1].argmax(axis=0)  # index of the sample just inside
    outer = np.minimum(first + 1, count - 1)
    inside_value = np.take_along_axis(sigma, first[None], 0)[0]
    outside_value = np.take_along_axis(sigma, outer[None], 0)[0]
    drop = np.maximum(inside_value - outside_value, 1e-9)
    step = np.where(outer > first, np.clip((inside_value - LEVEL) / drop, 0.0, 1.0), 0.0)
    height = np.where(hit, coordinates[first] + step * spacing, 0.0)
    behind = ~body & (np.arange(count)[:, None, None] < first)  # empty samples behind the surface
    last_empty = np.where(behind.any(axis=0), count - 1 - behind[::-1].argmax(axis=0), -1)
    return HeightMap(height, hit, np.where(hit, (first - last_empty) * spacing, 0.0))


def _inner(valid: np.ndarray, steps: int) -> np.ndarray:
    return ndimage.binary_erosion(valid, structure=np.ones((3, 3), bool), iterations=steps)


def _flux_difference(height: np.ndarray, cross_slope: np.ndarray, step: float, axis: int) -> np.ndarray:
    """d/du (z_u / sqrt(1 + |grad z|^2)) along `axis` from half-step slopes, so that even alternating samples count; edges are 0."""
    height, cross_slope = np.moveaxis(height, axis, 0), np.moveaxis(cross_slope, axis, 0)
    slope = np.diff(height, axis=0) / step
    across = (cross_slope[1:] + cross_slope[:-1]) / 2
    flux = slope / np.sqrt(1.0 + slope**2 + across**2)
    return np.moveaxis(np.pad(np.diff(flux, axis=0) / step, ((1, 1), (0, 0))), 0, axis)


def roughness(view: HeightMap, spacing: tuple[float, float], region: np.ndarray) -> float:
    """Mean absolute deviation of mean curvature from its local mean, in 1/world unit; 0 for a plane and nearly 0 for a sphere.

    Only the lowest TRIM of the deviations counts: skin should be smooth, while nose, lips and lids may be sharp.

    Mean curvature of the graph z(u, v): 1/2 div(grad z / sqrt(1 + |grad z|^2)), which does not grow where a smooth surface turns
    away from the viewer. Silhouettes and steps between surfaces (more than four voxels per voxel) are left out with their neighbours.

    Args: `spacing` world lengths of (u, v), `region` [U, V] bool to average over. Returns 0 where fewer than 9 samples remain.
    """
    slope_u, slope_v = np.gradient(view.height, *spacing)
    smooth = _inner(view.hit, 1) & (np.hypot(slope_u, slope_v) < 4.0)
    curvature = 0.5 * (_flux_difference(view.height, slope_v, spacing[0], 0) + _flux_difference(view.height, slope_u, spacing[1], 1))
    curvature = np.clip(curvature, -CURVATURE_CAP, CURVATURE_CAP)
    valid = _inner(smooth, 1)
    u, v = (2 * round(CURVATURE_WINDOW / step / 2) + 1 for step in spacing)
    weight = ndimage.uniform_filter(valid.astype(np.float64), (u, v), mode="constant")
    mean = ndimage.uniform_filter(np.where(valid, curvature, 0.0), (u, v), mode="constant") / np.maximum(weight, 1e-9)
    deviation = np.abs(curvature - mean)  # from the mean of the valid samples around each
    kept = np.sort(deviation[valid & region])
    return float(kept[: round(TRIM * kept.size)].mean()) if kept.size >= 9 else 0.0


def holes_and_dents(view: HeightMap, grid: Grid) -> tuple[float, float]:
    """Of the head: share of the filled front silhouette without surface, and mean depth of narrow pits beyond DENT_MARGIN (world units).

    A pit is the morphological closing of the height map less the map itself: what a square of side DENT_WIDTH cannot reach into.
    """
    filled = ndimage.binary_fill_holes(view.hit) & grid.head
    area = max(int(filled.sum()), 1)
    holes = float((filled & ~view.hit).sum() / area)
    size = tuple(max(3, 2 * round(DENT_WIDTH / step / 2) + 1) for step in grid.spacing[1:])
    height = np.where(view.hit, view.height, view.height[view.hit].min())
    pits = np.maximum(ndimage.grey_closing(height, size=size) - height - DENT_MARGIN, 0.0)
    inner = _inner(ndimage.binary_fill_holes(view.hit), max(size) // 2) & view.hit & grid.head
    return holes, float(np.minimum(pits[inner], HEIGHT_CAP).sum() / area)


def asymmetry(view: HeightMap, body: np.ndarray, grid: Grid) -> tuple[float, float]:
    """Left-right mismatch of the head: of the front height map (world units, mean, capped) and the occupancy (1 - intersection over union).

    The occupancy is filled between the outermost samples of each x row, since what a head holds inside is never seen.
    """
    mirrored = view.height[:, ::-1]
    both, either = view.hit & view.hit[:, ::-1], (view.hit | view.hit[:, ::-1]) & grid.head
    mismatch = np.where(both, np.minimum(np.abs(view.height - mirrored), HEIGHT_CAP), HEIGHT_CAP)
    depth = float(mismatch[either].mean()) if either.any() else 0.0
    front = body[grid.axis(0) >= FACE_BACK][:, grid.axis(1) >= HEAD_BOTTOM]
    solid = np.logical_or.accumulate(front, axis=2) & np.logical_or.accumulate(front[:, :, ::-1], axis=2)[:, :, ::-1]
    union = int((solid | solid[:, :, ::-1]).sum())
    return depth, 1.0 - float((solid & solid[:, :, ::-1]).sum() / union) if union else 1.0


def depth_order(view: HeightMap, grid: Grid) -> float:
    """How far the face is from nose ahead of cheeks ahead of eye sockets, 0 (both margins met) to 1 (no relief or inverted)."""
    def level(box: tuple[float, float, float, float], side: int, quantile: float) -> float | None:
        values = view.height[grid.window(box, side) & view.hit]
        return float(np.quantile(values, quantile)) if values.size >= 2 else None

    nose = level(NOSE_WINDOW, 0, 0.98)
    scores = []
    for side in (-1, 1):
        cheek, eye = level(CHEEK_WINDOW, side, 0.8), level(EYE_WINDOW, side, 0.1)
        scores.append(0.0 if nose is None or cheek is None else np.clip((nose - cheek) / NOSE_OVER_CHEEK, 0.0, 1.0))
        scores.append(0.0 if cheek is None or eye is None else np.clip((cheek - eye) / CHEEK_OVER_EYE, 0.0, 1.0))
    return 1.0 - float(np.mean(scores))


def hollowness(view: HeightMap, grid: Grid) -> float:
    """Missing crust behind the face window, 0 (solid to CRUST everywhere) to 1 (nothing there)."""
    window = grid.window(FACE_WINDOW)
    return 1.0 - float(np.minimum(view.thickness[window] / CRUST, 1.0).mean())


def relief(view: HeightMap, grid: Grid) -> np.ndarray:
    """What stands out of the front [H, W], world units, capped at HEIGHT_CAP; 0 where there is no surface."""
    deviation = [RELIEF_SMOOTHING / step for step in grid.spacing[1:]]
    share = ndimage.gaussian_filter(view.hit.astype(np.float64), deviation)
    smooth = ndimage.gaussian_filter(np.where(view.hit, view.height, 0.0), deviation) / np.maximum(share, 1e-9)
    return np.where(view.hit, np.clip(view.height - smooth, -HEIGHT_CAP, HEIGHT_CAP), 0.0)


@functools.lru_cache(maxsize=8)
def average_relief(shape: tuple[int, int, int], box_warp: float) -> np.ndarray:
    """Relief [H, W] of the average head of the family."""
    grid = Grid(shape=shape, box_warp=box_warp)
    z, y, x = np.meshgrid(*(grid.axis(i) for i in range(3)), indexing="ij")
    points = torch.from_numpy(np.stack([x, y, z], axis=-1).reshape(1, -1, 3)).float()
    sigma = LEVEL - 1000 * head_sdf(points, torch.zeros(1, SHAPE_COUNT)).reshape(shape).numpy()
    return relief(height_map(sigma, sigma >= LEVEL, grid.axis(0)), grid)


def face(view: HeightMap, grid: Grid) -> float:
    """How much of a face is missing, 0 (eyes, nose and lips stand out as on the average head) to 1 (none of it, or a face turned inside).

    From the correlation of the two reliefs over RELIEF_WINDOW.
    """
    window = grid.window(RELIEF_WINDOW)
    seen, expected = (values[window] - values[window].mean() for values in (relief(view, grid), average_relief(grid.shape, grid.box_warp)))
    match = float(seen @ expected / max(np.sqrt((seen @ seen) * (expected @ expected)), 1e-12))
    return float(np.clip(1 - match / RELIEF_MATCH, 0.0, 1.0))


def sigma_features(sigma: np.ndarray, box_warp: float = 1.0) -> dict[str, float] | None:
    """All FEATURES of one raw density cube, or None where it holds no surface.

    Args: `sigma` [D, H, W] raw density (before the marcher's softplus), every side at least 16 samples; NaN and +-inf count as empty
    and full. `box_warp` is the side of the cube in world units.
    """
    assert sigma.ndim == 3 and min(sigma.shape) >= 16
    grid = Grid(shape=sigma.shape, box_warp=box_warp)
    sigma = np.nan_to_num(np.asarray(sigma, dtype=np.float32), nan=-1e4, posinf=1e4, neginf=-1e4)
    body, floater_volume, floater_count = components(sigma >= LEVEL)
    if not body.any():
        return None
    z, y, x = (grid.axis(i) for i in range(3))
    dz, dy, dx = grid.spacing
    front = height_map(sigma, body, z)  # maps are [H, W]
    sides = [height_map(sigma.transpose(2, 0, 1)[::step], body.transpose(2, 0, 1)[::step], x) for step in (1, -1)]  # [D, H]
    seen = (z >= FACE_BACK)[:, None] & (y >= HEAD_BOTTOM)
    holes, dents = holes_and_dents(front, grid)
    asymmetry_depth, asymmetry_occupancy = asymmetry(front, body, grid)
    return {
        "floater_volume": floater_volume,
        "floater_count": float(floater_count),
        "roughness_front": roughness(front, (dy, dx), grid.head),
        "roughness_side": float(np.mean([roughness(side, (dz, dy), seen) for side in sides])),
        "holes": holes,
        "dents": dents,
        "asymmetry_depth": asymmetry_depth,
        "asymmetry_occupancy": asymmetry_occupancy,
        "depth_order": depth_order(front, grid),
        "hollowness": hollowness(front, grid),
        "face": face(front, grid),
    }


ANNOTATOR = "sigma-geometry-3"  # name written into labels; changes whenever features, weights or calibration do
MIN_SCALE = {  # smallest spread of a feature; keeps a feature that is constant over the calibration set from becoming a step function
    "floater_volume": 0.005, "floater_count": 1.0, "roughness_front": 0.2, "roughness_side": 0.2, "holes": 0.005, "dents": 5e-5,
    "asymmetry_depth": 5e-4, "asymmetry_occupancy": 0.005, "depth_order": 0.02, "hollowness": 0.02, "face": 0.05,
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What matters to this annotator; the weights sum to 1, so the utility lies in [0, 1]."""

    floater_volume: float = 0.12  # detached material
    floater_count: float = 0.02
    roughness_front: float = 0.12  # skin should be smooth
    roughness_side: float = 0.05
    holes: float = 0.06
    dents: float = 0.20
    asymmetry_depth: float = 0.10
    asymmetry_occupancy: float = 0.04
    depth_order: float = 0.02  # nose ahead of cheeks ahead of eye sockets
    hollowness: float = 0.02
    face: float = 0.25  # eyes, nose and lips: what a person looks for first

    def __post_init__(self) -> None:
        values = [getattr(self, item.name) for item in fields(self)]
        if min(values) < 0 or abs(sum(values) - 1.0) > 1e-6:
            raise ValueError(f"Weights: expected non-negative weights that sum to 1, got {values}. Divide by their sum.")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Median and robust spread per feature, which put the features of one generator on a common scale."""

    median: Mapping[str, float]
    scale: Mapping[str, float]  # interquartile range / 1.349 (the deviation of a normal), at least MIN_SCALE
    samples: int = 0  # cubes behind the figures

    def __post_init__(self) -> None:
        if set(self.median) != set(FEATURES) or set(self.scale) != set(FEATURES):
            raise ValueError(f"Calibration: expected exactly the features {list(FEATURES)}. Calibrate again with this version.")
        if not all(np.isfinite(self.median[name]) and self.scale[name] > 0 for name in FEATURES):
            raise ValueError("Calibration: expected finite medians and positive scales. Calibrate again on cubes that hold a surface.")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping) -> "Calibration":
        return cls(median=dict(record["median"]), scale=dict(record["scale"]), samples=int(record["samples"]))


DEFAULT_CALIBRATION = Calibration(  # a tri-plane generator of middling quality; heads of the true family lie well above 1/2 throughout
    median={
        "floater_volume": 0.002, "floater_count": 1.0, "roughness_front": 8.0, "roughness_side": 5.0, "holes": 0.002, "dents": 6e-4,
        "asymmetry_depth": 0.006, "asymmetry_occupancy": 0.05, "depth_order": 0.2, "hollowness": 0.05, "face": 0.2,
    },
    scale={
        "floater_volume": 0.005, "floater_count": 2.0, "roughness_front": 1.5, "roughness_side": 1.0, "holes": 0.005, "dents": 3e-4,
        "asymmetry_depth": 0.003, "asymmetry_occupancy": 0.03, "depth_order": 0.15, "hollowness": 0.05, "face": 0.15,
    },
)


@dataclass(frozen=True, kw_only=True)
class UtilityResult:
    """Noise-free judgement of one cube."""

    total: float  # 0 (no surface) to 1
    parts: dict[str, float] = field(default_factory=dict)  # per feature, unweighted, 0..1, 1 is best
    features: dict[str, float] = field(default_factory=dict)  # raw defects; empty where there is no surface


def utility(
    sigma: np.ndarray, *, calibration: Calibration = DEFAULT_CALIBRATION, weights: Weights | None = None, box_warp: float = 1.0
) -> UtilityResult:
    """Judge one raw density cube.

    Args: `sigma` [D, H, W] raw density over the whole cube of side `box_warp`, sides >= 16 (48 to 64 is the intended range).
    Returns the utility, larger is better. A cube without surface gets 0, below every cube that has one. Never NaN.
    """
    weights = weights or Weights()
    features = sigma_features(sigma, box_warp)
    if features is None:
        return UtilityResult(total=0.0, parts=dict.fromkeys(FEATURES, 0.0))
    median, scale = calibration.median, calibration.scale
    parts = {name: float(expit((median[name] - features[name]) / scale[name]) / expit(median[name] / scale[name])) for name in FEATURES}
    total = sum(getattr(weights, name) * parts[name] for name in FEATURES)
    return UtilityResult(total=float(total), parts=parts, features=features)


def calibrate(sigmas: Iterable[np.ndarray], box_warp: float = 1.0) -> Calibration:
    """Median and interquartile range of every feature over a set of cubes; cubes without surface are left out.

    Raises ValueError when fewer than 4 cubes hold a surface.
    """
    records = [record for record in (sigma_features(sigma, box_warp) for sigma in sigmas) if record is not None]
    if len(records) < 4:
        raise ValueError(f"calibrate: expected at least 4 cubes with a surface at raw sigma 10, got {len(records)}. Pass more samples.")
    low, median, high = np.quantile([[record[name] for name in FEATURES] for record in records], [0.25, 0.5, 0.75], axis=0)  # [F] each
    spread = (high - low) / 1.349
    scale = {name: max(float(width), MIN_SCALE[name]) for name, width in zip(FEATURES, spread, strict=True)}
    return Calibration(median=dict(zip(FEATURES, median.tolist(), strict=True)), scale=scale, samples=len(records))


class PairLabel(NamedTuple):
    """One noisy judgement; `winner` and `loser` index the utilities."""

    winner: int
    loser: int
    clean: bool  # the noise-free order agrees (a tie counts as agreeing)


def _gaps(utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs as int64 [P, 2] and their utility differences u_a - u_b, float64 [P]."""
    index = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    values = np.asarray(utilities, dtype=np.float64)
    assert np.isfinite(values).all()
    return index, values[index[:, 0]] - values[index[:, 1]]


def label_pairs(
    utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray, temperature: float, rng: np.random.Generator
) -> list[PairLabel]:
    """Draw one Bradley-Terry judgement per pair.

    Args: `utilities` [S]; `pairs` [P, 2] of indices into them; `temperature` >= 0 in units of utility, 0 for noise-free labels;
    `rng` is advanced by exactly P uniform draws.
    Returns P labels in the order of `pairs`.
    """
    assert temperature >= 0
    index, gap = _gaps(utilities, pairs)
    draw = rng.random(len(index))
    chance = expit(gap / temperature) if temperature > 0 else np.where(gap == 0, 0.5, gap > 0)  # P(a preferred) [P]
    first = draw < chance
    return [
        PairLabel(int(a if won else b), int(b if won else a), bool((delta >= 0) if won else (delta <= 0)))
        for (a, b), won, delta in zip(index, first, gap, strict=True)
    ]


def solve_temperature(utilities: ArrayLike, pairs: Sequence[tuple[int, int]] | np.ndarray, flip_rate: float = 0.10) -> float:
    """Temperature at which the expected share of labels against the noise-free order is `flip_rate` over these pairs.

    E[flips] = mean over pairs of 1 / (1 + exp(|u_a - u_b| / T)) rises from 0 to 1/2 with T, so the root is unique. Ties are left out.
    Args: `flip_rate` in [0, 0.5). Returns T >= 0 in units of utility. Raises ValueError when all pairs tie.
    """
    assert 0.0 <= flip_rate < 0.5
    _, gap = _gaps(utilities, pairs)
    gap = np.abs(gap[gap != 0])
    if gap.size == 0:
        raise ValueError("solve_temperature: expected at least one pair whose utilities differ, got only ties. Sample other pairs.")
    if flip_rate == 0.0:
        return 0.0
    scale = float(np.median(gap))
    return scale * float(np.exp(brentq(lambda log_t: expit(-gap / (scale * np.exp(log_t))).mean() - flip_rate, -60.0, 60.0)))


def disjoint_pairs(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random pairs [P, 2] of indices 0..2*count-1, each used once, so that a split by pair is also a split by sample."""
    return rng.permutation(2 * count).reshape(count, 2)
