"""What the tools that draw samples share: their options, the seeds syntax of EG3D ('0,2-5'), and a progress bar by stages."""

from collections.abc import Callable
from pathlib import Path

import click
from tqdm import tqdm

from eg3d_rlhf.cli import option

_FLAGS = (
    option("--outdir", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write into."),
    option("--network", metavar="PATH", type=click.Path(path_type=Path), default=None, show_default="the bundled generator",
           help="Generator file or run folder.", group="Samples"),
    option("--seeds", metavar="LIST", required=True, help="Seeds and ranges, such as 0,2-5.", group="Samples"),
    option("--trunc", "--psi", "psi", metavar="FLOAT", type=click.FloatRange(min=0), default=1.0, help="Truncation psi.", group="Samples"),
    option("--trunc-cutoff", "--cutoff", "cutoff", metavar="INT", type=click.IntRange(min=0), default=14, group="Samples",
           help="ws that truncation reaches."),
    option("--noise-mode", metavar="NAME", type=click.Choice(["const", "random", "none"]), default="const", group="Samples",
           help="Noise of the synthesis; random is drawn from the (first) seed."),
)  # fmt: skip
MOST_SEEDS = 100_000
_LARGEST = 2**32 - 1  # of numpy's RandomState
_SCALED = 10_000  # totals from here on are shown with k and M


def sampling_flags(command: Callable) -> Callable:
    """Decorator: --outdir, --network, --seeds, --trunc, --trunc-cutoff, --noise-mode, listed in this order."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


def parse_seeds(text: str) -> list[int]:
    """Seeds of a comma-separated list of numbers and inclusive ranges, in the order given: '0,2-5' -> [0, 2, 3, 4, 5].

    Raises: ValueError for anything else, an empty list, a range that runs backwards, a seed above 2^32 - 1, over 100,000 seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"seeds: expected numbers and ranges such as 0,2-5, got {text!r}. Correct {part.strip()!r}.")
        start, end = int(first), int(last or first)
        if start > end or end > _LARGEST:
            raise ValueError(f"seeds: expected ranges that rise, up to {_LARGEST}, got {part.strip()!r}. Correct it.")
        if len(seeds) + end - start >= MOST_SEEDS:
            raise ValueError(f"seeds: expected at most {MOST_SEEDS} seeds, got more in {text!r}. Run in parts.")
        seeds += range(start, end + 1)
    return seeds


class StageBar:
    """A bar per stage, with time left; called with (stage, units done, units in all)."""

    def __init__(self, prefix: str = ""):
        self._prefix, self._stage = prefix, ""
        self._bar: tqdm | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the stage's bar to `done` of `total`; another stage starts a bar of its own."""
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(total=total, desc=f"{self._prefix}{stage}", unit_scale=total >= _SCALED)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the running bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "StageBar":
        return self

    def __exit__(self, *exc) -> None:
        self.close()
