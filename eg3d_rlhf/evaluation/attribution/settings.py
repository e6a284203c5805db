"""Settings of an attribution study; imports no torch."""

from dataclasses import dataclass
from pathlib import Path

METHODS = ("exact", "permutation", "antithetic")
BOUND = 0.01  # completeness gap, as a share of the reward difference
STEPS = 32
MOST_STEPS = 1024
BOXES = "boxes"
LANDMARKS = "landmarks"
HEAD = "head"
PEOPLE = "people"


@dataclass(frozen=True, kw_only=True)
class Settings:
    method: str = "exact"
    regions: str | Path = BOXES  # BOXES, LANDMARKS, HEAD, PEOPLE or a label volume
    landmarks: Path | None = None  # JSON of 2-D points
    permutations: int = 64  # of the sampled methods
    steps: int = STEPS  # of the integral, at first
    most_steps: int = MOST_STEPS
    gap_bound: float = BOUND  # largest efficiency gap, as a share of the reward difference
    randomisations: int = 8  # rewards with randomised weights
    checked: int = 2  # latents behind that check

    def __post_init__(self) -> None:
        if self.method == "antithetic" and (self.permutations < 4 or self.permutations % 2):
            raise ValueError(
                f"--permutations: expected an even number >= 4 for antithetic pairs, got {self.permutations}."
                " Change it."
            )
        if self.steps > self.most_steps:
            raise ValueError(
                f"--steps: expected at most --most-steps={self.most_steps}, got {self.steps}. It doubles by"
                " itself."
            )
        if self.landmarks is not None and self.regions not in (LANDMARKS, HEAD):
            raise ValueError(
                f"--landmarks: expected --regions=landmarks or head beside it, got --regions={self.regions}."
                " Change one."
            )
