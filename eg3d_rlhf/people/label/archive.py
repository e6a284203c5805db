"""Exports and imports campaigns without loss as JSON lines, for archives and for moves.

Each line holds one record. Its field `record` names the kind: campaign, shape, pair, annotator, assignment or
judgement. The records are the rows of the tables, with names and tokens where the tables have numeric ids.
Judgements come in the order of receipt and include undos. Hashes of tokens, sessions and leases are not
exported. Importing a file a second time adds only the records that are new.

The module also exports and imports ranked-seeds tables: CSV files with a row number, the preferred seed and
the other seed, as published with arXiv 2606.27305. Such a table does not record who answered, when, or on
which side a shape was. The sides are therefore chosen by a hash, which avoids an artificial side bias.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, Table, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from eg3d_rlhf.core.seeds import refuse_held_out
from eg3d_rlhf.people.label.campaigns import create, settings_from_json
from eg3d_rlhf.people.label.database import (
    Lock,
    annotators,
    assignments,
    campaigns,
    insert_all,
    judgements,
    pairs,
    shapes,
)
from eg3d_rlhf.people.label.entities import (
    LOCAL,
    ROLES,
    CampaignSettings,
    Choice,
    Kind,
    Mode,
    PlannedPair,
    Shape,
    check_stored,
)
from eg3d_rlhf.people.label.store import ANNOTATOR_COLUMNS, NAME, Store, find_or_add
from eg3d_rlhf.people.label.store_labels import LabelFilters, store_preferences
from eg3d_rlhf.preferences.labels import load_labels
from training.storage import write_atomic

FORMAT = 1  # of the JSON lines; a file with another number is rejected


@dataclass(frozen=True)
class Kept:
    """Description of how the rows of a table are stored in the file. A link, which is a column that ends in
    `_id`, becomes a field without `_id`.
    """

    table: Table  # table of the database
    name: str  # column by which other records refer to a row; for judgements, together with the annotator
    links: Mapping[str, str]  # column -> kind of record that it points to


KEPT = {  # by kind of record; a kind comes after the kinds that it refers to
    "shape": Kept(shapes, "asset", {}),
    "pair": Kept(pairs, "position", {"first_id": "shape", "second_id": "shape"}),
    "assignment": Kept(assignments, "token", {"annotator_id": "annotator", "pair_id": "pair"}),
    "judgement": Kept(
        judgements,
        "key",
        {"annotator_id": "annotator", "assignment_id": "assignment", "takes_back": "judgement"},
    ),
}
# Columns that are not exported: they describe leases, or `_Import.settle` computes them from the records.
STATE = {"takes_back", "answered", "leased", "taken"}


def export_judgements(store: Store, path: str | Path, campaign: str | None = None) -> Path:
    """Write one campaign, or all of them. Returns the path. Raises: ValueError for an unknown campaign."""
    with store.database.read() as c:
        query = select(campaigns).order_by(campaigns.c.id)
        rows = list(c.execute(query if campaign is None else query.where(campaigns.c.name == campaign)))
        if campaign is not None and not rows:
            raise ValueError(
                f"campaign: expected a campaign of this store, got {campaign!r}. `campaigns` lists them."
            )
        lines = [json.dumps({"record": "format", "version": FORMAT})]
        for row in rows:
            lines += [json.dumps(record) for record in _records(c, row)]
    # The file is complete or absent: write_atomic writes a temporary file and renames it.
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return Path(path)


def _records(c: Connection, campaign: Row) -> Iterator[dict]:
    """Yield the records of one campaign, each after the records that it refers to."""
    yield {
        "record": "campaign",
        "name": campaign.name,
        "settings": json.loads(campaign.settings),
        "created": campaign.created,
    }
    known = list(c.execute(ANNOTATOR_COLUMNS.order_by(annotators.c.id)))
    # Kind of record -> numeric id -> the name under which the file refers to that row.
    names: dict[str, dict] = {"annotator": {annotator.id: annotator.name for annotator in known}}
    for kind, kept in KEPT.items():
        rows = list(
            c.execute(
                select(kept.table).where(kept.table.c.campaign_id == campaign.id).order_by(kept.table.c.id)
            )
        )
        if kind == "assignment":
            # Only annotators with an assignment in this campaign are exported, and they come before the first
            # assignment, which refers to them.
            taking_part = {row.annotator_id for row in rows}
            yield from (
                {"record": "annotator", "name": a.name, "role": a.role, "created": a.created}
                for a in known
                if a.id in taking_part
            )
        names[kind] = {row.id: row._mapping[kept.name] for row in rows}
        for row in rows:
            columns = {
                k: v
                for k, v in row._mapping.items()
                if k != "id" and not k.endswith("_id") and k not in STATE
                # Numeric ids are valid in this database only. The links replace those that end in _id.
            }
            linked = {
                column.removesuffix("_id"): names[other].get(row._mapping[column])
                for column, other in kept.links.items()
            }
            yield {"record": kind, "campaign": campaign.name, **columns, **linked}


def import_judgements(store: Store, path: str | Path) -> int:
    """Add the campaigns of a file, or the new records of known campaigns, in one transaction.

    Returns: the number of new judgements, undos included.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"import_judgements: expected an exported file, got no file at {path}. Check the path."
        )
    # Both schema locks are held: new campaigns (1) and new annotators (2) are created by other processes,
    # too.
    locks = (Lock.SCHEMA, 1), (Lock.SCHEMA, 2)
    # Undecodable bytes are replaced, so that a binary file is rejected below as a record that cannot be read.
    with path.open(encoding="utf-8", errors="replace") as file, store.database.write(*locks) as c:
        reading = _Import(c, store.clock())
        line = 0
        try:
            for line, text in enumerate(file, 1):
                try:
                    record = json.loads(text)
                    kind = record["record"]
                except (ValueError, TypeError, KeyError):
                    raise ValueError(
                        f"{path.name}, line {line}: expected an exported record, got {text[:40]!r}. Export"
                        " again."
                    ) from None
                if line == 1 and (kind != "format" or record.get("version") != FORMAT):
                    raise ValueError(
                        f"{path.name}, line 1: expected format {FORMAT}, got {text[:60]!r}. Export with this"
                        " program."
                    )
                try:
                    if line > 1:
                        reading.add(record)
                except ValueError as error:
                    raise ValueError(f"{path.name}, line {line}: {error}") from None
            if line == 0:
                raise ValueError(f"{path.name}: expected an exported file, got an empty one. Export again.")
            reading.settle()
        except IntegrityError as error:
            reason = str(error.orig).strip().splitlines()[0]
            raise ValueError(
                f"{path.name}, up to line {line}: the store has other records under the same names"
                f" ({reason}). Import into another store."
            ) from None
    return reading.new


class _Import:
    """Adds records of a file to the tables, many at a time.

    Rows wait in memory as long as they are of the same kind and campaign. They are written before a record of
    another kind needs their ids.
    """

    def __init__(self, c: Connection, now: float):
        self.c = c
        self.now = now
        self.new = 0
        self.campaigns: dict[str, int] = {}
        self.trainable: set[str] = set()  # campaigns whose preferences may train a reward
        self.annotators: dict[str, int] = {}  # name in the file -> id in the store
        self.ids: dict[tuple[str, str], dict] = {}  # (kind, campaign) -> name of a row in the file -> its id
        self.waiting: dict = {}  # name of a row in the file -> its columns
        self.kind: tuple[str, str] | None = None  # kind and campaign of the waiting rows

    def add(self, record: dict) -> None:
        """Add one record. Raises: ValueError for an unknown kind, a missing field or a wrong value."""
        kind = record["record"]
        adds = {
            "campaign": self._add_campaign,
            "annotator": self._add_annotator,
            **dict.fromkeys(KEPT, self._add_row),
        }
        if kind not in adds:
            raise ValueError(f"expected a known kind of record, got {kind!r}. Export with this version.")
        try:
            adds[kind](record)
        except KeyError as error:
            raise ValueError(
                f"expected a field {error} in the record of kind {kind}, got none. Export again."
            ) from None

    def settle(self) -> None:
        """Write the waiting rows, and compute the columns of STATE from all records."""
        self._write()
        back = judgements.alias("back")
        undone = select(back.c.id).where(back.c.takes_back == judgements.c.id).exists()
        # The judgement that counts is the last choice that no undo takes back.
        chosen = (judgements.c.assignment_id == assignments.c.id, judgements.c.type == "choice", ~undone)
        counted = select(func.max(judgements.c.id)).where(*chosen).scalar_subquery()
        # An assignment that was released before its last undo was given back to its annotator by that undo.
        taken_back = (judgements.c.assignment_id == assignments.c.id, judgements.c.type == "undo")
        last_undo = select(func.max(judgements.c.received_at)).where(*taken_back).scalar_subquery()
        reopened = assignments.c.answered.is_(None) & (
            assignments.c.released.is_(None) | (assignments.c.released < last_undo)
        )
        holding = (
            assignments.c.pair_id == pairs.c.id,
            assignments.c.kind == Kind.PAIR.value,
            assignments.c.released.is_(None),
        )
        held = select(func.count()).where(*holding).scalar_subquery()
        # A place of a pair is taken as long as an assignment of kind 'pair' has not been released.
        for campaign_id in self.campaigns.values():
            of_campaign = update(assignments).where(assignments.c.campaign_id == campaign_id)
            self.c.execute(of_campaign.values(answered=counted, undone=None))
            self.c.execute(of_campaign.where(reopened).values(undone=last_undo))
            self.c.execute(update(pairs).where(pairs.c.campaign_id == campaign_id).values(taken=held))

    def _add_campaign(self, record: dict) -> None:
        self._write()
        name = record["name"]
        settings = json.dumps(record["settings"], sort_keys=True)
        try:
            # Settings that this version cannot read are an error of the file, as are settings of another
            # name.
            parsed = settings_from_json(settings)
        except (KeyError, TypeError, ValueError):
            parsed = None
        if parsed is None or parsed.name != name:
            raise ValueError(f"expected the settings of campaign {name!r}, got other values. Export again.")
        # Settings are compared as JSON with sorted keys: the store writes them in this form, too.
        known = self.c.execute(select(campaigns).where(campaigns.c.name == name)).first()
        if known is not None and known.settings != settings:
            raise ValueError(
                f"expected a new campaign, got {name!r}, which is another campaign in this store. Use another"
                " store."
            )
        values = _checked(campaigns, {**record, "settings": settings})
        self.trainable |= {name} if parsed.mode is not Mode.STUDY else set()
        self.campaigns[name] = (
            known.id
            if known
            else self.c.execute(insert(campaigns).returning(campaigns.c.id), values).scalar_one()
        )

    def _add_annotator(self, record: dict) -> None:
        # Tokens are secrets of the old store. An imported annotator gets a token by `annotators new-token`.
        values = _checked(annotators, {"created": self.now, **record, "token_hash": None, "revoked": None})
        if values["role"] not in ROLES or not (NAME.fullmatch(values["name"]) or values["name"] == LOCAL):
            got = f"{values['name']!r}, {values['role']!r}"
            raise ValueError(f"expected a name and a role of {', '.join(ROLES)}, got {got}. Export again.")
        known = find_or_add(self.c, values["name"], values["role"], values["created"])
        self.annotators[record["name"]] = known.id

    def _add_row(self, record: dict) -> None:
        kind = record["record"]
        campaign = record["campaign"]
        kept = KEPT[kind]
        linked: dict[str, Any] = {}
        for column, other in kept.links.items():
            name = (
                record.get(column.removesuffix("_id"))
                if kept.table.c[column].nullable
                else record[column.removesuffix("_id")]
            )
            # A judgement is named by its annotator and its key. An undo links to a judgement of the same
            # annotator.
            linked[column] = (
                None
                if name is None
                else self._id(other, campaign, (linked["annotator_id"], name) if other == kind else name)
            )
        name = (linked["annotator_id"], record[kept.name]) if kind == "judgement" else record[kept.name]
        if (kind, campaign) != self.kind:
            self._write()
            self.kind = kind, campaign
        # Records that the store already has are left as they are.
        if name in self._known(kind, campaign) or name in self.waiting:
            return
        # Leases begin at the import. `settle` counts the places that are taken when all rows are there.
        values = {**record, **linked, "campaign_id": self.campaigns[campaign], "leased": self.now, "taken": 0}
        self.waiting[name] = _checked(kept.table, values)
        if kind == "shape" and campaign in self.trainable:
            # Held-out seeds must never train a reward. A blind study may contain them.
            refuse_held_out([record["seed"]], f"campaign {campaign}")
        self.new += kind == "judgement"

    def _id(self, kind: str, campaign: str, name) -> int:
        """Return the id of a row that the file names. Raises: ValueError if it was not named earlier."""
        # A record can refer to a waiting one of its own kind: an undo refers to a judgement.
        if (kind, campaign) == self.kind and name in self.waiting:
            self._write()
        known = self.annotators if kind == "annotator" else self._known(kind, campaign)
        if name not in known:
            raise ValueError(
                f"expected the {kind} to be named earlier in the file, got {name!r}. Export again."
            )
        return known[name]

    def _known(self, kind: str, campaign: str) -> dict:
        """Return name -> id of a campaign's rows of one kind, read from the store at the first use."""
        if (kind, campaign) not in self.ids:
            if campaign not in self.campaigns:
                raise ValueError(
                    f"expected a campaign named earlier in the file, got {campaign!r}. Export again."
                )
            columns = KEPT[kind].table.c
            wanted = (
                columns.id,
                columns[KEPT[kind].name],
                *([columns.annotator_id] if kind == "judgement" else []),
            )
            rows = self.c.execute(select(*wanted).where(columns.campaign_id == self.campaigns[campaign]))
            self.ids[kind, campaign] = {
                (annotator[0], name) if annotator else name: id for id, name, *annotator in rows
            }
        return self.ids[kind, campaign]

    def _write(self) -> None:
        """Insert the waiting rows in one statement and keep their ids."""
        if self.waiting and self.kind is not None:
            ids = insert_all(self.c, KEPT[self.kind[0]].table, list(self.waiting.values()))
            self._known(*self.kind).update(zip(self.waiting, ids, strict=True))
            self.waiting = {}


def _checked(table: Table, record: dict) -> dict:
    """Return a record's values for every column of a table except the id.

    Raises: ValueError for values of a wrong type. SQLite would store them as they are.
    """
    values: dict[str, Any] = {}
    for column in table.columns:
        if column.name == "id":
            continue
        value = record.get(column.name)
        # JSON has one type of number, so a whole number is valid for a column of floats.
        kinds = (int, float) if column.type.python_type is float else (column.type.python_type,)
        # bool is a subclass of int in Python, but true is no number in JSON.
        if not (value is None and column.nullable) and (
            isinstance(value, bool) or not isinstance(value, kinds)
        ):
            raise ValueError(
                f"expected {column.name} of type {kinds[-1].__name__}, got {value!r}. Export again."
            )
        values[column.name] = value
    if values.get("votes") is not None:
        check_stored(values["votes"])
    return values


def import_ranked_seeds(
    store: Store, path: str | Path, campaign: str | None = None, annotator: str = "imported"
) -> int:
    """Create a campaign from a ranked-seeds table, with all pairs answered by `annotator`.

    Args:
        campaign: name of the campaign; None: the name of the file without its suffix.

    Returns: the number of pairs.
    """
    path = Path(path)
    labels = load_labels(path)
    header = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    # Tables with other columns may contain ties, which would be read as preferences here.
    if not header.endswith(",rank1,rank2"):
        raise ValueError(
            f"{path.name}, line 1: expected the columns row number, rank1, rank2, got {header[:80]!r}."
            " Correct it."
        )
    name = campaign or path.stem
    extra = {"origin": "ranked-seeds table", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    # A table has no repeats, no swapped sides and no gold checks. Its hash records the origin of the answers.
    settings = CampaignSettings(name=name, repeat_share=0, swap_share=0, gold_every=0, extra=extra)
    # A table names seeds only. Everything else about the shapes is unknown and gets an empty value.
    unknown: dict[str, Any] = {
        "generator": "",
        "source": "",
        "psi": math.nan,
        "level": math.nan,
        "resolution": 0,
        "triangles": 0,
    }
    planned = [
        PlannedPair(first=Shape(seed=pref.winner, **unknown), second=Shape(seed=pref.loser, **unknown))
        for pref in labels
    ]
    answering = store.annotator_without_token(annotator)
    with store.database.write((Lock.SCHEMA, 1)) as c:
        now = store.clock()
        campaign_id, ids = create(c, settings, planned, now)
        _answer_all(c, {"campaign_id": campaign_id, "annotator_id": answering.id}, ids, now)
    return len(labels)


def export_ranked_seeds(store: Store, path: str | Path, **filters) -> None:
    """Write the ranked-seeds table of the paper, with rows numbered from 0. Ties are left out, because the
    format cannot hold them. The filters are those of `LabelFilters`.
    """
    decided = [label for label in store_preferences(store, LabelFilters(**filters)) if not label.tie]
    if not decided:
        raise ValueError(
            "export: expected at least one preference that passes the filters, got none. Loosen the filters."
        )
    lines = [
        ",rank1,rank2",
        *(f"{number},{label.winner},{label.loser}" for number, label in enumerate(decided)),
    ]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def _answer_all(c: Connection, ids_of_campaign: dict, ids: list[int], now: float) -> None:
    """Insert one assignment and one judgement for each pair; the first shape of each pair is preferred."""
    campaign = ids_of_campaign["campaign_id"]
    numbers = range(len(ids))
    # One hash bit per pair decides the side, so that the same table gives the same sides at every import.
    first_left = [hashlib.sha256(f"{campaign} {number}".encode()).digest()[0] & 1 for number in numbers]
    given = insert_all(
        c,
        assignments,
        [
            {
                **ids_of_campaign,
                "token": secrets.token_urlsafe(18),
                "pair_id": pair,
                "sequence": number + 1,
                "kind": Kind.PAIR.value,
                "first_is_left": left,
                "leased": now,
            }
            for pair, number, left in zip(ids, numbers, first_left, strict=True)
        ],
    )
    c.execute(
        insert(judgements),
        [
            {
                **ids_of_campaign,
                "key": f"{campaign}-{number}",
                "type": "choice",
                "choice": (Choice.LEFT if left else Choice.RIGHT).value,
                "assignment_id": assigned,
                "milliseconds": 0,
                "views": "[]",
                "received_at": now,
                "page_version": "import",
            }
            for assigned, number, left in zip(given, numbers, first_left, strict=True)
        ],
    )
    # Each assignment has exactly one judgement here, so the subquery gives one value.
    judgement = (
        select(judgements.c.id).where(judgements.c.assignment_id == assignments.c.id).scalar_subquery()
    )
    c.execute(update(assignments).where(assignments.c.campaign_id == campaign).values(answered=judgement))
    c.execute(update(pairs).where(pairs.c.campaign_id == campaign).values(taken=pairs.c.places))
