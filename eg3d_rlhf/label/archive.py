"""A store's campaigns without loss, as JSON lines: for archives, and for moving to another database.

One record per line with a field `record`: campaign, shape, pair, annotator, assignment, judgement; those are the tables' rows, with names
and tokens where the tables have numbers. Judgements come in order of receipt, with undos. Token hashes, sessions and leases stay behind.
Reading a file again adds only what is new.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, Row, Table, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from eg3d_rlhf.label.accounts import NAME, find_or_add, listed
from eg3d_rlhf.label.campaigns import settings_from_json
from eg3d_rlhf.label.database import Lock, insert_all
from eg3d_rlhf.label.entities import LOCAL, ROLES, Kind, Mode
from eg3d_rlhf.label.schema import annotators, assignments, campaigns, judgements, pairs, shapes
from eg3d_rlhf.label.store import Store
from eg3d_rlhf.seeds import refuse_held_out
from training.storage import write_atomic

FORMAT = 1
NAMED = {  # record -> table, and the columns that tell its rows apart within a campaign
    "shape": (shapes, ("asset",)), "pair": (pairs, ("position",)), "assignment": (assignments, ("token",)),
    "judgement": (judgements, ("annotator_id", "key")),
}  # fmt: skip
DEFAULTS = {"degradation": "", "page_version": "", "taken": 0}  # of fields that an export may lack


def export_judgements(store: Store, path: str | Path, campaign: str | None = None) -> Path:
    """Write one campaign, or all. Returns the path. Raises: ValueError for an unknown campaign."""
    with store.reading() as c:
        query = select(campaigns).order_by(campaigns.c.id)
        found = list(c.execute(query if campaign is None else query.where(campaigns.c.name == campaign)))
        if campaign is not None and not found:
            raise ValueError(f"campaign: expected one of the store's, got {campaign!r}. `campaigns` lists them.")
        lines = [json.dumps({"record": "format", "version": FORMAT})]
        for row in found:
            lines += [json.dumps(record) for record in _records(c, row)]
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return Path(path)


def _records(c: Connection, campaign: Row) -> Iterator[dict]:
    """A campaign's records: whatever is referred to comes first."""
    own = {"campaign": campaign.name}
    yield {"record": "campaign", "name": campaign.name, "settings": json.loads(campaign.settings), "created": campaign.created}

    def rows(table: Table):
        return c.execute(select(table).where(table.c.campaign_id == campaign.id).order_by(table.c.id))

    asset = {}
    for row in rows(shapes):
        asset[row.id] = row.asset
        yield {"record": "shape", **own, **_plain(row)}
    position = {}
    for row in rows(pairs):
        position[row.id] = row.position
        yield {"record": "pair", **own, **_plain(row), "first": asset[row.first_id], "second": asset[row.second_id]}
    given = list(rows(assignments))
    names = {row.id: row.name for row in listed(c)}
    taking_part = {row.annotator_id for row in given}
    for row in c.execute(select(annotators).where(annotators.c.id.in_(taking_part)).order_by(annotators.c.id)):
        yield {"record": "annotator", "name": row.name, "role": row.role, "created": row.created}
    tokens = {row.id: row.token for row in given}
    for row in given:
        yield {"record": "assignment", **own, **_plain(row), "annotator": names[row.annotator_id], "pair": position[row.pair_id]}
    keys: dict[int, str] = {}
    for row in rows(judgements):
        keys[row.id] = row.key
        linked = {"assignment": tokens.get(row.assignment_id), "takes_back": keys.get(row.takes_back)}
        yield {"record": "judgement", **own, **_plain(row), "annotator": names[row.annotator_id], **linked}


def _plain(row: Row) -> dict:
    """Columns that mean the same in every database."""
    state = {"takes_back", "answered", "leased", "taken"}
    return {k: v for k, v in row._mapping.items() if k != "id" and not k.endswith("_id") and k not in state}


def import_judgements(store: Store, path: str | Path) -> int:
    """Add a file's campaigns, or what is new of them; all of it or nothing. Returns the number of new judgements, undos included.

    Annotators are told apart by name; new ones get no token. Raises: FileNotFoundError; ValueError with the line for what does not fit,
    and for a campaign whose name the store uses for another, or in which both sides have gone on since.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"import_judgements: expected an exported file, got none at {path}. Check the path.")
    with store.writing((Lock.SCHEMA, 1), (Lock.SCHEMA, 2)) as c:
        reading, line = _Import(c, store.now()), 0
        try:
            for line, record in _numbered_records(path):
                try:
                    reading.add(record)
                except ValueError as error:
                    raise ValueError(f"{path.name}, line {line}: {error}") from None
            reading.settle()
        except IntegrityError as error:
            reason = str(error.orig).strip().splitlines()[0]
            raise ValueError(
                f"{path.name}, up to line {line}: the store has something else in its place ({reason}). Import into another store."
            ) from None
    return reading.new


def _numbered_records(path: Path) -> Iterator[tuple[int, dict]]:
    """Records and their lines, the first line's format checked and left out."""
    count = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for count, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                kind = record["record"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path.name}, line {count}: expected an exported record, got {line[:40]!r}. Export again.") from None
            if count > 1:
                yield count, record
            elif kind != "format" or record.get("version") != FORMAT:
                raise ValueError(f"{path.name}, line 1: expected format {FORMAT}, got {line[:60]!r}. Export with this program.")
    if count == 0:
        raise ValueError(f"{path.name}: expected an exported file, got an empty one. Export again.")


class _Import:
    """Adds records, many at a time: what waits is of one kind and one campaign, and is written before anything asks for its ids."""

    def __init__(self, c: Connection, now: float):
        self.c, self.now, self.new = c, now, 0
        self.campaigns: dict[str, int] = {}
        self.learnt_from: set[str] = set()  # campaigns that collect preferences
        self.annotators: dict[str, int] = {}
        self.ids: dict[tuple[str, str], dict] = {}  # (kind, campaign) -> what the file calls a row -> its id
        self.waiting: dict = {}  # rows by what the file calls them
        self.kind: tuple[str, str] | None = None  # of what waits

    def add(self, record: dict) -> None:
        """Store a record unless it is there."""
        kind = record["record"]
        if kind not in ("campaign", "annotator", *NAMED):
            raise ValueError(f"expected a known record, got {kind!r}. Export with this program.")
        try:
            getattr(self, f"_add_{kind}")(record)
        except KeyError as error:
            raise ValueError(f"expected a field {error} in {kind}, got none. Export again.") from None

    def settle(self) -> None:
        """Write what waits; which judgements count, and which places are taken, follow from the records."""
        self._write()
        back = judgements.alias("back")
        undone = select(back.c.id).where(back.c.takes_back == judgements.c.id).exists()
        chosen = (judgements.c.assignment_id == assignments.c.id, judgements.c.type == "choice", ~undone)
        counting = select(func.max(judgements.c.id)).where(*chosen).scalar_subquery()
        taken_back = (judgements.c.assignment_id == assignments.c.id, judgements.c.type == "undo")
        last_undo = select(func.max(judgements.c.received_at)).where(*taken_back).scalar_subquery()
        waiting = assignments.c.answered.is_(None) & (assignments.c.released.is_(None) | (assignments.c.released < last_undo))
        holding = (assignments.c.pair_id == pairs.c.id, assignments.c.kind == Kind.PAIR.value, assignments.c.released.is_(None))
        held = select(func.count()).where(*holding).scalar_subquery()
        for campaign_id in self.campaigns.values():
            own = update(assignments).where(assignments.c.campaign_id == campaign_id)
            self.c.execute(own.values(answered=counting, undone=None))
            self.c.execute(own.where(waiting).values(undone=last_undo))
            self.c.execute(update(pairs).where(pairs.c.campaign_id == campaign_id).values(taken=held))

    def _add_campaign(self, record: dict) -> None:
        self._write()
        name, settings = record["name"], json.dumps(record["settings"], sort_keys=True)
        try:
            parsed = settings_from_json(settings)
        except (KeyError, TypeError, ValueError):
            parsed = None
        if parsed is None or parsed.name != name:
            raise ValueError(f"expected the settings of campaign {name!r}, got others. Export again.")
        known = self.c.execute(select(campaigns).where(campaigns.c.name == name)).first()
        if known is not None and known.settings != settings:
            raise ValueError(f"expected a new campaign, got {name!r}, which the store uses for another. Use another store.")
        values = _checked(campaigns, {**record, "settings": settings})
        self.learnt_from |= {name} if parsed.mode is Mode.LABEL else set()
        self.campaigns[name] = known.id if known else self.c.execute(insert(campaigns).returning(campaigns.c.id), values).scalar_one()

    def _add_annotator(self, record: dict) -> None:
        values = _checked(annotators, {"created": self.now, **record, "token_hash": None, "revoked": None})
        if values["role"] not in ROLES or not (NAME.fullmatch(values["name"]) or values["name"] == LOCAL):
            got = f"{values['name']!r}, {values['role']!r}"
            raise ValueError(f"expected a name and a role of {', '.join(ROLES)}, got {got}. Export again.")
        known = find_or_add(self.c, values["name"], values["role"], values["created"])
        self.annotators[record["name"]] = known.id

    def _add_shape(self, record: dict) -> None:
        if self._keep(record, record["asset"], {}) and record["campaign"] in self.learnt_from:
            refuse_held_out([record["seed"]], f"campaign {record['campaign']}")

    def _add_pair(self, record: dict) -> None:
        ends = {f"{end}_id": self._id("shape", record, record[end]) for end in ("first", "second")}
        self._keep(record, record["position"], ends)

    def _add_assignment(self, record: dict) -> None:
        linked = {"annotator_id": self._annotator(record), "pair_id": self._id("pair", record, record["pair"]), "leased": self.now}
        self._keep(record, record["token"], linked)

    def _add_judgement(self, record: dict) -> None:
        annotator, assignment, back = self._annotator(record), record.get("assignment"), record.get("takes_back")
        linked = {
            "annotator_id": annotator, "assignment_id": None if assignment is None else self._id("assignment", record, assignment),
            "takes_back": None if back is None else self._id("judgement", record, (annotator, back)),
        }  # fmt: skip
        self.new += self._keep(record, (annotator, record["key"]), linked)

    def _annotator(self, record: dict) -> int:
        if record["annotator"] not in self.annotators:
            raise ValueError(f"expected an annotator named earlier in the file, got {record['annotator']!r}. Export again.")
        return self.annotators[record["annotator"]]

    def _keep(self, record: dict, name, linked: dict) -> bool:
        """Let a row of a campaign wait for writing, unless the store has it; whether it is new."""
        of = (record["record"], record["campaign"])
        if of != self.kind:
            self._write()
            self.kind = of
        if name in self._known(of) or name in self.waiting:
            return False
        self.waiting[name] = _checked(NAMED[of[0]][0], {**record, **linked, "campaign_id": self.campaigns[record["campaign"]]})
        return True

    def _id(self, kind: str, record: dict, name) -> int:
        of = (kind, record["campaign"])
        if of == self.kind and name in self.waiting:
            self._write()
        found = self._known(of).get(name)
        if found is None:
            raise ValueError(f"expected a {kind} named earlier in the file, got {name!r}. Export again.")
        return found

    def _known(self, of: tuple[str, str]) -> dict:
        """Ids of the rows that are in the database."""
        if of not in self.ids:
            if of[1] not in self.campaigns:
                raise ValueError(f"expected a campaign named earlier in the file, got {of[1]!r}. Export again.")
            table, names = NAMED[of[0]]
            query = select(table.c.id, *(table.c[name] for name in names)).where(table.c.campaign_id == self.campaigns[of[1]])
            self.ids[of] = {tuple(row[1:]) if len(names) > 1 else row[1]: row[0] for row in self.c.execute(query)}
        return self.ids[of]

    def _write(self) -> None:
        if self.waiting:
            ids = insert_all(self.c, NAMED[self.kind[0]][0], list(self.waiting.values()))
            self._known(self.kind).update(zip(self.waiting, ids, strict=True))
            self.waiting = {}


def _checked(table: Table, record: dict) -> dict:
    """A record's values for every column of a table. Raises: ValueError for values of a wrong type, which a database may not mind."""
    values = {}
    for column in table.columns:
        if column.name == "id":
            continue
        value = record.get(column.name)
        if value is None and column.name in DEFAULTS:
            value = DEFAULTS[column.name]
        kinds = (int, float) if column.type.python_type is float else (column.type.python_type,)
        if not (value is None and column.nullable) and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ValueError(f"expected {column.name} of type {kinds[-1].__name__}, got {value!r}. Export again.")
        values[column.name] = value
    return values
