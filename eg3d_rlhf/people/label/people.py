"""Who may label, on the command line: annotators made and listed, their tokens replaced and revoked. Imports no torch, no server."""

import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, naming, option, together
from eg3d_rlhf.people.label import links
from eg3d_rlhf.people.label.entities import LOCAL
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_at import database, open_store

address = option("--address", metavar="URL", default=None, help="Where annotators reach the server, as https://host:8000: for the link.",
                 show_default="a link without it")  # fmt: skip
qr = option("--qr", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), default=None,
            help="The link's QR code as a new .svg or .png; needs --address.")  # fmt: skip
handed_over = together(address, qr)


@click.command("add-annotator", cls=GroupedCommand)
@click.argument("name")
@option("--admin", is_flag=True, help="May also see results and name annotators.")
@handed_over
@database
def add_annotator(name: str, admin: bool, address: str | None, qr: Path | None, db: str) -> None:
    """Make an annotator and print the token, this once; only its hash is stored."""
    _hand_over(name, address, qr, db, True, lambda store: store.add_annotator(name, "admin" if admin else "annotator"))


@click.command("new-token", cls=GroupedCommand)
@click.argument("name")
@handed_over
@database
def new_token(name: str, address: str | None, qr: Path | None, db: str) -> None:
    """Replace an annotator's token, or give one to somebody revoked: the old one, its link and all sessions end, the work stays."""
    _hand_over(name, address, qr, db, False, lambda store: store.new_token(name))


def _hand_over(name: str, address: str | None, qr: Path | None, db: str, create: bool, make: Callable[[Store], str]) -> None:
    """Print a new token on stdout, and on stderr what goes with it."""
    with naming("--address"):
        server = links.check_address(address) if address else ""
    with naming("--qr"):
        if qr is not None and not server:
            raise ValueError("expected --address as well, got none, without which a phone finds no server. Add it.")
        if qr is not None:
            links.check_picture(qr)
    with open_store(db, create) as store:
        token = make(store)
    click.echo(f"token of {name}; it is not shown again:", err=True)
    click.echo(token)
    link = links.login_link(server, token)
    sys.stdout.flush()
    where = "" if server else " behind the server's address (--address=URL puts it there)"
    click.echo(f"or this link{where}; it logs in whoever has it:\n{link}", err=True)
    if server and sys.stdout.isatty() and sys.stderr.isatty():
        click.echo(links.qr_text(link), err=True)
    if qr is not None:
        links.write_qr(qr, link)
        click.echo(f"{qr}: the link's QR code", err=True)


@click.command("revoke", cls=GroupedCommand)
@click.argument("name")
@database
def revoke(name: str, db: str) -> None:
    """Withdraw an annotator's token, link and sessions; the judgements stay. `new-token` lets her in again."""
    with open_store(db, create=False) as store:
        store.revoke_annotator(name)
        left = [one for one in store.annotators() if one.role == "admin" and one.revoked is None and one.name != LOCAL]
        role = next(one.role for one in store.annotators() if one.name == name)
    click.echo(f"{name}: token revoked")
    if role == "admin" and not left:
        click.echo("no admin is left: add-annotator NAME --admin makes one", err=True)


@click.command("annotators", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@database
def annotators(as_json: bool, db: str) -> None:
    """List annotators, roles and revocations."""
    with open_store(db, create=False) as store:
        found = store.annotators()
    rows = [{"name": a.name, "role": a.role, "created": _date(a.created), "revoked": a.revoked and _date(a.revoked)} for a in found]
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        revoked = f", revoked {row['revoked']}" if row["revoked"] else ""
        click.echo(f"{row['name']:<24} {row['role']:<10} since {row['created']}{revoked}")


@click.command("status", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@database
def status(as_json: bool, db: str) -> None:
    """Show campaigns, pairs, judgements and annotators."""
    with open_store(db, create=False) as store:
        known = store.annotators()
        work, campaigns = store.tally(), store.campaigns()
    found: list[dict] = []
    for campaign in campaigns:
        own = [one for one in work if one.campaign_id == campaign.id]
        found.append({
            "name": campaign.settings.name, "mode": campaign.settings.mode.value, "pairs": campaign.pairs,
            "judgements": sum(one.judgements for one in own), "annotators": {one.name: one.judgements for one in own},
            "created": _date(campaign.created), "last": _date(max(one.last for one in own)) if own else None,
        })  # fmt: skip
    if as_json:
        click.echo(json.dumps({"campaigns": found, "annotators": len(known)}, indent=1, ensure_ascii=False))
        return
    for row in found:
        count = f"{row['pairs']} pairs, {row['judgements']} judgements of {len(row['annotators'])} annotators"
        click.echo(f"{row['name']}: {row['mode']}, {count}, made {row['created']}, last answer {row['last'] or 'none'}")
    click.echo(f"{len(found)} campaigns, {len(known)} annotators")


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


@click.group("label")
@click.option("--db", metavar="URL", default=None)
@click.pass_context
def quick(ctx: click.Context, db: str | None) -> None:
    """The commands of this file by themselves."""
    ctx.obj = db


for command in (add_annotator, new_token, revoke, annotators, status):
    quick.add_command(command)


def is_quick(arguments: Sequence[str]) -> bool:
    """Whether a command line names one of these commands, --db aside the first word: then nothing else need be loaded."""
    words = list(arguments)
    if words[:1] == ["--db"]:
        words = words[2:]
    elif words and words[0].startswith("--db="):
        words = words[1:]
    return bool(words) and words[0] in quick.commands
