"""Define the rewards of the comparison: their observations, and the flags of their training and of tuning.

This module does not import torch, so that --help is fast.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A reward of the comparison with the flags of its training and of tuning by it."""

    words: str  # description of its observation and its training data in the table
    train: tuple[str, ...] | None  # flags of tools/train_reward.py; None: the bundled reward is used
    tune: tuple[str, ...]  # flags of train.py
    # rough duration of its steps for the short table on one core; the longest reward is started first
    minutes: float
    # flags of `eg3d-rlhf label synthetic`, whose labels replace the bundled pairs in training; (): none
    label: tuple[str, ...] = ()
    short: tuple[str, ...] = ()  # further flags of tools/train_reward.py for the short table


# Flags for training on labels of single shapes. Pairs have weight 0 in the loss; they only select the best
# epoch and measure the accuracy. The loss is the published divergence loss plus a squared error of the score.
UNPAIRED = (
    "--set=pairs=0",
    "--set=scalar=0",
    "--set=bradley_terry=0",
    "--reference-samples=0",
    "--regression=25",
    "--divergence=1",
)
ENTRIES = {
    "sigma": Entry(
        words="density slab, bundled", minutes=1, train=None, tune=("--reward=sigma", "--lambda-r=10")
    ),
    "depth": Entry(
        words="depth from the front",
        minutes=4,
        train=("--observation=depth",),
        tune=("--reward=depth",),
        short=("--preset=coarse",),
    ),
    "lifted-points": Entry(
        words="points lifted from depth, PointNet",
        minutes=10,
        train=("--observation=lifted-points", "--preset=pointnet"),
        tune=("--reward=lifted-points", "--lambda-r=10"),
        short=("--epochs=12",),
    ),
    "points": Entry(
        words="points on the level set, PointNet",
        minutes=4,
        train=("--observation=points", "--preset=pointnet"),
        tune=("--reward=points", "--lambda-r=10"),
        short=("--epochs=12",),
    ),
    "thumbs": Entry(
        words="density slab, trained on thumbs up or down alone",
        minutes=5,
        label=("--kind=thumbs", "--pairs=1000", "--block=2"),
        train=UNPAIRED,
        tune=("--reward=sigma", "--lambda-r=10"),
        short=("--epochs=8",),
    ),
}
