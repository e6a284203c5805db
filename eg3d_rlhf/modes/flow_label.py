"""The job `flow label`: people compare the generated assets of a WORK folder in the browser.

The pairs and the answers are stored in WORK/labels.db as a labelling project, which the database calls a
campaign. `flow tune` reads the answers.
"""

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

SECONDS = 8  # assumed time of one answer, from which the total time is estimated


@click.command("label", cls=GroupedCommand)
@work_argument
@option(
    "--pairs",
    metavar="N",
    type=click.IntRange(1),
    show_default="the number of assets",
    help="Number of pairs of assets to compare.",
)
@option(
    "--strategy",
    metavar="NAME",
    default="random",
    help=(
        f"Strategy that chooses the pairs: {', '.join(STRATEGIES)}, or the name of a plugin's strategy."
        " active chooses pairs on which rewards disagree, and close chooses pairs with similar scores; both"
        f" need trained rewards in WORK/{REWARD}."
    ),
)
@device_flag
@option(
    "--campaign",
    rare=True,
    metavar="NAME",
    show_default="the project of WORK",
    help=(
        "Name of the labelling project (campaign) in labels.db. A new name starts a further project on the"
        " same assets."
    ),
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
    **server_values,
) -> None:
    """Compare the generated assets in the browser: each page shows two assets of the same prompt. The command
    prints the address of the page.

    \b
    Example:
        eg3d-rlhf flow label WORK
        eg3d-rlhf flow label WORK --strategy=active --set campaign=more
    """
    # Imported here, so that --help is printed without loading this module.
    from eg3d_rlhf.tuning.flow.workspace.answers import check_trained, latent_ensemble

    # Fails at once if the packages of the label server are not installed.
    check_extra(EXTRA)
    work = Work.open(folder)
    server_flags = launch.ServerFlags.from_flags(server_values, folder)
    # one line per generated asset
    asset_count = len(work.lines())
    # WORK has a default campaign; others are made with --set campaign=NAME
    campaign_name = campaign or work.campaign
    request = make_request(work, campaign_name, pairs or asset_count, strategy)
    with open_store(work.database, create=True) as store:
        # Annotators on other machines must log in, so at least one must exist before the server starts.
        if server_flags.exposed:
            launch.check_annotators(
                store, server_flags.host, f"eg3d-rlhf label add-annotator NAME --db={work.database}"
            )
        stored_campaign = store.campaign(campaign_name)
        if stored_campaign is None:
            # active strategies need trained rewards, which the first answers provide
            if STRATEGIES[strategy].least_rewards:
                check_trained(work, strategy)
            # loaded only if the strategy scores pairs
            load_scorer = partial(latent_ensemble, work, choose_device(device))
            store.create_campaign(*launch.plan_campaign(store, request, click.echo, load_scorer))
            stored_campaign = store.campaign(campaign_name)
            assert stored_campaign is not None
        else:
            # An existing campaign resumes, so its pairs and its strategy cannot change. `check_resumed`
            # raises ValueError if a given flag differs from the stored value.
            requested_settings = {"pairs": pairs, "strategy": strategy}
            launch.check_resumed(
                stored_campaign, requested_settings, launch.given_flags(ctx), "--set campaign=NAME"
            )
        # number of judgements in the database
        answer_count = store.answer_count(campaign_name)
        click.echo(
            f"{stored_campaign.pairs} pairs, about {format_duration(SECONDS * stored_campaign.pairs)} at"
            f" {SECONDS} s per answer; {answer_count} answers so far"
        )
        # Serves the page until Ctrl-C. The lambda returns the lines that are printed at the start.
        launch.serve_campaign(
            store,
            work.database,
            campaign_name,
            server_flags,
            lambda address: [
                f"label at {address}  (Ctrl-C stops)",
                f"next: {tuning_command(work, campaign_name)}",
            ],
            "answer",
        )


def tuning_command(work: Work, campaign: str) -> str:
    """Return the shell command that tunes the generator on the answers of a labelling project.

    `flow tune` reads the answers of WORK's default project by itself. The answers of another project must be
    exported first, so the result then consists of two commands.

    Args:
        work: the opened folder WORK.
        campaign: name of the labelling project.
    """
    tune_command = f"eg3d-rlhf flow tune {work.folder}"
    # `flow tune` reads the answers of this project directly from the database.
    if campaign == work.campaign:
        return tune_command
    labels_file = work.folder / "answers.jsonl"
    return (
        f"eg3d-rlhf label export {labels_file} --kind=asset-pairs --db={work.database} && {tune_command}"
        f" --labels={labels_file}"
    )


def make_request(work: Work, campaign_name: str, pair_count: int, strategy: str = "random") -> launch.Request:
    """Build the description of a new labelling project on the generated assets of WORK.

    Args:
        work: the opened folder WORK.
        campaign_name: name of the project.
        pair_count: number of pairs.
        strategy: name of the strategy that chooses the pairs.
    """
    # None for every setting: `with_defaults` replaces it by the default value of the setting
    campaign_settings = launch.with_defaults(dict.fromkeys(launch.SETTINGS), CampaignSettings) | launch.ASKED
    pairing_options = PairingOptions(pairs=pair_count, seed=work.seed, strategy=strategy)
    # an absolute path, because the label server may be started in another folder
    asset_folder = str(work.asset_folder().resolve())
    return launch.Request(
        name=campaign_name,
        network=None,
        after=None,
        pairing=pairing_options,
        settings=campaign_settings,
        assets=asset_folder,
        up=work.up,
        # samples without a surface are left out instead of rejected
        lenient=True,
    )


def format_duration(seconds: float) -> str:
    """Format a duration in hours and minutes, rounded to minutes. A duration below one minute becomes 1 min.

    Args:
        seconds: duration in seconds.

    >>> format_duration(5400), format_duration(300)
    ('1 h 30 min', '5 min')
    """
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
