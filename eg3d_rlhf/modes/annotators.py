"""Commands of `eg3d-rlhf label` and `eg3d-rlhf study` that create, list and revoke annotators.

An annotator logs in to the labelling server with a token, or with a link that contains the token. The module
imports neither torch nor the server, so these commands start quickly.
"""

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, combine_decorators, option, prefix_errors
from eg3d_rlhf.people.label.db_flag import DATABASE, DB, open_store
from eg3d_rlhf.people.label.entities import JUDGE

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

# --db may follow the name of the subcommand, or precede it. `label` and `study` store the value of the
# second form in `ctx.obj`. DB is the default.
database = option("--db", metavar="URL", help=DATABASE, callback=lambda ctx, _, url: url or ctx.obj or DB)
address = option(
    "--address",
    metavar="URL",
    help="Address of the server for annotators, such as https://host:8000; the login link contains it.",
    show_default="none; the printed link lacks the address",
)
qr = option(
    "--qr",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="New .svg or .png file to which the QR code of the login link is written; needs --address.",
)
token_options = combine_decorators(address, qr)


@click.command("add-annotator", cls=GroupedCommand)
@click.argument("name")
@option("--admin", is_flag=True, help="Allow the annotator to see results and to manage annotators.")
@token_options
@database
def add_annotator(name: str, admin: bool, address: str | None, qr: Path | None, db: str) -> None:
    """Create an annotator and print the login token. The token is printed only once, because the database
    stores only its hash.
    """
    _hand_over(
        name,
        address,
        qr,
        db,
        # create the database if it does not exist
        True,
        lambda store: store.add_annotator(name, "admin" if admin else "annotator"),
    )


@click.command("new-token", cls=GroupedCommand)
@click.argument("name")
@token_options
@database
def new_token(name: str, address: str | None, qr: Path | None, db: str) -> None:
    """Replace the token of an annotator, or give a revoked annotator a new token. The old token, its login
    link and all open sessions become invalid. The annotator's judgements stay in the database.
    """
    _hand_over(name, address, qr, db, False, lambda store: store.new_token(name))


def _hand_over(
    name: str,
    address: str | None,
    qr: Path | None,
    db: str,
    create_database: bool,
    make_token: Callable[["Store"], str],
) -> None:
    """Make a token in the database. Print it on stdout, and the login link with explanations on stderr.

    Args:
        name: name of the annotator.
        address: address of the server in the login link; None: the link lacks it.
        qr: file to which the QR code of the link is written; None: no file.
        db: URL of the database.
        create_database: True to create the database if it does not exist.
        make_token: function that makes the token in the open database and returns it.

    Raises: ValueError for a wrong address or file, and errors of `make_token`.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.people.label.access import check_address, check_image_path, login_link, qr_code, write_qr

    # Addresses and files are checked before the database changes: a token is shown only once.
    with prefix_errors("--address"):
        server_address = check_address(address) if address else ""
    # an error in this block begins with the name --qr
    with prefix_errors("--qr"):
        if qr is not None and not server_address:
            raise ValueError(
                "the QR code needs the address of the server, because a phone cannot open a link without it."
                " Add --address=URL."
            )
        if qr is not None:
            # raises ValueError if the file exists or has another suffix
            check_image_path(qr)
    # An error in `make_token` happens before anything is printed.
    with open_store(db, create_database) as store:
        token = make_token(store)
    # stdout holds the token alone, so that a script can read it
    click.echo(f"token of {name}; it will not be shown again:", err=True)
    click.echo(token)
    login_url = login_link(server_address, token)
    # keeps the order of the two streams where both go to one terminal
    sys.stdout.flush()
    address_note = (
        "" if server_address else ", to be appended to the server's address (or pass --address=URL)"
    )
    click.echo(f"or this link{address_note}; anybody who has it can log in:\n{login_url}", err=True)
    # a QR code of text characters makes sense only on a screen
    if server_address and sys.stdout.isatty() and sys.stderr.isatty():
        qr_code(login_url, "l").terminal(sys.stderr, compact=True)
    if qr is not None:
        write_qr(qr, login_url)
        click.echo(f"{qr}: QR code of the login link", err=True)


@click.command("revoke", cls=GroupedCommand)
@click.argument("name")
@database
def revoke(name: str, db: str) -> None:
    """Make the token, the login link and all sessions of an annotator invalid. The annotator's judgements
    stay in the database. The command `new-token` gives access again.
    """
    # Imported here, so that --help is printed without loading this module.
    from eg3d_rlhf.people.label.entities import LOCAL

    with open_store(db, create=False) as store:
        # The database keeps the annotator, because judgements refer to it.
        store.revoke_annotator(name)
        # LOCAL is the person who uses the server on its own machine. This annotator needs no token, so it
        # cannot replace an administrator who logs in from elsewhere.
        remaining_admins = [
            annotator
            for annotator in store.annotators()
            if annotator.role == "admin" and annotator.revoked is None and annotator.name != LOCAL
        ]
        # the role is needed after the database is closed
        annotator_role = next(annotator.role for annotator in store.annotators() if annotator.name == name)
    click.echo(f"{name}: token revoked")
    if annotator_role == "admin" and not remaining_admins:
        click.echo(
            "no administrator is left. Create an administrator with add-annotator NAME --admin.", err=True
        )


@click.command("annotators", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@database
def annotators(as_json: bool, db: str) -> None:
    """List the annotators with their roles, and the dates on which they were created and revoked."""
    with open_store(db, create=False) as store:
        all_annotators = store.annotators()
    annotator_rows = [
        {
            "name": annotator.name,
            "role": annotator.role,
            "created": _date(annotator.created),
            # None stays None (null in JSON): not revoked
            "revoked": annotator.revoked and _date(annotator.revoked),
        }
        for annotator in all_annotators
    ]
    if as_json:
        click.echo(json.dumps(annotator_rows, indent=1, ensure_ascii=False))
        return
    for annotator_row in annotator_rows:
        revoked_text = f", revoked {annotator_row['revoked']}" if annotator_row["revoked"] else ""
        click.echo(
            f"{annotator_row['name']:<24} {annotator_row['role']:<10} since"
            f" {annotator_row['created']}{revoked_text}"
        )


@click.command("status", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
@database
def status(as_json: bool, db: str) -> None:
    """Show all labelling projects (campaigns) of the database, with the numbers of pairs, judgements and
    annotators.
    """
    with open_store(db, create=False) as store:
        all_annotators = store.annotators()
        all_tallies = store.tally()
        campaigns = store.campaigns()
    people = [annotator for annotator in all_annotators if annotator.role != JUDGE]
    # one row per campaign, also the keys of --json
    campaign_rows: list[dict] = []
    for campaign in campaigns:
        # a tally counts the judgements of one annotator in one campaign
        tallies = [tally for tally in all_tallies if tally.campaign_id == campaign.id]
        people_times = [tally.last for tally in tallies if tally.role != JUDGE]
        campaign_rows.append(
            {
                "name": campaign.settings.name,
                "mode": campaign.settings.mode.value,
                "pairs": campaign.pairs,
                "judgements": sum(tally.judgements for tally in tallies if tally.role != JUDGE),
                "annotators": {tally.name: tally.judgements for tally in tallies if tally.role != JUDGE},
                # answers of judges are counted apart, and never as those of people
                "judges": {tally.name: tally.judgements for tally in tallies if tally.role == JUDGE},
                "created": _date(campaign.created),
                # time of the latest judgement of a person; no judgement yet: null
                "last": _date(max(people_times)) if people_times else None,
            }
        )
    if as_json:
        click.echo(
            json.dumps(
                {"campaigns": campaign_rows, "annotators": len(people)},
                indent=1,
                ensure_ascii=False,
            )
        )
        return
    for campaign_row in campaign_rows:
        count_text = (
            f"{campaign_row['pairs']} pairs, {campaign_row['judgements']} judgements by"
            f" {len(campaign_row['annotators'])} annotators"
        )
        if campaign_row["judges"]:
            count_text += (
                f", {sum(campaign_row['judges'].values())} answers of judges"
                f" ({', '.join(campaign_row['judges'])})"
            )
        click.echo(
            f"{campaign_row['name']}: {campaign_row['mode']}, {count_text}, created"
            f" {campaign_row['created']}, last answer {campaign_row['last'] or 'none'}"
        )
    click.echo(f"{len(campaign_rows)} campaigns, {len(people)} annotators")


def _date(seconds: float) -> str:
    """Format a Unix time, in seconds since 1970, as a date and a time of day in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def known_database(context: click.Context) -> list[object]:
    """Return the values that --help shows as defaults: the URL of the database, for --db."""
    return [{"db": context.params["db"]}]


# jobs.py finds these commands by name, without importing the command `label`.
PEOPLE = {command.name: command for command in (add_annotator, new_token, revoke, annotators, status)}
for command in PEOPLE.values():
    command.resolved = known_database
