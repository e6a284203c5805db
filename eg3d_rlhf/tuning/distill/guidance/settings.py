"""Defines the settings of the distillation methods.

This file does not import PyTorch, so that `--help` is fast. The papers of the methods are cited in their
modules, for example guidance/dreamdpo.py.
"""

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
        7.5,
        "Scale of classifier-free guidance. With 1, the prior's prediction for the prompt is used without"
        " guidance.",
        PRIOR,
        low=0,
    )
    negative_prompt: str = _rare_prior_knob(
        "", "Prompt from which classifier-free guidance moves images away.", metavar="TEXT"
    )
    form: str = _rare_prior_knob(
        "sds",
        "Formula of the gradient. sds: score distillation sampling; sjc: score Jacobian chaining with"
        " reduced variance; sjc-plain: score Jacobian chaining without reduced variance; recon: MVDream's"
        " reconstruction loss.",
        choices=FORMS,
    )
    weighting: str = _rare_prior_knob(
        "sds",
        "Weight of a diffusion time in the gradient of form=sds, where x_t = a x + s e. sds: s^2; uniform: 1;"
        " fantasia3d: a s^2.",
        choices=WEIGHTINGS,
    )
    rescale: float = _rare_prior_knob(
        0.5,
        "With form=recon: strength with which the guided estimate is rescaled to the standard deviation of"
        " the estimate without guidance. 0: no rescaling; 1: full rescaling.",
        low=0,
        high=1,
    )
    view_prompts: bool = _rare_prior_knob(
        False,
        "Append the direction from which the camera sees the asset to the prompt, such as ', side view'.",
    )
    perp_neg: bool = _rare_prior_knob(
        False,
        "Use Perp-Neg, a guidance that mixes the prompts of the two nearest viewing directions and moves"
        " images away from the other directions.",
    )

    def __post_init__(self):
        check_knobs(self)
        if self.perp_neg and not self.view_prompts:
            raise ValueError(
                "--set perp_neg=True needs --set view_prompts=True, because Perp-Neg mixes prompts with"
                " viewing directions. Set view_prompts=True as well."
            )


RANKING = "Ranking of two noises"
_rare_ranking_knob = functools.partial(knob, group=RANKING, rare=True)


@dataclass(frozen=True, kw_only=True)
class RankingSettings(Knobs):
    """Settings of the ranking of two noises, which determines the preferred noise."""

    pair_level: str = _rare_ranking_knob(
        "asset",
        "Unit for which the preferred noise is determined. asset: the asset with all its views; view: each"
        " view separately, as in DreamDPO's code.",
        choices=("asset", "view"),
    )
    standardise: bool = _rare_ranking_knob(
        True,
        "Subtract the mean of the last 200 steps' scores from each score, and divide by their standard"
        " deviation.",
    )
    judge_mode: str = _rare_ranking_knob(
        "replace",
        "Use of the answer of --judge. replace: it replaces the ranking by the reward; or: the first noise is"
        " preferred if the judge or the reward prefers it, as in DreamDPO's code.",
        choices=("replace", "or"),
    )


# --- weights of several noises in the gradient, computed from the scores of their images. The strategies are
# those of RewardSDS (arXiv 2503.09601), and "push" is the case of two noises of DreamDPO (arXiv 2502.04370).

NOISES = "Noises and rewards"
_rare_noises_knob = functools.partial(knob, group=NOISES, rare=True)
STRATEGIES = ("min-max", "best", "weighted", "none", "push")  # see NoiseWeighting


@dataclass(frozen=True, kw_only=True)
class NoiseWeighting(Knobs):
    """Strategy that converts the scores of noises to weights of the noises in the gradient.

    A single noise has the weight 1 with every strategy.
    """

    strategy: str = knob(
        "min-max",
        "Strategy that computes the weights of the noises from their scores. min-max: the mean of the best"
        " minus that of the worst noises; best: the mean of the best; weighted: a softmax of the scores;"
        " none: equal weights; push: the best minus the worst noise.",
        NOISES,
        choices=STRATEGIES,
    )
    best: int = _rare_noises_knob(
        2,
        "Number of noises with the highest scores that count as the best, for --strategy=best and min-max.",
        low=1,
    )
    worst: int = _rare_noises_knob(
        2, "Number of noises with the lowest scores that count as the worst, for --strategy=min-max.", low=1
    )
    best_weight: float = _rare_noises_knob(
        0.9, "Weight of the mean of the best noises, for --strategy=min-max.", low=0
    )
    worst_weight: float = _rare_noises_knob(
        0.1, "Weight of the mean of the worst noises, which is subtracted, for --strategy=min-max.", low=0
    )

    def __call__(self, scores: "torch.Tensor", push: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Convert the scores of K noises to their weights, for each of N assets.

        Args:
            scores: [K, N]. If scores are equal, the noise with the lower index counts as the better one.
            push: [N] bool, for the strategy "push" only: True if the worst noise has the weight -1, False if
                it has the weight 0. None: True for all assets.
        Returns: weights [K, N].
        """
        noise_count = len(scores)  # K
        if noise_count == 1:
            return scores.new_ones(scores.shape)
        if self.strategy == "none":
            return scores.new_full(scores.shape, 1 / noise_count)
        if self.strategy == "weighted":
            # The softmax has no temperature, since scores are standardised by default, which fixes their
            # scale.
            return scores.softmax(0)
        # [K, N] indices of noises, best first. Stable: noises with equal scores keep their order.
        noise_order = scores.argsort(dim=0, descending=True, stable=True)
        if self.strategy == "push":
            # [1, N]: 1 where the worst noise is subtracted, else 0.
            push_weight = scores.new_ones(scores[:1].shape) if push is None else push[None].to(scores)
            return (
                scores.new_zeros(scores.shape)
                .scatter_(0, noise_order[:1], 1.0)
                .scatter_add_(0, noise_order[-1:], -push_weight)
            )
        # With fewer noises than requested, all of them count.
        best_count = min(self.best, noise_count)
        worst_count = min(self.worst, noise_count)
        # [best_count, N]: each of the best noises has the same weight.
        equal_shares = scores.new_full(scores[:best_count].shape, 1 / best_count)
        if self.strategy == "best":
            return scores.new_zeros(scores.shape).scatter_(0, noise_order[:best_count], equal_shares)
        noise_weights = scores.new_zeros(scores.shape)
        noise_weights.scatter_(0, noise_order[:best_count], self.best_weight * equal_shares)
        # scatter_add_ and not scatter_, because with few noises one noise can be among the best and the
        # worst.
        return noise_weights.scatter_add_(
            0,
            noise_order[-worst_count:],
            scores.new_full(scores[:worst_count].shape, -self.worst_weight / worst_count),
        )


SDS = "Score distillation"


@dataclass(frozen=True, kw_only=True)
class SdsSettings:
    """Settings of score distillation without a reward."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    samples: int = knob(
        1,
        "Number of noises per step, over which the gradient of sds is averaged. More noises make the"
        " gradient less noisy, and a step takes proportionally longer.",
        SDS,
        low=1,
        rare=True,
    )
    image_loss: float = knob(
        0.0,
        "Weight of HiFA's loss, the difference between the render and the image that the prior estimates. It"
        " needs form=sds.",
        SDS,
        low=0,
        rare=True,
    )

    def __post_init__(self):
        check_knobs(self)
        # The weight of HiFA's loss is derived from the residual of the form sds.
        if self.image_loss and self.prior.form != "sds":
            raise ValueError(
                f"--set image_loss={self.image_loss:g} cannot be combined with form={self.prior.form}. Use"
                " --set form=sds, or --set image_loss=0."
            )


@dataclass(frozen=True, kw_only=True)
class BestOfNSettings(SdsSettings):
    """Settings of best-of-n: score distillation of several assets per prompt, of which the best is kept."""

    starts: int = knob(
        4,
        "Number of assets that best-of-n optimises for each asset that it keeps. The computation takes this"
        " number of times that of sds.",
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
    # Smallest gap between the scores of winner and loser at which images are pushed away from the loser. With
    # tau_mode=quantile it is given as a share of the gaps, 0 to 1. Infinity: never. The setting is --set tau,
    # which modes/distill.py defines, since a knob has finite numbers only.
    tau: float = 0.001
    tau_mode: str = _rare_dreamdpo_knob(
        "gap",
        "Unit of tau. gap: a difference of scores; quantile: the share of the score differences of the last"
        " 200 steps that lie below it.",
        choices=("gap", "quantile"),
    )
    lose_guidance_scale: float | None = _rare_dreamdpo_knob(
        1.0,
        "Guidance scale of the prediction for the loser, from which DreamDPO moves images away.",
        low=0,
        shown="the value of --guidance-scale",
    )
    subtract_noise: bool = _rare_dreamdpo_knob(
        True,
        "Subtract the added noise from the prediction in steps in which images are not pushed away from the"
        " loser. DreamDPO's code does not subtract it.",
    )

    def __post_init__(self):
        check_knobs(self)
        # An infinite tau means that images are never pushed away from losers.
        largest_tau = 1.0 if self.tau_mode == "quantile" else float("inf")
        if not 0 <= self.tau <= largest_tau:
            raise ValueError(
                f"--set tau={self.tau} is not possible with tau_mode={self.tau_mode}. Use a number from 0 to"
                f" {largest_tau:g}."
            )
        if self.prior.form != "sds":
            raise ValueError(
                f"--set form={self.prior.form} cannot be combined with dreamdpo, whose gradient is a"
                " difference of predicted noises. Use --set form=sds."
            )


DREAMREWARD = "DreamReward"
_rare_dreamreward_knob = functools.partial(knob, group=DREAMREWARD, rare=True)


@dataclass(frozen=True, kw_only=True)
class DreamRewardSettings:
    """Settings of DreamReward: strength of the reward's gradient, its target, and the steps that use it."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    # Weight of the reward. With balance=grad-norm it is the norm of the reward's gradient as a share of that
    # of the distillation gradient; with other balances it is a factor of the reward's loss. 0: no reward.
    weight: Ramp = Ramp(0.3)
    balance: str = _rare_dreamreward_knob(
        "grad-norm",
        "Method that scales the reward's gradient to the distillation gradient before the weight is applied."
        " grad-norm: by their mean norms over 50 steps; digits: by the number of digits of both losses, as in"
        " DreamReward's code; none: no scaling.",
        choices=("grad-norm", "digits", "none"),
    )
    ceiling: float | None = _rare_dreamreward_knob(
        None, "Reward above which DreamReward uses no gradient of the reward.", shown="none"
    )
    through: str = _rare_dreamreward_knob(
        "latents",
        "Tensor to which the reward's gradient is applied. latents: the prior's latents of the render;"
        " images: the rendered images.",
        choices=("latents", "images"),
    )
    x0_until: int = _rare_dreamreward_knob(
        999,
        "Largest diffusion time at which the reward scores the image that the prior estimates. At larger"
        " times it scores the rendered image, since the estimate is blurred.",
        low=-1,
        high=999,
    )
    reward_from: int = _rare_dreamreward_knob(
        0, "First step in which DreamReward uses the reward.", metavar="STEP", low=0
    )
    reward_only_from: int | None = _rare_dreamreward_knob(
        None,
        "First step in which DreamReward uses only the reward and no distillation.",
        metavar="STEP",
        low=0,
        shown="never",
    )

    def __post_init__(self):
        check_knobs(self)
        if self.through == "images" and self.balance == "grad-norm":
            raise ValueError(
                "--set through=images cannot be combined with balance=grad-norm, because the norms of"
                " gradients on images and on latents cannot be compared. Use --set balance=digits or none."
            )
        if min(value for _, value in self.weight.knots()) < 0:
            raise ValueError(
                f"--set weight={self.weight.spec} contains a negative weight, which would decrease the"
                " reward. Use weights >= 0, or an arm dreamreward-inverted in --compare."
            )


@dataclass(frozen=True, kw_only=True)
class RewardSdsSettings:
    """Settings of RewardSDS."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    weighting: NoiseWeighting = field(default_factory=NoiseWeighting)
    noises: int = _rare_noises_knob(8, "Number of noises that are scored for each asset in a step.", low=1)
    until: int | None = _rare_noises_knob(
        None,
        "First step in which RewardSDS uses one noise only, which is score distillation without a reward.",
        metavar="STEP",
        low=0,
        shown="never",
    )
    explore_steps: int = _rare_noises_knob(
        1,
        "Number of DDIM steps for the full range of diffusion times, by which a noised image is denoised"
        " before it is scored. 1: the prior's one-step estimate is scored.",
        high=1000,
        low=1,
    )
    explore_end: str = _rare_noises_knob(
        "x0",
        "Result of the DDIM steps that is scored. x0: the clean estimate of the last prediction; t0: the"
        " latents at the time 0, as in RewardSDS's code.",
        choices=("x0", "t0"),
    )
    standardise: bool = _rare_noises_knob(
        True,
        "Subtract the mean of the last 200 steps' scores from each score, and divide by their standard"
        " deviation.",
    )

    def __post_init__(self):
        check_knobs(self)
        # With one step the clean estimate itself is scored; there is no DDIM chain that ends at t = 0.
        if self.explore_end == "t0" and self.explore_steps == 1:
            raise ValueError(
                "--set explore_end=t0 cannot be combined with explore_steps=1. Use a larger explore_steps, or"
                " --set explore_end=x0."
            )


PSD = "Preference score distillation"
_rare_psd_knob = functools.partial(knob, group=PSD, rare=True)
PREDICTORS = ("cond", "cfg")  # values of the setting predictor
NEGATIVES = ("auto", "reward", "preference", "none")  # values of the setting negative_update


@dataclass(frozen=True, kw_only=True)
class PsdSettings:
    """Settings of preference score distillation (PSD): its preference term and its null embedding."""

    prior: DenoiserSettings = field(default_factory=DenoiserSettings)
    ranking: RankingSettings = field(default_factory=RankingSettings)
    eta: float = _rare_psd_knob(
        1.0,
        "Weight of PSD's preference term, which moves images from the estimate of the loser to that of the"
        " winner.",
        low=0,
    )
    predictor: str = _rare_psd_knob(
        "cond",
        "Prediction of the prior that PSD ranks and uses in its preference term. cond: the prediction for the"
        " prompt; cfg: the prediction with classifier-free guidance.",
        choices=PREDICTORS,
    )
    negative_update: str = _rare_psd_knob(
        "auto",
        "Objective by which PSD updates the null embedding. reward: the reward; preference: a preference"
        " loss; auto: the reward if it is differentiable, else the preference loss; none: the null embedding"
        " stays fixed.",
        choices=NEGATIVES,
    )
    negative_rate: float = _rare_psd_knob(
        1e-3,
        "Largest root mean square step of the null embedding in an update, as a share of the root mean square"
        " of its entries.",
        low=0,
    )
    negative_ball: float = _rare_psd_knob(
        0.5,
        "Largest distance of the null embedding from its initial value, as a share of the norm of that"
        " value.",
        above=0,
    )
    negative_from: int = _rare_psd_knob(
        0, "First step in which PSD updates the null embedding.", metavar="STEP", low=0
    )
    negative_every: int = _rare_psd_knob(
        4, "Number of steps between two updates of PSD's null embedding.", low=1
    )

    def __post_init__(self):
        check_knobs(self)
        if self.prior.form != "sds":
            raise ValueError(
                f"--set form={self.prior.form} cannot be combined with psd, whose preference term is a"
                " difference of predicted noises. Use --set form=sds."
            )


GEOMETRY = "Geometry reward"  # title of the group of flags in the help
_rare_geometry_knob = functools.partial(knob, group=GEOMETRY, rare=True)


@dataclass(frozen=True, kw_only=True)
class GeometrySettings(Knobs):
    """Settings of the geometry reward: its strength over the run, and how often it is evaluated."""

    geometry_weight: float = _rare_geometry_knob(
        0.3,
        "Norm of the geometry reward's gradient in the last step, as a share of the norm of the distillation"
        " gradient.",
        low=0,
    )
    geometry_weight_from: float = _rare_geometry_knob(
        0.0,
        "Norm of the geometry reward's gradient in the first step that uses it, as a share of the norm of the"
        " distillation gradient.",
        low=0,
    )
    geometry_start: float = _rare_geometry_knob(
        0.1, "Share of the steps of the run after which the geometry reward is used.", low=0, high=1
    )
    geometry_every: int = _rare_geometry_knob(
        10,
        "Number of steps after which the geometry reward is evaluated again. The steps in between reuse its"
        " gradient.",
        low=1,
    )
