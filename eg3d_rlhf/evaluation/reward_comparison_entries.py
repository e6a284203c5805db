"""The rewards that are compared: what each reads, and the flags that train it and tune by it.

Imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One of the rewards."""

    words: str  # what it reads, and what taught it
    train: tuple[str, ...] | None  # flags of tools/train_reward.py; None: bundled
    tune: tuple[str, ...]  # flags of train.py
    minutes: float  # about, of the short table on one core: the longest is begun first
    # flags of eg3d-rlhf label synthetic, whose labels replace the bundled pairs in training
    label: tuple[str, ...] = ()
    short: tuple[str, ...] = ()  # more flags of its training in the short table


# the pairs choose the epoch and make the test, no more; the divergence as published, beside the error in
# units of the score
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
        words="density slab, taught by thumbs up or down alone",
        minutes=5,
        label=("--kind=thumbs", "--pairs=1000", "--block=2"),
        train=UNPAIRED,
        tune=("--reward=sigma", "--lambda-r=10"),
        short=("--epochs=8",),
    ),
}
