"""Settings of an attribution study. This module does not import torch, so that --help is fast."""

from dataclasses import dataclass
from pathlib import Path

METHODS = ("exact", "permutation", "antithetic")  # methods of `shapley.shapley`
# The attributions must sum to the reward difference; this is the largest error, as a share of the difference.
BOUND = 0.01
STEPS = 32  # first number of steps of the integral of Integrated Gradients
MAX_STEPS = 1024  # the number of steps is doubled up to this number until the sum is close enough
# Kinds of regions. Any other value of --regions is the path of a label volume.
BOXES = "boxes"  # fixed boxes of the slab
LANDMARKS = "landmarks"  # boxes around groups of landmarks
HEAD = "head"  # eight parts of the head, divided at the landmarks
PEOPLE = "people"  # parts of the ground-truth head


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of an attribution study."""

    method: str = "exact"  # one of METHODS
    regions: str | Path = BOXES  # BOXES, LANDMARKS, HEAD, PEOPLE or the path of a label volume
    landmarks: Path | None = None  # JSON file of 2-D points
    permutations: int = 64  # number of random orders of the sampled methods
    steps: int = STEPS  # first number of steps of the integral
    most_steps: int = MAX_STEPS  # largest number of steps of the integral
    gap_bound: float = BOUND  # largest efficiency gap, as a share of the reward difference
    randomisations: int = 8  # number of rewards with randomised weights
    checked: int = 2  # number of latents that this check attributes

    def __post_init__(self) -> None:
        # Antithetic orders come in pairs, and a standard error needs at least two pairs.
        if self.method == "antithetic" and (self.permutations < 4 or self.permutations % 2):
            raise ValueError(
                f"--permutations={self.permutations}: --method=antithetic needs an even number >= 4, since"
                " orders come in pairs. Pass such a number."
            )
        if self.steps > self.most_steps:
            raise ValueError(
                f"--steps={self.steps} exceeds --most-steps={self.most_steps}. Lower --steps: the number of"
                " steps is doubled automatically where necessary."
            )
        if self.landmarks is not None and self.regions not in (LANDMARKS, HEAD):
            raise ValueError(
                f"--landmarks has no effect with --regions={self.regions}. Remove --landmarks, or use"
                " --regions=landmarks or --regions=head."
            )
