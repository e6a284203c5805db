"""Temporary folder of a rehearsal, and the text that states the estimated time of the whole run."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from eg3d_rlhf.core.cli import aligned
from training.distributed import SINGLE, Ranks
from training.progress import tqdm
from training.rehearsal import Rehearsal


@contextlib.contextmanager
def temporary_folder(outdir: Path, ranks: Ranks = SINGLE) -> Iterator[Path]:
    """Make a folder in `outdir`, and delete it at the end. Yield its path, the same on every rank.

    The name does not begin with a number, so no command takes the folder for a run.

    Args:
        outdir: folder of runs. If it does not exist, it is made, and deleted at the end.
        ranks: this process among the processes of the rehearsal; rank 0 makes and deletes the folder.

    Raises:
        OSError: the folder cannot be made.
    """
    made_folders = [path for path in (outdir, *outdir.parents) if not path.exists()]
    folder = ""
    if ranks.is_main:
        try:
            outdir.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(prefix="rehearsal-", dir=outdir)
        except OSError as error:
            raise OSError(
                f"--outdir: no folder can be made in {outdir}: {error.strerror or error}. Pass --outdir=DIR"
                " with a folder that can be written."
            ) from error
    folder = ranks.broadcast(folder)
    try:
        yield Path(folder)
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            # The innermost folder comes first. A folder that another process uses meanwhile is not empty.
            with contextlib.suppress(OSError):
                for made_folder in made_folders:
                    made_folder.rmdir()


def time_lines(rehearsal: Rehearsal) -> list[str]:
    """Return the lines that state the measured times and the estimated time of the whole run.

    Args: rehearsal: the finished rehearsal.
    """
    table_rows = [("part", "work", "measured", "whole run", "time")]
    table_rows += [
        (
            cost.part,
            cost.name,
            f"{cost.seconds_per_step:.3g} s",
            f"x {cost.planned:,.0f}" if cost.planned >= 1 else f"x {cost.planned:.2g}",
            tqdm.format_interval(cost.estimate),
        )
        for cost in rehearsal.costs()
    ]
    seconds_by_part = rehearsal.seconds_by_part()
    parts_text = ", ".join(
        f"{part} {_hours(seconds)}" for part, seconds in seconds_by_part.items() if seconds > 0
    )
    return [
        "",
        aligned(table_rows),
        "",
        f"Estimated time of the whole run: {_hours(sum(seconds_by_part.values()))} ({parts_text}).",
        "The files of the rehearsal were deleted. Start the run with the same command without --rehearse.",
    ]


def _hours(seconds: float) -> str:
    """Format a time in hours, with three digits: "0.0123 h", "36.1 h"."""
    return f"{seconds / 3600:.3g} h" if seconds < 3.6e6 else f"{seconds / 3600:,.0f} h"
