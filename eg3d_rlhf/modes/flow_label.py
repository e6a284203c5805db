"""The job `flow label`: people compare the generated assets of a WORK folder in the browser."""

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

SECONDS = 8  # time that an answer takes, assumed in the estimate of the total


@click.command("label", cls=GroupedCommand)
@work_argument
@option(
    "--pairs",
    metavar="N",
    type=click.IntRange(1),
    show_default="the number of assets",
    help="Number of pairs to compare.",
)
@option(
    "--strategy",
    metavar="NAME",
    default="random",
    help=(
        f"Strategy that chooses the pairs: {', '.join(STRATEGIES)}, or a plugin's. active and close need"
        f" rewards in WORK/{REWARD}."
    ),
)
@device_flag
@option(
    "--campaign",
    rare=True,
    metavar="NAME",
    show_default="WORK's",
    help="Name of another campaign in labels.db.",
)
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
    """Compare the generated assets in the browser, two of the same prompt at a time. Prints the address.

    \b
    Example:
        eg3d-rlhf flow label WORK
        eg3d-rlhf flow label WORK --strategy=active --set campaign=more
    """
    from eg3d_rlhf.tuning.flow.workspace.answers import check_trained, latent_ensemble

    check_extra(EXTRA)
    work = Work.open(folder)
    flags = launch.ServerFlags.of(server, folder)
    # lines of the list of generated assets
    assets = len(work.lines())
    # WORK has a default campaign; others are made with --set campaign=NAME
    name = campaign or work.campaign
    request = request_of(work, name, pairs or assets, strategy)
    with open_store(work.database, create=True) as store:
        # reachable from other machines: annotators need a login
        if flags.exposed:
            launch.check_annotators(
                store, flags.host, f"eg3d-rlhf label add-annotator NAME --db={work.database}"
            )
        stored = store.campaign(name)
        if stored is None:
            # active strategies need trained rewards, which the first answers provide
            if STRATEGIES[strategy].least_rewards:
                check_trained(work, strategy)
            # loaded only if the strategy scores pairs
            scorer = partial(latent_ensemble, work, choose_device(device))
            store.create_campaign(*launch.plan_campaign(store, request, click.echo, scorer))
            stored = store.campaign(name)
            assert stored is not None
        else:  # an existing campaign resumes, so its pairs and strategy cannot change
            # raises an error if these differ from the stored campaign
            asked = {"pairs": pairs, "strategy": strategy}
            launch.check_resumed(stored, asked, launch.given_flags(ctx), "--set campaign=NAME")
        answered = sum(1 for _ in store.judgements(name))
        click.echo(
            f"{stored.pairs} pairs, about {duration(SECONDS * stored.pairs)} at {SECONDS} s per answer;"
            f" {answered}"
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
    """Return the command that tunes on a campaign's answers. Those of a further campaign are exported
    first.
    """
    tune = f"eg3d-rlhf flow tune {work.folder}"
    if campaign == work.campaign:
        return tune
    file = work.folder / "answers.jsonl"
    return f"eg3d-rlhf label export {file} --kind=asset-pairs --db={work.database} && {tune} --labels={file}"


def request_of(work: Work, name: str, pairs: int, strategy: str = "random") -> launch.Request:
    """Build the request for a campaign on the generated assets of WORK."""
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
    """Write a duration in hours and minutes; at least one minute.

    >>> duration(5400), duration(300)
    ('1 h 30 min', '5 min')
    """
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
