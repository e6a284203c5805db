"""Settings of preference losses and of the simulated annotator.

This module does not import torch, so that `--help` is quick.
"""

from dataclasses import dataclass

from eg3d_rlhf.core.seeds import reject_held_out_seeds
from training.config import check_knobs, knob

TERMS = "Loss weights"  # title of the group of flags in --help


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms of a reward network's loss; a weight of 0 leaves a term out.

    The defaults are those of the paper (arXiv 2606.27305).

    Raises: ValueError for a weight out of range, and for a divergence without a term that orders shapes.
    """

    # The first five terms need labels of pairs.
    pairs: float = knob(
        1.0,
        "Loss weight of the pair head: cross-entropy of its prediction which of two shapes is better.",
        TERMS,
        low=0,
        rare=True,
    )
    scalar: float = knob(
        1e-3,
        "Loss weight of the reward: -log sigmoid of the difference of the rewards of both shapes of a pair.",
        TERMS,
        low=0,
        rare=True,
    )
    bradley_terry: float = knob(
        1e-3,
        "Loss weight of the Bradley-Terry head: -log of the probability that its strengths give to the"
        " label.",
        TERMS,
        low=0,
        rare=True,
    )
    strength: float = knob(
        1e-8,
        "Loss weight of the norm of the Bradley-Terry strengths. This term is only logged and has no"
        " gradient.",
        TERMS,
        low=0,
        flag=False,
    )
    reconstruction: float = knob(
        1e-2,
        "Loss weight of the L1 error with which the U-Net reconstructs its input.",
        TERMS,
        low=0,
        rare=True,
    )
    # Terms on labels of single shapes, which the paper does not have
    regression: float = knob(
        0.0,
        "Loss weight of the squared error of the reward on labels of single shapes (--unpaired). 0 leaves"
        " this term out.",
        TERMS,
        low=0,
    )
    divergence: float = knob(
        0.0,
        "Loss weight of the Cauchy-Schwarz divergence between the embeddings of preferred and of all other"
        " single shapes (--unpaired), which is maximised. 0 leaves this term out.",
        TERMS,
        low=0,
    )
    drawn_from_epoch: int = knob(
        3,
        "Index of the epoch (from 0) from which on the pair head sees each pair in one random order per step,"
        " instead of both orders.",
        TERMS,
        low=0,
        flag=False,
    )

    def __post_init__(self) -> None:
        check_knobs(self)
        # The divergence is symmetric, so without another term the reward could prefer either set.
        if self.divergence and not (self.regression or self.on_pairs):
            raise ValueError(
                f"--divergence={self.divergence:g} separates preferred shapes from all other shapes, but does"
                " not determine which of them get the higher reward. Set --regression or a loss weight on"
                " pairs above 0 as well."
            )

    @property
    def on_pairs(self) -> bool:
        """True if any term that trains the network on labels of pairs has a weight above 0."""
        return max(self.pairs, self.scalar, self.bradley_terry) > 0


KINDS = ("pairs", "thumbs", "scores")  # kinds of simulated labels
RESOLUTION = 64  # number of points per axis of the grid on which shapes are evaluated


@dataclass(frozen=True, kw_only=True)
class AnnotationOptions:
    """Settings of simulated labels: the labelled samples, and the noise of the simulated annotator.

    Raises: ValueError for a value out of range, and for seeds that are held out for evaluation.
    """

    pairs: int = knob(2000, "Number of pairs to label.", "Samples", low=1)
    block: int = knob(
        8,
        "Number of seeds in a block. All pairs of seeds within a block are labelled. With 2, each seed is"
        " used in one pair.",
        "Samples",
        low=2,
    )
    first_seed: int = knob(
        0,
        "First of the consecutive seeds that are labelled. Their number follows from --pairs and --block.",
        "Samples",
        low=0,
    )
    resolution: int = knob(
        RESOLUTION,
        "Number of points per axis of the grid on which shapes are evaluated.",
        "Judgement",
        metavar="VOXELS",
        low=16,
        high=256,
    )
    kind: str = knob(
        "pairs",
        "Kind of labels. pairs: which of two shapes is better; thumbs: whether a single shape is good or bad;"
        " scores: a score of a single shape from 0 to 5.",
        "Judgement",
        choices=KINDS,
    )
    # The flip rate determines the temperature of the noise, see `annotator.solve_temperature`.
    flip_rate: float = knob(
        0.12,
        "Expected share of labels that are wrong, that is, that prefer the shape with the larger defects.",
        "Judgement",
        metavar="0..0.5",
        low=0,
        below=0.5,
    )
    seed: int = knob(0, "Random seed of the pairing and of the noise of the labels.", "Judgement", low=0)
    batch: int = knob(
        16,
        "Number of samples that are generated at once. Reduce it if the memory does not suffice.",
        "General",
        low=1,
    )

    def __post_init__(self) -> None:
        check_knobs(self)
        # Held-out seeds are reserved for the evaluation of rewards.
        reject_held_out_seeds(self.seeds, "--first-seed")

    @property
    def seeds(self) -> range:
        """Seeds that are labelled. They form complete blocks, of which the last may be used in part."""
        # A block of B seeds has B (B - 1) / 2 pairs; -(-a // b) is a / b rounded up.
        pairs_per_block = self.block * (self.block - 1) // 2
        block_count = -(-self.pairs // pairs_per_block)
        return range(self.first_seed, self.first_seed + block_count * self.block)


# Treatments of ties in ratings: as a win of both, or as a separate result (Davidson 1970)
DRAWS = ("both", "davidson")
