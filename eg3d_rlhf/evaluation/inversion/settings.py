"""Settings of an inversion. This module does not import torch, so that --help is fast."""

from dataclasses import dataclass

from training.config import check_knobs, knob

# headings of the groups of settings in the help
STAGES = "Stages"
LOSS = "Loss"


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """Settings of both stages of an inversion.

    The defaults are for the small bundled generator; `PUBLISHED` has the values of the published projectors.
    """

    w_steps: int = knob(
        128,
        "Number of optimisation steps of the first stage, which optimises the latent.",
        STAGES,
        low=1,
        rare=True,
    )
    pivot_steps: int = knob(
        64,
        "Number of optimisation steps of the second stage, which tunes the generator.",
        STAGES,
        low=0,
        rare=True,
    )
    w_lr: float = knob(
        0.1,
        "Largest learning rate of the first stage, which optimises the latent.",
        STAGES,
        above=0,
        rare=True,
    )
    pivot_lr: float = knob(
        3e-4, "Learning rate of the second stage, which tunes the generator.", STAGES, above=0, rare=True
    )
    noise: float = knob(
        0.01,
        "Initial noise that is added to the latent in the first stage, in standard deviations of w.",
        STAGES,
        low=0,
        rare=True,
    )
    fresh_rays: bool = knob(
        False,
        "Use new random ray samples in every optimisation step. By default all steps use the same samples.",
        STAGES,
        rare=True,
    )
    sample_mult: float = knob(
        2.0, "Samples per ray, as a multiple of the generator's own number.", STAGES, above=0, rare=True
    )
    # the run's seed
    seed: int = knob(0, "Random seed of the noise and the ray samples.", STAGES, low=0, flag=False)
    lambda_mse: float = knob(
        10.0,
        "Weight of the mean squared error of the image, whose values are in [-1, 1].",
        LOSS,
        low=0,
        rare=True,
    )
    lambda_w: float = knob(
        0.03,
        "Weight of the mean squared distance from the latent to the mean latent.",
        LOSS,
        low=0,
        rare=True,
    )
    lambda_sigma: float = knob(
        0.01,
        "Weight of the density-consistency term in the second stage: the mean absolute difference of the"
        " density from the density before that stage. It has an effect only if the reward's"
        " weight is above 0.",
        LOSS,
        low=0,
        rare=True,
    )
    reward_every: int = knob(
        2,
        "Number of steps between two evaluations of the reward and density terms. Their weights are"
        " multiplied by this number, so that their mean weight over all steps does not change. A larger"
        " number is faster.",
        LOSS,
        low=1,
        rare=True,
    )
    reward_in_w: bool = knob(
        False, "Also apply the reward in the second half of the first stage.", LOSS, rare=True
    )

    def __post_init__(self):
        check_knobs(self)


# The values of PanoHead's and SphereHead's projectors, for their generators.
PUBLISHED = {
    "w_steps": 500,
    "pivot_steps": 500,
    "noise": 0.05,
    "fresh_rays": True,
    "sample_mult": 1.0,
    "lambda_mse": 0.1,
    "lambda_w": 1.0,
}
