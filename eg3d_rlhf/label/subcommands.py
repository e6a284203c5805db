"""What is done beside the labelling server: annotators, exports and imports, and how far everything is."""

import datetime
import json
from pathlib import Path

import click
from click.core import ParameterSource

from eg3d_rlhf.cli import GroupedCommand, option
from eg3d_rlhf.label.exchange import (
    export_judgements,
    export_labels,
    export_ranked_seeds,
    import_judgements,
    import_ranked_seeds,
)
from eg3d_rlhf.label.launch import DB, open_store
from eg3d_rlhf.label.store import Store, StoredCampaign

KINDS = ("labels", "judgements", "ranked-seeds")


def database(function):
    """The option --db, here or before the sub-command."""
    text = "Database: sqlite:///FILE or postgresql://user@host/database."
    return option("--db", metavar="URL", default=None, show_default=DB, help=text)(function)


def _url(db: str | None) -> str:
    return db or click.get_current_context().obj or DB


@click.command("add-annotator", cls=GroupedCommand)
@click.argument("name")
@option("--admin", is_flag=True, help="May also see results and name annotators.")
@database
def add_annotator(name: str, admin: bool, db: str | None) -> None:
    """Make an annotator and print the token, this once; only its hash is stored."""
    with open_store(_url(db), create=True) as store:
        token = store.add_annotator(name, "admin" if admin else "annotator")
    click.echo(f"token of {name}; it is not shown again:", err=True)
    click.echo(token)


@click.command("revoke", cls=GroupedCommand)
@click.argument("name")
@database
def revoke(name: str, db: str | None) -> None:
    """Withdraw an annotator's token and end the sessions; the judgements stay."""
    with open_store(_url(db), create=False) as store:
        store.revoke_annotator(name)
    click.echo(f"{name}: token revoked")


@click.command("annotators", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@database
def annotators(as_json: bool, db: str | None) -> None:
    """List annotators, roles and revocations."""
    with open_store(_url(db), create=False) as store:
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
@option("--kind", type=click.Choice(KINDS), default="labels", help="Labels in the open form (.jsonl, .csv), all judgements without loss "
        "(.jsonl), or a table of ranked seeds (.csv).")
@option("--campaign", metavar="NAME", default=None, show_default="all", help="One campaign alone.")
@option("--annotator", "annotators", metavar="NAME", multiple=True, show_default="all", help="May be given again.")
@option("--least-gold-accuracy", metavar="0..1", type=click.FloatRange(0, 1), default=None, help="Leave out annotators below it.")
@option("--drop-repeats", is_flag=True, help="Keep each annotator's first answer to a pair alone.")
@option("--min-milliseconds", metavar="INT", type=click.IntRange(min=0), default=0, help="Leave out faster answers.")
@option("--since", metavar="TIME", default=None, help="Received from then on, ISO 8601.")
@database
@click.pass_context
def export(ctx: click.Context, out: Path, kind: str, campaign: str | None, db: str | None, **filters) -> None:
    """Write labels or judgements to FILE."""
    _check_suffix(out, kind)
    if kind == "judgements":
        given = {name for name in filters if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        used = [p.opts[0] for p in ctx.command.params if p.name in given]
        if used:
            raise ValueError(f"{', '.join(used)}: expected no filter with --kind=judgements, which leaves nothing out. Leave the flag out.")
    with open_store(_url(db), create=False) as store:
        if kind == "judgements":
            export_judgements(store, out, campaign)
        elif kind == "labels":
            export_labels(store, out, campaign=campaign, **filters)
        else:
            export_ranked_seeds(store, out, campaign=campaign, **filters)
    click.echo(f"{out}: {_records(out)} written")


def _check_suffix(out: Path, kind: str) -> None:
    allowed = {"labels": (".jsonl", ".csv"), "judgements": (".jsonl",), "ranked-seeds": (".csv",)}[kind]
    if out.suffix not in allowed:
        raise ValueError(f"FILE: expected a name with {' or '.join(allowed)} for --kind={kind}, got {out.name}. Rename it.")


def _records(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        count = sum(1 for _ in file) - (path.suffix == ".csv")
    return f"{count} line{'s' if count != 1 else ''}"


@click.command("import", cls=GroupedCommand)
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@option("--campaign", metavar="NAME", default=None, show_default="the file's name", help="Of ranked seeds: campaign to make.")
@option("--annotator", metavar="NAME", default=None, show_default="imported", help="Of ranked seeds: who judged.")
@database
def import_(source: Path, campaign: str | None, annotator: str | None, db: str | None) -> None:
    """Read FILE: judgements that were exported (.jsonl), or a table of ranked seeds (.csv)."""
    if source.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"FILE: expected .jsonl (judgements) or .csv (ranked seeds), got {source.name}. Rename it.")
    if source.suffix == ".jsonl" and (campaign or annotator):
        raise ValueError("--campaign, --annotator: expected only with ranked seeds; judgements bring theirs. Leave the flag out.")
    with open_store(_url(db), create=True) as store:
        if source.suffix == ".csv":
            count = import_ranked_seeds(store, source, campaign, **({"annotator": annotator} if annotator else {}))
        else:
            count = import_judgements(store, source)
    click.echo(f"{source}: {count} judgements imported")


@click.command("status", cls=GroupedCommand)
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@database
def status(as_json: bool, db: str | None) -> None:
    """Show campaigns, pairs, judgements and annotators."""
    with open_store(_url(db), create=False) as store:
        found = [_campaign_status(store, campaign) for campaign in store.campaigns()]
        known = store.annotators()
    if as_json:
        click.echo(json.dumps({"campaigns": found, "annotators": len(known)}, indent=1, ensure_ascii=False))
        return
    for row in found:
        work = f"{row['pairs']} pairs, {row['judgements']} judgements of {len(row['annotators'])} annotators"
        click.echo(f"{row['name']}: {row['mode']}, {work}, made {row['created']}, last answer {row['last'] or 'none'}")
    click.echo(f"{len(found)} campaigns, {len(known)} annotators")


def _campaign_status(store: Store, campaign: StoredCampaign) -> dict:
    counts, last, name = {}, None, campaign.settings.name
    for row in store.judgements(name):
        counts[row.annotator] = counts.get(row.annotator, 0) + 1
        last = row.received_at
    return {
        "name": name, "mode": campaign.settings.mode.value, "pairs": campaign.pairs, "judgements": sum(counts.values()),
        "annotators": counts, "created": _date(campaign.created), "last": last and _date(last),
    }


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


COMMANDS = (add_annotator, revoke, annotators, export, import_, status)
