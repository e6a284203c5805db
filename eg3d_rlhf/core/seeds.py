"""Ranges of seeds: held-out seeds, and the parts of the project that use each range.

All ranges are written down here and nowhere else. A seed gives a latent, z = RandomState(seed).randn(z_dim).
Rewards are trained on labels of some seeds. Every evaluation of a reward, or of a generator that was tuned
with it, uses other seeds. Labels may use every seed that is not held out: the bundled labels use about
0..3999, and new campaigns begin at 10,000. A report shifts each of its ranges by STRIDE per unit of --seed,
beyond all other ranges.
"""

from collections.abc import Iterable
from dataclasses import dataclass

# First seed of a reward's high-quality reference samples. Not held out: seeds with labels are skipped.
ANCHORS = 100_000
# First seed of the ground-truth heads that the shape features are trained on. Not held out; no other use.
TRUE_HEADS = 400_000
STRIDE = 1_000_000  # larger than every seed below, so that shifted ranges do not overlap


@dataclass(frozen=True)
class HeldOut:
    """A range of seeds that no training may use."""

    name: str
    first: int
    count: int
    drawn_by: str  # the parts of the project that use it
    moved: bool = False  # True: --seed of a report shifts the range

    @property
    def all(self) -> range:
        """Return all seeds of the range, not shifted."""
        return range(self.first, self.first + self.count)

    def take(self, n: int, move: int = 0) -> range:
        """Return the first n seeds, shifted by `move` strides.

        Raises: ValueError if the range has fewer.
        """
        if n > self.count:
            raise ValueError(
                f"{self.name} seeds: expected at most {self.count:,}, got {n:,}. Use a smaller number."
            )
        start = self.first + STRIDE * move
        return range(start, start + n)


LATENTS = HeldOut("latents", 200_000, 10_000, "reports, and a run's summary (the first 100)", moved=True)
EVALUATION = HeldOut(
    "evaluation",
    210_000,
    200,
    "a run's summary (pairs that the oracle labels, images, meshes) and the images of reports",
    moved=True,
)
GEOMETRY = HeldOut("geometry", 220_000, 40, "a run's summary")
SHAPES = HeldOut("shapes", 221_000, 400, "a run's summary (shape Fréchet distance)")
IMAGES = HeldOut(
    "images",
    230_000,
    70_000,
    "distances to the data, in reports and a run's summary (the first 500)",
    moved=True,
)
MONITOR = HeldOut("monitor", 300_000, 32, "the held-out reward that detects over-optimisation during tuning")
CALIBRATION = HeldOut(
    "calibration",
    500_000,
    128,
    "the reward phase before tuning: calibration of reward shaping and gradient clipping",
)
STANDARDISATION = HeldOut(
    "standardisation",
    505_000,
    200,
    "reward phase and inversions: mean and standard deviation of the standardised reward",
)
SCALES = HeldOut("scales", 510_000, 256, "ensembles of rewards before tuning: the scale of each member")
BEST_OF_N = HeldOut(
    "best-of-n", 520_000, 10_000, "the best-of-n report, which may select rewards", moved=True
)
ALIGNMENT = HeldOut(
    "alignment",
    540_000,
    1_024,
    "scores across generators: position of shapes, scale of density, the reward's training distribution",
)
INVERSION = HeldOut(
    "inversion", 550_000, 64, "targets of the table of inversions (eg3d-rlhf generator invert --latents)"
)
DISTILLED = HeldOut("distilled", 560_000, 1_024, "initial shapes of text-to-3D on head generators")
VALIDATION = HeldOut(
    "validation", 590_000, 100, "choice of post-processing filters and settings, before a controlled study"
)
HELD_OUT = (
    LATENTS,
    EVALUATION,
    GEOMETRY,
    SHAPES,
    IMAGES,
    MONITOR,
    CALIBRATION,
    STANDARDISATION,
    SCALES,
    BEST_OF_N,
    ALIGNMENT,
    INVERSION,
    DISTILLED,
    VALIDATION,
)


def refuse_held_out(seeds: Iterable[int], who: str) -> None:
    """Raise ValueError that names the first of `seeds` that is held out."""
    for seed in seeds:
        # The ranges do not overlap, so the first match is the only one.
        for held in HELD_OUT:
            # The shift that a seed of a report's --seed would have; ranges that do not move have no shift.
            move = seed // STRIDE if held.moved else 0
            if seed - STRIDE * move in held.all:
                reserved = held.take(held.count, move)
                name = held.name + (f" of --seed={move}" if move else "")
                raise ValueError(
                    f"{who}: expected seeds that are not held out, got {seed} ({name}, {reserved[0]} to"
                    f" {reserved[-1]}). Choose other seeds."
                )
