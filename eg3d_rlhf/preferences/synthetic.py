"""Preference labels without people: seeds of a generator of heads of people, judged by the programmatic
annotator.

Shape letters: S = seeds, P = pairs, N = latents, Z = 64 coordinates; n points along x, y, z.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.core.field import Bounds, Field
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.generators import Generator, latents, ws_of_seeds
from eg3d_rlhf.preferences import BAD, GOOD
from eg3d_rlhf.preferences.annotator import (
    ANNOTATOR,
    DEFECTS,
    LAPSES,
    SCALES,
    WEIGHTS,
    PairLabel,
    Utility,
    label_pairs,
    solve_temperature,
    utility,
)
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies.blocks import blocks_of_pairs
from eg3d_rlhf.preferences.settings import RESOLUTION, AnnotationOptions
from eg3d_rlhf.preferences.unpaired import SCALE, UnpairedPreference
from training.heads import people_mesh
from training.heads.people import LATENT

PSI = 1.0  # a truncated latent names no head any more
SHARE = 0.47  # of all shapes, that are preferred, and that are not; those in between have no thumb


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Labels with everything that is needed to repeat or audit them."""

    options: AnnotationOptions
    labels: list[PairLabel]  # winner and loser are seeds
    judged: dict[int, Utility]  # by seed
    temperature: float

    @property
    def utilities(self) -> np.ndarray:
        """[S] in the order of the seeds."""
        return np.array([found.total for found in self.judged.values()])

    def preferences(self, generator: str) -> list[Preference]:
        """The labels in the open format; `generator` is the sampled network's hash. No time: equal options
        give equal bytes.

        `gap` in a label's extra is by how much the volume errors of both differ.
        """
        common: dict[str, Any] = {"generator": generator, "psi": PSI, "annotator": ANNOTATOR}
        return [
            Preference(
                winner=label.winner,
                loser=label.loser,
                clean=label.winner if label.clean else label.loser,
                **common,
                extra={
                    "gap": round(
                        abs(self.judged[label.winner].volume_error - self.judged[label.loser].volume_error), 3
                    )
                },
            )
            for label in self.labels
        ]

    def unpaired(self, generator: str, shuffled: bool = False) -> list[UnpairedPreference]:
        """Labels of single shapes, by the rank of the utility with noise as pairs have it:
        utility + temperature * Gumbel's distribution.

        The upper and the lower 47 % of the shapes are preferred and not; scores are straight lines within
        these, and in between.

        Args: shuffled: labels dealt to the shapes at random, a control from which nothing can be learnt.
        """
        rng = np.random.default_rng([self.options.seed, 3])
        count = len(self.judged)
        utilities = self.utilities
        quantile = [
            (np.argsort(np.argsort(values)) + 0.5) / count  # [S] each
            for values in (utilities + self.temperature * rng.gumbel(size=count), utilities)
        ]
        given, clean = (np.interp(q, [0, SHARE, 1 - SHARE, 1], [0, BAD, GOOD, SCALE]) for q in quantile)
        given = rng.permutation(given) if shuffled else given
        common: dict[str, Any] = {
            "generator": generator,
            "psi": PSI,
            "annotator": ANNOTATOR + ("-shuffled" * shuffled),
        }
        labels = [
            UnpairedPreference(
                seed=seed, score=round(float(score), 3), clean=bool(true >= (GOOD + BAD) / 2), **common
            )
            for seed, score, true in zip(self.judged, given, clean, strict=True)
        ]
        if self.options.kind == "scores":
            return labels
        return [
            replace(label, score=None, label=label.preferred)
            for label in labels
            if label.preferred is not None
        ]

    def summary(self) -> dict[str, Any]:
        """Settings and outcome as JSON values."""
        quantiles = np.quantile(self.utilities, [0, 0.25, 0.5, 0.75, 1])
        return {
            **asdict(self.options),
            "temperature": self.temperature,
            "flipped": sum(not label.clean for label in self.labels),
            "agreement": (
                round(float(np.mean([label.clean for label in self.labels])), 4) if self.labels else None
            ),
            "seeds": len(self.judged),
            "psi": PSI,
            "utility_quantiles": [round(float(value), 6) for value in quantiles],
            "defect_medians": {
                name: round(float(np.median([found.defects[name] for found in self.judged.values()])), 4)
                for name in DEFECTS
            },
            "weights": WEIGHTS,
            "scales": SCALES,
            "lapses": LAPSES,
        }


def names_people(generator: Generator) -> bool:
    """Whether a generator's latents can name heads of people: 64 coordinates, in the cube of side 1."""
    return generator.z_dim == LATENT and generator.bounds == Bounds()


def shape_values(field: Field, resolution: int) -> np.ndarray:
    """Shapes of a field as the annotator reads them: level minus density [N, n, n, n], axes x, y, z, at the
    middles of voxels.
    """
    side = field.bounds.side * (resolution - 1) / resolution
    density = field.density_grid(SlabSpec.of(field.bounds, resolution, box_warp=side))
    return (field.level - density).permute(0, 3, 2, 1).cpu().numpy()


@torch.no_grad()
def judge_seeds(
    generator: Generator,
    seeds: Sequence[int],
    *,
    resolution: int = RESOLUTION,
    psi: float = PSI,
    batch: int = 16,
) -> Iterator[Utility]:
    """The annotator's judgement of a generator's seeds, one after the other, each by the whole head that its
    latent names.

    Args: psi: truncation; below 1 the shape is still judged by the head that the untruncated latent names.
    Raises: ValueError for a generator whose latents do not name heads of people.
    """
    if not names_people(generator):
        raise ValueError(
            f"--network: expected a generator of heads of people, latents of {LATENT} numbers in the unit"
            f" cube, got {generator.z_dim} numbers in {generator.bounds}. Its latents do not name heads: name"
            " one of synthetic:people64, or label with people."
        )
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        wholes = people_mesh.whole_grids(latents(part, generator.z_dim), resolution)
        shapes = shape_values(generator.field(ws_of_seeds(generator, part, psi)), resolution)
        yield from map(utility, shapes, wholes)


def annotate(
    generator: Generator,
    options: AnnotationOptions,
    on_seed: Callable[[Utility], None] | None = None,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    temperature: float | None = None,
) -> Annotation:
    """Judge the options' seeds, pair them block by block, and draw one noisy label per pair.

    Args:
        on_seed: is told each judgement, for a progress bar.
        pairs: seeds that were paired already, in place of the options' own.
        temperature: of the noise, such as that of earlier labels; None: the one that flips the options' share
            of these pairs.
    Deterministic in the options and the generator.
    Raises ValueError when every pair ties (for example a generator without any surface), and as
    `judge_seeds`.
    """
    seeds = list(options.seeds if pairs is None else dict.fromkeys(seed for pair in pairs for seed in pair))
    judged: dict[int, Utility] = {}
    for seed, found in zip(
        seeds, judge_seeds(generator, seeds, resolution=options.resolution, batch=options.batch), strict=True
    ):
        judged[seed] = found
        if on_seed is not None:
            on_seed(found)
    rng = np.random.default_rng(options.seed)
    utilities = [found.total for found in judged.values()]
    place = {seed: number for number, seed in enumerate(seeds)}
    table = (
        blocks_of_pairs(options.pairs, options.block, rng)
        if pairs is None
        else [(place[a], place[b]) for a, b in pairs]
    )
    if temperature is None:
        temperature = solve_temperature(utilities, table, options.flip_rate)
    labels = [
        PairLabel(seeds[label.winner], seeds[label.loser], label.clean)
        for label in label_pairs(utilities, table, temperature, rng)
    ]
    return Annotation(options=options, labels=labels, judged=judged, temperature=temperature)
