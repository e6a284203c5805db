"""DreamDPO (Zhou et al. 2025, arXiv 2502.04370): towards the better of two noises and, if it is clearly
better, away from the other.
"""

import warnings
from dataclasses import dataclass, field

import torch

from eg3d_rlhf.core.interfaces import DiffusionPrior, GuidanceOutput, PairwiseJudge, RewardModel
from eg3d_rlhf.tuning.distill import gradients
from eg3d_rlhf.tuning.distill.config import METHODS, Method
from eg3d_rlhf.tuning.distill.gradients import History, NoiseWeighting
from eg3d_rlhf.tuning.distill.guidance.denoiser import DenoiserSettings, Guided, Ranking, RankingSettings
from eg3d_rlhf.tuning.distill.schedule import Streams
from training.config import check_knobs, knob

DREAMDPO = "DreamDPO"


@dataclass(frozen=True, kw_only=True)
class DreamDpoSettings:
    """Two noises, a winner, and how far the loser is pushed away."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    # gap from which the loser is pushed away: in scores, or a share of the gaps with tau_mode quantile; may
    # be infinite
    tau: float = 0.001
    tau_mode: str = knob(
        "gap",
        "tau is a gap of scores, or a quantile of the last 200 steps' gaps.",
        DREAMDPO,
        choices=("gap", "quantile"),
        rare=True,
    )
    lose_guidance_scale: float | None = knob(
        1.0, "Guidance scale of the loser.", DREAMDPO, low=0, shown="the winner's", rare=True
    )
    subtract_noise: bool = knob(True, "Subtract the noise where only the winner counts.", DREAMDPO, rare=True)

    def __post_init__(self):
        check_knobs(self)
        top = 1.0 if self.tau_mode == "quantile" else float("inf")
        if not 0 <= self.tau <= top:
            raise ValueError(
                f"--set tau={self.tau}: expected 0 to {top:g} with tau_mode={self.tau_mode}. Correct it."
            )
        if self.prior.form != "sds":
            raise ValueError(
                f"--set form={self.prior.form}: expected sds with dreamdpo, whose gradient is a difference of"
                " noises. Use it."
            )


class DreamDpo(Guided):
    """One pair of noises per step and asset."""

    def __init__(
        self,
        prior: DiffusionPrior,
        settings: DreamDpoSettings,
        *,
        views: int,
        streams: Streams,
        reward: RewardModel | None = None,
        judge: PairwiseJudge | None = None,
    ):
        """Warns where winner and loser have the same guidance scale: pictures leave the prior then
        (docs/understand/distillation.md).
        """
        super().__init__(prior, settings, views=views, streams=streams)
        self.ranking = Ranking(self.denoiser, reward, judge, settings.ranking)
        self.gaps = History()
        self.kept = {"scores": self.ranking.history, "gaps": self.gaps}
        scale = settings.prior.guidance_scale
        if scale != 1 and settings.lose_guidance_scale in (None, scale) and settings.tau != float("inf"):
            warnings.warn(
                f"lose_guidance_scale: both noises at {scale:g} leave no anchor: pictures diverge. Use 1.",
                stacklevel=2,
            )

    @torch.no_grad()
    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        prompts: list[str],
        cameras: torch.Tensor | None,
        step: int,
        images: torch.Tensor | None = None,
    ) -> GuidanceOutput:
        """Ranked by views, winner and one_sided are of pictures."""
        d = self.denoiser
        s = self.settings
        noise, x_t, _, prediction = d.ask(2, x, t, prompts, cameras, step)
        guided = prediction.guided(s.prior.guidance_scale)
        ranks = self.ranking(
            torch.stack([d.prior.decode(x0) for x0 in d.x0(x_t, guided, t)]), prompts, cameras
        )
        two_sided = (ranks.gap >= self._tau(ranks.gap)) & (ranks.winner >= 0)
        # no answer: the first one, alone
        ordered = torch.stack([(ranks.winner < 1), (ranks.winner == 1)]).to(x)
        weights = NoiseWeighting(strategy="push")(ordered, two_sided)
        weights = weights.repeat_interleave(len(x) // weights.shape[1], 1)  # [2, B]
        loser = (weights < 0).view(*weights.shape, 1, 1, 1)
        weight = d.schedule.weight(t, s.prior.weighting, x)
        predicted = torch.where(loser, self._lose(prediction), guided)
        grad = gradients.dreamdpo(predicted, noise, weights, weight, subtract_noise=s.subtract_noise)
        terms = {"gap": ranks.gap, **d.compare(d.residuals(x, noise, t, x_t, prediction), grad)}
        return GuidanceOutput(
            grad=grad, terms=terms, scores=ranks.scores, winner=ranks.winner, one_sided=~two_sided
        )

    def _lose(self, prediction) -> torch.Tensor:
        scale = self.settings.lose_guidance_scale
        if scale == 1:
            return prediction.text
        return prediction.guided(self.settings.prior.guidance_scale if scale is None else scale)

    def _tau(self, gap: torch.Tensor) -> float:
        if self.settings.tau_mode == "gap":
            return self.settings.tau
        self.gaps.add(gap)
        return self.gaps.quantile(self.settings.tau)


METHODS.add("dreamdpo", Method(settings=DreamDpoSettings, guidance=DreamDpo, noises=lambda s: 2, judged=True))
