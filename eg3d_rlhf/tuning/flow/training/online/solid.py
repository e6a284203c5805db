"""`--reward=solid` of a flow: is an asset a sound body that is still what the untuned generator makes of its
condition? No labels.

solid * clip((F - .75) / .2, 0, 1) on the voxels of a finished asset (eg3d_rlhf.geometry.solids). A sampler
with noise at every step has no one untuned asset of a seed, so F is the best over REFERENCES untuned assets
of the condition, which are drawn once and repaired.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.geometry import solids
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.base.stage import Pipeline
from training.phases import derive_seed

REFERENCES = 16  # untuned assets of a condition
SMALL = 16  # voxels per edge up to which nothing is thick, and a floor means little


def grid_of(pipeline: Any, asset: Any) -> np.ndarray:
    """Which voxels of an asset are solid, bool [X, Y, Z] with y up; at most EDGE per axis. Flows' own grids
    have z up.

    Raises: ValueError for assets without voxels.
    """
    if hasattr(asset, "occupancy"):
        grid = np.asarray(asset.occupancy, dtype=bool)
    elif hasattr(pipeline, "voxels"):
        grid = np.zeros((pipeline.resolution,) * 3, dtype=bool)
        grid[tuple(pipeline.voxels(asset).cpu().long().numpy().T)] = True
    else:
        raise ValueError(
            f"--reward=solid: expected assets of voxels, got {type(asset).__name__}. Use another generator or"
            " reward."
        )
    return solids.reduced(np.moveaxis(grid, 2, 1))


def rules_for(grid: np.ndarray) -> solids.Rules:
    return solids.OCCUPANCY if max(grid.shape) <= SMALL else solids.OBJECTS


@dataclass(kw_only=True)
class SolidReward:
    """An AssetReward; 0 for an empty asset."""

    pipeline: Pipeline
    references: int = REFERENCES
    _known: dict[str, list[np.ndarray]] = field(default_factory=dict)  # repaired untuned assets, by condition

    def __call__(self, assets: Sequence[Any], conditions: Sequence[str]) -> torch.Tensor:
        """[N] float32 in 0..1."""
        return torch.tensor([judged.reward for judged in self.judged(assets, conditions)])

    def judged(self, assets: Sequence[Any], conditions: Sequence[str]) -> list[solids.Judged]:
        """Every asset's terms."""
        self._draw(sorted(set(conditions) - set(self._known)))
        grids = [grid_of(self.pipeline, asset) for asset in assets]
        return [
            solids.beside(grid, self._known[name], rules_for(grid))
            for grid, name in zip(grids, conditions, strict=True)
        ]

    def _draw(self, names: Sequence[str]) -> None:
        """References of conditions that have none yet, by the pipeline's own networks."""
        crossed = [
            (name, derive_seed("solid", name, k) % 2**31) for name in names for k in range(self.references)
        ]
        if not crossed:
            return
        conditions, seeds = map(list, zip(*crossed, strict=True))
        assets = generate(self.pipeline, conditions, seeds)
        for asset, name in zip(assets, conditions, strict=True):
            grid = grid_of(self.pipeline, asset)
            self._known.setdefault(name, []).append(solids.repaired(grid, rules_for(grid)))


def solid_reward(problem: Problem) -> SolidReward:
    return SolidReward(pipeline=problem.pipeline)
