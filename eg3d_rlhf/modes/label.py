"""`eg3d-rlhf label`: the server of the labelling page, and its sub-commands."""

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
    """Call a function that reads or writes the tables themselves: its module needs the extra, which help does
    without.
    """
    from eg3d_rlhf.people.label import archive

    return getattr(archive, what)(*args, **options)


# of exports: the files' suffixes, and what writes them
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
    """Completes its sub-commands, and the jobs that begin with `label`, which have files of their own."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from eg3d_rlhf.modes.jobs import JobGroup

        return super().shell_complete(ctx, incomplete) + JobGroup("label").shell_complete(ctx, incomplete)


@click.command("label", cls=LabelGroup, job="label", invoke_without_command=True)
@_pairs_option(
    "--network", metavar="PATH", show_default="the bundled generator", help="Network file or run folder."
)
@_pairs_option(
    "--assets",
    metavar="PATH",
    show_default="a generator's shapes",
    help=(
        "Finished assets, GLB, PLY, OBJ, splats or videos: a folder GENERATOR/PROMPT.glb, or a list (.jsonl)."
    ),
)
@_pairs_option(
    "--up", type=click.Choice(["y", "z"]), default="y", help="Of finished assets: the axis that points up."
)
@options_of(PairingOptions)
@_pairs_option(
    "--reward",
    "rewards",
    metavar="FILE",
    multiple=True,
    show_default="the bundled two",
    help="Active, close: a reward of the ensemble; may be given again.",
)
@_pairs_option("--after", metavar="NAME", help="Tournament: campaign whose results decide this next round.")
@options_of(CampaignSettings)
@_pairs_option(
    "--show-render/--no-show-render",
    default=False,
    rare=True,
    help="Whether the RGB picture may be asked for.",
)
@_pairs_option(
    "--both-bad/--no-both-bad",
    default=True,
    rare=True,
    help="Whether 'both are bad' may be answered; no with --single.",
)
@_pairs_option(
    "--criteria",
    "questions",
    metavar="LIST",
    default="",
    show_default="none",
    help=f"Asked besides which is better, with commas between: {', '.join(QUESTIONS)}, or NAME=TEXT.",
)
@_pairs_option(
    "--reveal/--no-reveal",
    default=False,
    rare=True,
    help="Whether the generators' names are told after each answer.",
)
@option("--db", metavar="URL", default=DB, help=DATABASE)
@option("--campaign", metavar="NAME", default="labels", help="Made if it is new, else taken up again.")
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
    """Label pairs of shapes, or shapes one by one, in the browser; prints the address.

    \b
    Example:
        python tools/label.py --network=runs/00001-x --pairs=1000
        python tools/label.py --assets=FOLDER --pairs=200 --campaign=chairs
        python tools/label.py add-annotator ann
        python tools/label.py --host=0.0.0.0
    """
    ctx.obj = db
    if ctx.invoked_subcommand is not None:
        launch.refuse_flags_before(ctx, "db")
        return
    check_extra(EXTRA)
    request, given = _request(ctx, campaign, network, assets, after, rewards, flags)
    wanted = request.to_json()
    server = server_of(flags, db)
    if dry_run:
        click.echo(json.dumps(_dry_run(db, request, server, wanted, given), indent=1, default=str))
        return
    _start(db, request, server, wanted, given)


def server_of(flags: Mapping, db: str) -> launch.ServerFlags:
    """Return how the server is reached; its log is beside the database."""
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

    given = launch.given_flags(ctx)
    if assets is not None:
        _refuse_generators_flags(ctx, given)
    elif "up" in given:
        raise ValueError(
            "--up: expected --assets beside it, got none; a generator's shapes stand upright. Leave it out."
        )
    flags = launch.filled(flags, PairingOptions, CampaignSettings)
    if after is not None and not STRATEGIES[flags["strategy"]].reads_answers:
        names = " or ".join(name for name, strategy in STRATEGIES.items() if strategy.reads_answers)
        raise ValueError(
            f"--after: expected --strategy={names}, got {flags['strategy']}. Add it, or leave --after out."
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
                f"expected a network file or a run folder, got nothing at {network}. Check the path."
            )
    settings = {name: flags[name] for name in launch.SETTINGS}
    settings["questions"] = tuple(part.strip() for part in flags["questions"].split(",") if part.strip())
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
            "--criteria: expected no 'prompt' without --assets: a generator's shapes have none. Leave it out."
        )
    parse_questions(settings["questions"])
    request.campaign_settings({})  # checks the shares before anything slow
    return request, given


def _refuse_generators_flags(ctx: click.Context, given: set[str]) -> None:
    """Raise ValueError for flags that say how a generator's shapes are drawn: finished assets have none."""
    drawn = {"network", "show_render", "first_seed", "psi", "level", "resolution", "triangles", "pool"}
    if wrong := launch.named_flags(ctx, given & drawn):
        raise ValueError(
            f"{', '.join(wrong)}: expected no such flag with --assets, which are finished. Leave it out."
        )


def _dry_run(
    db: str, request: launch.Request, server: launch.ServerFlags, wanted: dict, given: set[str]
) -> dict:
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
    planned = None
    if not store_exists(db):  # whatever is wrong comes to light before a database is made
        if server.exposed:
            launch.check_annotators(None, server.host, MAKE)
        planned = launch.plan_campaign(None, request, click.echo)
    with open_store(db, create=True) as store:
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
                f"campaign {request.name!r}: taken up again, {campaign.pairs} pairs, {answered} judgements"
                " so far"
            )
        have = f"{len(launch.with_access(store))} can log in, add-annotator NAME makes more"
        more = [f"other machines can reach this server, by a token: {have}"] if server.exposed else []
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
        "Labels of pairs in the open form (.jsonl, .csv), of single shapes (.jsonl), all judgements without"
        " loss (.jsonl), or the paper's table of ranked seeds (.csv). Of assets: pairs of files, rankings of"
        " each prompt's, scores of single ones."
    ),
)
@option("--campaign", metavar="NAME", default=None, show_default="all", help="One campaign alone.")
@option(
    "--annotator", "annotators", metavar="NAME", multiple=True, show_default="all", help="May be given again."
)
@option(
    "--least-gold-accuracy",
    metavar="0..1",
    type=click.FloatRange(0, 1),
    help="Leave out annotators below it.",
)
@option("--drop-repeats", is_flag=True, help="Keep each annotator's first answer to a pair alone.")
@option(
    "--criterion",
    metavar="NAME",
    show_default="which is better",
    help="Take the votes on this criterion as the answers.",
)
@option(
    "--from-pairs",
    is_flag=True,
    help="Unpaired, asset-scores: both of each pair that was answered with 'both are bad', as not good.",
)
@database
@click.pass_context
def export(
    ctx: click.Context, out: Path, kind: str, campaign: str | None, db: str, from_pairs: bool, **filters
) -> None:
    """Write labels or judgements to FILE."""
    if from_pairs and (kind not in ("unpaired", "asset-scores") or filters["criterion"]):
        raise ValueError(
            f"--from-pairs: expected --kind=unpaired or asset-scores and no --criterion, got --kind={kind}."
            " Leave it out."
        )
    suffixes, write = KINDS[kind]
    if out.suffix not in suffixes:
        raise ValueError(
            f"FILE: expected a name with {' or '.join(suffixes)} for --kind={kind}, got {out.name}."
            " Rename it."
        )
    if kind == "judgements":
        if used := launch.named_flags(ctx, launch.given_flags(ctx) & set(filters)):
            raise ValueError(
                f"{', '.join(used)}: expected no filter with --kind=judgements, which leaves nothing out."
                " Leave the flag out."
            )
        filters = {}
    with open_store(db, create=False) as store:
        write(store, out, campaign=campaign, **filters, **({"from_pairs": True} if from_pairs else {}))
    with out.open(encoding="utf-8") as file:
        count = sum(1 for _ in file) - (out.suffix == ".csv")
    click.echo(f"{out}: {count} line{'s' if count != 1 else ''} written")


@click.command("import", cls=GroupedCommand)
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@option(
    "--campaign", metavar="NAME", show_default="the file's name", help="Of ranked seeds: campaign to make."
)
@option(
    "--annotator", metavar="NAME", default=None, show_default="imported", help="Of ranked seeds: who judged."
)
@database
def import_(source: Path, campaign: str | None, annotator: str | None, db: str) -> None:
    """Read FILE: judgements that were exported (.jsonl), or a table of ranked seeds (.csv)."""
    if source.suffix not in (".jsonl", ".csv"):
        raise ValueError(
            f"FILE: expected .jsonl (judgements) or .csv (ranked seeds), got {source.name}. Rename it."
        )
    if source.suffix == ".jsonl" and (campaign or annotator):
        raise ValueError(
            "--campaign, --annotator: expected only with ranked seeds; judgements bring theirs. Leave the"
            " flag out."
        )
    with open_store(db, create=True) as store:
        if source.suffix == ".csv":
            count = _archive("import_ranked_seeds", store, source, campaign, annotator or "imported")
        else:
            count = _archive("import_judgements", store, source)
    click.echo(f"{source}: {count} judgements imported")


@click.command("leaderboard", cls=GroupedCommand, job="label leaderboard")
@option("--campaign", metavar="NAME", show_default="all that collect preferences", help="One campaign alone.")
@option("--criterion", metavar="NAME", show_default="which is better", help="The votes on this criterion.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@database
def leaderboard(campaign: str | None, criterion: str | None, as_json: bool, db: str) -> None:
    """Rank the generators whose shapes were compared, with 95 % intervals."""
    from eg3d_rlhf.people.label.quality import as_text, leaderboard_of

    with open_store(db, create=False) as store:
        _check(store, campaign)
        rows = list(store.judgements(campaign))
    asked = sorted({name for row in rows for name in row.votes})
    if criterion is not None and criterion not in asked:
        raise ValueError(
            f"--criterion: expected one with votes ({', '.join(asked) or 'there is none'}), got {criterion}."
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
    stored = store.campaign(campaign) if campaign is not None else None
    if campaign is not None and stored is None:
        raise ValueError(f"--campaign: expected one of this database, got {campaign}. `status` lists them.")
    if stored is not None and stored.settings.mode is not Mode.LABEL:
        remedy = (
            "tools/study.py report gives its result"
            if stored.settings.mode is Mode.STUDY
            else "it compares nothing"
        )
        raise ValueError(
            f"--campaign: expected one that collects preferences, got {campaign} ({stored.settings.mode}):"
            f" {remedy}."
        )


main.resolved = lambda context: [{"access_log": server_of(context.params, context.params["db"]).access_log}]
for command in (*PEOPLE.values(), export, import_, leaderboard):
    command.resolved = known_database
    main.add_command(command)
