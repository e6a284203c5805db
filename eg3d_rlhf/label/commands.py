"""The command line of the labelling application: a server with flags of its own, and what is done beside it."""

import datetime
import json
from collections import Counter
from pathlib import Path

import click

from eg3d_rlhf.cli import GroupedCommand, naming, option, options_of
from eg3d_rlhf.generators import find_network
from eg3d_rlhf.label import launch, questions
from eg3d_rlhf.label.archive import export_judgements, export_ranked_seeds, import_judgements, import_ranked_seeds
from eg3d_rlhf.label.asset_labels import export_assets
from eg3d_rlhf.label.entities import CampaignSettings
from eg3d_rlhf.label.figure_commands import leaderboard, simulate
from eg3d_rlhf.label.pairing import PairingOptions
from eg3d_rlhf.label.preferences import export_labels, export_unpaired, without_password
from eg3d_rlhf.label.shape_files import DEFAULT_FOLDER

MAKE = "python tools/label.py add-annotator NAME"
KINDS = {  # with the files' suffixes
    "labels": (".jsonl", ".csv"), "unpaired": (".jsonl",), "judgements": (".jsonl",), "ranked-seeds": (".csv",),
    "asset-pairs": (".jsonl",), "rankings": (".jsonl",), "asset-scores": (".jsonl",),
}  # fmt: skip


class LabelGroup(GroupedCommand, click.Group):
    """A grouped command with sub-commands."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options in groups, then the commands."""
        GroupedCommand.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


@click.command("label", cls=LabelGroup, invoke_without_command=True)
@option("--network", metavar="PATH", default=None, show_default="the bundled generator", help="Network file or run folder.", group="Pairs")
@option("--assets", metavar="PATH", default=None, show_default="a generator's shapes", group="Pairs",
        help="Finished assets, GLB, PLY, OBJ, splats or videos: a folder GENERATOR/PROMPT.glb, or a list (.jsonl).")
@options_of(PairingOptions)
@option("--active", is_flag=True, help="Short for --strategy=active.", group="Pairs", show_default=False)
@option("--tournament", is_flag=True, help="Short for --strategy=tournament.", group="Pairs", show_default=False)
@option("--reward", "rewards", metavar="FILE", multiple=True, show_default="the bundled two", group="Pairs",
        help="Active: a reward of the ensemble; may be given again.")
@option("--after", metavar="NAME", default=None, group="Pairs", help="Tournament: campaign whose results decide this next round.")
@options_of(CampaignSettings)
@option("--show-render/--no-show-render", default=False, group="Pairs", help="Whether the RGB picture may be asked for.")
@option("--both-bad/--no-both-bad", default=True, group="Pairs", help="Whether 'both are bad' may be answered; no with --single.")
@option("--questions", metavar="LIST", default="", show_default="none", group="Pairs",
        help=f"Asked besides which is better, with commas between: {', '.join(questions.KNOWN)}, or NAME=TEXT.")
@option("--reveal/--no-reveal", default=False, group="Pairs", help="Whether the generators' names are told after each answer.")
@option("--db", metavar="URL", default=launch.DB, help=launch.DATABASE)
@option("--campaign", metavar="NAME", default="labels", help="Made if it is new, else taken up again.")
@option("--cache", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_FOLDER, help="Where shapes are kept.")
@option("-n", "--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
@launch.server_options("access.jsonl beside the database")
@click.pass_context
def main(
    ctx: click.Context, db: str, campaign: str, network: str | None, assets: str | None, after: str | None, rewards: tuple,
    dry_run: bool, **flags,
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
    request, given = _request(ctx, campaign, network, assets, after, rewards, flags)
    wanted = request.to_json()
    path = launch.sqlite_file(db)
    server = launch.ServerFlags.of(flags, path.parent if path else Path("runs/labels"))
    if dry_run:
        click.echo(json.dumps(_dry_run(db, request, server, wanted, given), indent=1, default=str))
        return
    _start(db, request, server, wanted, given)


def _request(
    ctx: click.Context, campaign: str, network: str | None, assets: str | None, after: str | None, rewards: tuple, flags: dict
) -> tuple[launch.Request, set[str]]:
    """What is to be planned, and which of its flags are on the command line."""
    given = launch.given_flags(ctx)
    chosen = [name for name in ("active", "tournament") if flags[name]] + ([flags["strategy"]] if "strategy" in given else [])
    if len(set(chosen)) > 1:
        raise ValueError(f"--strategy, --active, --tournament: expected one strategy, got {' and '.join(chosen)}. Choose one of them.")
    if assets is not None:
        _refuse_generators_flags(ctx, given, chosen)
    flags = launch.filled({**flags, "strategy": chosen[0] if chosen else None}, PairingOptions, CampaignSettings)
    if after is not None and flags["strategy"] != "tournament":
        raise ValueError(f"--after: expected --strategy=tournament, got {flags['strategy']}. Add --tournament, or leave --after out.")
    pairing = PairingOptions(rewards=rewards, **{name: flags[name] for name in PairingOptions.__dataclass_fields__ if name != "rewards"})
    with naming("--network"):
        source = find_network(network).resolve() if network else None
        if source is not None and not source.is_file():
            raise FileNotFoundError(f"expected a network file or a run folder, got nothing at {network}. Check the path.")
    settings = {name: flags[name] for name in launch.SETTINGS}
    settings["questions"] = tuple(one.strip() for one in flags["questions"].split(",") if one.strip())
    if pairing.single:
        settings |= {name: value for name, value in (("swap_share", 0.0), ("both_bad", False)) if name not in given}
    request = launch.Request(
        name=campaign, network=str(source) if source else None, after=after, pairing=pairing, settings=settings,
        assets=str(Path(assets).resolve()) if assets else None,
    )  # fmt: skip
    questions.parse_questions(settings["questions"])
    request.campaign_settings({})  # checks the shares before anything slow
    return request, given | ({"strategy"} if chosen else set())


def _refuse_generators_flags(ctx: click.Context, given: set[str], chosen: list[str]) -> None:
    """Flags that say how a generator's shapes are drawn say nothing of finished assets. Raises: ValueError naming them."""
    if set(chosen) - {"random"}:
        raise ValueError(f"--{chosen[0]}: expected random pairs with --assets, which are neither ranked by rewards nor paired by results "
                         "yet. Leave it out.")  # fmt: skip
    own = {"pairs", "strategy", "seed", "gold", "training", "single"}
    drawn = (set(PairingOptions.__dataclass_fields__) - own) | {"network", "rewards", "after", "show_render"}
    wrong = [p.opts[0] for p in ctx.command.params if p.name in given & drawn]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: expected no such flag with --assets, which are finished. Leave it out.")


def _dry_run(db: str, request: launch.Request, server: launch.ServerFlags, wanted: dict, given: set[str]) -> dict:
    """What would be done; nothing is written."""
    resumed = False
    if launch.store_exists(db):
        with launch.open_store(db, create=False) as store:
            found = store.campaign(request.name)
            if found is not None:
                resumed, wanted = True, dict(launch.check_resumed(found, wanted, given))
    kept = {"db": without_password(db), "access_log": str(server.access_log)}
    return {"campaign": request.name, "action": "resume" if resumed else "plan", **wanted, **server.to_dict(), **kept}


def _start(db: str, request: launch.Request, server: launch.ServerFlags, wanted: dict, given: set[str]) -> None:
    """Plan or resume, then serve until interrupted."""
    planned = None
    if not launch.store_exists(db):  # whatever is wrong comes to light before a database is made
        if server.exposed:
            launch.check_annotators(None, server.host, MAKE)
        planned = launch.plan_campaign(None, request, click.echo)
    with launch.open_store(db, create=True) as store:
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
            click.echo(f"campaign {request.name!r}: taken up again, {campaign.pairs} pairs, {answered} judgements so far")
        more = ["other machines can reach this server: everybody needs a token (add-annotator NAME)"] if server.exposed else []
        launch.serve_campaign(store, db, request.name, server, lambda address: [f"label at {address}  (Ctrl-C stops)", *more], "judgement")


@click.command("add-annotator", cls=GroupedCommand)
@click.argument("name")
@option("--admin", is_flag=True, help="May also see results and name annotators.")
@launch.database
def add_annotator(name: str, admin: bool, db: str) -> None:
    """Make an annotator and print the token, this once; only its hash is stored."""
    with launch.open_store(db, create=True) as store:
        token = store.add_annotator(name, "admin" if admin else "annotator")
    click.echo(f"token of {name}; it is not shown again:", err=True)
    click.echo(token)


@click.command("revoke", cls=GroupedCommand)
@click.argument("name")
@launch.database
def revoke(name: str, db: str) -> None:
    """Withdraw an annotator's token and end the sessions; the judgements stay."""
    with launch.open_store(db, create=False) as store:
        store.revoke_annotator(name)
    click.echo(f"{name}: token revoked")


@click.command("annotators", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@launch.database
def annotators(as_json: bool, db: str) -> None:
    """List annotators, roles and revocations."""
    with launch.open_store(db, create=False) as store:
        found = store.annotators()
    rows = [{"name": a.name, "role": a.role, "created": _date(a.created), "revoked": a.revoked and _date(a.revoked)} for a in found]
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        revoked = f", revoked {row['revoked']}" if row["revoked"] else ""
        click.echo(f"{row['name']:<24} {row['role']:<10} since {row['created']}{revoked}")


@click.command("export", cls=GroupedCommand)
@click.argument("out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@option("--kind", type=click.Choice(tuple(KINDS)), default="labels",
        help="Labels of pairs in the open form (.jsonl, .csv), of single shapes (.jsonl), all judgements without loss (.jsonl), or a table "
             "of ranked seeds (.csv). Of assets: pairs of files, rankings of each prompt's, scores of single ones.")
@option("--campaign", metavar="NAME", default=None, show_default="all", help="One campaign alone.")
@option("--annotator", "annotators", metavar="NAME", multiple=True, show_default="all", help="May be given again.")
@option("--least-gold-accuracy", metavar="0..1", type=click.FloatRange(0, 1), default=None, help="Leave out annotators below it.")
@option("--drop-repeats", is_flag=True, help="Keep each annotator's first answer to a pair alone.")
@option("--min-milliseconds", metavar="INT", type=click.IntRange(min=0), default=0, help="Leave out faster answers.")
@option("--since", metavar="TIME", default=None, help="Received from then on, ISO 8601.")
@option("--question", metavar="NAME", default=None, show_default="which is better", help="Take the votes on this question as the answers.")
@option("--from-pairs", is_flag=True, help="Unpaired: both shapes of pairs that were answered with 'both are bad', as not good.")
@launch.database
@click.pass_context
def export(ctx: click.Context, out: Path, kind: str, campaign: str | None, db: str, from_pairs: bool, **filters) -> None:
    """Write labels or judgements to FILE."""
    if from_pairs and (kind != "unpaired" or filters["question"]):
        raise ValueError(f"--from-pairs: expected --kind=unpaired and no --question, got --kind={kind}. Leave it out.")
    if out.suffix not in KINDS[kind]:
        raise ValueError(f"FILE: expected a name with {' or '.join(KINDS[kind])} for --kind={kind}, got {out.name}. Rename it.")
    if kind == "judgements":
        used = [p.opts[0] for p in ctx.command.params if p.name in launch.given_flags(ctx) & set(filters)]
        if used:
            raise ValueError(f"{', '.join(used)}: expected no filter with --kind=judgements, which leaves nothing out. Leave the flag out.")
    with launch.open_store(db, create=False) as store:
        if kind == "judgements":
            export_judgements(store, out, campaign)
        elif kind == "labels":
            export_labels(store, out, campaign=campaign, **filters)
        elif kind == "unpaired":
            export_unpaired(store, out, from_pairs, campaign=campaign, **filters)
        elif kind == "ranked-seeds":
            export_ranked_seeds(store, out, campaign=campaign, **filters)
        else:
            export_assets(store, out, kind, campaign=campaign, **filters)
    with out.open(encoding="utf-8") as file:
        count = sum(1 for _ in file) - (out.suffix == ".csv")
    click.echo(f"{out}: {count} line{'s' if count != 1 else ''} written")


@click.command("import", cls=GroupedCommand)
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@option("--campaign", metavar="NAME", default=None, show_default="the file's name", help="Of ranked seeds: campaign to make.")
@option("--annotator", metavar="NAME", default=None, show_default="imported", help="Of ranked seeds: who judged.")
@launch.database
def import_(source: Path, campaign: str | None, annotator: str | None, db: str) -> None:
    """Read FILE: judgements that were exported (.jsonl), or a table of ranked seeds (.csv)."""
    if source.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"FILE: expected .jsonl (judgements) or .csv (ranked seeds), got {source.name}. Rename it.")
    if source.suffix == ".jsonl" and (campaign or annotator):
        raise ValueError("--campaign, --annotator: expected only with ranked seeds; judgements bring theirs. Leave the flag out.")
    with launch.open_store(db, create=True) as store:
        if source.suffix == ".csv":
            count = import_ranked_seeds(store, source, campaign, annotator or "imported")
        else:
            count = import_judgements(store, source)
    click.echo(f"{source}: {count} judgements imported")


@click.command("status", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@launch.database
def status(as_json: bool, db: str) -> None:
    """Show campaigns, pairs, judgements and annotators."""
    with launch.open_store(db, create=False) as store:
        known = store.annotators()
        found: list[dict] = []
        for campaign in store.campaigns():
            rows = list(store.judgements(campaign.settings.name))
            found.append({
                "name": campaign.settings.name, "mode": campaign.settings.mode.value, "pairs": campaign.pairs, "judgements": len(rows),
                "annotators": Counter(row.annotator for row in rows), "created": _date(campaign.created),
                "last": _date(rows[-1].received_at) if rows else None,
            })  # fmt: skip
    if as_json:
        click.echo(json.dumps({"campaigns": found, "annotators": len(known)}, indent=1, ensure_ascii=False))
        return
    for row in found:
        work = f"{row['pairs']} pairs, {row['judgements']} judgements of {len(row['annotators'])} annotators"
        click.echo(f"{row['name']}: {row['mode']}, {work}, made {row['created']}, last answer {row['last'] or 'none'}")
    click.echo(f"{len(found)} campaigns, {len(known)} annotators")


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


for command in (add_annotator, revoke, annotators, export, import_, status, leaderboard, simulate):
    main.add_command(command)
