"""Settings of the steering of latents. This module does not import torch, so that `--help` is quick."""

import math
from dataclasses import dataclass

from training.config import check_knobs, knob

SPACES = ("auto", "z", "w")
AUTO = "auto"  # value of `strength` that lets a held-out reward choose the strength
AUTO_LABELS = 200  # least number of labels for it
GRID = tuple(0.5 * step for step in range(1, 7))  # strengths of the frontier and of the page
DEFAULT_STRENGTH = 1.0


@dataclass(frozen=True, kw_only=True)
class SteerOptions:
    """Settings of a steering.

    Raises: ValueError for a value that is not allowed.
    """

    space: str = knob(
        "auto",
        "Space of the direction. auto takes z unless w is more accurate on held-out labels, significantly and"
        " by at least 3 percentage points.",
        "Direction",
        choices=SPACES,
    )
    strength: str = knob(
        "1",
        "Threshold along the direction, in standard deviations: samples below it are moved to it. auto"
        f" chooses it by a held-out reward and needs at least {AUTO_LABELS} labels. 0 writes the network"
        " without steering.",
        "Direction",
        metavar="FLOAT|auto",
    )
    layers: int | None = knob(
        None,
        "Number of first layers whose style vectors are moved. Only with --space=w.",
        "Direction",
        metavar="INT",
        shown="all",
        low=1,
        rare=True,
    )
    unlabelled: int = knob(
        600,
        "Number of unlabelled samples, from which principal components and the direction are computed.",
        "Direction",
        metavar="SEEDS",
        low=16,
        high=20_000,
        rare=True,
    )
    resolution: int = knob(
        32,
        "Number of grid points per axis of the density grid that the reward reads.",
        "Direction",
        low=8,
        high=256,
        rare=True,
    )
    latents: int = knob(
        48,
        "Number of held-out latents on which the rewards before and after are compared.",
        "Report",
        low=8,
        high=256,
        rare=True,
    )
    seed: int = knob(0, "Random seed of the folds, the splits and the control.", "Direction", low=0)

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.strength != AUTO:
            try:
                threshold = float(self.strength)
            except ValueError:
                threshold = math.nan
            if not (math.isfinite(threshold) and threshold >= 0):
                raise ValueError(
                    f"--strength: expected a number of standard deviations >= 0, or auto, got"
                    f" {self.strength!r}. Use --strength=1."
                )
        if self.layers is not None and self.space != "w":
            raise ValueError(
                f"--layers={self.layers} applies only to style vectors. Add --space=w, or remove --layers."
            )

    @property
    def threshold(self) -> float | None:
        """Strength as a number; None if a held-out reward chooses it."""
        return None if self.strength == AUTO else float(self.strength)
