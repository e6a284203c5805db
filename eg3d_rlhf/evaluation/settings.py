"""Settings of reports, and the names that their flags accept.

This module does not import torch, so that --help is fast.
"""

from dataclasses import dataclass

from eg3d_rlhf.core.seeds import ALIGNMENT, EVALUATION, LATENTS, VALIDATION
from training.config import check_knobs, knob

STEERING_LABELS = (25, 50, 100, 200, 500, 2000)  # numbers of labels of the study of steering
STEERING_LABEL_KINDS = ("labels", "randomised", "inverted")  # what its labels are
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
HELD_OUT_RANGES = {"evaluation": EVALUATION, "latents": LATENTS, "validation": VALIDATION}
LABELS = "labels"
RANDOMISED = "randomised"  # each pair's winner is random
INVERTED = "inverted"  # winner and loser of each pair are exchanged
POST_PROCESSING = "post-processing"
TRUNCATION = "truncation"
# Arm -> number of labels with which the latents are moved; None: all labels of a set.
STEERING_ARMS = {"steering-25": 25, "steering-100": 100, "steering-all": None}
STEERED_TUNED = "steered-tuned"  # tuned from the network that was steered by all labels
SEARCH = "search"
UNSUPERVISED = "unsupervised"
# Arm -> filter of evaluation/baselines, which is applied where it changes more than a share of the volume.
WEIGHED_ARMS = {
    "weighed-closing": "morphological closing",
    "weighed-median-back": "median back",
    "weighed-mean-back": "mean back",
    "weighed-psi-0-back": "psi 0 at the back",
}
# Arms of the controlled study, with their names in the table. `compare` in controlled_study/results.py needs
# LABELS to be the first one.
ARMS = {
    LABELS: "labels",
    "steering-25": "latents moved by 25 labels, no tuning",
    "steering-100": "latents moved by 100 labels, no tuning",
    "steering-all": "latents moved by all labels, no tuning",
    STEERED_TUNED: "latents moved by all labels, then tuned",
    SEARCH: "search in w where the reward is low, no tuning",
    UNSUPERVISED: "best unsupervised direction by the reward, no tuning",
    "weighed-closing": "closing, weighed",
    "weighed-median-back": "median back, weighed",
    "weighed-mean-back": "mean back, weighed",
    "weighed-psi-0-back": "ψ 0 at the back, weighed",
    "no-reward": "no reward (λ_r 0)",
    POST_PROCESSING: "best label-free post-processing that leaves intact heads alone",
    TRUNCATION: "truncation, as many intact heads",
    "smoothness": "a label-free reward for smooth surfaces",
    "permuted": "the reward, weights permuted",
    RANDOMISED: "randomised labels",
    INVERTED: "inverted labels",
}
# Arms of the pre-registered criterion. The other arms were added after it was fixed.
PRE_REGISTERED_ARMS = (
    LABELS,
    "no-reward",
    POST_PROCESSING,
    TRUNCATION,
    "smoothness",
    "permuted",
    RANDOMISED,
    INVERTED,
)
# Arms that change latents or shapes of the untuned network, so that they have no run of train.py.
ARMS_WITHOUT_RUNS = (
    *STEERING_ARMS,
    SEARCH,
    UNSUPERVISED,
    *WEIGHED_ARMS,
    POST_PROCESSING,
    TRUNCATION,
)
