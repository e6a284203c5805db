"""The jobs `report heads` and `report solid`, which compare the shapes of several networks in a table."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option
from eg3d_rlhf.evaluation.settings import CHOOSE, PLACES
from eg3d_rlhf.modes.shared_flags import PATH, name_option, shared
from training.storage import write_atomic

TO_JSON = {
    "metavar": "FILE",
    "type": click.Path(path_type=Path, dir_okay=False),
    "default": None,
    "help": "Also write the table to this JSON file.",
}


def names_of(networks: Sequence[Path]) -> list[str]:
    """Name networks by the fewest last parts of their paths that make the names distinct.

    Raises: click.UsageError if a network is listed twice.
    """
    # a file is named without its suffix
    parts = [
        path.resolve().with_suffix("").parts if path.is_file() else path.resolve().parts for path in networks
    ]
    # add parent folders until all names differ
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise click.UsageError("[FILE|RUN]: a network is listed twice. Name each network once.")


@click.command("heads", cls=GroupedCommand, job="report heads")
@click.argument("networks", metavar="[FILE|RUN]...", nargs=-1, type=PATH)
@shared(
    "before n out",
    before="Generator before tuning: a network file or a run folder.",
    n={
        "metavar": "LATENTS",
        "type": click.IntRange(min=2),
        "default": 64,
        "help": "Number of held-out latents.",
    },
    out=TO_JSON,
)
@option(
    "--held-out",
    "place",
    type=click.Choice(list(PLACES)),
    default="evaluation",
    help=(
        "Held-out latents: evaluation, those of the published tables; validation, those for choosing"
        " settings."
    ),
)
def heads(networks: tuple[Path, ...], before: Path | None, place: str, n: int, out: Path | None) -> None:
    """Compare generators of synthetic heads with the ground-truth heads of their latents: one line per
    network, with the error reduction on defective heads and the harm to intact ones.

    \b
    Example:
        eg3d-rlhf report heads runs/00000-* --held-out=validation --n=60
    """
    from eg3d_rlhf.evaluation.heads import TABLE, compare
    from eg3d_rlhf.experiments.table import figure_table

    # seeds that core/seeds.py reserves, so that no training uses them
    seeds = PLACES[place].take(n)
    columns, defective = compare(dict(zip(names_of(networks), networks, strict=True)), before, seeds)
    click.echo("\n".join(figure_table("network", columns, TABLE, intervals=("error_reduction",))))
    click.echo(f"\n{n} latents ({place}, from {seeds[0]}), psi 1; {defective} heads defective before tuning.")
    if out is not None:
        data = {"held_out": place, "seeds": [seeds[0], seeds[-1]], "networks": columns}
        write_atomic(out, json.dumps(data, indent=1).encode())


@click.command("solid", cls=GroupedCommand, job="report solid")
@click.argument("networks", metavar="[FILE|RUN]...", nargs=-1, type=click.Path(path_type=Path, exists=True))
@option(
    "--pipeline",
    metavar="toy|DIR",
    show_default="none: networks are GANs",
    help="Untuned flow generator of the listed runs.",
)
@option(
    "--conditioning",
    metavar="FILE|DIR",
    type=click.Path(path_type=Path, exists=True),
    show_default="those of the runs",
    help="With --pipeline=DIR: embeddings of the prompts or images to sample.",
)
@name_option("--stage", show_default="the first", help="With --pipeline: name of the stage that was tuned.")
@shared(
    "before n psi seed out device",
    before="Generator before tuning: a network file or a run folder.",
    n={
        "metavar": "SHAPES",
        "type": click.IntRange(min=CHOOSE),
        "default": 64,
        "help": "Number of shapes, rounded down to a multiple of four.",
    },
    psi={"default": 1.0, "help": "Truncation psi of the latents."},
    seed="Random seed of the held-out latents or noises.",
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
) -> None:
    """Test whether shapes are physically valid solids: the terms of the `solid` reward before and after
    tuning, compared with filtered shapes, convex hulls and balls.

    \b
    Examples:
        eg3d-rlhf report solid runs/00000-* --n=16
        eg3d-rlhf report solid --pipeline=toy --n=16
    """
    from eg3d_rlhf.evaluation.solids import compare_networks, compare_stages, markdown, source_of

    for flag, value in (("--stage", stage), ("--conditioning", conditioning)):
        if value is not None and pipeline is None:
            raise ValueError(f"{flag}={value} needs --pipeline. Add --pipeline, or remove {flag}.")
    # a snapshot is named by its run, as all snapshots have similar names
    folders = [
        path.parent if path.name.startswith("network-snapshot-") else path
        for path in map(Path.resolve, networks)
    ]
    named = dict(zip(names_of(folders), networks, strict=True))
    where = choose_device(device)
    # generators of density fields; else stages of a flow generator
    if pipeline is None:
        lines, how = compare_networks(named, before, n, psi, seed, where)
    else:
        source = source_of(pipeline, conditioning, folders)
        lines, how = compare_stages(named, source, stage, n, seed, where)
    click.echo("\n".join(markdown(lines, how["rules"])))
    click.echo(
        f"\n{how['what']}. Brackets: 95 % intervals, bootstrap over shapes; for shares Wilson intervals."
        " Grids of"
        f" {how['edge']}^3."
    )
    if out is not None:
        data = {"what": how["what"], "weights": how["rules"].weights, "lines": lines}
        write_atomic(out, json.dumps(data, indent=1).encode())
