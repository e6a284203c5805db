"""Settings of the methods. This file imports no torch, so that `--help` is quick."""

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eg3d_rlhf.tuning.distill.schedules_by_step import Ramp
from training.config import Knobs, check_knobs, knob

if TYPE_CHECKING:
    import torch

WEIGHTINGS = ("sds", "uniform", "fantasia3d")

PRIOR = "Asking the prior"  # title of the flags
_rare_prior_knob = functools.partial(knob, group=PRIOR, rare=True)
FORMS = ("sds", "sjc", "sjc-plain", "recon")


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings:
    """How the prior is asked, and how its answer becomes a gradient."""

    guidance_scale: float = knob(7.5, "Of the prompt; 1: the prompt alone.", PRIOR, low=0)
    negative_prompt: str = _rare_prior_knob("", "What the pictures should not be.", metavar="TEXT")
    form: str = _rare_prior_knob(
        "sds", "Gradient: SDS, score Jacobian chaining, or MVDream's reconstruction.", choices=FORMS
    )
    weighting: str = _rare_prior_knob("sds", "Weight of times, of the form sds.", choices=WEIGHTINGS)
    rescale: float = _rare_prior_knob(
        0.5, "Share of x0 whose spread is the unguided one's, of the form recon.", low=0, high=1
    )
    view_prompts: bool = _rare_prior_knob(False, "Say the side that the camera looks from in the prompt.")
    perp_neg: bool = _rare_prior_knob(
        False, "Perp-Neg: mix the prompts of neighbouring sides, away from the others."
    )

    def __post_init__(self):
        check_knobs(self)
        if self.perp_neg and not self.view_prompts:
            raise ValueError(
                "--set perp_neg=True: expected --set view_prompts=True with it, got none. Turn both on."
            )


RANKING = "Ranking two noises"
_rare_ranking_knob = functools.partial(knob, group=RANKING, rare=True)


@dataclass(frozen=True, kw_only=True)
class RankingSettings(Knobs):
    """What makes one noise the winner."""

    pair_level: str = _rare_ranking_knob(
        "asset", "Rank assets, or each view alone as DreamDPO's code does.", choices=("asset", "view")
    )
    standardise: bool = _rare_ranking_knob(True, "Scores in deviations of the last 200 steps' scores.")
    judge_mode: str = _rare_ranking_knob(
        "replace",
        "A judge's answer replaces the reward's, or is OR-ed as in DreamDPO's code.",
        choices=("replace", "or"),
    )


# From scores of several noises to their weights in the gradient: RewardSDS's strategies, and DreamDPO's push
# as the case of two.

NOISES = "Noises and rewards"
_rare_noises_knob = functools.partial(knob, group=NOISES, rare=True)
STRATEGIES = ("min-max", "best", "weighted", "none", "push")


@dataclass(frozen=True, kw_only=True)
class NoiseWeighting(Knobs):
    """Weights of noises: mean of the best, softmax, best minus worst, all alike, or winner minus loser. One
    noise always weighs 1.
    """

    strategy: str = knob(
        "min-max",
        "Which noises count: the best, a softmax, best minus worst, all.",
        NOISES,
        choices=STRATEGIES,
    )
    best: int = _rare_noises_knob(2, "Noises counted as the best.", low=1)
    worst: int = _rare_noises_knob(2, "Noises counted as the worst.", low=1)
    best_weight: float = _rare_noises_knob(0.9, "Weight of the best ones' mean, of min-max.", low=0)
    worst_weight: float = _rare_noises_knob(
        0.1, "Weight of the worst ones' mean, of min-max, subtracted.", low=0
    )

    def __call__(self, scores: "torch.Tensor", push: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Weights [K, N] of scores [K, N].

        Args: push: [N] bool, of the strategy push: whether the loser is pushed away, too; None: always. Equal
            scores: the first wins.
        """
        count = len(scores)
        if count == 1:
            return scores.new_ones(scores.shape)
        if self.strategy == "none":
            return scores.new_full(scores.shape, 1 / count)
        if self.strategy == "weighted":
            return scores.softmax(0)
        order = scores.argsort(dim=0, descending=True, stable=True)
        if self.strategy == "push":
            away = scores.new_ones(scores[:1].shape) if push is None else push[None].to(scores)
            return (
                scores.new_zeros(scores.shape).scatter_(0, order[:1], 1.0).scatter_add_(0, order[-1:], -away)
            )
        best = min(self.best, count)
        worst = min(self.worst, count)
        kept = scores.new_full(scores[:best].shape, 1 / best)
        if self.strategy == "best":
            return scores.new_zeros(scores.shape).scatter_(0, order[:best], kept)
        weights = scores.new_zeros(scores.shape).scatter_(0, order[:best], self.best_weight * kept)
        return weights.scatter_add_(
            0, order[-worst:], scores.new_full(scores[:worst].shape, -self.worst_weight / worst)
        )


SDS = "Score distillation"


@dataclass(frozen=True, kw_only=True)
class SdsSettings:
    """Score distillation of the prior alone."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    samples: int = knob(1, "Noises per step, averaged.", SDS, low=1, rare=True)
    image_loss: float = knob(
        0.0, "Weight of HiFA's loss on pictures, of the form sds.", SDS, low=0, rare=True
    )

    def __post_init__(self):
        check_knobs(self)
        if self.image_loss and self.prior.form != "sds":
            raise ValueError(
                f"--set image_loss={self.image_loss:g}: expected the form sds, got {self.prior.form}. Choose"
                " one of them."
            )


@dataclass(frozen=True, kw_only=True)
class BestOfNSettings(SdsSettings):
    """How many there are to choose from."""

    starts: int = knob(
        4,
        "Assets that are optimised for each one that is kept: as many times the work of sds.",
        "Best of n",
        low=1,
        rare=True,
    )


DREAMDPO = "DreamDPO"
_rare_dreamdpo_knob = functools.partial(knob, group=DREAMDPO, rare=True)


@dataclass(frozen=True, kw_only=True)
class DreamDpoSettings:
    """Two noises, a winner, and how far the loser is pushed away."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    # gap from which the loser is pushed away: in scores, or a share of the gaps with tau_mode quantile; may
    # be infinite
    tau: float = 0.001
    tau_mode: str = _rare_dreamdpo_knob(
        "gap",
        "tau is a gap of scores, or a quantile of the last 200 steps' gaps.",
        choices=("gap", "quantile"),
    )
    lose_guidance_scale: float | None = _rare_dreamdpo_knob(
        1.0, "Guidance scale of the loser.", low=0, shown="the winner's"
    )
    subtract_noise: bool = _rare_dreamdpo_knob(True, "Subtract the noise where only the winner counts.")

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


DREAMREWARD = "DreamReward"
_rare_dreamreward_knob = functools.partial(knob, group=DREAMREWARD, rare=True)


@dataclass(frozen=True, kw_only=True)
class DreamRewardSettings:
    """How strong the reward's gradient is, where it is taken and where it goes."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    # k: share of the distillation gradient's norm (grad-norm), or factor of the reward's loss; 0: no reward
    weight: Ramp = Ramp(0.3)
    balance: str = _rare_dreamreward_knob(
        "grad-norm",
        "What makes the weight comparable: the norms of both gradients over 50 steps, the digits of the "
        "printed losses as in DreamReward's code, or nothing.",
        choices=("grad-norm", "digits", "none"),
    )
    ceiling: float | None = _rare_dreamreward_knob(
        None, "Reward above which nothing is gained.", shown="none"
    )
    through: str = _rare_dreamreward_knob(
        "latents",
        "Where the reward's gradient goes: to the latents, or to the rendered pictures.",
        choices=("latents", "images"),
    )
    x0_until: int = _rare_dreamreward_knob(
        999, "Largest time at which the estimate is scored; above, the render.", low=-1, high=999
    )
    reward_from: int = _rare_dreamreward_knob(0, "First step with the reward.", metavar="STEP", low=0)
    reward_only_from: int | None = _rare_dreamreward_knob(
        None, "First step without distillation.", metavar="STEP", low=0, shown="never"
    )

    def __post_init__(self):
        check_knobs(self)
        if self.through == "images" and self.balance == "grad-norm":
            raise ValueError(
                "--set through=images: expected latents with balance=grad-norm. Their norms do not compare;"
                " use another."
            )
        if min(value for _, value in self.weight.knots()) < 0:
            raise ValueError(f"--set weight={self.weight.spec}: expected weights >= 0. Correct it.")


@dataclass(frozen=True, kw_only=True)
class RewardSdsSettings:
    """How many noises, how they are explored, and what their rewards weigh."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    weighting: NoiseWeighting = field(default_factory=NoiseWeighting)
    noises: int = _rare_noises_knob(8, "Per step and asset.", low=1)
    until: int | None = _rare_noises_knob(
        None, "Step from which it is plain distillation with one noise.", metavar="STEP", low=0, shown="never"
    )
    explore_steps: int = _rare_noises_knob(
        1,
        "DDIM steps over the whole range before a noise is scored; 1: the one-step estimate.",
        high=1000,
        low=1,
    )
    explore_end: str = _rare_noises_knob(
        "x0", "Score the estimate, or the latent at t = 0 as RewardSDS's code does.", choices=("x0", "t0")
    )
    standardise: bool = _rare_noises_knob(True, "Scores in deviations of the last 200 steps' scores.")

    def __post_init__(self):
        check_knobs(self)
        if self.explore_end == "t0" and self.explore_steps == 1:
            raise ValueError(
                "--set explore_end=t0: expected x0 with one step of exploration. Raise explore_steps."
            )


PSD = "Preference score distillation"
_rare_psd_knob = functools.partial(knob, group=PSD, rare=True)
PREDICTORS = ("cond", "cfg")
NEGATIVES = ("auto", "reward", "preference", "none")


@dataclass(frozen=True, kw_only=True)
class PsdSettings:
    """The push, its predictor, and the null embedding."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    eta: float = _rare_psd_knob(1.0, "Weight of the push.", low=0)
    predictor: str = _rare_psd_knob(
        "cond",
        "Whose estimate is ranked and pushed: the prompt's alone, or the guided one.",
        choices=PREDICTORS,
    )
    negative_update: str = _rare_psd_knob(
        "auto",
        "Learning the null embedding: by the reward's gradient, by preference, by the one that the reward "
        "allows, or not.",
        choices=NEGATIVES,
    )
    negative_rate: float = _rare_psd_knob(
        1e-3, "Largest step of an entry, in root mean squares of the embedding.", low=0
    )
    negative_ball: float = _rare_psd_knob(0.5, "Largest distance from where it began, in its norm.", above=0)
    negative_from: int = _rare_psd_knob(0, "First step that changes it.", metavar="STEP", low=0)
    negative_every: int = _rare_psd_knob(4, "Steps between its changes.", low=1)

    def __post_init__(self):
        check_knobs(self)
        if self.prior.form != "sds":
            raise ValueError(
                f"--set form={self.prior.form}: expected sds with psd, whose push is a difference of noises."
                " Use it."
            )


GEOMETRY = "Geometry reward"  # title of the flags
_rare_geometry_knob = functools.partial(knob, group=GEOMETRY, rare=True)


@dataclass(frozen=True, kw_only=True)
class GeometrySettings(Knobs):
    """How strongly, and from when on, a geometry reward pulls."""

    geometry_weight: float = _rare_geometry_knob(
        0.3, "Its gradient's norm at the end, in norms of the distillation's.", low=0
    )
    geometry_weight_from: float = _rare_geometry_knob(0.0, "The same where it sets in.", low=0)
    geometry_start: float = _rare_geometry_knob(
        0.1, "Share of the run after which it sets in.", low=0, high=1
    )
    geometry_every: int = _rare_geometry_knob(
        10, "Steps between two looks at the shapes; the gradient stays the same in between.", low=1
    )
