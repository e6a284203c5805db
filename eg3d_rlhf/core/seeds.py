"""Ranges of latent seeds that are reserved for one purpose, above all for evaluation (held-out seeds).

No other module defines such a range. A seed defines a latent: z = RandomState(seed).randn(z_dim). Rewards are
trained on labels of some seeds. Every evaluation of a reward, or of a generator that was tuned with it, uses
other seeds. Labels may use every seed that is not held out: the bundled labels use seeds from about 0 to
3999, and new labelling projects begin at 10,000. A report with --seed=S shifts each of its ranges by S *
STRIDE, beyond all other ranges.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MAX_SEEDS = 100_000  # largest number of seeds of one command
_LARGEST = 2**32 - 1  # largest seed of numpy's RandomState
# First seed of a reward's reference samples (high-quality samples at low truncation). They are not held out;
# seeds that have labels are skipped.
REFERENCE_SAMPLES = 100_000
# First seed of the ground-truth heads that the shape features are trained on. They are not held out, but
# nothing else uses them.
GROUND_TRUTH_HEADS = 400_000
# First seed of the unlabelled samples from which steering and linear rewards compute principal components and
# regressions. They are not held out, but no label and no evaluation uses them.
UNLABELLED_SAMPLES = 450_000
STRIDE = 1_000_000  # larger than every seed below, so that shifted ranges do not overlap


@dataclass(frozen=True)
class HeldOut:
    """A range of latent seeds that no training of a reward or generator may use."""

    name: str  # name of the range in messages
    first: int  # smallest seed
    count: int  # number of seeds
    used_by: str  # commands, phases or reports that use the range
    shifted: bool = False  # True: a report shifts the range by STRIDE per unit of its --seed

    @property
    def seeds(self) -> range:
        """Return all seeds of the range without any shift."""
        return range(self.first, self.first + self.count)

    def take(self, n: int, shift_count: int = 0) -> range:
        """Return the first n seeds of the range, shifted by `shift_count` * STRIDE.

        Raises: ValueError if the range has fewer than n seeds.
        Args:
            n: number of seeds.
            shift_count: number of strides by which the range is shifted; a report passes its --seed.
        """
        if n > self.count:
            raise ValueError(
                f"The held-out range {self.name!r} has {self.count:,} seeds, but {n:,} were requested."
                f" Request at most {self.count:,}."
            )
        first_seed = self.first + STRIDE * shift_count
        return range(first_seed, first_seed + n)


LATENTS = HeldOut("latents", 200_000, 10_000, "reports, and a run's summary (the first 100)", shifted=True)
EVALUATION = HeldOut(
    "evaluation",
    210_000,
    200,
    "a run's summary (pairs that the oracle labels, images, meshes) and the images of reports",
    shifted=True,
)
GEOMETRY = HeldOut("geometry", 220_000, 40, "a run's summary")
SHAPES = HeldOut("shapes", 221_000, 400, "a run's summary (shape Fréchet distance)")
IMAGES = HeldOut(
    "images",
    230_000,
    70_000,
    "distances to the data, in reports and a run's summary (the first 500)",
    shifted=True,
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
    "best-of-n", 520_000, 10_000, "the best-of-n report, which may select rewards", shifted=True
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
STEERING = HeldOut(
    "steering", 600_000, 256, "steering of latents: rewards and harm before and after, and its page"
)
BUILDER = HeldOut(
    "builder", 610_000, 1_000, "images and checks while the bundled generator of heads is trained (builders/)"
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
    STEERING,
    BUILDER,
)


def reject_held_out_seeds(seeds: Iterable[int], message_start: str) -> None:
    """Raise ValueError, which names the first held-out seed, if any seed is held out.

    Args: seeds: latent seeds; message_start: start of the message, such as a flag.
    """
    for seed in seeds:
        # The ranges do not overlap, so the first match is the only one.
        for held_out_range in HELD_OUT:
            # A report with --seed=S uses this range shifted by S * STRIDE: the shift of this seed.
            shift_count = seed // STRIDE if held_out_range.shifted else 0
            if seed - STRIDE * shift_count in held_out_range.seeds:
                reserved_seeds = held_out_range.take(held_out_range.count, shift_count)
                range_name = held_out_range.name + (f" of --seed={shift_count}" if shift_count else "")
                raise ValueError(
                    f"{message_start}: seed {seed} is held out for evaluation (range {range_name},"
                    f" {reserved_seeds[0]} to {reserved_seeds[-1]}). Choose seeds outside this range."
                )


def parse_seeds(seed_list: str) -> list[int]:
    """Parse a comma-separated list of numbers and inclusive ranges: '0,2-5' -> [0, 2, 3, 4, 5].

    The seeds have the order of the text.

    Raises:
        ValueError: the text is empty or contains something other than numbers and ranges, a range descends, a
            seed is above 2^32 - 1, or there are more than 100,000 seeds.
    """
    seeds: list[int] = []
    for seed_range in seed_list.split(","):
        start_text, separator, end_text = (piece.strip() for piece in seed_range.partition("-"))
        if not start_text.isdecimal() or (separator and not end_text.isdecimal()):
            raise ValueError(
                f"seeds: {seed_range.strip()!r} in {seed_list!r} is not a number or a range. Write numbers"
                " and ranges such as 0,2-5."
            )
        first_seed = int(start_text)
        last_seed = int(end_text or start_text)  # a number is a range of one seed
        if first_seed > last_seed:
            raise ValueError(
                f"seeds: the range {seed_range.strip()!r} descends. Write the smaller seed before the larger"
                " one."
            )
        if last_seed > _LARGEST:
            raise ValueError(
                f"seeds: {seed_range.strip()!r} contains a seed above {_LARGEST}, the largest seed of numpy."
                " Use smaller seeds."
            )
        # The number is checked before the range is expanded: a huge range would fill the memory.
        if len(seeds) + last_seed - first_seed >= MAX_SEEDS:
            raise ValueError(
                f"seeds: at most {MAX_SEEDS} seeds are allowed, but {seed_list!r} contains more. Divide the"
                " seeds among several commands."
            )
        seeds += range(first_seed, last_seed + 1)
    return seeds
