"""Compute `--reward=solid` of a flow, without labels: it scores whether an asset is a physically valid solid
that still resembles what the untuned generator makes of the prompt.

The reward is solid * clip((F - .75) / .2, 0, 1) on the voxels of a finished asset, with F the fidelity to a
reference (eg3d_rlhf.geometry.solids). A sampler with noise at every step has no single untuned asset of a
seed, so F is the best over REFERENCES untuned assets of the prompt. They are generated once, and their
defects are removed.
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

REFERENCES = 16  # untuned assets of a prompt
SMALL = 16  # voxels per edge up to which the rules of coarse grids apply: nothing there is thick


def grid_of(pipeline: Any, asset: Any) -> np.ndarray:
    """Return the solid voxels of an asset, bool [X, Y, Z] with y up and at most EDGE voxels per axis.

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
    # flows' grids have z up, the rules for solids have y up
    return solids.reduced(np.moveaxis(grid, 2, 1))


def rules_for(grid: np.ndarray) -> solids.Rules:
    """Choose the rules for solids by the resolution of a grid."""
    return solids.OCCUPANCY if max(grid.shape) <= SMALL else solids.OBJECTS


@dataclass(kw_only=True)
class SolidReward:
    """Reward of finished assets (an AssetReward), in 0..1; an empty asset has 0."""

    pipeline: Pipeline
    references: int = REFERENCES  # untuned assets of a prompt
    # voxels of untuned assets without their defects, by prompt
    _known: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def __call__(self, assets: Sequence[Any], conditions: Sequence[str]) -> torch.Tensor:
        """Score assets, [N] float32 in 0..1."""
        return torch.tensor([judged.reward for judged in self.judged(assets, conditions)])

    def judged(self, assets: Sequence[Any], prompts: Sequence[str]) -> list[solids.Judged]:
        """Compute the terms of the reward of every asset."""
        # sorted: the same batches of references in every process
        self._make_references(sorted(set(prompts) - set(self._known)))
        grids = [grid_of(self.pipeline, asset) for asset in assets]
        return [
            solids.beside(grid, self._known[name], rules_for(grid))
            for grid, name in zip(grids, prompts, strict=True)
        ]

    def _make_references(self, names: Sequence[str]) -> None:
        """Generate the references of prompts that have none yet, by the pipeline's own networks."""
        # the seed depends on the prompt alone, not on the order in which prompts occur
        crossed = [
            (name, derive_seed("solid", name, k) % 2**31) for name in names for k in range(self.references)
        ]
        if not crossed:
            return
        prompts, seeds = map(list, zip(*crossed, strict=True))
        assets = generate(self.pipeline, prompts, seeds)
        for asset, name in zip(assets, prompts, strict=True):
            grid = grid_of(self.pipeline, asset)
            self._known.setdefault(name, []).append(solids.repaired(grid, rules_for(grid)))


def solid_reward(problem: Problem) -> SolidReward:
    """Create the reward for a problem's pipeline."""
    return SolidReward(pipeline=problem.pipeline)
