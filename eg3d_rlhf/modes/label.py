"""The job `label`: serves the labelling page, and the subcommands that export, import and rank its
answers.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from eg3d_rlhf.core.cli import GroupedCommand, GroupedGroup, check_extra, naming, option, options_of
from eg3d_rlhf.modes.annotators import PEOPLE, database, known_database
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.db_flag import DATABASE, DB, EXTRA, open_store, sqlite_file, store_exists
from eg3d_rlhf.people.label.entities import QUESTIONS, CampaignSettings, Mode, parse_questions
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.store_labels import (
    export_assets,
    export_labels,
    export_unpaired,
    without_password,
)
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

MAKE = "python tools/label.py add-annotator NAME"


def _archive(what: str, *args, **options) -> Any:
    """Call a function of people/label/archive.py by name.

    That module needs an optional dependency, so it is imported only when called, and --help works without it.
    """
    from eg3d_rlhf.people.label import archive

    return getattr(archive, what)(*args, **options)


# by --kind of an export: the allowed file suffixes, and the function that writes the file
KINDS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "labels": ((".jsonl", ".csv"), export_labels),
    "unpaired": ((".jsonl",), export_unpaired),
    "judgements": ((".jsonl",), functools.partial(_archive, "export_judgements")),
    "ranked-seeds": ((".csv",), functools.partial(_archive, "export_ranked_seeds")),
    **{
        kind: ((".jsonl",), functools.partial(export_assets, kind=kind))
        for kind in ("asset-pairs", "rankings", "asset-scores")
    },
}
_pairs_option = functools.partial(option, group="Pairs")


class LabelGroup(GroupedGroup):
    """Group that completes its subcommands and the jobs that begin with `label`, such as `label elo`."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete subcommands, flags and jobs."""
        from eg3d_rlhf.modes.jobs import JobGroup

        return super().shell_complete(ctx, incomplete) + JobGroup("label").shell_complete(ctx, incomplete)


@click.command("label", cls=LabelGroup, job="label", invoke_without_command=True)
@_pairs_option(
    "--network",
    metavar="PATH",
    show_default="the bundled generator",
    help="Generator whose shapes are labelled: a network file or a run folder.",
)
@_pairs_option(
    "--assets",
    metavar="PATH",
    show_default="a generator's shapes",
    help=(
        "Finished assets to label (GLB, PLY, OBJ, splats, videos): a folder GENERATOR/PROMPT.glb, or a"
        " .jsonl list."
    ),
)
@_pairs_option(
    "--up", type=click.Choice(["y", "z"]), default="y", help="With --assets: the axis that points up."
)
@options_of(PairingOptions)
@_pairs_option(
    "--reward",
    "rewards",
    metavar="FILE",
    multiple=True,
    show_default="the bundled two",
    help="Reward of the ensemble for --strategy=active or close. May be repeated.",
)
@_pairs_option(
    "--after", metavar="NAME", help="Tournament: campaign whose results decide the pairs of this round."
)
@options_of(CampaignSettings)
@_pairs_option(
    "--show-render/--no-show-render",
    default=False,
    rare=True,
    help="Let annotators show the RGB render as well.",
)
@_pairs_option(
    "--both-bad/--no-both-bad",
    default=True,
    rare=True,
    help="Allow the answer 'both are bad'; off with --single.",
)
@_pairs_option(
    "--criteria",
    "questions",
    metavar="LIST",
    default="",
    show_default="none",
    help=(
        f"Criteria to ask about besides which is better, comma-separated: {', '.join(QUESTIONS)}, or"
        " NAME=TEXT."
    ),
)
@_pairs_option(
    "--reveal/--no-reveal",
    default=False,
    rare=True,
    help="Show the generators' names after each answer.",
)
@option("--db", metavar="URL", default=DB, help=DATABASE)
@option(
    "--campaign",
    metavar="NAME",
    default="labels",
    help="Name of the campaign. An existing campaign is resumed.",
)
@option("-n", "--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
@launch.server_options("access.jsonl beside the database")
@click.pass_context
def main(
    ctx: click.Context,
    db: str,
    campaign: str,
    network: str | None,
    assets: str | None,
    after: str | None,
    rewards: tuple,
    dry_run: bool,
    **flags,
) -> None:
    """Label pairs of shapes, or shapes one by one, in the browser. Prints the address.

    \b
    Example:
        python tools/label.py --network=runs/00001-x --pairs=1000
        python tools/label.py --assets=FOLDER --pairs=200 --campaign=chairs
        python tools/label.py add-annotator ann
        python tools/label.py --host=0.0.0.0
    """
    # subcommands take --db from here if they are not given their own
    ctx.obj = db
    # `label export` and others run by themselves
    if ctx.invoked_subcommand is not None:
        launch.refuse_flags_before(ctx, "db")
        return
    check_extra(EXTRA)
    request, given = _request(ctx, campaign, network, assets, after, rewards, flags)
    # compared with the stored campaign at a resume
    wanted = request.to_json()
    server = server_of(flags, db)
    if dry_run:
        click.echo(json.dumps(_dry_run(db, request, server, wanted, given), indent=1, default=str))
        return
    _start(db, request, server, wanted, given)


def server_of(flags: Mapping, db: str) -> launch.ServerFlags:
    """Build the server's settings; its access log lies beside the database."""
    # a database server has no folder, so the log goes to runs/labels
    path = sqlite_file(db)
    return launch.ServerFlags.of(flags, path.parent if path else Path("runs/labels"))


def _request(
    ctx: click.Context,
    campaign: str,
    network: str | None,
    assets: str | None,
    after: str | None,
    rewards: tuple,
    flags: dict,
) -> tuple[launch.Request, set[str]]:
    """Build the request for a campaign from the flags. Returns it and the names of the given flags.

    Raises: ValueError, FileNotFoundError naming the flag.
    """
    given = launch.given_flags(ctx)
    if assets is not None:
        _reject_generator_flags(ctx, given)
    elif "up" in given:
        raise ValueError("--up needs --assets: a generator's shapes always stand upright. Remove --up.")
    # None becomes the default of the setting
    flags = launch.filled(flags, PairingOptions, CampaignSettings)
    if after is not None and not STRATEGIES[flags["strategy"]].reads_answers:
        names = " or ".join(name for name, strategy in STRATEGIES.items() if strategy.reads_answers)
        raise ValueError(
            f"--after needs --strategy={names}, got {flags['strategy']}. Change it, or remove --after."
        )
    pairing = PairingOptions(
        rewards=rewards,
        **{name: flags[name] for name in PairingOptions.__dataclass_fields__ if name != "rewards"},
    )
    from eg3d_rlhf.generators import find_network

    with naming("--network"):
        source = find_network(network).resolve() if network else None
        if source is not None and not source.is_file():
            raise FileNotFoundError(
                f"expected a network file or a run folder, but {network} does not exist. Check the path."
            )
    # settings that are stored with the campaign
    settings = {name: flags[name] for name in launch.SETTINGS}
    settings["questions"] = tuple(part.strip() for part in flags["questions"].split(",") if part.strip())
    # for single shapes there is no second side to swap and no 'both'
    if pairing.single:
        settings |= {
            name: value for name, value in (("swap_share", 0.0), ("both_bad", False)) if name not in given
        }
    request = launch.Request(
        name=campaign,
        network=str(source) if source else None,
        after=after,
        pairing=pairing,
        settings=settings,
        assets=str(Path(assets).resolve()) if assets else None,
        up=flags["up"],
    )
    if "prompt" in settings["questions"] and assets is None:
        raise ValueError(
            "--criteria: 'prompt' needs --assets, because a generator's shapes have no prompts. Remove it."
        )
    parse_questions(settings["questions"])  # raises ValueError for an unknown criterion
    request.campaign_settings({})  # checks the shares of repeated and swapped pairs before anything slow
    return request, given


def _reject_generator_flags(ctx: click.Context, given: set[str]) -> None:
    """Raise ValueError for flags that describe how a generator is sampled: they do not apply to finished
    assets.
    """
    sampling_flags = {
        "network",
        "show_render",
        "first_seed",
        "psi",
        "level",
        "resolution",
        "triangles",
        "pool",
    }
    if wrong := launch.named_flags(ctx, given & sampling_flags):
        raise ValueError(
            f"{', '.join(wrong)} cannot be combined with --assets, which are finished. Remove the flag."
        )


def _dry_run(
    db: str, request: launch.Request, server: launch.ServerFlags, wanted: dict, given: set[str]
) -> dict:
    # an existing campaign resumes with its stored settings
    resumed = False
    if store_exists(db):
        with open_store(db, create=False) as store:
            stored = store.campaign(request.name)
            if stored is not None:
                resumed = True
                wanted = dict(launch.check_resumed(stored, wanted, given))
    kept = {"db": without_password(db), "access_log": str(server.access_log)}
    return {
        "campaign": request.name,
        "action": "resume" if resumed else "plan",
        **wanted,
        **server.to_dict(),
        **kept,
    }


def _start(
    db: str, request: launch.Request, server: launch.ServerFlags, wanted: dict, given: set[str]
) -> None:
    """Serve the campaign; plan it first if it is new."""
    planned = None
    if not store_exists(db):  # plan first: an error must leave no empty database
        if server.exposed:
            launch.check_annotators(None, server.host, MAKE)
        # slow: it generates the shapes of the pairs
        planned = launch.plan_campaign(None, request, click.echo)
    with open_store(db, create=True) as store:
        # reachable from other machines: annotators need a login
        if server.exposed:
            launch.check_annotators(store, server.host, MAKE)
        campaign = store.campaign(request.name)
        if campaign is None:
            settings, pairs = planned or launch.plan_campaign(store, request, click.echo)
            store.create_campaign(settings, pairs)
            click.echo(f"campaign {request.name!r}: {len(pairs)} pairs planned")
        else:
            launch.check_resumed(campaign, wanted, given)
            answered = sum(1 for _ in store.judgements(request.name))
            click.echo(
                f"campaign {request.name!r}: resumed, {campaign.pairs} pairs, {answered} judgements so far"
            )
        have = f"{len(launch.with_access(store))} annotators can log in; add-annotator NAME adds one"
        more = [f"other machines can reach this server with a login token: {have}"] if server.exposed else []
        launch.serve_campaign(
            store,
            db,
            request.name,
            server,
            lambda address: [f"label at {address}  (Ctrl-C stops)", *more],
            "judgement",
        )


@click.command("export", cls=GroupedCommand, job="label export")
@click.argument("out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@option(
    "--kind",
    type=click.Choice(tuple(KINDS)),
    default="labels",
    help=(
        "Content of the file. labels: pairs (.jsonl, .csv); unpaired: single shapes (.jsonl); judgements: all"
        " answers without loss (.jsonl); ranked-seeds: the paper's table (.csv). For assets: pairs of files,"
        " rankings per prompt, or scores of single assets (.jsonl)."
    ),
)
@option("--campaign", metavar="NAME", default=None, show_default="all", help="Campaign to export.")
@option(
    "--annotator",
    "annotators",
    metavar="NAME",
    multiple=True,
    show_default="all",
    help="Annotator to export. May be repeated.",
)
@option(
    "--least-gold-accuracy",
    metavar="0..1",
    type=click.FloatRange(0, 1),
    help="Leave out annotators with a lower accuracy on gold pairs.",
)
@option("--drop-repeats", is_flag=True, help="Keep only each annotator's first answer to a pair.")
@option(
    "--criterion",
    metavar="NAME",
    show_default="which is better",
    help="Export the votes on this criterion.",
)
@option(
    "--from-pairs",
    is_flag=True,
    help=(
        "For unpaired and asset-scores: also label both shapes of a pair answered 'both are bad' as not good."
    ),
)
@database
@click.pass_context
def export(
    ctx: click.Context, out: Path, kind: str, campaign: str | None, db: str, from_pairs: bool, **filters
) -> None:
    """Write the labels or judgements of a database to FILE."""
    if from_pairs and (kind not in ("unpaired", "asset-scores") or filters["criterion"]):
        raise ValueError(
            f"--from-pairs needs --kind=unpaired or asset-scores, without --criterion; got --kind={kind}."
            " Remove --from-pairs."
        )
    suffixes, write = KINDS[kind]
    if out.suffix not in suffixes:
        raise ValueError(
            f"FILE: --kind={kind} needs a name ending in {' or '.join(suffixes)}, got {out.name}. Rename it."
        )
    # judgements are an archive of everything, so filters do not apply
    if kind == "judgements":
        if used := launch.named_flags(ctx, launch.given_flags(ctx) & set(filters)):
            raise ValueError(
                f"{', '.join(used)} cannot be combined with --kind=judgements, which exports everything."
                " Remove the flag."
            )
        filters = {}
    with open_store(db, create=False) as store:
        write(store, out, campaign=campaign, **filters, **({"from_pairs": True} if from_pairs else {}))
    with out.open(encoding="utf-8") as file:
        # the first line of a CSV is its header
        count = sum(1 for _ in file) - (out.suffix == ".csv")
    click.echo(f"{out}: {count} line{'s' if count != 1 else ''} written")


@click.command("import", cls=GroupedCommand)
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@option(
    "--campaign",
    metavar="NAME",
    show_default="the file's name",
    help="For ranked seeds: name of the campaign to create.",
)
@option(
    "--annotator",
    metavar="NAME",
    default=None,
    show_default="imported",
    help="For ranked seeds: name of the annotator.",
)
@database
def import_(source: Path, campaign: str | None, annotator: str | None, db: str) -> None:
    """Import FILE into a database: exported judgements (.jsonl), or a table of ranked seeds (.csv)."""
    if source.suffix not in (".jsonl", ".csv"):
        raise ValueError(
            f"FILE: expected .jsonl (judgements) or .csv (ranked seeds), got {source.name}. Rename it."
        )
    if source.suffix == ".jsonl" and (campaign or annotator):
        raise ValueError(
            "--campaign and --annotator need ranked seeds (.csv): exported judgements contain both."
            " Remove the"
            " flag."
        )
    with open_store(db, create=True) as store:
        if source.suffix == ".csv":
            count = _archive("import_ranked_seeds", store, source, campaign, annotator or "imported")
        else:
            count = _archive("import_judgements", store, source)
    click.echo(f"{source}: {count} judgements imported")


@click.command("leaderboard", cls=GroupedCommand, job="label leaderboard")
@option("--campaign", metavar="NAME", show_default="all that collect preferences", help="Campaign to rank.")
@option(
    "--criterion", metavar="NAME", show_default="which is better", help="Criterion whose votes are ranked."
)
@option("--json", "as_json", is_flag=True, help="Print the ranking as JSON.")
@database
def leaderboard(campaign: str | None, criterion: str | None, as_json: bool, db: str) -> None:
    """Rank the generators whose shapes were compared, with 95 % intervals."""
    from eg3d_rlhf.people.label.quality import as_text, leaderboard_of

    with open_store(db, create=False) as store:
        _check(store, campaign)
        # read whole, because the database closes with the block
        rows = list(store.judgements(campaign))
    # criteria that were asked besides which is better
    asked = sorted({name for row in rows for name in row.votes})
    if criterion is not None and criterion not in asked:
        raise ValueError(
            f"--criterion: {criterion} has no votes. Criteria with votes: {', '.join(asked) or 'none'}."
            " Name another."
        )
    board = leaderboard_of(rows, criterion)
    if as_json:
        click.echo(
            json.dumps(
                {"campaign": campaign, "question": criterion, **board.to_dict()}, indent=1, ensure_ascii=False
            )
        )
    else:
        click.echo(as_text(board))


def _check(store: "Store", campaign: str | None) -> None:
    """Raise ValueError if the campaign does not exist or does not collect preferences."""
    # without --campaign, all that collect preferences are ranked
    stored = store.campaign(campaign) if campaign is not None else None
    if campaign is not None and stored is None:
        raise ValueError(
            f"--campaign: {campaign} is not in this database. Use one of the campaigns that `status` lists."
        )
    if stored is not None and stored.settings.mode is not Mode.LABEL:
        remedy = (
            "run tools/study.py report for its result"
            if stored.settings.mode is Mode.STUDY
            else "name another campaign"
        )
        raise ValueError(
            f"--campaign: {campaign} does not collect preferences ({stored.settings.mode}): {remedy}."
        )


main.resolved = lambda context: [{"access_log": server_of(context.params, context.params["db"]).access_log}]
for command in (*PEOPLE.values(), export, import_, leaderboard):
    command.resolved = known_database
    main.add_command(command)
