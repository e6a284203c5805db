"""Flags and the progress bar that the builders share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from eg3d_rlhf.core.cli import option
from training.progress import tqdm

dry_run = option(
    "-n", "--dry-run", is_flag=True, group="Run", help="Print the resolved settings as JSON and stop."
)


def out(default: Path) -> Callable:
    """The flag --out of a builder that writes one file, by default the bundled one."""
    return option(
        "--out",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        default=default,
        show_default="the bundled file",
        group="Run",
        help="File to write (.safetensors).",
    )


@contextlib.contextmanager
def loss_bar(title: str, losses: list[float]) -> Iterator[Callable[[int, int, float], None]]:
    """Show a progress bar; give on_step(step, steps, loss), which also appends the loss to `losses`."""
    with tqdm(unit="step", desc=title) as bar:

        def on_step(step: int, steps: int, loss: float) -> None:
            losses.append(loss)
            bar.total = steps
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        yield on_step


def last(losses: list[float]) -> float:
    """Return the mean of the last twentieth of the losses."""
    kept = losses[-max(len(losses) // 20, 1) :]
    return sum(kept) / len(kept)
