"""Draw the pictures of a finished reward run again, without evaluating it: comparison.png, turntable.mp4 and meshes.

Prints the median change of the surface, too, which summary.json holds.

\b
Example:
    python tools/draw_comparison.py --run=runs/00000-heads64-synthetic-heads64-batch8-gamma0.3-sigma-lambda10
"""

import json

import _repository  # noqa: F401
import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device
from eg3d_rlhf.core.seeds import JUDGE
from eg3d_rlhf.evaluation import flags
from eg3d_rlhf.evaluation.comparison import Sources, load_comparison
from eg3d_rlhf.evaluation.pictures import CHANGED, surface_change, write_pictures


@click.command(cls=GroupedCommand, help=__doc__)
@flags.shared("before after run reward-ckpt data psi")
@flags.shared("out device dry-run", out={"show_default": "the run folder"})
def main(out, device, dry_run, **sources) -> None:
    c = load_comparison(Sources(device=choose_device(device), **sources))
    folder = out or c.run
    if folder is None:
        raise ValueError("--out: expected a folder, got none, and --after lies in no run folder. Name one.")
    if dry_run:
        click.echo(json.dumps({**c.resolved(), "out": str(folder)}, indent=1))
        return
    written = write_pictures(c, folder)
    click.echo(json.dumps(surface_change(c, JUDGE.take(CHANGED))))
    click.echo(f"Written to {folder}: {', '.join(written)}")


if __name__ == "__main__":
    main()
