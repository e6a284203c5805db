"""Settings of the losses of preferences, of the programmatic annotator and of ratings; imports no torch."""

from dataclasses import dataclass

from eg3d_rlhf.core.seeds import refuse_held_out
from training.config import check_knobs, knob

TERMS = "Loss weights"  # title of their flags


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms, defaults the paper's; 0 leaves the term out."""

    pairs: float = knob(1.0, "Cross-entropy of the pair head.", TERMS, low=0, rare=True)
    scalar: float = knob(1e-3, "Margin of the reward itself.", TERMS, low=0, rare=True)
    bradley_terry: float = knob(1e-3, "Strengths.", TERMS, low=0, rare=True)
    strength: float = knob(1e-8, "Norm of the strengths, without gradient.", TERMS, low=0, flag=False)
    reconstruction: float = knob(
        1e-2, "L1 between what is read and its reconstruction.", TERMS, low=0, rare=True
    )
    regression: float = knob(0.0, "Squared error of the reward on unpaired labels.", TERMS, low=0)
    divergence: float = knob(
        0.0,
        "Cauchy-Schwarz divergence between embeddings of preferred and other unpaired shapes.",
        TERMS,
        low=0,
    )
    drawn_from_epoch: int = knob(
        3, "Epoch (0-based) from which one presentation order is drawn per pair.", TERMS, low=0, flag=False
    )

    def __post_init__(self) -> None:
        check_knobs(self)
        if self.divergence and not (self.regression or self.on_pairs):
            raise ValueError(
                "--divergence: expected --regression or a loss on pairs above 0 with it, got"
                f" {self.divergence:g} alone. It says that two sets lie apart, not which is better."
            )

    @property
    def on_pairs(self) -> bool:
        """Whether pairs are learnt from, and not only tested on."""
        return max(self.pairs, self.scalar, self.bradley_terry) > 0


KINDS = ("pairs", "thumbs", "scores")
RESOLUTION = 64  # points along an edge of the judged cube


@dataclass(frozen=True, kw_only=True)
class AnnotationOptions:
    """What is sampled and how noisy the judgement is."""

    pairs: int = knob(2000, "Pairs.", "Samples", low=1)  # P
    block: int = knob(
        8, "Seeds of a block, all pairs of which are labelled; with 2 a seed is used once.", "Samples", low=2
    )
    first_seed: int = knob(
        0, "First of the seeds, of which there are as many as blocks need.", "Samples", low=0
    )
    resolution: int = knob(
        RESOLUTION,
        "Points along an edge of the judged cube.",
        "Judgement",
        metavar="VOXELS",
        low=16,
        high=256,
    )
    kind: str = knob(
        "pairs", "Judge pairs, or single shapes by thumbs or scores.", "Judgement", choices=KINDS
    )
    flip_rate: float = knob(
        0.12,
        "Expected share of labels against the noise-free order.",
        "Judgement",
        metavar="0..0.5",
        low=0,
        below=0.5,
    )
    seed: int = knob(0, "Seed of pairing and noise.", "Judgement", low=0)
    batch: int = knob(16, "Latents synthesised at once.", "General", low=1)

    def __post_init__(self) -> None:
        check_knobs(self)
        refuse_held_out(self.seeds, "--first-seed")

    @property
    def seeds(self) -> range:
        """What is labelled: whole blocks."""
        blocks = -(-self.pairs // (self.block * (self.block - 1) // 2))
        return range(self.first_seed, self.first_seed + blocks * self.block)


DRAWS = ("both", "davidson")
