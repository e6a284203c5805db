"""Defects of a head's geometry, measured on the raw density cube alone: no image, no camera, no network.

The volume is cut at raw sigma = LEVEL. Height maps (the first crossing seen from the front and from either side, to sub-voxel
precision) carry the surface measures; the occupancy carries components and symmetry. Every feature is oriented so that 0 is
the ideal and larger is worse, is finite for any input, and is independent of the grid's resolution up to sampling error.

Shape letters: D = z voxels, H = y voxels, W = x voxels, all with increasing coordinate; U, V = the two axes of a height map.
World: cube of side `box_warp` about the origin, x right, y up, z to the camera; eyes near y = 0, chin near -0.2, crown near 0.25.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from training.heads.family import SHAPE_COUNT
from training.heads.sdf import head_sdf

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
    Raises ValueError on another rank or a coarser grid.
    """
    if sigma.ndim != 3 or min(sigma.shape) < 16:
        raise ValueError(f"sigma_features: expected [D, H, W] with sides >= 16, got {list(sigma.shape)}. Sample the cube at 48 or more.")
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
