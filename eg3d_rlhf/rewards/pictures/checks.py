"""A reward whose arguments and results are looked at: a prompt per picture, whole assets, pictures within 0..1, no NaN.

Shape letters: B pictures.
"""

import torch

from eg3d_rlhf.core.interfaces import RewardModel
from eg3d_rlhf.core.ranges import check_finite, check_pictures, check_views

FLAG = "--reward"


class CheckedReward:
    """Any reward of pictures, with checks at its edge: one line that names flag and remedy."""

    def __init__(self, reward: RewardModel):
        self.reward = reward
        self.modality, self.views, self.differentiable = reward.modality, reward.views, reward.differentiable
        self.view_prompts = getattr(reward, "view_prompts", False)

    def score(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores [B] of pictures [B, 3, h, w] in 0..1. Raises: ValueError."""
        if len(prompts) != len(pixels):
            raise ValueError(f"{FLAG}: expected one prompt per picture, got {len(prompts)} for {len(pixels)}. Repeat them per view.")
        check_views(len(pixels), self.views, FLAG)
        check_pictures(pixels, FLAG)
        scores = self.reward.score(pixels, prompts)
        check_finite(scores, FLAG, "Use another file, or look at the pictures.")
        return scores
