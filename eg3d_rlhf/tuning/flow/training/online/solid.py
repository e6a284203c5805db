"""Compute the reward `--reward=solid` of a flow's assets, which needs no labels.

The reward is high if an asset is a physically valid solid that still resembles the assets which the untuned
generator samples for the prompt.

The reward is solid * clip((F - .75) / .2, 0, 1) on the voxels of a finished asset. Here solid in 0..1 is the
score of a valid solid, and F the fidelity to a reference shape (both from eg3d_rlhf.geometry.solids). If the
sampler adds noise at every step, no untuned asset corresponds to a seed, so F is the best fidelity over
REFERENCES untuned assets of the prompt. These references are generated once, and their defects are removed.
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

REFERENCES = 16  # number of untuned assets of a prompt
# voxels per edge up to which the rules for coarse grids apply, in which no part is many voxels thick
SMALL = 16


def grid_of(pipeline: Any, asset: Any) -> np.ndarray:
    """Return the solid voxels of an asset, bool [X, Y, Z] with y up and at most EDGE voxels per axis.

    Raises: ValueError for assets without voxels.
    """
    if hasattr(asset, "occupancy"):
        grid = np.asarray(asset.occupancy, dtype=bool)
    elif hasattr(pipeline, "voxels"):
        grid = np.zeros((pipeline.resolution,) * 3, dtype=bool)
        # voxels [v, 3]; the tuple of three index arrays selects them in the grid
        grid[tuple(pipeline.voxels(asset).cpu().long().numpy().T)] = True
    else:
        raise ValueError(
            f"--reward=solid: assets of the type {type(asset).__name__} have no voxels. Use another --reward,"
            " or a generator of voxels."
        )
    # flows' grids have z up, the rules for solids have y up; axis 2 becomes axis 1
    return solids.reduced(np.moveaxis(grid, 2, 1))


def rules_for(grid: np.ndarray) -> solids.Rules:
    """Return the rules by which a grid is scored as a solid: OCCUPANCY for a coarse grid, else OBJECTS."""
    return solids.OCCUPANCY if max(grid.shape) <= SMALL else solids.OBJECTS


@dataclass(kw_only=True)
class SolidReward:
    """Reward of finished assets (an AssetReward) in 0..1, see the module; 0 for an empty asset."""

    pipeline: Pipeline
    references: int = REFERENCES  # number of untuned assets of a prompt
    # voxels of untuned assets without their defects, by prompt
    _reference_grids: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def __call__(self, assets: Sequence[Any], prompts: Sequence[str]) -> torch.Tensor:
        """Score N finished assets of these prompts, [N] float32 in 0..1."""
        return torch.tensor([score.reward for score in self.score_terms(assets, prompts)])

    def score_terms(self, assets: Sequence[Any], prompts: Sequence[str]) -> list[solids.ScoreWithFidelity]:
        """Compute the reward of each of N assets with these prompts, and the terms of the reward."""
        # sorted, so that the references are generated in the same batches in every process
        self._make_references(sorted(set(prompts) - set(self._reference_grids)))
        grids = [grid_of(self.pipeline, asset) for asset in assets]
        return [
            solids.score_against(grid, self._reference_grids[prompt], rules_for(grid))
            for grid, prompt in zip(grids, prompts, strict=True)
        ]

    def _make_references(self, new_prompts: Sequence[str]) -> None:
        """Generate and store the reference shapes of these prompts, by the pipeline's own networks."""
        # the seed depends on the prompt alone, not on the order in which prompts occur
        prompts_and_seeds = [
            (prompt, derive_seed("solid", prompt, k) % 2**31)
            for prompt in new_prompts
            for k in range(self.references)
        ]
        if not prompts_and_seeds:
            return
        prompts, seeds = map(list, zip(*prompts_and_seeds, strict=True))
        assets = generate(self.pipeline, prompts, seeds)
        for asset, prompt in zip(assets, prompts, strict=True):
            grid = grid_of(self.pipeline, asset)
            self._reference_grids.setdefault(prompt, []).append(solids.without_defects(grid, rules_for(grid)))


def solid_reward(problem: Problem) -> SolidReward:
    """Create the reward "solid" for the pipeline of a problem."""
    return SolidReward(pipeline=problem.pipeline)
