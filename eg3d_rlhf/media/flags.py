"""Options that every tool that draws samples of a generator shares."""

from collections.abc import Callable
from pathlib import Path

import click

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


def sampling_flags(command: Callable) -> Callable:
    """Decorator: --outdir, --network, --seeds, --trunc, --trunc-cutoff, --noise-mode, listed in this order."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command
