"""Row: the value of a coalition of regions, which exact Shapley values need 2^regions times.

Reference: captum's ShapleyValueSampling with a feature mask along one order of the regions. It masks the whole slab for each coalition
and calls the reward's own `score`, one slab at a time; before that, captum walks through the mask voxel by voxel in Python. Fast:
`CoalitionValues` on the same coalitions with the fused reward. Both evaluate the original slab and one more for each region, so the ratio
is that of one evaluation among the 4096 that exact values of 12 regions take; captum's own exact ShapleyValues would walk through all 12!
orders.
"""

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.rows import Case, Outcome, Row, Target
from eg3d_rlhf.attribution.landmarks import head_landmarks, landmark_partition
from eg3d_rlhf.attribution.scoring import fast_score
from eg3d_rlhf.attribution.shapley import CoalitionValues, marginals
from eg3d_rlhf.reward.model import PAPER, PRESETS, RewardArch, RewardModel
from eg3d_rlhf.sigma.spec import SlabSpec
from training.heads.family import SHAPE_COUNT

_BATCH = 2  # slabs that are mixed at once


def _slabs(shape: tuple[int, int, int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two smooth random slabs [1, D, H, W] in [0, 100]."""
    coarse = torch.rand([2, 1, 9, 9, 9], generator=torch.Generator().manual_seed(0)) * 100
    return tuple(F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True).to(device))


def coalitions(device: str, tiny: bool) -> Case:
    """Marginal contributions along one order of 12 regions."""
    from captum.attr import ShapleyValueSampling

    spec = SlabSpec(resolution=64) if tiny else SlabSpec()
    torch.manual_seed(0)
    reward = RewardModel(RewardArch.from_dict(PRESETS["small-slice"].network) if tiny else PAPER).to(device).eval().requires_grad_(False)
    partition = landmark_partition(head_landmarks(torch.zeros(1, SHAPE_COUNT))[0].double().numpy(), spec)
    labels, regions = partition.labels.to(device), len(partition.names)
    original, tuned = _slabs(spec.shape, device)
    order = np.random.default_rng(0).permutation(regions)
    score = fast_score(reward)

    def reference() -> Outcome:
        method = ShapleyValueSampling(reward.score)
        method.permutation_generator = lambda features, samples: [order.tolist()]  # the order of the fast path
        with torch.no_grad():
            found = method.attribute(tuned[None], baselines=original[None], feature_mask=labels[None, None], n_samples=1)
        first = torch.tensor([int((labels.flatten() == i).nonzero()[0]) if (labels == i).any() else -1 for i in range(regions)])
        values = torch.where(first >= 0, found.flatten().cpu()[first.clamp_min(0)], 0.0)  # captum writes a region's value to its voxels
        return Outcome({"marginal contributions": values.float()})

    def fast() -> Outcome:
        values = CoalitionValues(score, original, tuned, labels, regions, _BATCH)
        return Outcome({"marginal contributions": torch.from_numpy(marginals(values, order[None])[0]).float()})

    return Case(fast=fast, reference=reference)


ROWS = [
    Row(
        name="Shapley coalitions of 12 regions, full-size reward", size="full", make=coalitions, seconds=35, meter_in_round=True,
        target=Target(at_least=4, aim=5), tolerance=1e-4,
    ),
]
