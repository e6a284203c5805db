"""`eg3d-rlhf flow label`: what people say of the assets that were drawn."""

from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, check_extra, option
from eg3d_rlhf.modes.flow_draw import work_argument
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.db_flag import EXTRA, open_store
from eg3d_rlhf.people.label.entities import CampaignSettings
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.tuning.flow.workspace.work import Work

SECONDS = 8  # that an answer takes


@click.command("label", cls=GroupedCommand)
@work_argument
@option(
    "--pairs",
    metavar="N",
    type=click.IntRange(1),
    default=None,
    show_default="as many as assets",
    help="How many are compared.",
)
@option(
    "--campaign",
    rare=True,
    metavar="NAME",
    default=None,
    show_default="WORK's",
    help="Another one, of labels.db.",
)
@launch.server_options("access.jsonl in WORK")
def label(folder: Path, pairs: int | None, campaign: str | None, **server) -> None:
    """Compare what was drawn, two assets of one condition at a time, in the browser; prints the address.

    \b
    Example:
        eg3d-rlhf flow label WORK
    """
    check_extra(EXTRA)
    work = Work.open(folder)
    flags = launch.ServerFlags.of(server, folder)
    assets = len(work.lines())
    with open_store(work.database, create=True) as store:
        if flags.exposed:
            launch.check_annotators(
                store, flags.host, f"eg3d-rlhf label add-annotator NAME --db={work.database}"
            )
        name = campaign or work.campaign
        stored = store.campaign(name)
        if stored is None:
            request = request_of(work, name, pairs or assets)
            store.create_campaign(*launch.plan_campaign(store, request, click.echo))
            stored = store.campaign(name)
            assert stored is not None
        elif pairs is not None and pairs != stored.settings.extra[launch.FLAGS]["pairs"]:
            asked = f"{stored.settings.extra[launch.FLAGS]['pairs']}, as campaign {name!r} was planned"
            raise ValueError(f"--pairs: expected {asked}, got {pairs}. Leave it out, or --set campaign=NAME.")
        answered = sum(1 for _ in store.judgements(name))
        click.echo(
            f"{stored.pairs} pairs, about {duration(SECONDS * stored.pairs)} at {SECONDS} s each; {answered}"
            " answers so far"
        )
        launch.serve_campaign(
            store,
            work.database,
            name,
            flags,
            lambda address: [f"label at {address}  (Ctrl-C stops)", f"next: eg3d-rlhf flow tune {folder}"],
            "answer",
        )


def request_of(work: Work, name: str, pairs: int) -> launch.Request:
    """A campaign on what was drawn, as the labelling tool plans it."""
    settings = launch.filled(dict.fromkeys(launch.SETTINGS), CampaignSettings) | launch.ASKED
    pairing = PairingOptions(pairs=pairs, seed=work.seed, strategy="random")
    assets = str(work.drawn().resolve())
    return launch.Request(
        name=name,
        network=None,
        after=None,
        pairing=pairing,
        settings=settings,
        assets=assets,
        up=work.up,
        lenient=True,
    )


def duration(seconds: float) -> str:
    """In words.

    >>> duration(5400), duration(300)
    ('1 h 30 min', '5 min')
    """
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
