"""Who may label: links that log an annotator in, and the commands that make, list and revoke annotators.
Imports no torch, no server.

A link is the token in another form and is valid as long: made void by another token (`new-token`) or by
revoking. The token stands behind '#', which browsers send to no server: neither logs nor a Referer hold it,
and what fetches a link for a preview logs nobody in.
"""

import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from eg3d_rlhf.core.cli import GroupedCommand, naming, option, together
from eg3d_rlhf.people.label.db_flag import database, open_store
from eg3d_rlhf.people.label.entities import LOCAL

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

PICTURES = (".svg", ".png")
address = option(
    "--address",
    metavar="URL",
    default=None,
    help="Where annotators reach the server, as https://host:8000: for the link.",
    show_default="a link without it",
)
qr = option(
    "--qr",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="The link's QR code as a new .svg or .png; needs --address.",
)
handed_over = together(address, qr)


def check_address(address: str) -> str:
    """The server's address without what a browser may have added. Raises: ValueError."""
    parts = urlsplit(address)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise ValueError(f"expected the server's address, got {address!r}. Write it as https://host:8000.")
    return f"{parts.scheme}://{parts.netloc}"


def login_link(address: str, token: str) -> str:
    """The link; `address` is empty where it is not known: then it is a path."""
    return f"{address}/login#token={token}"


def qr_data(link: str) -> str:
    """The link's QR code as a data URL of an SVG picture, dark on light."""
    return _code(link).svg_data_uri(scale=4, dark="#000", light="#fff")


def _code(link: str, error: str = "m") -> Any:
    import segno  # of the extra, which help does without

    return segno.make(link, error=error)


def check_picture(path: Path) -> None:
    """Raises: ValueError for another suffix or a file that is there."""
    if path.suffix not in PICTURES:
        raise ValueError(f"expected a name with {' or '.join(PICTURES)}, got {path.name}. Rename it.")
    if path.exists() or not path.parent.is_dir():
        raise ValueError(f"expected a new file in a folder that is there, got {path}. Name another.")


def write_qr(path: Path, link: str) -> None:
    """The link's QR code as a new file that only its owner reads: who has the picture has the token."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        _code(link).save(file, kind=path.suffix[1:], scale=8, light="#fff")


@click.command("add-annotator", cls=GroupedCommand)
@click.argument("name")
@option("--admin", is_flag=True, help="May also see results and name annotators.")
@handed_over
@database
def add_annotator(name: str, admin: bool, address: str | None, qr: Path | None, db: str) -> None:
    """Make an annotator and print the token, this once; only its hash is stored."""
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
    """Replace an annotator's token, or give one to somebody revoked: the old one, its link and all sessions
    end, the work stays.
    """
    _hand_over(name, address, qr, db, False, lambda store: store.new_token(name))


def _hand_over(
    name: str, address: str | None, qr: Path | None, db: str, create: bool, make: Callable[["Store"], str]
) -> None:
    """Print a new token on stdout, and on stderr what goes with it."""
    with naming("--address"):
        server = check_address(address) if address else ""
    with naming("--qr"):
        if qr is not None and not server:
            raise ValueError(
                "expected --address as well, got none, without which a phone finds no server. Add it."
            )
        if qr is not None:
            check_picture(qr)
    with open_store(db, create) as store:
        token = make(store)
    click.echo(f"token of {name}; it is not shown again:", err=True)
    click.echo(token)
    link = login_link(server, token)
    sys.stdout.flush()
    where = "" if server else " behind the server's address (--address=URL puts it there)"
    click.echo(f"or this link{where}; it logs in whoever has it:\n{link}", err=True)
    if server and sys.stdout.isatty() and sys.stderr.isatty():
        _code(link, "l").terminal(sys.stderr, compact=True)
    if qr is not None:
        write_qr(qr, link)
        click.echo(f"{qr}: the link's QR code", err=True)


@click.command("revoke", cls=GroupedCommand)
@click.argument("name")
@database
def revoke(name: str, db: str) -> None:
    """Withdraw an annotator's token, link and sessions; the judgements stay.
    `new-token` lets her in again.
    """
    with open_store(db, create=False) as store:
        store.revoke_annotator(name)
        left = [
            person
            for person in store.annotators()
            if person.role == "admin" and person.revoked is None and person.name != LOCAL
        ]
        role = next(person.role for person in store.annotators() if person.name == name)
    click.echo(f"{name}: token revoked")
    if role == "admin" and not left:
        click.echo("no admin is left: add-annotator NAME --admin makes one", err=True)


@click.command("annotators", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@database
def annotators(as_json: bool, db: str) -> None:
    """List annotators, roles and revocations."""
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
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@database
def status(as_json: bool, db: str) -> None:
    """Show campaigns, pairs, judgements and annotators."""
    with open_store(db, create=False) as store:
        known = store.annotators()
        work = store.tally()
        campaigns = store.campaigns()
    rows: list[dict] = []
    for campaign in campaigns:
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
        count = f"{row['pairs']} pairs, {row['judgements']} judgements of {len(row['annotators'])} annotators"
        click.echo(
            f"{row['name']}: {row['mode']}, {count}, made {row['created']}, last answer"
            f" {row['last'] or 'none'}"
        )
    click.echo(f"{len(rows)} campaigns, {len(known)} annotators")


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


PEOPLE = {command.name: command for command in (add_annotator, new_token, revoke, annotators, status)}
