"""The job `score`, which scores generators of any family with one reward.

A reward is trained on shapes of one generator, the reference. Other generators may place their shapes
elsewhere in space, or have densities of another scale. The job therefore reports scores with and without
corrections of the position and of the scale.
"""

import functools
from dataclasses import asdict
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, option, options_from_settings
from eg3d_rlhf.core.input_paths import check_network, check_reward_file
from eg3d_rlhf.evaluation.settings import ScoreOptions
from eg3d_rlhf.modes.shared_flags import PATH, print_json, shared

_what_option = functools.partial(option, group="What")


@click.command(cls=GroupedCommand, job="score")
@_what_option(
    "--network",
    "networks",
    check=check_network,
    metavar="FILE|RUN",
    type=PATH,
    multiple=True,
    show_default="the generator of --reference",
    help="Generator of any family to score: a network file or a run folder. May be repeated.",
)
@_what_option(
    "--reward",
    check=check_reward_file,
    metavar="FILE",
    type=PATH,
    show_default="the bundled reward",
    help="Reward file that scores the shapes.",
)
@_what_option(
    # The scores of other generators are compared with the scores of the reference.
    "--reference",
    check=check_network,
    metavar="FILE|RUN",
    type=PATH,
    show_default="the generator that the reward file names: the bundled one or one of --network",
    help="Generator whose shapes the reward was trained on.",
)
@options_from_settings(ScoreOptions)
@shared("outdir device dry-run", outdir={"default": Path("runs/scores"), "help": "Folder to write into."})
def main(networks, reward, reference, outdir: Path, device: str, dry_run: bool, **settings) -> None:
    """Score the shapes of several generators with a reward that was trained on one of them. The table shows
    raw scores, scores of shapes that were aligned to the region that the reward reads, and scores of shapes
    with calibrated densities.

    For each generator, the report also shows how many shapes lie outside the training distribution of the
    reward, and how stable the ranks of the shapes are. The command writes a page with images of meshes, and
    scores.json.

    \b
    Example:
        eg3d-rlhf score --n=16 --set=fit=8 --set=known=16 --resolution=32 --outdir=runs/example/scores
    """
    # Imported here, so that --help is printed without loading this module.
    from eg3d_rlhf.evaluation.foreign_scores import load_trial, write

    # None: the flag was not given, so the default of the setting applies
    score_options = ScoreOptions(**{name: value for name, value in settings.items() if value is not None})
    # Loads and checks all networks, so that --dry-run also reports mistakes in the files.
    trial = load_trial(networks, reward, reference, device, score_options)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        network_paths = {name: str(network.path) for name, network in trial.networks.items()}
        print_json(
            {
                "networks": network_paths,
                "reference": str(trial.reference.path),
                "outdir": str(outdir),
                **asdict(score_options),
            }
        )
        return
    for name, finding in write(trial, outdir).items():
        click.echo("\n".join([f"{name}:", *(f"  {sentence}" for sentence in finding.says)]))
    click.echo(f"\nWritten to {outdir}: index.html (open it in a browser), scores.json, data/")
