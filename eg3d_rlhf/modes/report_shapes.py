"""The jobs `report heads` and `report solid`, which compare the shapes of several generators in a table."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, argument, choose_device, option
from eg3d_rlhf.core.input_paths import check_network
from eg3d_rlhf.evaluation.settings import CHOOSE, HELD_OUT_RANGES
from eg3d_rlhf.modes.shared_flags import PATH, name_option, shared
from eg3d_rlhf.tuning.flow.families import check_root
from training.storage import write_atomic

# Arguments of the option --out of both jobs.
TO_JSON = {
    "metavar": "FILE",
    "type": click.Path(path_type=Path, dir_okay=False),
    "default": None,
    "help": "JSON file to which the table is also written.",
}


def network_names(networks: Sequence[Path]) -> list[str]:
    """Return distinct names of networks for the rows of a table.

    A name consists of the last parts of the network's path: as few parts as make all names distinct. The name
    of a file has no suffix.

    Args:
        networks: network files and run folders.

    Raises: click.UsageError if a network is listed twice.
    """
    path_parts = [
        path.resolve().with_suffix("").parts if path.is_file() else path.resolve().parts for path in networks
    ]
    # Parent folders are added until all names differ.
    for part_count in range(1, max(map(len, path_parts), default=1) + 1):
        candidate_names = ["/".join(parts[-part_count:]) for parts in path_parts]
        if len(set(candidate_names)) == len(candidate_names):
            return candidate_names
    raise click.UsageError("[FILE|RUN]: the same network is listed twice. Remove one of the two arguments.")


@click.command("heads", cls=GroupedCommand, job="report heads")
@argument("networks", check_network, metavar="[FILE|RUN]...", nargs=-1, type=PATH)
@shared(
    "before n out",
    before="Generator before tuning: a network file or a run folder.",
    n={
        "metavar": "LATENTS",
        "type": click.IntRange(min=2),
        "default": 64,
        "help": "Number of held-out latents that are compared with their ground-truth heads.",
    },
    out=TO_JSON,
)
@option(
    "--held-out",
    "latent_set",
    type=click.Choice(list(HELD_OUT_RANGES)),
    # settings must not be chosen on the latents of the published tables
    default="evaluation",
    help=(
        "Set of latents that no training uses: evaluation is the set of the published tables, validation is"
        " another set, for choosing settings."
    ),
)
def heads(networks: tuple[Path, ...], before: Path | None, latent_set: str, n: int, out: Path | None) -> None:
    """Compare the shapes of generators of synthetic heads with the ground-truth heads of their latents. The
    table has one line per generator: the error reduction on heads that were defective before tuning, and the
    damage to intact heads.

    \b
    Example:
        eg3d-rlhf report heads runs/00000-* --held-out=validation --n=60
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation.heads import TABLE, compare
    from eg3d_rlhf.experiments.table import figure_table

    # core/seeds.py reserves these seeds, so that no training uses them
    seeds = HELD_OUT_RANGES[latent_set].take(n)
    # Each generator is compared with `before` on the same latents.
    metrics_by_network, defective_count = compare(
        dict(zip(network_names(networks), networks, strict=True)), before, seeds
    )
    click.echo("\n".join(figure_table("network", metrics_by_network, TABLE, intervals=("error_reduction",))))
    click.echo(
        f"\n{n} latents ({latent_set}, from {seeds[0]}), psi 1; {defective_count} heads defective before"
        " tuning."
    )
    if out is not None:
        # first and last seed; the seeds are consecutive
        file_content = {
            "held_out": latent_set,
            "seeds": [seeds[0], seeds[-1]],
            "networks": metrics_by_network,
        }
        write_atomic(out, json.dumps(file_content, indent=1).encode())


@click.command("solid", cls=GroupedCommand, job="report solid")
@click.argument("networks", metavar="[FILE|RUN]...", nargs=-1, type=click.Path(path_type=Path, exists=True))
@option(
    "--pipeline",
    metavar="toy|DIR",
    check=check_root,
    show_default="none; the runs tuned GANs",
    help="Untuned flow generator that the listed runs tuned: its folder, or toy for the bundled generator.",
)
@option(
    "--conditioning",
    metavar="FILE|DIR",
    type=click.Path(path_type=Path, exists=True),
    show_default="the embeddings of the runs",
    help="Embeddings of the prompts or images for which the flow generator of --pipeline=DIR is sampled.",
)
@name_option(
    "--stage",
    show_default="the first stage",
    help="Name of the stage of the flow generator that was tuned; needs --pipeline.",
)
@shared(
    "before n psi seed out device",
    "level",
    before="Generator before tuning: a network file or a run folder.",
    n={
        "metavar": "SHAPES",
        # best of n is one of the controls: of each CHOOSE untuned shapes, the reward selects one
        "type": click.IntRange(min=CHOOSE),
        "default": 64,
        "help": "Number of shapes, rounded down to a multiple of four.",
    },
    psi={"default": 1.0, "help": "Truncation psi of the samples of GANs; 1 means no truncation."},
    seed="Random seed of the held-out latents of GANs, or of the noises of flow generators.",
    out=TO_JSON,
)
def solid(
    networks: tuple[Path, ...],
    before: Path | None,
    pipeline: str | None,
    conditioning: Path | None,
    stage: str | None,
    n: int,
    psi: float,
    seed: int,
    out: Path | None,
    device: str,
    level: float | None,
) -> None:
    """Test whether generated shapes are physically valid solids. The table shows the terms of the `solid`
    reward before and after tuning, and for comparison the terms of filtered shapes, convex hulls and balls.

    \b
    Examples:
        eg3d-rlhf report solid runs/00000-* --n=16
        eg3d-rlhf report solid --pipeline=toy --n=16
    """
    for flag, flag_value in (("--stage", stage), ("--conditioning", conditioning)):
        if flag_value is not None and pipeline is None:
            raise ValueError(
                f"{flag}={flag_value} has an effect on flow generators only. Add --pipeline, or remove"
                f" {flag}."
            )
    if level is not None and pipeline is not None:
        raise ValueError(
            f"--set level={level:g} has an effect on GANs only, whose shapes are densities. Remove it, or"
            " remove --pipeline."
        )
    # Imported here, so that --help and errors are printed without loading this module.
    from eg3d_rlhf.evaluation.solids import compare_networks, compare_stages, markdown, source_of

    # The names of snapshots are similar in all runs, so a snapshot is named by the folder of its run.
    run_folders = [
        path.parent if path.name.startswith("network-snapshot-") else path
        for path in map(Path.resolve, networks)
    ]
    networks_by_name = dict(zip(network_names(run_folders), networks, strict=True))
    target_device = choose_device(device)
    # Without --pipeline, the networks are GANs with density fields; with it, stages of a flow generator.
    if pipeline is None:
        table_rows, table_facts = compare_networks(
            networks_by_name, before, n, psi, seed, target_device, level
        )
    else:
        # the embeddings of --conditioning, else those that the runs record
        sampling_source = source_of(pipeline, conditioning, run_folders)
        table_rows, table_facts = compare_stages(
            networks_by_name, sampling_source, stage, n, seed, target_device
        )
    click.echo("\n".join(markdown(table_rows, table_facts["rules"])))
    click.echo(
        f"\n{table_facts['what']}. Brackets: 95 % intervals, bootstrap over shapes; for shares Wilson"
        f" intervals. Grids of {table_facts['edge']}^3."
    )
    if out is not None:
        # the file contains the same numbers as the printed table
        file_content = {
            "what": table_facts["what"],
            "weights": table_facts["rules"].weights,
            "lines": table_rows,
        }
        write_atomic(out, json.dumps(file_content, indent=1).encode())
