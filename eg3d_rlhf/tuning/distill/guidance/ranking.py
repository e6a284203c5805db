"""Which of two noises gave the better pictures: by a reward, by a judge, or by both.

Letters: K = 2 noises, A assets, V views, B = A V pictures; N assets, or pictures where each view is ranked alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from eg3d_rlhf.core.interfaces import PairwiseJudge, RewardModel
from eg3d_rlhf.tuning.distill.guidance.denoiser import Denoiser
from eg3d_rlhf.tuning.distill.guidance.directions import told
from eg3d_rlhf.tuning.distill.target import History
from training.config import check_knobs, knob

RANKING = "Ranking two noises"


@dataclass(frozen=True, kw_only=True)
class RankingSettings:
    """What makes one noise the winner."""

    pair_level: str = knob("asset", "Rank assets, or each view alone as DreamDPO's code does.", RANKING, choices=("asset", "view"))
    standardise: bool = knob(True, "Scores in deviations of the last 200 steps' scores.", RANKING)
    judge_mode: str = knob("replace", "A judge's answer replaces the reward's, is added, or is OR-ed as in DreamDPO's code.", RANKING,
                           choices=("replace", "sum", "or"))
    judge_weight: float = knob(1.0, "Of an answer, of the mode sum.", RANKING, low=0)
    judge_from: int = knob(0, "First step at which the judge is asked.", RANKING, metavar="STEP", low=0)
    judge_share: float = knob(1.0, "Probability with which it is asked at a step.", RANKING, low=0, high=1)

    def __post_init__(self):
        check_knobs(self)


class Ranks(NamedTuple):
    """A ranking."""

    scores: torch.Tensor  # [2, N]; a judge's answer alone: 1 and 0
    winner: torch.Tensor  # [N] 0 or 1; -1: no answer
    gap: torch.Tensor  # [N] winner's score less the loser's; 0 where there is no answer


class Ranking:
    """Scores and ranks the pictures of two noises. An answer of a judge alone is a gap of 1."""

    def __init__(self, denoiser: Denoiser, reward: RewardModel | None, judge: PairwiseJudge | None, settings: RankingSettings):
        """Raises: ValueError without reward and judge, or for a way of joining them that needs both."""
        if reward is None and (judge is None or settings.judge_mode != "replace"):
            raise ValueError("--reward: expected a reward, or a judge that replaces it, got none. Name one.")
        if settings.pair_level == "view" and reward is not None and reward.views > 1:
            raise ValueError(f"--pair-level: expected asset for a reward of {reward.views} views together, got view. Use asset.")
        if reward is not None:
            denoiser.check_reward(reward)
        self.denoiser, self.reward, self.judge, self.settings = denoiser, reward, judge, settings
        self.history = History()

    def __call__(self, images: torch.Tensor, prompts: list[str], cameras: torch.Tensor | None, step: int) -> Ranks:
        """Args: images [2, B, 3, h, w] in 0..1; prompts: one per picture; cameras [B, 16]."""
        s, views = self.settings, self.denoiser.views if self.settings.pair_level == "asset" else 1
        scores = None if self.reward is None else self._score(images, told(self.reward, prompts, cameras))
        if self.judge is None or not self._asked(step):
            return self._by_score(images, views) if scores is None else _ranks(scores)
        answers = torch.tensor(self._answers(images, prompts, views), device=images.device)  # [N]
        votes = torch.stack([answers == 0, answers == 1]).to(images.dtype)  # [2, N]
        if scores is None or s.judge_mode == "replace":
            return Ranks(votes if scores is None else scores, answers, (answers >= 0).to(images.dtype))
        if s.judge_mode == "sum":
            return _ranks(scores + s.judge_weight * votes)
        first = (scores[0] >= scores[1]) | (answers == 0)
        return Ranks(scores, (~first).long(), torch.where(first, scores[0] - scores[1], scores[1] - scores[0]))

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        scores = self.denoiser.score(self.reward, images, prompts)  # type: ignore[arg-type]
        scores = self.denoiser.per_asset(scores) if self.settings.pair_level == "asset" else scores
        if not self.settings.standardise:
            return scores
        self.history.add(scores)
        return (scores - self.history.mean()) / self.history.deviation()

    def _by_score(self, images: torch.Tensor, views: int) -> Ranks:
        """Nobody was asked."""
        none = images.new_zeros(images.shape[1] // views)
        return Ranks(torch.stack([none, none]), none.long() - 1, none)

    def _asked(self, step: int) -> bool:
        s = self.settings
        return step >= s.judge_from and float(self.denoiser.streams.chance("judge", 1, step)) < s.judge_share

    def _answers(self, images: torch.Tensor, prompts: list[str], views: int) -> list[int]:
        first, second = images.unflatten(1, (-1, views)).unbind(0)  # [N, V, 3, h, w] each
        answers = self.judge.judge(prompts[::views], list(zip(first, second, strict=True)))  # type: ignore[union-attr]
        if len(answers) != len(first) or not set(answers) <= {-1, 0, 1}:
            raise ValueError(f"--judge: expected {len(first)} answers of 0, 1 or -1, got {answers[:8]}. Check the judge.")
        return answers


def _ranks(scores: torch.Tensor) -> Ranks:
    first = scores[0] >= scores[1]
    return Ranks(scores, (~first).long(), (scores[0] - scores[1]).abs())
