"""Measurements of the samples of one point: rewards, geometry, front surface and, for heads, volume errors.

Every array has one row for each latent, so that all comparisons are paired by latent.
Shapes: N latents, n grid points per edge, R and C rows and columns of a depth map.
"""

from collections.abc import Mapping

import numpy as np
import torch
from scipy import ndimage

from eg3d_rlhf.core.field import Bounds, Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.measures.people import FACE, back_of_head, face_depth, face_relief, volume_error
from eg3d_rlhf.preferences.annotator import largest_part
from eg3d_rlhf.rewards.reward import Reward
from training.heads.people_mesh import grid_points

POINTS = heads.POINTS  # n, grid points per edge
MIN_PIXELS = 64  # smallest number of pixels with a surface from which a relief is computed

Measured = dict[str, np.ndarray]


class CorrectedField(Field):
    """Field whose density is that of another field plus a correction, which is interpolated from a grid.

    A filter changes a few grid points of a shape. The correction is zero elsewhere, so that a reward sees the
    generator's own density there. Not differentiable.

    Args:
        field: N shapes.
        corrections: added raw density [N, n, n, n] at the points of `cube_points`.
    """

    def __init__(self, field: Field, corrections: np.ndarray):
        self._field = field
        # [N, 1, n, n, n], with the axes z, y, x of torch's grid_sample
        self._corrections = torch.from_numpy(corrections).float().permute(0, 3, 2, 1)[:, None]

    @property
    def bounds(self) -> Bounds:
        """Return the cube that contains the shapes."""
        return self._field.bounds

    @property
    def level(self) -> float:
        """Return the raw density at the surface."""
        return self._field.level

    def __len__(self) -> int:
        """Return the number of shapes."""
        return len(self._field)

    def _correction(self, points: torch.Tensor) -> torch.Tensor:
        """Interpolate the corrections [N, P] at points [P, 3] or [N, P, 3] in world units."""
        bounds = self._field.bounds
        # -1 and 1 are the faces of the cube, because the grid holds the centres of voxels
        positions = (points - points.new_tensor(bounds.centre)) / (bounds.side / 2)
        corrections = self._corrections.to(points)
        # [N, P, 1, 1, 3]: grid_sample needs a volume of positions, of which the last two axes have the size
        # 1 here.
        positions = positions.expand(len(corrections), *positions.shape[-2:])[:, :, None, None]
        # align_corners=False places -1 and 1 at the outer faces of the voxels. With True, all corrections
        # would be stretched by half a voxel at the border.
        sampled = torch.nn.functional.grid_sample(
            corrections, positions, align_corners=False, padding_mode="border"
        )
        # [N, 1, P, 1, 1] -> [N, P]
        return sampled[:, 0, :, 0, 0]

    def density(self, points: torch.Tensor) -> torch.Tensor:
        """Return the raw density [N, P] at points in world units."""
        return self._field.density(points) + self._correction(points)

    def density_grid(self, grid: SlabSpec) -> torch.Tensor:
        """Return the raw density [N, D, H, W] at the points of a grid."""
        # The points of the grid are [D, H, W, 3] and are flattened to [D H W, 3].
        corrections = self._correction(grid.points().reshape(-1, 3))
        return self._field.density_grid(grid) + corrections.unflatten(1, grid.shape)

    def colour(self, points: torch.Tensor) -> torch.Tensor:
        """Return the colour [N, P, 3] at points in world units."""
        # The correction changes only the density, so colours stay those of the generator.
        return self._field.colour(points)


def cube_points(bounds: Bounds, resolution: int) -> torch.Tensor:
    """Return the centres [n^3, 3] of the voxels of a generator's cube in world units, axes x, y, z."""
    # `grid_points` spans the cube of edge 1 around 0, so its side and its centre convert it to world units.
    unit_points = torch.from_numpy(grid_points(resolution).reshape(-1, 3)).float()
    return unit_points * bounds.side + unit_points.new_tensor(bounds.centre)


@torch.no_grad()
def cube_grids(field: Field, device: torch.device, resolution: int | None = None) -> np.ndarray:
    """Compute grids [N, n, n, n] of level minus density over a field's cube, negative inside.

    Args:
        field: N shapes.
        device: device on which the field computes.
        resolution: number of grid points per edge; None: POINTS.
    """
    resolution = resolution or POINTS
    points = cube_points(field.bounds, resolution).to(device)
    # in chunks, since the activations of all n^3 points take too much memory
    densities = torch.cat([field.density(chunk).float() for chunk in points.split(1 << 17)], dim=1)
    # A raw density above the level is solid. The difference is negative inside, as a signed distance is.
    return (field.level - densities).unflatten(1, (resolution,) * 3).cpu().numpy()


def measure_shapes(grids: np.ndarray, ground_truth: np.ndarray | None) -> Measured:
    """Measure shapes on grids.

    Args:
        grids: level minus density, [N, n, n, n].
        ground_truth: ground-truth heads of the same latents, [N, n, n, n]; None for generators whose latents
            have none.

    Returns: arrays by name. "depth" and "relief" [N, R, C] are those of the face if there is a ground truth,
        and of the whole front otherwise. "loose" and "enclosed" [N] are the volume outside the largest part
        and the enclosed empty volume, as shares of the solid volume. With a ground truth, "missing" and
        "extra" [N] are volume errors at the back of the head.
    """
    # Only heads have a defined face. For other shapes, the
    # complete front stands for the part that must not change.
    window = None if ground_truth is None else FACE
    measured = {
        "depth": np.stack([face_depth(grid, window) for grid in grids]).astype(np.float32),
        "relief": np.stack([_relief(grid, window) for grid in grids]).astype(np.float32),
        # Loose parts are what marching cubes would export as separate components ("floaters").
        "loose": np.array([_share(grid < 0, (grid < 0) & ~largest_part(grid < 0)) for grid in grids]),
        "enclosed": np.array(
            # Enclosed empty voxels cannot be reached from outside, so no image shows them.
            [_share(grid < 0, ndimage.binary_fill_holes(grid < 0) & (grid >= 0)) for grid in grids]
        ),
    }
    if ground_truth is not None:
        errors = [volume_error(grid, head) for grid, head in zip(grids, ground_truth, strict=True)]
        measured["missing"] = np.array([error.missing for error in errors])
        measured["extra"] = np.array([error.extra for error in errors])
    return measured


def _share(is_solid: np.ndarray, is_counted: np.ndarray) -> float:
    """Return the number of counted voxels divided by the number of solid voxels; 0 for an empty shape."""
    # The maximum avoids a division by 0 for a shape without any solid voxel.
    return float(is_counted.sum() / max(1, is_solid.sum()))


def _relief(grid: np.ndarray, window: tuple[float, float, float] | None) -> np.ndarray:
    """Compute the relief [R, C] of a shape's front. All pixels are NaN if too few show a surface."""
    depth = face_depth(grid, window)
    # The depth is not finite where a ray hits nothing.
    has_surface = np.isfinite(depth)
    is_sufficient = (
        has_surface.sum() >= MIN_PIXELS if window is None else has_surface.mean() >= heads.MIN_SHARE
    )
    return face_relief(grid, window) if is_sufficient else np.full_like(depth, np.nan)


@torch.no_grad()
def score(field: Field, rewards: Mapping[str, Reward]) -> Measured:
    """Score the shapes of a field by several rewards, [N] each."""
    observed: dict = {}  # an input that several rewards read is computed once
    scores = {}
    for name, reward in rewards.items():
        # Observations are frozen dataclasses, so equal settings have equal
        # hashes. The observation costs far more than the network of the reward.
        if reward.observation not in observed:
            observed[reward.observation] = reward.observation.observe(field)
        scores[name] = reward.score_observed(observed[reward.observation]).cpu().numpy().astype(np.float64)
    return scores


def changed_share(grids_before: np.ndarray, grids_after: np.ndarray, has_back: bool) -> np.ndarray:
    """Return the share [N] of the volume after a change that became solid or empty.

    Args:
        grids_before: level minus density, [N, n, n, n].
        grids_after: the same after the change.
        has_back: True counts the voxels at the back of the head alone.
    """
    is_counted = (
        back_of_head(grid_points(grids_before.shape[1]))
        if has_back
        else np.ones(grids_before.shape[1:], dtype=bool)
    )
    # A mask of [n, n, n] selects K voxels: [N, n, n, n] -> [N, K].
    solid_before = (grids_before < 0)[:, is_counted]
    solid_after = (grids_after < 0)[:, is_counted]
    # The exclusive or counts both kinds of change: solid voxels that became empty, and the reverse.
    return (solid_before ^ solid_after).sum(axis=1) / np.maximum(1, solid_after.sum(axis=1))


def stack(batches: list[Measured]) -> Measured:
    """Concatenate the measurements of batches of latents."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


# Metrics of one point, from its measurements and those of the samples before.


def compute_metrics(before: Measured, after: Measured, *, is_same_sample: bool) -> dict[str, float | None]:
    """Compute the metrics of one point.

    Args:
        before: measurements of the untuned samples.
        after: measurements of the point's samples.
        is_same_sample: False if the point shows other samples than those of the latents (best of n), for
            which identity and front are not defined.

    Returns: metrics by name; None where a metric is not defined.
    """
    metrics: dict[str, float | None] = {
        name: float(after[name].mean())
        for name in ("reward", "heldout", "loose", "enclosed")
        if name in after
    }
    # A ratio, because the variety has a scale of its own for
    # each generator. A ratio far below 1 shows mode collapse.
    variety_before = heads.variety(before)
    variety_after = heads.variety(after)
    metrics["variety"] = variety_after / variety_before if variety_before and variety_after else None
    metrics["identity_kept"] = heads.identity_kept(before, after) if is_same_sample else None
    # Another sample (best of n) has another face, so a distance between the two would mean nothing.
    metrics["front_moved_voxels"] = None
    if is_same_sample:
        distances = heads.face_distance_moved(before, after)
        finite_distances = distances[np.isfinite(distances)]
        # The median, because a few shapes without a clear front surface have very large distances.
        metrics["front_moved_voxels"] = float(np.median(finite_distances)) if len(finite_distances) else None
    if "missing" in before:
        errors_before = heads.back_of_head_error(before)
        errors_after = heads.back_of_head_error(after)
        # Defective and intact are defined before the change, so
        # all rungs are compared on the same two groups of latents.
        is_defective = heads.find_defective(before)
        metrics["error"] = float(errors_after.mean())
        metrics["intact"] = float((~is_defective).sum())  # number of samples
        metrics["error_reduction"] = heads.error_reduction(
            errors_before[is_defective], errors_after[is_defective]
        )
        # The errors of two intact heads differ, so another sample is worse only if it is defective.
        is_other_defective = errors_after[~is_defective] > heads.DEFECTIVE
        if is_same_sample:
            metrics["intact_degraded"] = heads.intact_degraded(before, after)
        else:
            metrics["intact_degraded"] = float(is_other_defective.mean()) if len(is_other_defective) else None
        metrics["still_defective"] = (
            float((errors_after[is_defective] > heads.DEFECTIVE).mean()) if is_defective.any() else None
        )
    return metrics
