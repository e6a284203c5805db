"""The command line of the labelling application: a server with flags of its own, and what is done beside it."""

import json
import socket
from pathlib import Path

import click
from click.core import ParameterSource

from eg3d_rlhf.cli import GroupedCommand, naming, option
from eg3d_rlhf.generators import find_network
from eg3d_rlhf.label.launch import (
    DB,
    PAIRING,
    SETTINGS,
    Request,
    check_annotators,
    check_resumed,
    default_of,
    open_store,
    plan_campaign,
    sqlite_file,
)
from eg3d_rlhf.label.pairing import STRATEGIES, PairingOptions
from eg3d_rlhf.label.preparation import Preparation
from eg3d_rlhf.label.server.app import serve
from eg3d_rlhf.label.server.options import AppOptions
from eg3d_rlhf.label.server_flags import ServerFlags, server_options
from eg3d_rlhf.label.shape_cache import DEFAULT_FOLDER, ShapeCache
from eg3d_rlhf.label.subcommands import COMMANDS
from eg3d_rlhf.label.urls import without_password


class LabelGroup(GroupedCommand, click.Group):
    """A grouped command with sub-commands."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options in groups, then the commands."""
        GroupedCommand.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def planning(name: str, *declarations: str, **kwargs):
    """An option of the plan, with its owner's default."""
    return option(*(declarations or (f"--{name.replace('_', '-')}",)), default=default_of(name), group="Pairs", **kwargs)


@click.command("label", cls=LabelGroup, invoke_without_command=True)
@option("--network", metavar="PATH", default=None, show_default="the bundled generator", help="Network file or run folder.", group="Pairs")
@planning("pairs", metavar="INT", type=click.IntRange(min=1), help="Pairs to label.")
@planning("strategy", type=click.Choice(STRATEGIES), help="How pairs are found.")
@option("--active", is_flag=True, help="Short for --strategy=active.", group="Pairs", show_default=False)
@option("--tournament", is_flag=True, help="Short for --strategy=tournament.", group="Pairs", show_default=False)
@planning("seed", metavar="INT", type=click.IntRange(min=0), help="Decides pairs, order, sides, repeats.")
@planning("first_seed", metavar="INT", type=click.IntRange(min=0), help="Shapes are seeds from here on.")
@planning("psi", "--psi", "--trunc", "psi", metavar="0..2", type=click.FloatRange(0, 2), help="Truncation.")
@planning("level", metavar="FLOAT", type=float, help="Raw density of the surface.")
@planning("resolution", metavar="POINTS", type=click.IntRange(16, 512), help="Grid points per axis.")
@planning("triangles", metavar="INT", type=click.IntRange(100, 10**6), help="Per shape, about.")
@planning("gold", metavar="INT", type=click.IntRange(min=0), show_default="one for 25, at least 4", help="Pairs with a known answer.")
@planning("training", metavar="INT", type=click.IntRange(0, 100), help="Explained examples at the start.")
@option("--reward", "rewards", metavar="FILE", multiple=True, show_default="the bundled two", group="Pairs",
        help="Active: a reward of the ensemble; may be given again.")
@planning("pool", metavar="FLOAT", type=click.FloatRange(2, 100), help="Active: seeds looked at for each one used.")
@planning("diversity", metavar="0..1", type=click.FloatRange(0, 1), help="Active: 0 is doubt alone, 1 spread alone.")
@planning("rounds", metavar="INT", type=click.IntRange(1, 1000), help="Tournament: pairs that each shape is in.")
@option("--after", metavar="NAME", default=None, group="Pairs", help="Tournament: campaign whose results decide this next round.")
@planning("annotators_per_pair", metavar="INT", type=click.IntRange(min=1), help="Different annotators to judge each pair.")
@planning("repeat_share", metavar="0..0.5", type=click.FloatRange(0, 0.5), help="Trials that repeat one, same sides.")
@planning("swap_share", metavar="0..0.5", type=click.FloatRange(0, 0.5), help="Trials that repeat one, swapped sides.")
@planning("repeat_gap", metavar="TRIALS", type=click.IntRange(min=1), help="Trials at least between a pair and its repeat.")
@planning("gold_every", metavar="TRIALS", type=click.IntRange(min=0), help="One gold check in so many trials; 0: none.")
@planning("trials_per_annotator", metavar="INT", type=click.IntRange(min=1), show_default="all", help="An annotator is done after so many.")
@planning("show_render", "--show-render/--no-show-render", help="Whether the RGB picture may be asked for.")
@option("--db", metavar="URL", default=DB, help="Database: sqlite:///FILE or postgresql://user@host/database.")
@option("--campaign", metavar="NAME", default="labels", help="Made if it is new, else taken up again.")
@option("--cache", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_FOLDER, help="Where shapes are kept.")
@option("-n", "--dry-run", is_flag=True, help="Print the resolved settings as JSON and stop.")
@server_options("access.jsonl beside the database")
@click.pass_context
def main(
    ctx: click.Context, db: str, campaign: str, network: str | None, after: str | None, rewards: tuple, dry_run: bool, **flags
) -> None:
    """Label pairs of shapes in the browser; prints the address.

    \b
    Example:
        python tools/label.py --network=runs/00001-x --pairs=1000
        python tools/label.py add-annotator ann
        python tools/label.py --host=0.0.0.0
    """
    ctx.obj = db
    if ctx.invoked_subcommand is not None:
        _refuse_others(ctx)
        return
    request, given = _request(ctx, campaign, network, after, rewards, flags)
    wanted = request.to_json()
    path = sqlite_file(db)
    log = flags["access_log"] or (path.parent if path else Path("runs/labels")) / "access.jsonl"
    names = ("host", "port", "certificate", "key", "proxy", "title", "cache")
    server = ServerFlags(**{name: flags[name] for name in names}, access_log=log)
    if dry_run:
        click.echo(json.dumps(_dry_run(db, request, server, wanted, given), indent=1, default=str))
        return
    _start(db, request, server, wanted, given)


def _request(
    ctx: click.Context, campaign: str, network: str | None, after: str | None, rewards: tuple, flags: dict
) -> tuple[Request, set[str]]:
    """What is to be planned, and which of its flags are on the command line."""
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    chosen = [name for name in ("active", "tournament") if flags[name]] + ([flags["strategy"]] if "strategy" in given else [])
    if len(set(chosen)) > 1:
        raise ValueError(f"--strategy, --active, --tournament: expected one strategy, got {' and '.join(chosen)}. Choose one of them.")
    flags = {**flags, "strategy": chosen[0] if chosen else flags["strategy"]}
    if after is not None and flags["strategy"] != "tournament":
        raise ValueError(f"--after: expected --strategy=tournament, got {flags['strategy']}. Add --tournament, or leave --after out.")
    pairing = PairingOptions(rewards=rewards, **{name: flags[name] for name in PAIRING if name != "rewards"})
    with naming("--network"):
        source = None if network is None else find_network(network).resolve()
        if source is not None and not source.is_file():
            raise FileNotFoundError(f"expected a network file or a run folder, got nothing at {network}. Check the path.")
    settings = {name: flags[name] for name in SETTINGS}
    request = Request(name=campaign, network=source and str(source), after=after, pairing=pairing, settings=settings)
    request.campaign_settings({})  # checks the shares before anything slow
    return request, given | ({"strategy"} if chosen else set())


def _refuse_others(ctx: click.Context) -> None:
    """Sub-commands take --db alone."""
    used = [p.opts[0] for p in ctx.command.params if p.name != "db" and ctx.get_parameter_source(p.name) is ParameterSource.COMMANDLINE]
    if used:
        raise ValueError(f"{', '.join(used)}: expected only --db before {ctx.invoked_subcommand}. Write other flags after it.")


def _existing(db: str) -> bool:
    path = sqlite_file(db)
    return path is None or path.is_file()


def _dry_run(db: str, request: Request, server: ServerFlags, wanted: dict, given: set[str]) -> dict:
    """What would be done; nothing is written."""
    resumed = False
    if _existing(db):
        with open_store(db, create=False) as store:
            found = store.campaign(request.name)
            resumed = found is not None
            wanted = check_resumed(found, wanted, given) if resumed else wanted
    reached = {"host": server.host, "port": server.port, "exposed": server.exposed, "https": server.certificate is not None}
    kept = {"db": without_password(db), "cache": str(server.cache), "access_log": str(server.access_log), "title": server.title}
    return {"campaign": request.name, "action": "resume" if resumed else "plan", **wanted, **reached, "proxy": server.proxy, **kept}


def _start(db: str, request: Request, server: ServerFlags, wanted: dict, given: set[str]) -> None:
    """Plan or resume, then serve until interrupted."""
    planned = None
    if not _existing(db):  # whatever is wrong comes to light before a database is made
        if server.exposed:
            check_annotators(None, server.host)
        planned = plan_campaign(None, request, click.echo)
    with open_store(db, create=True) as store:
        if server.exposed:
            check_annotators(store, server.host)
        campaign = store.campaign(request.name)
        if campaign is None:
            settings, pairs = planned or plan_campaign(store, request, click.echo)
            store.create_campaign(settings, pairs)
            click.echo(f"campaign {request.name!r}: {len(pairs)} pairs planned")
        else:
            check_resumed(campaign, wanted, given)
            answered = sum(1 for _ in store.judgements(request.name))
            click.echo(f"campaign {request.name!r}: taken up again, {campaign.pairs} pairs, {answered} judgements so far")
        cache = ShapeCache(server.cache)
        options = AppOptions(
            store=store, campaign=request.name, cache=cache, preparation=Preparation(db, request.name, cache), exposed=server.exposed,
            title=server.title, access_log=server.access_log,
        )
        try:
            serve(
                options, server.host, server.port, certificate=server.certificate, key=server.key, proxy=server.proxy,
                on_listening=lambda address: _announce(address, server),
            )  # fmt: skip
        except KeyboardInterrupt:
            click.echo("stopped; every judgement is kept, the same command goes on")


def _announce(address: str, server: ServerFlags) -> None:
    for everywhere in ("//0.0.0.0:", "//[::]:"):
        address = address.replace(everywhere, f"//{socket.gethostname()}:")
    click.echo(f"label at {address}  (Ctrl-C stops)")
    if server.exposed:
        click.echo("other machines can reach this server: everybody needs a token (add-annotator NAME)")
        if server.certificate is None and server.proxy is None:
            click.echo("tokens travel unencrypted: give --certificate and --key, or use a proxy with https, outside a trusted network")


for command in COMMANDS:
    main.add_command(command)
