"""Settings of reports, and the names that their flags accept.

This module does not import torch, so that --help is fast.
"""

from dataclasses import dataclass

from eg3d_rlhf.core.seeds import ALIGNMENT, EVALUATION, LATENTS, VALIDATION
from training.config import check_knobs, knob

STEERING_LABELS = (25, 50, 100, 200, 500, 2000)  # numbers of labels of the study of steering
STEERING_ARMS = ("labels", "randomised", "inverted")  # what its labels are
# Labels of pairs that the posterior of a linear reward chose; not among the arms by default
ACTIVE = "active"


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Settings of a comparison of several generators by one reward (foreign_scores.py)."""

    n: int = knob(
        100, "Number of latents to score.", "Samples", metavar="LATENTS", low=16, high=LATENTS.count
    )
    psi: float = knob(
        0.7, "Truncation psi of the latents. With 1, latents are not truncated.", "Samples", above=0, high=2
    )
    cutoff: int = knob(14, "Number of synthesis layers that truncation affects.", "Samples", low=0, rare=True)
    seed: int = knob(
        0,
        "Number that selects the held-out latents. Another number selects other latents.",
        "Samples",
        low=0,
        rare=True,
    )
    fit: int = knob(
        64,
        "Number of latents on which the alignment and the density calibration of a generator are fitted. They"
        " are not scored.",
        "Samples",
        metavar="LATENTS",
        low=8,
        high=ALIGNMENT.count,
        rare=True,
    )
    known: int = knob(
        256,
        "Number of latents of the reference generator whose embeddings define which shapes are outside the"
        " reward's training distribution. They are not scored.",
        "Samples",
        metavar="LATENTS",
        low=16,
        high=ALIGNMENT.count,
        rare=True,
    )
    resolution: int = knob(
        64,
        "Number of voxels per edge of the density grids from which surfaces are extracted.",
        "Samples",
        metavar="VOXELS",
        low=24,
        high=256,
    )
    batch: int = knob(
        8, "Number of shapes per batch. A smaller number needs less memory.", "Run", low=1, rare=True
    )

    def __post_init__(self) -> None:
        check_knobs(self)  # raises ValueError for a value outside its range


CHOOSE = 4  # n of the best-of-n control: untuned shapes of which the reward selects one
# value of --held-out -> range of seeds
HELD_OUT_RANGES = {"evaluation": EVALUATION, "validation": VALIDATION}
LABELS = "labels"
RANDOMISED = "randomised"  # each pair's winner is random
INVERTED = "inverted"  # winner and loser of each pair are exchanged
POST_PROCESSING = "post-processing"
# Arms of the controlled study, with their names in the table. `compare` in controlled_study.py needs LABELS
# to be the first one.
ARMS = {
    LABELS: "labels",
    "no-reward": "no reward (λ_r 0)",
    POST_PROCESSING: "best label-free post-processing that leaves intact heads alone",
    "truncation": "truncation, as many intact heads",
    "smoothness": "a label-free reward for smooth surfaces",
    "permuted": "the reward, weights permuted",
    RANDOMISED: "randomised labels",
    INVERTED: "inverted labels",
}
