"""`eg3d-rlhf flow label`: what people say of the assets that were drawn."""

from functools import partial
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, check_extra, choose_device, option
from eg3d_rlhf.modes.flow_sample import device_flag, work_argument
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.db_flag import EXTRA, open_store
from eg3d_rlhf.people.label.entities import CampaignSettings
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES
from eg3d_rlhf.tuning.flow.workspace.work_folder import REWARD, Work

SECONDS = 8  # that an answer takes


@click.command("label", cls=GroupedCommand)
@work_argument
@option(
    "--pairs",
    metavar="N",
    type=click.IntRange(1),
    show_default="as many as assets",
    help="How many are compared.",
)
@option(
    "--strategy",
    metavar="NAME",
    default="random",
    help=(
        f"How pairs are chosen: {', '.join(STRATEGIES)}, or a plugin's. Active and close read the scores of"
        f" WORK/{REWARD}."
    ),
)
@device_flag
@option("--campaign", rare=True, metavar="NAME", show_default="WORK's", help="Another one, of labels.db.")
@launch.server_options("access.jsonl in WORK")
@click.pass_context
def label(
    ctx: click.Context,
    folder: Path,
    pairs: int | None,
    strategy: str,
    device: str,
    campaign: str | None,
    **server,
) -> None:
    """Compare what was drawn, two assets of one condition at a time, in the browser; prints the address.

    \b
    Example:
        eg3d-rlhf flow label WORK
        eg3d-rlhf flow label WORK --strategy=active --set campaign=more
    """
    from eg3d_rlhf.tuning.flow.workspace.answers import check_trained, latent_ensemble

    check_extra(EXTRA)
    work = Work.open(folder)
    flags = launch.ServerFlags.of(server, folder)
    assets = len(work.lines())
    name = campaign or work.campaign
    request = request_of(work, name, pairs or assets, strategy)
    with open_store(work.database, create=True) as store:
        if flags.exposed:
            launch.check_annotators(
                store, flags.host, f"eg3d-rlhf label add-annotator NAME --db={work.database}"
            )
        stored = store.campaign(name)
        if stored is None:
            if STRATEGIES[strategy].least_rewards:
                check_trained(work, strategy)
            scorer = partial(latent_ensemble, work, choose_device(device))
            store.create_campaign(*launch.plan_campaign(store, request, click.echo, scorer))
            stored = store.campaign(name)
            assert stored is not None
        else:
            asked = {"pairs": pairs, "strategy": strategy}
            launch.check_resumed(stored, asked, launch.given_flags(ctx), "--set campaign=NAME")
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
            lambda address: [f"label at {address}  (Ctrl-C stops)", f"next: {tuning_on(work, name)}"],
            "answer",
        )


def tuning_on(work: Work, campaign: str) -> str:
    """Return the command that tunes on a campaign's answers; those of further campaigns are exported before,
    together with WORK's own.
    """
    tune = f"eg3d-rlhf flow tune {work.folder}"
    if campaign == work.campaign:
        return tune
    file = work.folder / "answers.jsonl"
    return f"eg3d-rlhf label export {file} --kind=asset-pairs --db={work.database} && {tune} --labels={file}"


def request_of(work: Work, name: str, pairs: int, strategy: str = "random") -> launch.Request:
    """A campaign on what was drawn, as the labelling tool plans it."""
    settings = launch.filled(dict.fromkeys(launch.SETTINGS), CampaignSettings) | launch.ASKED
    pairing = PairingOptions(pairs=pairs, seed=work.seed, strategy=strategy)
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
