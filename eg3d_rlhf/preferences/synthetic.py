"""Preference labels without people: seeds of a generator, judged by the programmatic annotator.

Shape letters: S = seeds, P = pairs, N = samples in a batch; a cube is [D=z, H=y, W=x].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.seeds import refuse_held_out
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator, ws_of_seeds
from eg3d_rlhf.preferences.annotator import (
    ANNOTATOR,
    DEFAULT_CALIBRATION,
    Calibration,
    PairLabel,
    UtilityResult,
    Weights,
    calibrate,
    disjoint_pairs,
    label_pairs,
    solve_temperature,
    utility,
)
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.unpaired import BAD, GOOD, SCALE, UnpairedPreference
from training.config import check_knobs, knob

KINDS = ("pairs", "thumbs", "scores")
SHARE = 0.47  # of all shapes, that are preferred, and that are not; those in between have no thumb


@dataclass(frozen=True, kw_only=True)
class AnnotationOptions:
    """What is sampled and how noisy the judgement is."""

    pairs: int = knob(2000, "Pairs; a seed is used once.", "Samples", low=1)  # P
    first_seed: int = knob(0, "First of the 2 * pairs seeds.", "Samples", low=0)
    psi: float = knob(1.0, "Truncation.", "Samples", low=0)
    cutoff: int = knob(14, "ws that truncation reaches.", "Samples", low=0)
    resolution: int = knob(64, "Edge of the judged cube.", "Judgement", metavar="VOXELS", low=16, high=256)
    kind: str = knob("pairs", "Judge pairs, or single shapes by thumbs or scores.", "Judgement", choices=KINDS)
    flip_rate: float = knob(0.10, "Expected share of labels against the noise-free order.", "Judgement", metavar="0..0.5", low=0, below=0.5)
    calibrate: int = knob(
        0, "Calibrate the annotator on so many of the seeds; 0 keeps its fixed calibration.", "Judgement", metavar="CUBES", low=0
    )
    seed: int = knob(0, "Seed of pairing and noise.", "Judgement", low=0)
    batch: int = knob(16, "Latents synthesised at once.", "General", low=1)

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.calibrate and not 4 <= self.calibrate <= 2 * self.pairs:
            raise ValueError(f"AnnotationOptions: expected calibrate 0 or 4 .. {2 * self.pairs} cubes, got {self.calibrate}.")
        refuse_held_out(self.seeds, "--first-seed")

    @property
    def seeds(self) -> range:
        """What is labelled."""
        return range(self.first_seed, self.first_seed + 2 * self.pairs)


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Labels with everything that is needed to repeat or audit them."""

    options: AnnotationOptions
    labels: list[PairLabel]  # winner and loser are seeds
    utilities: np.ndarray  # [2 P] by seed - first_seed, or in the order of the pairs that were handed in
    temperature: float
    calibration: Calibration

    def preferences(self, generator: str) -> list[Preference]:
        """The labels in the open format; `generator` is the sampled network's hash. No time: equal options give equal bytes."""
        common: dict[str, Any] = {"generator": generator, "psi": self.options.psi, "annotator": ANNOTATOR}
        return [
            Preference(winner=label.winner, loser=label.loser, clean=label.winner if label.clean else label.loser, **common)
            for label in self.labels
        ]

    def unpaired(self, generator: str, shuffled: bool = False) -> list[UnpairedPreference]:
        """Labels of single shapes, by the rank of the utility with noise as pairs have it: utility + temperature * Gumbel's distribution.

        The upper and the lower 47 % of the shapes are preferred and not; scores are straight lines within these, and in between.

        Args: shuffled: labels dealt to the shapes at random, a control from which nothing can be learnt.
        """
        rng, count, seeds = np.random.default_rng([self.options.seed, 3]), len(self.utilities), self.options.seeds
        quantile = [(np.argsort(np.argsort(values)) + 0.5) / count  # [2 P] each
                    for values in (self.utilities + self.temperature * rng.gumbel(size=count), self.utilities)]
        given, clean = (np.interp(q, [0, SHARE, 1 - SHARE, 1], [0, BAD, GOOD, SCALE]) for q in quantile)
        given = rng.permutation(given) if shuffled else given
        common: dict[str, Any] = {"generator": generator, "psi": self.options.psi, "annotator": ANNOTATOR + ("-shuffled" * shuffled)}
        labels = [
            UnpairedPreference(seed=seed, score=round(float(score), 3), clean=bool(true >= (GOOD + BAD) / 2), **common)
            for seed, score, true in zip(seeds, given, clean, strict=True)
        ]
        if self.options.kind == "scores":
            return labels
        return [replace(label, score=None, label=label.preferred) for label in labels if label.preferred is not None]

    def summary(self) -> dict:
        """Settings and outcome as JSON values."""
        quantiles = np.quantile(self.utilities, [0, 0.25, 0.5, 0.75, 1])
        return {
            **asdict(self.options),
            "temperature": self.temperature,
            "flipped": sum(not label.clean for label in self.labels),
            "utility_quantiles": [round(float(value), 6) for value in quantiles],
            "calibration": self.calibration.to_dict(),
            "weights": asdict(Weights()),
        }


def seed_cubes(generator: Generator, seeds: Sequence[int], options: AnnotationOptions) -> Iterator[np.ndarray]:
    """Raw density cubes [D, H, W] of seeds over the whole scene, one after the other."""
    spec = SlabSpec.of(generator.bounds, options.resolution)
    for start in range(0, len(seeds), options.batch):
        ws = ws_of_seeds(generator, seeds[start : start + options.batch], options.psi, options.cutoff)
        with torch.no_grad():
            sigma = generator.field(ws).density_grid(spec)
        yield from sigma.cpu().numpy()


def annotate(
    generator: Generator, options: AnnotationOptions, on_seed: Callable[[UtilityResult], None] | None = None, *,
    pairs: Sequence[tuple[int, int]] | None = None, temperature: float | None = None, calibration: Calibration = DEFAULT_CALIBRATION,
) -> Annotation:
    """Judge 2 P seeds, pair them at random, and draw one noisy label per pair.

    Args:
        on_seed: is told each judgement, for a progress bar.
        pairs: seeds that were paired already, each in one pair, in place of the options' own.
        temperature: of the noise, such as that of earlier labels; None: the one that flips the options' share of these pairs.
        calibration: of the annotator, unless the options ask for a new one.
    Deterministic in the options and the generator.
    Raises ValueError when every pair ties (for example a generator without any surface).
    """
    seeds = options.seeds if pairs is None else [seed for pair in pairs for seed in pair]
    box_warp = generator.bounds.side
    if options.calibrate:
        calibration = calibrate(seed_cubes(generator, seeds[: options.calibrate], options), box_warp)
    utilities = np.empty(len(seeds))
    for i, cube in enumerate(seed_cubes(generator, seeds, options)):
        result = utility(cube, calibration=calibration, box_warp=box_warp)
        utilities[i] = result.total
        if on_seed is not None:
            on_seed(result)
    rng = np.random.default_rng(options.seed)
    table = disjoint_pairs(options.pairs, rng) if pairs is None else np.arange(len(seeds)).reshape(-1, 2)
    if temperature is None:
        temperature = solve_temperature(utilities, table, options.flip_rate)
    labels = [PairLabel(seeds[label.winner], seeds[label.loser], label.clean) for label in label_pairs(utilities, table, temperature, rng)]
    return Annotation(options=options, labels=labels, utilities=utilities, temperature=temperature, calibration=calibration)
