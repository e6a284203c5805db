"""Settings of preference losses and of the simulated annotator. This module imports no torch."""

from dataclasses import dataclass

from eg3d_rlhf.core.seeds import refuse_held_out
from training.config import check_knobs, knob

TERMS = "Loss weights"  # title of these flags in --help


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms of the reward's loss. The defaults are the paper's. 0 leaves a term out.

    Raises: ValueError for weights out of range.
    """

    # Weights of the paper (arXiv 2606.27305); the first five terms need labels of pairs.
    pairs: float = knob(1.0, "Weight of the cross-entropy of the pair head.", TERMS, low=0, rare=True)
    scalar: float = knob(1e-3, "Weight of the margin loss of the scalar reward.", TERMS, low=0, rare=True)
    bradley_terry: float = knob(
        1e-3, "Weight of the Bradley-Terry loss of the strengths.", TERMS, low=0, rare=True
    )
    strength: float = knob(
        1e-8, "Weight of the norm of the strengths, which has no gradient.", TERMS, low=0, flag=False
    )
    reconstruction: float = knob(
        1e-2, "Weight of the L1 error of the reconstructed input.", TERMS, low=0, rare=True
    )
    # Terms of unpaired labels, which the paper does not have.
    regression: float = knob(
        0.0, "Weight of the squared error of the reward on unpaired labels.", TERMS, low=0
    )
    divergence: float = knob(
        0.0,
        "Weight of the Cauchy-Schwarz divergence between embeddings of preferred and other unpaired shapes.",
        TERMS,
        low=0,
    )
    drawn_from_epoch: int = knob(
        3,
        "Epoch (0-based) from which one random presentation order is used per pair.",
        TERMS,
        low=0,
        flag=False,
    )

    def __post_init__(self) -> None:
        check_knobs(self)
        # The divergence alone has no direction: it may push preferred shapes to either side.
        if self.divergence and not (self.regression or self.on_pairs):
            raise ValueError(
                "--divergence: expected --regression or a loss on pairs above 0 together with it, got"
                f" {self.divergence:g} alone. Add one: the divergence separates two sets, but does not say"
                " which is better."
            )

    @property
    def on_pairs(self) -> bool:
        """True if the loss uses pairs, so that pairs are not for tests alone."""
        return max(self.pairs, self.scalar, self.bradley_terry) > 0


KINDS = ("pairs", "thumbs", "scores")
RESOLUTION = 64  # points along an edge of the grid on which shapes are compared


@dataclass(frozen=True, kw_only=True)
class AnnotationOptions:
    """Settings of simulated labels: the samples and the noise of the annotator."""

    pairs: int = knob(2000, "Number of pairs.", "Samples", low=1)  # P
    block: int = knob(
        8,
        "Seeds of a block. All pairs of a block are labelled; with 2, each seed is used once.",
        "Samples",
        low=2,
    )
    # Not among the held-out seeds of `core.seeds`.
    first_seed: int = knob(
        0, "First seed. The number of seeds follows from the pairs and the blocks.", "Samples", low=0
    )
    resolution: int = knob(
        RESOLUTION,
        "Points along an edge of the grid on which shapes are evaluated.",
        "Judgement",
        metavar="VOXELS",
        low=16,
        high=256,
    )
    kind: str = knob(
        "pairs", "Label pairs, or single shapes with thumbs or scores.", "Judgement", choices=KINDS
    )
    # Determines the temperature of the label noise, see `annotator.solve_temperature`.
    flip_rate: float = knob(
        0.12,
        "Expected fraction of labels that contradict the noise-free order.",
        "Judgement",
        metavar="0..0.5",
        low=0,
        below=0.5,
    )
    seed: int = knob(0, "Random seed of the pairing and of the noise.", "Judgement", low=0)
    batch: int = knob(16, "Latents that are synthesised at once.", "General", low=1)

    def __post_init__(self) -> None:
        check_knobs(self)
        # Labels on held-out seeds would leak into evaluations of rewards.
        refuse_held_out(self.seeds, "--first-seed")

    @property
    def seeds(self) -> range:
        """Return the seeds that are labelled: complete blocks."""
        # rounded up; a block of B seeds has B (B - 1) / 2 pairs
        blocks = -(-self.pairs // (self.block * (self.block - 1) // 2))
        return range(self.first_seed, self.first_seed + blocks * self.block)


DRAWS = ("both", "davidson")  # how a tie counts: as a win of both, or as Davidson's tie
