"""Best of n: plain score distillation from several starts, of which the reward keeps the asset that it scores highest at the end.

No preference enters a gradient: it is what any tuning has to beat, at n times the work. Letters: A assets, S starts of each, V views.
"""

from dataclasses import dataclass

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, RewardModel
from eg3d_rlhf.tuning.distill.guidance.directions import told
from eg3d_rlhf.tuning.distill.guidance.sds import Sds, SdsSettings
from eg3d_rlhf.tuning.distill.streams import Streams
from training.config import knob


@dataclass(frozen=True, kw_only=True)
class BestOfNSettings(SdsSettings):
    """How many there are to choose from."""

    starts: int = knob(4, "Assets that are optimised for each one that is kept: as many times the work of sds.", "Best of n", low=1)


class BestOfN(Sds):
    """Distillation of S x A assets; those of start s stand at s A to (s + 1) A - 1."""

    def __init__(self, prior: DiffusionPrior, settings: BestOfNSettings, *, views: int, streams: Streams, reward: RewardModel):
        super().__init__(prior, settings, views=views, streams=streams)
        self.denoiser.check_reward(reward)
        self.starts, self.reward = settings.starts, reward

    @torch.no_grad()
    def best(self, images: torch.Tensor, prompts: list[str], cameras: torch.Tensor) -> list[int]:
        """Places of the A assets to keep: of each, the start with the largest mean reward over its views; equal ones, the first.

        Args: images [S A V, 3, h, w] in 0..1 of the finished assets; prompts: one per picture; cameras [S A V, 16].
        """
        d = self.denoiser
        scores = d.per_asset(d.score(self.reward, images[None], told(self.reward, prompts, cameras)))[0]  # [S A]
        assets = len(scores) // self.starts
        chosen = scores.unflatten(0, (self.starts, assets)).argmax(0).cpu()  # [A]
        return (chosen * assets + torch.arange(assets)).tolist()
