"""Settings of an inversion; imports no torch."""

from dataclasses import dataclass

from training.config import check_knobs, knob

# headings of flags in the help
STAGES = "Stages"
LOSS = "Loss"


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """Settings of both stages. The defaults fit the small bundled generator, `PUBLISHED` are those of the
    published projectors.
    """

    w_steps: int = knob(128, "Number of optimisation steps on the latent.", STAGES, low=1, rare=True)
    pivot_steps: int = knob(64, "Number of optimisation steps on the generator.", STAGES, low=0, rare=True)
    w_lr: float = knob(0.1, "Largest learning rate of the latent.", STAGES, above=0, rare=True)
    pivot_lr: float = knob(3e-4, "Learning rate of the generator.", STAGES, above=0, rare=True)
    noise: float = knob(
        0.01, "Initial noise on the latent, in standard deviations of w.", STAGES, low=0, rare=True
    )
    fresh_rays: bool = knob(False, "Use new random ray samples in every step.", STAGES, rare=True)
    sample_mult: float = knob(
        2.0, "Samples per ray, as a multiple of the generator's.", STAGES, above=0, rare=True
    )
    seed: int = knob(
        0, "Random seed of the noise and the ray samples.", STAGES, low=0, flag=False
    )  # the run's seed
    lambda_mse: float = knob(
        10.0, "Weight of the mean squared error, images in [-1, 1].", LOSS, low=0, rare=True
    )
    lambda_w: float = knob(
        0.03, "Weight of the mean squared distance to the mean latent.", LOSS, low=0, rare=True
    )
    lambda_sigma: float = knob(
        0.01,
        "Weight of the density's change from the pivot; it acts if the reward's weight is above 0.",
        LOSS,
        low=0,
        rare=True,
    )
    reward_every: int = knob(
        2,
        "Evaluate the reward and the density terms every this many steps, with their weights multiplied by"
        " it.",
        LOSS,
        low=1,
        rare=True,
    )
    reward_in_w: bool = knob(
        False, "Apply the reward in the second half of the first stage, too.", LOSS, rare=True
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
