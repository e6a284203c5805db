"""Settings of reports, and the names that their flags accept. Imports no torch, so that --help is fast."""

from dataclasses import dataclass

from eg3d_rlhf.core.seeds import ALIGNMENT, EVALUATION, LATENTS, VALIDATION
from training.config import check_knobs, knob


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Numbers of latents that are scored, and of others on which alignment and calibration are fitted."""

    n: int = knob(
        100, "Number of latents to score.", "Samples", metavar="LATENTS", low=16, high=LATENTS.count
    )
    psi: float = knob(0.7, "Truncation psi; 1 does not truncate.", "Samples", above=0, high=2)
    cutoff: int = knob(14, "Number of layers that truncation affects.", "Samples", low=0, rare=True)
    seed: int = knob(0, "Selects other held-out latents.", "Samples", low=0, rare=True)
    fit: int = knob(
        64,
        "Number of further latents on which alignment and calibration are fitted.",
        "Samples",
        metavar="LATENTS",
        low=8,
        high=ALIGNMENT.count,
        rare=True,
    )
    known: int = knob(
        256,
        "Number of further latents of the reference generator that define the reward's known range.",
        "Samples",
        metavar="LATENTS",
        low=16,
        high=ALIGNMENT.count,
        rare=True,
    )
    resolution: int = knob(
        64,
        "Edge of the density grids from which surfaces are extracted.",
        "Samples",
        metavar="VOXELS",
        low=24,
        high=256,
    )
    batch: int = knob(8, "Shapes per batch; a smaller number needs less memory.", "Run", low=1, rare=True)

    def __post_init__(self) -> None:
        check_knobs(self)  # raises ValueError for a value outside its range


CHOOSE = 4  # n of the best-of-n control: untuned shapes of which the reward selects one
PLACES = {"evaluation": EVALUATION, "validation": VALIDATION}  # of --held-out
LABELS = "labels"
RANDOMISED = "randomised"  # each pair's winner is random
INVERTED = "inverted"  # winner and loser change places
POST_PROCESSING = "post-processing"
ARMS = {  # of the controlled study, with the words of its table
    LABELS: "labels",
    "no-reward": "no reward (λ_r 0)",
    POST_PROCESSING: "best label-free post-processing that leaves intact heads alone",
    "truncation": "truncation, as many intact heads",
    "smoothness": "a label-free reward for smooth surfaces",
    "permuted": "the reward, weights permuted",
    RANDOMISED: "randomised labels",
    INVERTED: "inverted labels",
}
