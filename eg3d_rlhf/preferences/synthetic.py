"""Simulated preference labels: a simulated annotator evaluates samples of a generator of synthetic heads.

Shapes: S seeds, N shapes of a batch, n grid points along x, y, z.
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

PSI = 1.0  # truncation of labelled samples; a truncated latent has no ground-truth head
# Share of the shapes that are labelled as preferred, and equal share of the shapes that are labelled as not
# preferred. All other shapes get no thumb.
SHARE = 0.47


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Simulated labels, with everything that is needed to repeat or to check them."""

    options: AnnotationOptions  # settings of the labels
    labels: list[PairLabel]  # labels of pairs, whose winner and loser are seeds
    evaluations: dict[int, Utility]  # noise-free evaluation of each seed
    temperature: float  # temperature of the label noise, in units of utility

    @property
    def utilities(self) -> np.ndarray:
        """Utilities [S] of all seeds, in the order of `evaluations`."""
        return np.array([evaluation.total for evaluation in self.evaluations.values()])

    def preferences(self, generator_hash: str) -> list[Preference]:
        """Return the labels of pairs in the format of `eg3d_rlhf.preferences.labels`.

        The labels contain no time, so equal options give equal bytes. The field "gap" in `extra` of a label
        is the difference of the volume errors of both shapes.

        Args: generator_hash: hash of the network that generated the shapes.
        """
        # Fields that are the same in all labels
        common_fields: dict[str, Any] = {"generator": generator_hash, "psi": PSI, "annotator": ANNOTATOR}
        preferences = []
        for label in self.labels:
            volume_error_gap = abs(
                self.evaluations[label.winner].volume_error - self.evaluations[label.loser].volume_error
            )
            preferences.append(
                Preference(
                    winner=label.winner,
                    loser=label.loser,
                    clean=label.winner if label.clean else label.loser,
                    **common_fields,
                    extra={"gap": round(volume_error_gap, 3)},
                )
            )
        return preferences

    def unpaired(self, generator_hash: str, shuffle_labels: bool = False) -> list[UnpairedPreference]:
        """Return labels of single shapes, from the ranks of their noisy utilities.

        The noisy utility is utility + temperature * Gumbel noise. The difference of two Gumbel variables is
        logistic, so this is the same noise as in labels of pairs. The upper 47 % of the shapes are preferred,
        and the lower 47 % are not. Scores are a piecewise linear function of the rank, with the thresholds at
        these two ranks.

        Args:
            generator_hash: hash of the network that generated the shapes.
            shuffle_labels: True to assign the labels to shapes at random; this control has no learnable
                signal.
        """
        # A separate stream of random numbers (3), so that labels of pairs do not change.
        rng = np.random.default_rng([self.options.seed, 3])
        shape_count = len(self.evaluations)
        utilities = self.utilities
        noisy_utilities = utilities + self.temperature * rng.gumbel(size=shape_count)

        def rank_scores(ranked_utilities: np.ndarray) -> np.ndarray:
            """Return scores [S] in 0..SCALE from the ranks of values [S]."""
            # argsort of argsort gives ranks from 0. Adding 0.5 and dividing gives quantiles in 0..1.
            quantiles = (np.argsort(np.argsort(ranked_utilities)) + 0.5) / shape_count
            return np.interp(quantiles, [0, SHARE, 1 - SHARE, 1], [0, BAD, GOOD, SCALE])

        noisy_scores = rank_scores(noisy_utilities)
        clean_scores = rank_scores(utilities)
        noisy_scores = rng.permutation(noisy_scores) if shuffle_labels else noisy_scores
        common_fields: dict[str, Any] = {
            "generator": generator_hash,
            "psi": PSI,
            "annotator": ANNOTATOR + ("-shuffled" * shuffle_labels),
        }
        labels = [
            UnpairedPreference(
                seed=seed,
                score=round(float(noisy_score), 3),
                clean=bool(clean_score >= (GOOD + BAD) / 2),
                **common_fields,
            )
            for seed, noisy_score, clean_score in zip(
                self.evaluations, noisy_scores, clean_scores, strict=True
            )
        ]
        if self.options.kind == "scores":
            return labels
        # Thumbs: `preferred` replaces the score. Shapes between the thresholds get no label.
        return [
            replace(label, score=None, label=label.preferred)
            for label in labels
            if label.preferred is not None
        ]

    def summary(self) -> dict[str, Any]:
        """Return the settings and statistics of the labels as JSON values."""
        # Minimum, quartiles and maximum of the utilities
        quantiles = np.quantile(self.utilities, [0, 0.25, 0.5, 0.75, 1])
        return {
            **asdict(self.options),
            "temperature": self.temperature,
            "flipped": sum(not label.clean for label in self.labels),
            "agreement": (
                round(float(np.mean([label.clean for label in self.labels])), 4) if self.labels else None
            ),
            "seeds": len(self.evaluations),
            "psi": PSI,
            "utility_quantiles": [round(float(value), 6) for value in quantiles],
            "defect_medians": {
                name: round(
                    float(np.median([evaluation.defects[name] for evaluation in self.evaluations.values()])),
                    4,
                )
                for name in DEFECTS
            },
            "weights": WEIGHTS,
            "scales": SCALES,
            "lapses": LAPSES,
        }


def has_ground_truth_heads(generator: Generator) -> bool:
    """Return True if the samples of a generator can have ground-truth heads.

    This requires latents with as many numbers as the synthetic head model has, and the unit cube as bounds.
    """
    return generator.z_dim == LATENT and generator.bounds == Bounds()


def shape_values(field: Field, resolution: int) -> np.ndarray:
    """Return the shapes of a field as grids for the simulated annotator: level minus density [N, n, n, n].

    The axes are x, y, z, and the points are the centres of voxels. Values are negative inside a shape.

    Args:
        field: field of N shapes.
        resolution: number of voxels per axis, n.
    """
    # The outermost points of a SlabSpec lie on the faces of its cube. The outermost centres of voxels are one
    # voxel closer together than the faces of the field's cube.
    edge_between_centres = field.bounds.side * (resolution - 1) / resolution
    density = field.density_grid(
        SlabSpec.from_bounds(field.bounds, resolution, box_warp=edge_between_centres)
    )
    # [N, z, y, x] -> [N, x, y, z]
    return (field.level - density).permute(0, 3, 2, 1).cpu().numpy()


@torch.no_grad()
def evaluate_seeds(
    generator: Generator,
    seeds: Sequence[int],
    *,
    resolution: int = RESOLUTION,
    psi: float = PSI,
    batch_size: int = 16,
) -> Iterator[Utility]:
    """Evaluate samples of a generator against their ground-truth heads. Yield the evaluations in order.

    Args:
        generator: generator that was trained on synthetic heads.
        seeds: seeds of the samples.
        resolution: number of voxels per axis of the grid on which shapes are evaluated.
        psi: truncation of the samples; the ground truth always belongs to the untruncated latent.
        batch_size: number of samples that are generated at once.
    Raises: ValueError for a generator whose samples have no ground-truth heads.
    """
    if not has_ground_truth_heads(generator):
        raise ValueError(
            f"--network: simulated labels need a generator of synthetic heads with latents of {LATENT}"
            f" numbers and the unit cube as bounds, but this generator has latents of {generator.z_dim}"
            f" numbers and {generator.bounds}. Pass a generator that was trained on synthetic:people64, or"
            " collect labels from people."
        )
    for start in range(0, len(seeds), batch_size):
        batch_seeds = seeds[start : start + batch_size]
        truth_grids = people_mesh.ground_truth_grids(latents(batch_seeds, generator.z_dim), resolution)
        shape_grids = shape_values(generator.field(ws_of_seeds(generator, batch_seeds, psi)), resolution)
        yield from map(utility, shape_grids, truth_grids)


def annotate(
    generator: Generator,
    options: AnnotationOptions,
    on_seed: Callable[[Utility], None] | None = None,
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    temperature: float | None = None,
) -> Annotation:
    """Evaluate samples of a generator, form pairs, and sample one noisy label per pair.

    Equal options and generators give equal labels.

    Args:
        generator: generator that was trained on synthetic heads.
        options: settings of the labels.
        on_seed: function that is called with each evaluation.
        pairs: pairs of seeds to label; None for the seeds and blocks of the options.
        temperature: temperature of the label noise, for example that of earlier labels; None for the
            temperature at which the expected share of wrong labels is `options.flip_rate`.
    Raises: ValueError if the utilities in every pair are equal, for example for a generator without any
        surface, and for a generator whose samples have no ground-truth heads.
    """
    # Without repetitions, in the order of the first occurrences
    seeds = list(options.seeds if pairs is None else dict.fromkeys(seed for pair in pairs for seed in pair))
    evaluation_of_seed: dict[int, Utility] = {}
    for seed, evaluation in zip(
        seeds,
        evaluate_seeds(generator, seeds, resolution=options.resolution, batch_size=options.batch),
        strict=True,
    ):
        evaluation_of_seed[seed] = evaluation
        if on_seed is not None:
            on_seed(evaluation)
    # The same random numbers serve the pairing and the noise, so the order of the calls below must not
    # change.
    rng = np.random.default_rng(options.seed)
    utilities = [evaluation.total for evaluation in evaluation_of_seed.values()]
    index_of_seed = {seed: seed_index for seed_index, seed in enumerate(seeds)}
    index_pairs = (
        blocks_of_pairs(options.pairs, options.block, rng)
        if pairs is None
        else [(index_of_seed[first_seed], index_of_seed[second_seed]) for first_seed, second_seed in pairs]
    )
    if temperature is None:
        temperature = solve_temperature(utilities, index_pairs, options.flip_rate)
    labels = [
        PairLabel(seeds[label.winner], seeds[label.loser], label.clean)
        for label in label_pairs(utilities, index_pairs, temperature, rng)
    ]
    return Annotation(options=options, labels=labels, evaluations=evaluation_of_seed, temperature=temperature)
