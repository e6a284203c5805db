"""Flags, progress bar and summary of losses that the builders share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from eg3d_rlhf.core.cli import option
from training.progress import tqdm

dry_run = option(
    "-n",
    "--dry-run",
    is_flag=True,
    group="Run",
    help="Print the settings that would be used as JSON, and stop without training.",
)


def out(default: Path) -> Callable:
    """Make the flag --out of a builder that writes one file, with the bundled file as default."""
    return option(
        "--out",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        default=default,
        show_default="the bundled file",
        group="Run",
        help="Path of the .safetensors file that is written.",
    )


@contextlib.contextmanager
def loss_bar(title: str, losses: list[float]) -> Iterator[Callable[[int, int, float], None]]:
    """Show a progress bar of a training.

    Args:
        title: text of the bar.
        losses: list to which the loss of every step is appended.
    Returns: context manager of a function on_step(step, steps, loss), which must be called after every step.
        `step` counts from 1, and `steps` is the number of all steps.
    """
    with tqdm(unit="step", desc=title) as bar:

        def on_step(step: int, steps: int, loss: float) -> None:
            """Record the loss of a step and update the bar."""
            losses.append(loss)
            bar.total = steps
            # tqdm expects the increment, not the number of steps.
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        yield on_step


def final_loss(losses: list[float]) -> float:
    """Return the mean of the last 5 % of the losses, and at least of the last one."""
    final_losses = losses[-max(len(losses) // 20, 1) :]
    return sum(final_losses) / len(final_losses)
