"""Which seeds are held out, and who may draw them: the only place where a range of seeds is written down.

A seed names a latent, z = RandomState(seed).randn(z_dim). Rewards learn from labels about some seeds;
whatever judges a reward, or a generator that was tuned with it, draws others. Labels may use every seed that
is not held out; the bundled ones are about 0..3999, new campaigns begin at 10000. Reports move every range of
theirs by STRIDE for each --seed, beyond all the others.
"""

from collections.abc import Iterable
from dataclasses import dataclass

# first seed of a reward's high-quality anchors; not held out: they pass over seeds that are labelled
ANCHORS = 100_000
# first of the latents whose heads the shape features learn from; not held out, and used by nothing else
TRUE_HEADS = 400_000
STRIDE = 1_000_000


@dataclass(frozen=True)
class HeldOut:
    """A range that nothing may learn from."""

    name: str
    first: int
    count: int
    drawn_by: str
    moved: bool = False  # whether --seed of a report moves it

    @property
    def all(self) -> range:
        return range(self.first, self.first + self.count)

    def take(self, n: int, move: int = 0) -> range:
        """The first n seeds, moved by `move` strides.

        Raises: ValueError where there are fewer.
        """
        if n > self.count:
            raise ValueError(f"{self.name} seeds: expected at most {self.count:,}, got {n:,}. Ask for fewer.")
        start = self.first + STRIDE * move
        return range(start, start + n)


LATENTS = HeldOut("latents", 200_000, 10_000, "reports, and a run's summary (the first 100)", moved=True)
EVALUATION = HeldOut(
    "evaluation",
    210_000,
    200,
    "a run's summary (oracle-labelled pairs; images and meshes), images of reports",
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
MONITOR = HeldOut("monitor", 300_000, 32, "the monitor for over-optimisation, during tuning")
CALIBRATION = HeldOut(
    "calibration", 500_000, 128, "the reward phase, for its shaping and its clip, before tuning"
)
STANDARDISATION = HeldOut(
    "standardisation",
    505_000,
    200,
    "reward phase and inversions: mean and standard deviation of the standardised reward",
)
SCALES = HeldOut(
    "scales", 510_000, 256, "ensembles of rewards, to put their members on one scale, before tuning"
)
BEST_OF_N = HeldOut(
    "best-of-n", 520_000, 10_000, "the best-of-n report, by which rewards may be chosen", moved=True
)
ALIGNMENT = HeldOut(
    "alignment",
    540_000,
    1_024,
    "scores across generators: where shapes lie, scale of density, what the reward knows",
)
INVERSION = HeldOut(
    "inversion", 550_000, 64, "targets of the table of inversions (eg3d-rlhf generator invert --latents)"
)
DISTILLED = HeldOut("distilled", 560_000, 1_024, "shapes that text to 3D on heads of people starts from")
VALIDATION = HeldOut(
    "validation", 590_000, 100, "the choice of filters and settings, before a controlled study"
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
    """Raise ValueError naming the first of `seeds` that is held out."""
    for seed in seeds:
        for held in HELD_OUT:
            move = seed // STRIDE if held.moved else 0
            if seed - STRIDE * move in held.all:
                found = held.take(held.count, move)
                name = held.name + (f" of --seed={move}" if move else "")
                raise ValueError(
                    f"{who}: expected seeds that are not held out, got {seed} ({name}, {found[0]} to"
                    f" {found[-1]}). Choose others."
                )
