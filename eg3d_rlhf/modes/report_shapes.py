"""The commands `report heads` and `report solid`: tables of the shapes of several networks."""

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
    "help": "JSON to write.",
}


def names_of(networks: Sequence[Path]) -> list[str]:
    """Name networks by as few last parts of their paths as tell them apart.

    Raises: click.UsageError where one stands twice.
    """
    parts = [
        path.resolve().with_suffix("").parts if path.is_file() else path.resolve().parts for path in networks
    ]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise click.UsageError("[FILE|RUN]: expected different networks, got one of them twice. Name each once.")


@click.command("heads", cls=GroupedCommand, job="report heads")
@click.argument("networks", metavar="[FILE|RUN]...", nargs=-1, type=PATH)
@shared(
    "before n out",
    before="Generator before tuning.",
    n={"metavar": "LATENTS", "type": click.IntRange(min=2), "default": 64, "help": "How many."},
    out=TO_JSON,
)
@option(
    "--held-out",
    "place",
    type=click.Choice(list(PLACES)),
    default="evaluation",
    help="Which held-out latents: those of the published tables, or those for choosing settings.",
)
def heads(networks: tuple[Path, ...], before: Path | None, place: str, n: int, out: Path | None) -> None:
    """Networks of heads of people beside the whole heads that latents name, a line each: what is repaired,
    what harmed.

    \b
    Example:
        eg3d-rlhf report heads runs/00000-* --held-out=validation --n=60
    """
    from eg3d_rlhf.evaluation.heads import TABLE, compare
    from eg3d_rlhf.experiments.table import figure_table

    seeds = PLACES[place].take(n)
    columns, defective = compare(dict(zip(names_of(networks), networks, strict=True)), before, seeds)
    click.echo("\n".join(figure_table("network", columns, TABLE, intervals=("error_reduction",))))
    click.echo(f"\n{n} latents ({place}, from {seeds[0]}), psi 1; {defective} defective before.")
    if out is not None:
        data = {"held_out": place, "seeds": [seeds[0], seeds[-1]], "networks": columns}
        write_atomic(out, json.dumps(data, indent=1).encode())


@click.command("solid", cls=GroupedCommand, job="report solid")
@click.argument("networks", metavar="[FILE|RUN]...", nargs=-1, type=click.Path(path_type=Path, exists=True))
@option(
    "--pipeline",
    metavar="toy|DIR",
    show_default="none: generators of fields",
    help="Flow generator whose tuned runs are named.",
)
@option(
    "--conditioning",
    metavar="FILE|DIR",
    type=click.Path(path_type=Path, exists=True),
    show_default="those of the runs",
    help="With --pipeline=DIR: embeddings of its prompts or images.",
)
@name_option("--stage", show_default="the first", help="With --pipeline: the stage that was tuned.")
@shared(
    "before n psi seed out device",
    before="Generator before tuning.",
    n={
        "metavar": "SHAPES",
        "type": click.IntRange(min=CHOOSE),
        "default": 64,
        "help": "How many, rounded down to groups of four.",
    },
    psi={"default": 1.0, "help": "Truncation of latents."},
    seed="Other held-out latents, or noises, per seed.",
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
    """Are shapes sound bodies? Terms of `solid` before and after tuning, beside filters, hulls and balls,
    which only look so.

    \b
    Examples:
        eg3d-rlhf report solid runs/00000-* --n=16
        eg3d-rlhf report solid --pipeline=toy --n=16
    """
    from eg3d_rlhf.evaluation.solids import compare_networks, compare_stages, markdown, source_of

    for flag, value in (("--stage", stage), ("--conditioning", conditioning)):
        if value is not None and pipeline is None:
            raise ValueError(
                f"{flag}={value}: expected --pipeline with it, got none. Add it, or leave this out."
            )
    folders = [
        path.parent if path.name.startswith("network-snapshot-") else path
        for path in map(Path.resolve, networks)
    ]
    named = dict(zip(names_of(folders), networks, strict=True))
    where = choose_device(device)
    if pipeline is None:
        lines, how = compare_networks(named, before, n, psi, seed, where)
    else:
        source = source_of(pipeline, conditioning, folders)
        lines, how = compare_stages(named, source, stage, n, seed, where)
    click.echo("\n".join(markdown(lines, how["rules"])))
    click.echo(
        f"\n{how['what']}. Brackets: 95 %, bootstrap over shapes; of shares Wilson's. Grids of"
        f" {how['edge']}^3."
    )
    if out is not None:
        data = {"what": how["what"], "weights": how["rules"].weights, "lines": lines}
        write_atomic(out, json.dumps(data, indent=1).encode())
