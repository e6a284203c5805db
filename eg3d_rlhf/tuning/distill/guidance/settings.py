"""Defines the settings of the methods. This file imports no PyTorch, so that `--help` is fast."""

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp
from training.config import Knobs, check_knobs, knob

if TYPE_CHECKING:
    import torch

WEIGHTINGS = ("sds", "uniform", "fantasia3d")  # formulas in schedule.NoiseSchedule.weight

PRIOR = "Predictions of the prior"  # title of the group of flags in the help
_rare_prior_knob = functools.partial(knob, group=PRIOR, rare=True)
FORMS = ("sds", "sjc", "sjc-plain", "recon")  # formulas in distill.gradients


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings:
    """Settings of the prior's predictions, and of the gradient that is computed from them."""

    guidance_scale: float = knob(
        7.5, "Scale of classifier-free guidance. 1: the prediction with the prompt only.", PRIOR, low=0
    )
    negative_prompt: str = _rare_prior_knob("", "Prompt from which images are guided away.", metavar="TEXT")
    form: str = _rare_prior_knob(
        "sds",
        "Form of the gradient: SDS, score Jacobian chaining, or MVDream's reconstruction.",
        choices=FORMS,
    )
    weighting: str = _rare_prior_knob(
        "sds", "Weight of times of the diffusion, for the form sds.", choices=WEIGHTINGS
    )
    rescale: float = _rare_prior_knob(
        0.5,
        "Share of x0 that is rescaled to the standard deviation without guidance, for the form recon.",
        low=0,
        high=1,
    )
    view_prompts: bool = _rare_prior_knob(False, "Add the viewing direction of the camera to the prompt.")
    perp_neg: bool = _rare_prior_knob(
        False, "Perp-Neg: mix the prompts of neighbouring directions, and guide away from other directions."
    )

    def __post_init__(self):
        check_knobs(self)
        # Perp-Neg mixes the prompts of viewing directions.
        if self.perp_neg and not self.view_prompts:
            raise ValueError("--set perp_neg=True needs --set view_prompts=True. Use both.")


RANKING = "Ranking of two noises"
_rare_ranking_knob = functools.partial(knob, group=RANKING, rare=True)


@dataclass(frozen=True, kw_only=True)
class RankingSettings(Knobs):
    """Settings of the ranking that determines which noise is preferred."""

    pair_level: str = _rare_ranking_knob(
        "asset", "Rank assets, or each view separately as DreamDPO's code does.", choices=("asset", "view")
    )
    standardise: bool = _rare_ranking_knob(
        True, "Standardise scores by the standard deviation of the last 200 steps."
    )
    judge_mode: str = _rare_ranking_knob(
        "replace",
        "The judge's answer replaces that of the reward, or both are combined by OR as in DreamDPO's code.",
        choices=("replace", "or"),
    )


# --- weights of several noises in the gradient, from their scores: RewardSDS's strategies, and DreamDPO's
# push as the case of two noises

NOISES = "Noises and rewards"
_rare_noises_knob = functools.partial(knob, group=NOISES, rare=True)
STRATEGIES = ("min-max", "best", "weighted", "none", "push")  # see NoiseWeighting


@dataclass(frozen=True, kw_only=True)
class NoiseWeighting(Knobs):
    """Strategy that converts scores of noises to weights: mean of the best, softmax, best minus worst, equal
    weights, or winner minus loser. A single noise always has the weight 1.
    """

    strategy: str = knob(
        "min-max",
        "Weights of noises: only the best, a softmax, best minus worst, or equal weights.",
        NOISES,
        choices=STRATEGIES,
    )
    best: int = _rare_noises_knob(2, "Number of noises that count as the best.", low=1)
    worst: int = _rare_noises_knob(2, "Number of noises that count as the worst.", low=1)
    best_weight: float = _rare_noises_knob(0.9, "Weight of the mean of the best noises, for min-max.", low=0)
    worst_weight: float = _rare_noises_knob(
        0.1, "Weight of the mean of the worst noises, which is subtracted, for min-max.", low=0
    )

    def __call__(self, scores: "torch.Tensor", push: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Convert scores [K, N] to weights [K, N].

        Args:
            scores: of K noises. Of equal scores, the first one wins.
            push: [N] bool, for the strategy push: True if the loser is pushed away, too; None: always.
        """
        count = len(scores)
        # One noise: the weight is 1 for every strategy, so the method is plain distillation.
        if count == 1:
            return scores.new_ones(scores.shape)
        if self.strategy == "none":
            return scores.new_full(scores.shape, 1 / count)
        if self.strategy == "weighted":
            # Scores are standardised by default, which fixes their scale for the softmax.
            return scores.softmax(0)
        # [K, N] indices, best first; stable, so that results do not depend on the sorting algorithm.
        order = scores.argsort(dim=0, descending=True, stable=True)
        if self.strategy == "push":
            # [1, N]: 1 where the loser is pushed away, else 0.
            push_weight = scores.new_ones(scores[:1].shape) if push is None else push[None].to(scores)
            return (
                scores.new_zeros(scores.shape)
                .scatter_(0, order[:1], 1.0)
                .scatter_add_(0, order[-1:], -push_weight)
            )
        # With fewer noises than requested, all count.
        best = min(self.best, count)
        worst = min(self.worst, count)
        # [best, N], each of the best noises has the same share.
        equal_shares = scores.new_full(scores[:best].shape, 1 / best)
        if self.strategy == "best":
            return scores.new_zeros(scores.shape).scatter_(0, order[:best], equal_shares)
        weights = scores.new_zeros(scores.shape).scatter_(0, order[:best], self.best_weight * equal_shares)
        # scatter_add_, because with few noises one of them can be among the best and the worst.
        return weights.scatter_add_(
            0, order[-worst:], scores.new_full(scores[:worst].shape, -self.worst_weight / worst)
        )


SDS = "Score distillation"


@dataclass(frozen=True, kw_only=True)
class SdsSettings:
    """Settings of score distillation without a reward."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    samples: int = knob(1, "Number of noises per step, whose gradients are averaged.", SDS, low=1, rare=True)
    image_loss: float = knob(0.0, "Weight of HiFA's loss on images, for the form sds.", SDS, low=0, rare=True)

    def __post_init__(self):
        check_knobs(self)
        # HiFA's loss belongs to the same estimate as the form sds.
        if self.image_loss and self.prior.form != "sds":
            raise ValueError(
                f"--set image_loss={self.image_loss:g} needs the form sds, got {self.prior.form}. Change one"
                " of them."
            )


@dataclass(frozen=True, kw_only=True)
class BestOfNSettings(SdsSettings):
    """Settings of best of n: score distillation from several starts."""

    starts: int = knob(
        4,
        "Number of assets that are optimised for each one that is kept. The work is that many times the work"
        " of sds.",
        "Best of n",
        low=1,
        rare=True,
    )


DREAMDPO = "DreamDPO"
_rare_dreamdpo_knob = functools.partial(knob, group=DREAMDPO, rare=True)


@dataclass(frozen=True, kw_only=True)
class DreamDpoSettings:
    """Settings of DreamDPO."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    # Gap from which on the loser is pushed away, in units of scores, or with tau_mode=quantile a share of the
    # gaps. May be infinite.
    tau: float = 0.001  # the flag is --tau
    tau_mode: str = _rare_dreamdpo_knob(
        "gap",
        "Meaning of tau: a gap of scores, or a quantile of the gaps of the last 200 steps.",
        choices=("gap", "quantile"),
    )
    lose_guidance_scale: float | None = _rare_dreamdpo_knob(
        1.0, "Guidance scale of the loser.", low=0, shown="the winner's"
    )
    subtract_noise: bool = _rare_dreamdpo_knob(
        True, "Subtract the noise e from the prediction where only the winner counts."
    )

    def __post_init__(self):
        check_knobs(self)
        # An infinite gap means that losers are never pushed away.
        top = 1.0 if self.tau_mode == "quantile" else float("inf")
        if not 0 <= self.tau <= top:
            raise ValueError(
                f"--set tau={self.tau}: expected 0 to {top:g} with tau_mode={self.tau_mode}. Correct it."
            )
        if self.prior.form != "sds":
            raise ValueError(
                f"--set form={self.prior.form}: dreamdpo needs the form sds, because its gradient is a"
                " difference of noises. Use --set form=sds."
            )


DREAMREWARD = "DreamReward"
_rare_dreamreward_knob = functools.partial(knob, group=DREAMREWARD, rare=True)


@dataclass(frozen=True, kw_only=True)
class DreamRewardSettings:
    """Settings of DreamReward: strength of the reward's gradient, and where it is computed and applied."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    # Share of the norm of distillation's gradient (grad-norm), or factor of the reward's loss; 0: no reward.
    weight: Ramp = Ramp(0.3)
    balance: str = _rare_dreamreward_knob(
        "grad-norm",
        "Quantity that makes weights comparable: the norms of both gradients over 50 steps, the digits of"
        " the printed losses as in DreamReward's code, or none.",
        choices=("grad-norm", "digits", "none"),
    )
    ceiling: float | None = _rare_dreamreward_knob(
        None, "Reward above which its gradient is 0.", shown="none"
    )
    through: str = _rare_dreamreward_knob(
        "latents",
        "Target of the reward's gradient: the latents, or the rendered images.",
        choices=("latents", "images"),
    )
    x0_until: int = _rare_dreamreward_knob(
        999,
        "Largest time at which the estimate is scored. At larger times the render is scored.",
        low=-1,
        high=999,
    )
    reward_from: int = _rare_dreamreward_knob(0, "First step with the reward.", metavar="STEP", low=0)
    reward_only_from: int | None = _rare_dreamreward_knob(
        None, "First step without distillation.", metavar="STEP", low=0, shown="never"
    )

    def __post_init__(self):
        check_knobs(self)
        if self.through == "images" and self.balance == "grad-norm":
            raise ValueError(
                "--set through=images cannot be combined with balance=grad-norm, because the norms of"
                " gradients on images and on latents cannot be compared. Use another balance."
            )
        # A negative weight would decrease the reward; the control -inverted does that.
        if min(value for _, value in self.weight.knots()) < 0:
            raise ValueError(f"--set weight={self.weight.spec}: expected weights >= 0. Correct it.")


@dataclass(frozen=True, kw_only=True)
class RewardSdsSettings:
    """Settings of RewardSDS."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    weighting: NoiseWeighting = field(default_factory=NoiseWeighting)
    noises: int = _rare_noises_knob(8, "Number of noises per step and asset.", low=1)
    until: int | None = _rare_noises_knob(
        None, "First step of plain distillation with one noise.", metavar="STEP", low=0, shown="never"
    )
    explore_steps: int = _rare_noises_knob(
        1,
        "Number of DDIM steps over the entire range before a noise is scored. 1: the one-step estimate.",
        high=1000,
        low=1,
    )
    explore_end: str = _rare_noises_knob(
        "x0",
        "Latent that is scored: the estimate, or that at t = 0 as in RewardSDS's code.",
        choices=("x0", "t0"),
    )
    standardise: bool = _rare_noises_knob(
        True, "Standardise scores by the standard deviation of the last 200 steps."
    )

    def __post_init__(self):
        check_knobs(self)
        # One step of exploration is the estimate itself; there is no chain that ends at t = 0.
        if self.explore_end == "t0" and self.explore_steps == 1:
            raise ValueError(
                "--set explore_end=t0 cannot be used with one step of exploration. Increase explore_steps,"
                " or use explore_end=x0."
            )


PSD = "Preference score distillation"
_rare_psd_knob = functools.partial(knob, group=PSD, rare=True)
PREDICTORS = ("cond", "cfg")  # with the prompt only; with classifier-free guidance
NEGATIVES = ("auto", "reward", "preference", "none")  # updates of the null embedding


@dataclass(frozen=True, kw_only=True)
class PsdSettings:
    """Settings of preference score distillation: the push, its predictor, and the null embedding."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    eta: float = _rare_psd_knob(1.0, "Weight of the push from loser to winner.", low=0)
    predictor: str = _rare_psd_knob(
        "cond",
        "Prediction that is ranked and pushed: with the prompt only, or with guidance.",
        choices=PREDICTORS,
    )
    negative_update: str = _rare_psd_knob(
        "auto",
        "Update of the null embedding: by the gradient of the reward, by a preference loss, by the reward"
        " if it is differentiable and else by preference (auto), or none.",
        choices=NEGATIVES,
    )
    negative_rate: float = _rare_psd_knob(
        1e-3, "Largest step of an entry, in units of the root mean square of the embedding.", low=0
    )
    negative_ball: float = _rare_psd_knob(
        0.5, "Largest distance of the null embedding from its start, in units of its norm.", above=0
    )
    negative_from: int = _rare_psd_knob(
        0, "First step that updates the null embedding.", metavar="STEP", low=0
    )
    negative_every: int = _rare_psd_knob(4, "Number of steps between updates of the null embedding.", low=1)

    def __post_init__(self):
        check_knobs(self)
        if self.prior.form != "sds":
            raise ValueError(
                f"--set form={self.prior.form}: psd needs the form sds, because its push is a difference of"
                " noises. Use --set form=sds."
            )


GEOMETRY = "Geometry reward"  # title of the group of flags in the help
_rare_geometry_knob = functools.partial(knob, group=GEOMETRY, rare=True)


@dataclass(frozen=True, kw_only=True)
class GeometrySettings(Knobs):
    """Settings of the strength of a geometry reward over the run."""

    geometry_weight: float = _rare_geometry_knob(
        0.3, "Norm of the geometry reward's gradient at the end, relative to that of distillation.", low=0
    )
    geometry_weight_from: float = _rare_geometry_knob(
        0.0, "The same norm at the start of the geometry reward.", low=0
    )
    geometry_start: float = _rare_geometry_knob(
        0.1, "Share of the run after which the geometry reward starts.", low=0, high=1
    )
    geometry_every: int = _rare_geometry_knob(
        10,
        "Number of steps between two evaluations of the geometry reward. Its gradient is reused in between.",
        low=1,
    )
