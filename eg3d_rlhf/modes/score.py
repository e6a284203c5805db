"""The job `score`, which scores generators of any family with one reward."""

import functools
from dataclasses import asdict
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, option, options_of
from eg3d_rlhf.evaluation.settings import ScoreOptions
from eg3d_rlhf.modes.shared_flags import PATH, print_json, shared

_what_option = functools.partial(option, group="What")


@click.command(cls=GroupedCommand, job="score")
@_what_option(
    "--network",
    "networks",
    metavar="FILE|RUN",
    type=PATH,
    multiple=True,
    show_default="the reference",
    help="Generator to score, of any family. May be repeated.",
)
@_what_option("--reward", metavar="FILE", type=PATH, show_default="the bundled one", help="Reward file.")
@_what_option(
    "--reference",
    metavar="FILE|RUN",
    type=PATH,
    show_default="the bundled generator",
    help="Generator whose shapes the reward was trained on.",
)
@options_of(ScoreOptions)
@shared("outdir device dry-run", outdir={"default": Path("runs/scores"), "help": "Folder to write."})
def main(networks, reward, reference, outdir: Path, device: str, dry_run: bool, **settings) -> None:
    """Score generators with a reward that was trained on one of them: raw scores, scores of shapes aligned to
    the region that the reward reads, and scores with calibrated densities.

    Reports for each generator how many shapes lie outside the reward's training distribution and how stable
    their ranks are. Writes a page with strips of meshes, and scores.json.

    \b
    Example:
        eg3d-rlhf score --n=16 --set=fit=8 --set=known=16 --resolution=32 --outdir=runs/example/scores
    """
    from eg3d_rlhf.evaluation.foreign_scores import trial_of, write

    options = ScoreOptions(**{name: value for name, value in settings.items() if value is not None})
    # loads and checks all networks, so that --dry-run finds mistakes
    trial = trial_of(networks, reward, reference, device, options)
    if dry_run:
        shown = {name: str(network.path) for name, network in trial.networks.items()}
        print_json(
            {
                "networks": shown,
                "reference": str(trial.reference.path),
                "outdir": str(outdir),
                **asdict(options),
            }
        )
        return
    for name, finding in write(trial, outdir).items():
        click.echo("\n".join([f"{name}:", *(f"  {line}" for line in finding.says)]))
    click.echo(f"\nWritten to {outdir}: index.html (open it in a browser), scores.json, data/")
