"""Settings of reports and what their flags may name; imports no torch."""

from dataclasses import dataclass

from eg3d_rlhf.core.seeds import ALIGNMENT, EVALUATION, LATENTS, VALIDATION
from training.config import check_knobs, knob


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How many latents, and what is fitted on how many others."""

    n: int = knob(100, "Latents that are scored.", "Samples", metavar="LATENTS", low=16, high=LATENTS.count)
    psi: float = knob(0.7, "Truncation.", "Samples", above=0, high=2)
    cutoff: int = knob(14, "Layers that truncation reaches.", "Samples", low=0, rare=True)
    seed: int = knob(0, "Other held-out latents per seed.", "Samples", low=0, rare=True)
    fit: int = knob(
        64,
        "Further latents behind alignment and calibration.",
        "Samples",
        metavar="LATENTS",
        low=8,
        high=ALIGNMENT.count,
        rare=True,
    )
    known: int = knob(
        256,
        "Further latents of the reference that show what the reward knows.",
        "Samples",
        metavar="LATENTS",
        low=16,
        high=ALIGNMENT.count,
        rare=True,
    )
    resolution: int = knob(
        64,
        "Edge of the cubes in which surfaces are looked for.",
        "Samples",
        metavar="VOXELS",
        low=24,
        high=256,
    )
    batch: int = knob(8, "Shapes at once; bounds memory.", "Run", low=1, rare=True)

    def __post_init__(self) -> None:
        check_knobs(self)


CHOOSE = 4  # untuned shapes that the best is chosen of
PLACES = {"evaluation": EVALUATION, "validation": VALIDATION}
LABELS = "labels"
RANDOMISED = "randomised"
INVERTED = "inverted"
POST_PROCESSING = "post-processing"
ARMS = {  # words of the table
    LABELS: "labels",
    "no-reward": "no reward (λ_r 0)",
    POST_PROCESSING: "best label-free post-processing that leaves intact heads alone",
    "truncation": "truncation, as many intact heads",
    "smoothness": "a reward that likes smooth surfaces",
    "permuted": "the reward, weights permuted",
    RANDOMISED: "randomised labels",
    INVERTED: "inverted labels",
}
