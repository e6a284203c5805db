"""Registry of the kinds of observations that rewards read.

This module does not import torch, so that a wrong name is rejected at once.
"""

from typing import TYPE_CHECKING

from eg3d_rlhf.core.registry import Registry

if TYPE_CHECKING:
    from eg3d_rlhf.rewards.observations import Observation

OBSERVATIONS: Registry["type[Observation]"] = Registry(
    "observation",
    {
        "sigma": "eg3d_rlhf.rewards.observations",
        "depth": "eg3d_rlhf.rewards.depth",
        "points": "eg3d_rlhf.rewards.points",
        "lifted-points": "eg3d_rlhf.rewards.points",
        "published-points": "eg3d_rlhf.rewards.points",
        "smoothness": "eg3d_rlhf.rewards.smoothness",
        "solid": "eg3d_rlhf.rewards.solid",
        "mesh-validity": "eg3d_rlhf.rewards.solid",
    },
)
