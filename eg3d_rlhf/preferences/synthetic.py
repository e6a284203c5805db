"""Simulated preference labels: a simulated annotator evaluates seeds of a head generator.

Letters: S seeds, P pairs, N latents, Z = 64 coordinates; n points along x, y, z.
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

PSI = 1.0  # truncation; a truncated latent has no ground-truth head
SHARE = 0.47  # fraction of shapes with each thumb, up and down; those in between get none


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Labels, with everything that is needed to repeat or check them."""

    options: AnnotationOptions
    labels: list[PairLabel]  # winner and loser are seeds
    judged: dict[int, Utility]  # seed -> evaluation
    temperature: float  # of the label noise, in units of utility

    @property
    def utilities(self) -> np.ndarray:
        """Return the utilities [S] in the order of the seeds."""
        return np.array([evaluation.total for evaluation in self.judged.values()])

    def preferences(self, generator: str) -> list[Preference]:
        """Return the labels in the open format. They contain no time, so equal options give equal bytes.

        `gap` in a label's extra is the difference of the volume errors of both shapes.

        Args: generator: the hash of the network that generated the shapes.
        """
        # Fields that all labels share.
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
        """Return labels of single shapes, from the rank of the noisy utility: utility + temperature * Gumbel
        noise.

        The difference of two Gumbel variables is logistic, so the noise is that of the pairs. The upper and
        the lower 47 % of the shapes are preferred and not preferred. Scores are linear in the rank within
        these, and in between.

        Args: shuffled: assign labels to shapes at random. This control has no learnable signal.
        """
        # a stream of its own, so that pairs do not change
        rng = np.random.default_rng([self.options.seed, 3])
        # One shape per seed.
        count = len(self.judged)
        utilities = self.utilities
        # Rank of each shape in 0..1, with noise and without.
        quantile = [
            # argsort of argsort is the rank.
            (np.argsort(np.argsort(values)) + 0.5) / count  # [S] each
            for values in (utilities + self.temperature * rng.gumbel(size=count), utilities)
        ]
        noisy_scores, clean_scores = (
            np.interp(q, [0, SHARE, 1 - SHARE, 1], [0, BAD, GOOD, SCALE]) for q in quantile
        )
        noisy_scores = rng.permutation(noisy_scores) if shuffled else noisy_scores
        common: dict[str, Any] = {
            "generator": generator,
            "psi": PSI,
            "annotator": ANNOTATOR + ("-shuffled" * shuffled),
        }
        labels = [
            UnpairedPreference(
                seed=seed, score=round(float(score), 3), clean=bool(clean_score >= (GOOD + BAD) / 2), **common
            )
            for seed, score, clean_score in zip(self.judged, noisy_scores, clean_scores, strict=True)
        ]
        # The same quantiles give scores or thumbs.
        if self.options.kind == "scores":
            return labels
        return [
            # A thumb replaces the score; shapes without a preference are dropped.
            replace(label, score=None, label=label.preferred)
            for label in labels
            if label.preferred is not None
        ]

    def summary(self) -> dict[str, Any]:
        """Return settings and outcome as JSON values."""
        # Minimum, quartiles and maximum.
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
                name: round(
                    float(np.median([evaluation.defects[name] for evaluation in self.judged.values()])), 4
                )
                for name in DEFECTS
            },
            "weights": WEIGHTS,
            "scales": SCALES,
            "lapses": LAPSES,
        }


def names_people(generator: Generator) -> bool:
    """Return True if a generator's latents can have ground-truth heads: 64 coordinates, in the cube of
    side 1.
    """
    return generator.z_dim == LATENT and generator.bounds == Bounds()


def shape_values(field: Field, resolution: int) -> np.ndarray:
    """Return shapes of a field in the annotator's form: level minus density [N, n, n, n], axes x, y, z,
    at centres of voxels.
    """
    # from the centre of the first voxel to that of the last
    side = field.bounds.side * (resolution - 1) / resolution
    # The grid of SlabSpec has its outermost points on the faces, so the cube is smaller by one voxel.
    density = field.density_grid(SlabSpec.of(field.bounds, resolution, box_warp=side))
    # [N, z, y, x] -> [N, x, y, z]; negative inside
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
    """Evaluate seeds of a generator, one after another, each against the ground-truth head of its latent.

    Args: psi: truncation. Below 1 the shape is still compared with the head of the untruncated latent.
    Raises: ValueError for a generator whose latents have no ground-truth heads.
    """
    # A ground truth exists only for latents of the synthetic head model.
    if not names_people(generator):
        raise ValueError(
            f"--network: expected a generator trained on synthetic heads, with latents of {LATENT} numbers in"
            f" the unit cube, got {generator.z_dim} numbers in {generator.bounds}. Use a generator that was"
            " trained on synthetic:people64, or collect labels from people."
        )
    for start in range(0, len(seeds), batch):
        # Batches bound the memory of synthesis.
        part = seeds[start : start + batch]
        ground_truths = people_mesh.whole_grids(latents(part, generator.z_dim), resolution)
        shapes = shape_values(generator.field(ws_of_seeds(generator, part, psi)), resolution)
        yield from map(utility, shapes, ground_truths)


def annotate(
    generator: Generator,
    options: AnnotationOptions,
    on_seed: Callable[[Utility], None] | None = None,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    temperature: float | None = None,
) -> Annotation:
    """Evaluate the options' seeds, pair them block by block, and sample one noisy label per pair.

    Deterministic in the options and the generator.

    Args:
        on_seed: called with each evaluation, for a progress bar.
        pairs: seeds that are already paired, instead of the options' own.
        temperature: of the noise, for example that of earlier labels. None: the temperature that flips the
            options' fraction of these pairs.
    Raises: ValueError if every pair ties (for example for a generator without any surface), and as
    `judge_seeds`.
    """
    # Without repetitions, in order of first appearance.
    seeds = list(options.seeds if pairs is None else dict.fromkeys(seed for pair in pairs for seed in pair))
    judged: dict[int, Utility] = {}
    for seed, evaluation in zip(
        seeds, judge_seeds(generator, seeds, resolution=options.resolution, batch=options.batch), strict=True
    ):
        judged[seed] = evaluation
        if on_seed is not None:
            on_seed(evaluation)
    # Also used for the noise below, so the order of calls matters
    rng = np.random.default_rng(options.seed)
    utilities = [evaluation.total for evaluation in judged.values()]
    index_of_seed = {seed: number for number, seed in enumerate(seeds)}
    index_pairs = (
        blocks_of_pairs(options.pairs, options.block, rng)
        if pairs is None
        else [(index_of_seed[a], index_of_seed[b]) for a, b in pairs]
    )
    # The noise is calibrated on these pairs, so the flip rate is reached in expectation.
    if temperature is None:
        temperature = solve_temperature(utilities, index_pairs, options.flip_rate)
    labels = [
        PairLabel(seeds[label.winner], seeds[label.loser], label.clean)
        for label in label_pairs(utilities, index_pairs, temperature, rng)
    ]
    return Annotation(options=options, labels=labels, judged=judged, temperature=temperature)
