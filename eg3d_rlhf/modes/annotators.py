"""Commands that create, list and revoke annotators, for `eg3d-rlhf label` and `eg3d-rlhf study`.

The module imports neither torch nor the label server, so these commands start quickly.
"""

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, naming, option, together
from eg3d_rlhf.people.label.db_flag import DATABASE, DB, open_store

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

# The subcommands accept --db after their name or, through the command's context, before it.
database = option("--db", metavar="URL", help=DATABASE, callback=lambda ctx, _, given: given or ctx.obj or DB)
address = option(
    "--address",
    metavar="URL",
    help="Address at which annotators reach the server, such as https://host:8000, for the login link.",
    show_default="a link without the address",
)
qr = option(
    "--qr",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="New .svg or .png file for the QR code of the login link; needs --address.",
)
handed_over = together(address, qr)


@click.command("add-annotator", cls=GroupedCommand)
@click.argument("name")
@option("--admin", is_flag=True, help="Allow the annotator to see results and to manage annotators.")
@handed_over
@database
def add_annotator(name: str, admin: bool, address: str | None, qr: Path | None, db: str) -> None:
    """Create an annotator and print the login token. It is shown only once; the database stores its hash."""
    _hand_over(
        name,
        address,
        qr,
        db,
        True,
        lambda store: store.add_annotator(name, "admin" if admin else "annotator"),
    )


@click.command("new-token", cls=GroupedCommand)
@click.argument("name")
@handed_over
@database
def new_token(name: str, address: str | None, qr: Path | None, db: str) -> None:
    """Replace an annotator's token, or give a revoked annotator a new one. The old token, its link and all
    sessions end; the judgements are kept.
    """
    _hand_over(name, address, qr, db, False, lambda store: store.new_token(name))


def _hand_over(
    name: str, address: str | None, qr: Path | None, db: str, create: bool, make: Callable[["Store"], str]
) -> None:
    """Print a new token on stdout, and the login link with explanations on stderr."""
    from eg3d_rlhf.people.label.access import check_address, check_picture, login_link, qr_code, write_qr

    # Addresses and files are checked before the database changes: a token is shown only once.
    with naming("--address"):
        server = check_address(address) if address else ""
    with naming("--qr"):
        if qr is not None and not server:
            raise ValueError(
                "the QR code needs the server's address: without it, a phone cannot open the link. Add"
                " --address=URL."
            )
        if qr is not None:
            check_picture(qr)
    with open_store(db, create) as store:
        token = make(store)
    # stdout holds the token alone, so that a script can read it
    click.echo(f"token of {name}; it will not be shown again:", err=True)
    click.echo(token)
    link = login_link(server, token)
    # keeps the order of the two streams where both go to one terminal
    sys.stdout.flush()
    where = "" if server else ", to be appended to the server's address (or pass --address=URL)"
    click.echo(f"or this link{where}; anybody who has it can log in:\n{link}", err=True)
    if server and sys.stdout.isatty() and sys.stderr.isatty():
        qr_code(link, "l").terminal(sys.stderr, compact=True)
    if qr is not None:
        write_qr(qr, link)
        click.echo(f"{qr}: the link's QR code", err=True)


@click.command("revoke", cls=GroupedCommand)
@click.argument("name")
@database
def revoke(name: str, db: str) -> None:
    """Withdraw an annotator's token, link and sessions; the judgements are kept.
    `new-token` gives access again.
    """
    from eg3d_rlhf.people.label.entities import LOCAL

    with open_store(db, create=False) as store:
        store.revoke_annotator(name)
        # LOCAL stands for the person at the server's own machine and needs no token, so it is not counted
        left = [
            person
            for person in store.annotators()
            if person.role == "admin" and person.revoked is None and person.name != LOCAL
        ]
        # the role is needed after the database is closed
        role = next(person.role for person in store.annotators() if person.name == name)
    click.echo(f"{name}: token revoked")
    if role == "admin" and not left:
        click.echo("no administrator is left. Create one: add-annotator NAME --admin", err=True)


@click.command("annotators", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@database
def annotators(as_json: bool, db: str) -> None:
    """List the annotators with their roles and revocations."""
    with open_store(db, create=False) as store:
        people = store.annotators()
    rows = [
        {
            "name": a.name,
            "role": a.role,
            "created": _date(a.created),
            "revoked": a.revoked and _date(a.revoked),
        }
        for a in people
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for row in rows:
        revoked = f", revoked {row['revoked']}" if row["revoked"] else ""
        click.echo(f"{row['name']:<24} {row['role']:<10} since {row['created']}{revoked}")


@click.command("status", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
@database
def status(as_json: bool, db: str) -> None:
    """Show the campaigns with their pairs, judgements and annotators."""
    with open_store(db, create=False) as store:
        known = store.annotators()
        work = store.tally()
        campaigns = store.campaigns()
    # one row per campaign, also the keys of --json
    rows: list[dict] = []
    for campaign in campaigns:
        # a tally counts the judgements of one annotator in one campaign
        tallies = [tally for tally in work if tally.campaign_id == campaign.id]
        rows.append(
            {
                "name": campaign.settings.name,
                "mode": campaign.settings.mode.value,
                "pairs": campaign.pairs,
                "judgements": sum(tally.judgements for tally in tallies),
                "annotators": {tally.name: tally.judgements for tally in tallies},
                "created": _date(campaign.created),
                "last": _date(max(tally.last for tally in tallies)) if tallies else None,
            }
        )
    if as_json:
        click.echo(json.dumps({"campaigns": rows, "annotators": len(known)}, indent=1, ensure_ascii=False))
        return
    for row in rows:
        count = f"{row['pairs']} pairs, {row['judgements']} judgements by {len(row['annotators'])} annotators"
        click.echo(
            f"{row['name']}: {row['mode']}, {count}, created {row['created']}, last answer"
            f" {row['last'] or 'none'}"
        )
    click.echo(f"{len(rows)} campaigns, {len(known)} annotators")


def _date(seconds: float) -> str:
    """Format a Unix time in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def known_database(context: click.Context) -> list[object]:
    """Return the values that --help shows as defaults: that of --db."""
    return [{"db": context.params["db"]}]


# jobs.py dispatches to these by name, without importing the labelling command
PEOPLE = {command.name: command for command in (add_annotator, new_token, revoke, annotators, status)}
for command in PEOPLE.values():
    command.resolved = known_database
