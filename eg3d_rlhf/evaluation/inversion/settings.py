"""Settings of an inversion; imports no torch."""

from dataclasses import dataclass

from training.config import check_knobs, knob

# titles of flags
STAGES = "Stages"
LOSS = "Loss"


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """Settings of both stages; the defaults are those of the small bundled generator, `PUBLISHED` the
    projectors' own.
    """

    w_steps: int = knob(128, "Steps on the latent.", STAGES, low=1, rare=True)
    pivot_steps: int = knob(64, "Steps on the generator.", STAGES, low=0, rare=True)
    w_lr: float = knob(0.1, "Largest learning rate of the latent.", STAGES, above=0, rare=True)
    pivot_lr: float = knob(3e-4, "Learning rate of the generator.", STAGES, above=0, rare=True)
    noise: float = knob(
        0.01, "First noise on the latent, in standard deviations of w.", STAGES, low=0, rare=True
    )
    fresh_rays: bool = knob(False, "Draw other ray samples in every step.", STAGES, rare=True)
    sample_mult: float = knob(2.0, "Times the network's samples per ray.", STAGES, above=0, rare=True)
    seed: int = knob(0, "Of noise and ray samples.", STAGES, low=0, flag=False)  # that of the run
    lambda_mse: float = knob(
        10.0, "Weight of the mean squared error, images in [-1, 1].", LOSS, low=0, rare=True
    )
    lambda_w: float = knob(
        0.03, "Weight of the mean squared distance to the mean latent.", LOSS, low=0, rare=True
    )
    lambda_sigma: float = knob(
        0.01,
        "Weight of the density's change from the pivot, where the reward's is above 0.",
        LOSS,
        low=0,
        rare=True,
    )
    reward_every: int = knob(
        2,
        "Steps between two looks at the density; its terms count as often as they are left out.",
        LOSS,
        low=1,
        rare=True,
    )
    reward_in_w: bool = knob(
        False, "Let the reward act in the second half of the first stage, too.", LOSS, rare=True
    )

    def __post_init__(self):
        check_knobs(self)


PUBLISHED = {
    "w_steps": 500,
    "pivot_steps": 500,
    "noise": 0.05,
    "fresh_rays": True,
    "sample_mult": 1.0,
    "lambda_mse": 0.1,
    "lambda_w": 1.0,
}
