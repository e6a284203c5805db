"""Settings of an attribution study; imports no torch."""

from dataclasses import dataclass
from pathlib import Path

METHODS = ("exact", "permutation", "antithetic")  # of `shapley.shapley`
BOUND = 0.01  # largest completeness gap, as a share of the reward difference
STEPS = 32  # of the integral of Integrated Gradients, at first
# The step count doubles up to this number.
MOST_STEPS = 1024
# Kinds of regions; any other value is the path of a label volume.
BOXES = "boxes"
LANDMARKS = "landmarks"
HEAD = "head"
PEOPLE = "people"


@dataclass(frozen=True, kw_only=True)
class Settings:
    method: str = "exact"  # one of METHODS
    regions: str | Path = BOXES  # BOXES, LANDMARKS, HEAD, PEOPLE or a label volume
    landmarks: Path | None = None  # JSON of 2-D points
    permutations: int = 64  # number of random orders of the sampled methods
    steps: int = STEPS  # of the integral, at first
    most_steps: int = MOST_STEPS
    gap_bound: float = BOUND  # largest efficiency gap, as a share of the reward difference
    randomisations: int = 8  # number of rewards with randomised weights
    checked: int = 2  # number of latents that this check attributes

    def __post_init__(self) -> None:
        # Antithetic orders come in pairs, and a standard error needs at least two pairs.
        if self.method == "antithetic" and (self.permutations < 4 or self.permutations % 2):
            raise ValueError(
                f"--permutations: expected an even number >= 4 for antithetic pairs, got {self.permutations}."
                " Change it."
            )
        if self.steps > self.most_steps:
            raise ValueError(
                f"--steps: expected at most --most-steps={self.most_steps}, got {self.steps}. Lower --steps:"
                " the count doubles automatically."
            )
        if self.landmarks is not None and self.regions not in (LANDMARKS, HEAD):
            raise ValueError(
                f"--landmarks: expected --regions=landmarks or head beside it, got --regions={self.regions}."
                " Change one."
            )
