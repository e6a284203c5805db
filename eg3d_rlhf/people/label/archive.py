"""Export and import of labelling campaigns without loss as JSON lines, for archives and for moves to another
store.

Each line contains one record. The field `record` names its kind: campaign, shape, pair, annotator, assignment
or judgement. The records are the rows of the tables, with names and tokens in place of numeric ids.
Judgements are in the order of receipt and include undos. Hashes of tokens, sessions and leases are not
exported. If a file is imported a second time, only records that the store does not have are added.

The module also exports and imports ranked-seeds tables. These are CSV files with a row number, the preferred
seed and the rejected seed, as published with arXiv 2606.27305. Such a table does not contain who answered,
when, or on which side a shape was shown. The sides are therefore chosen by a hash, which avoids an artificial
side bias.
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

from eg3d_rlhf.core.seeds import reject_held_out_seeds
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
    JUDGE,
    LOCAL,
    ROLES,
    CampaignSettings,
    Choice,
    Kind,
    Mode,
    PlannedPair,
    Shape,
    check_judge_origin,
    check_stored,
)
from eg3d_rlhf.people.label.store import ANNOTATOR_COLUMNS, NAME, Store, find_or_add
from eg3d_rlhf.people.label.store_labels import LabelFilters, store_preferences, why_left_out
from eg3d_rlhf.preferences.labels import is_ranked_table, load_labels
from training.storage import write_atomic
from training.text_files import read_text

FORMAT = 1  # version of the JSON lines; a file of another version is rejected


@dataclass(frozen=True)
class RecordKind:
    """One kind of records in an exported file, and the database table that contains their rows."""

    table: Table  # table of the database
    # Column by which other records refer to a row. Records refer to a judgement by this column and the
    # annotator.
    name: str
    # Columns with ids of other rows -> kind of the record that they refer to. The ending `_id` of the column
    # is removed in the record.
    links: Mapping[str, str]


# Kind of record -> its description. A kind comes after the kinds to which it refers.
RECORD_KINDS = {
    "shape": RecordKind(shapes, "asset", {}),
    "pair": RecordKind(pairs, "position", {"first_id": "shape", "second_id": "shape"}),
    "assignment": RecordKind(assignments, "token", {"annotator_id": "annotator", "pair_id": "pair"}),
    "judgement": RecordKind(
        judgements,
        "key",
        {"annotator_id": "annotator", "assignment_id": "assignment", "takes_back": "judgement"},
    ),
}
# Columns that are not exported, because they describe leases, or `_Import.settle` computes them from the
# records.
UNEXPORTED_COLUMNS = {"takes_back", "answered", "leased", "taken"}


def export_judgements(store: Store, path: str | Path, campaign: str | None = None) -> Path:
    """Write campaigns into a file of JSON lines, and return its path.

    Args:
        store: store that contains the campaigns.
        path: path of the file.
        campaign: name of the campaign; None: all campaigns of the store.

    Raises:
        ValueError: the store has no campaign of this name.
    """
    with store.database.read() as connection:
        campaign_query = select(campaigns).order_by(campaigns.c.id)
        campaign_rows = list(
            connection.execute(
                campaign_query if campaign is None else campaign_query.where(campaigns.c.name == campaign)
            )
        )
        if campaign is not None and not campaign_rows:
            raise ValueError(
                f"campaign: this store has no campaign {campaign!r}. The command `campaigns` lists all"
                " names; use one of them."
            )
        json_lines = [json.dumps({"record": "format", "version": FORMAT})]
        for campaign_row in campaign_rows:
            json_lines += [json.dumps(record) for record in _records(connection, campaign_row)]
    # The file is complete or absent: write_atomic writes a temporary file and renames it.
    write_atomic(path, ("\n".join(json_lines) + "\n").encode())
    return Path(path)


def _records(connection: Connection, campaign: Row) -> Iterator[dict]:
    """Yield the records of one campaign. Each record comes after the records to which it refers."""
    yield {
        "record": "campaign",
        "name": campaign.name,
        "settings": json.loads(campaign.settings),
        "created": campaign.created,
    }
    all_annotators = list(connection.execute(ANNOTATOR_COLUMNS.order_by(annotators.c.id)))
    # kind of record -> numeric id of a row -> name by which records refer to the row
    names_by_kind: dict[str, dict] = {
        "annotator": {annotator.id: annotator.name for annotator in all_annotators}
    }
    for record_kind, table_description in RECORD_KINDS.items():
        table_rows = list(
            connection.execute(
                select(table_description.table)
                .where(table_description.table.c.campaign_id == campaign.id)
                .order_by(table_description.table.c.id)
            )
        )
        if record_kind == "assignment":
            # Annotators are exported before the assignments, which refer to them. Annotators without an
            # assignment in this campaign are not exported.
            assigned_ids = {table_row.annotator_id for table_row in table_rows}
            for annotator in all_annotators:
                if annotator.id in assigned_ids:
                    yield {
                        "record": "annotator",
                        "name": annotator.name,
                        "role": annotator.role,
                        "created": annotator.created,
                    }
        names_by_kind[record_kind] = {
            table_row.id: table_row._mapping[table_description.name] for table_row in table_rows
        }
        for table_row in table_rows:
            # Numeric ids are valid in this database only, so they are left out or replaced by names.
            column_values = {
                column: column_value
                for column, column_value in table_row._mapping.items()
                if column != "id" and not column.endswith("_id") and column not in UNEXPORTED_COLUMNS
            }
            link_names = {
                column.removesuffix("_id"): names_by_kind[linked_kind].get(table_row._mapping[column])
                for column, linked_kind in table_description.links.items()
            }
            yield {"record": record_kind, "campaign": campaign.name, **column_values, **link_names}


def import_judgements(store: Store, path: str | Path) -> int:
    """Add the records of an exported file to a store, in one transaction.

    Records that the store already contains are skipped.

    Args:
        store: store to which the records are added.
        path: file that `export_judgements` has written.

    Returns:
        Number of new judgements, undos included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is invalid, or contradicts the store; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"import_judgements: there is no file {path}. Pass the path of an exported file."
        )
    # The import may create campaigns (number 1) and annotators (number 2), and holds both locks.
    locks = (Lock.SCHEMA, 1), (Lock.SCHEMA, 2)
    # errors="replace": a binary file is rejected below as an invalid record, and not as undecodable text.
    with (
        path.open(encoding="utf-8", errors="replace") as import_file,
        store.database.write(*locks) as connection,
    ):
        importer = _Import(connection, store.clock())
        line_number = 0  # stays 0 if the file is empty
        try:
            for line_number, line_text in enumerate(import_file, 1):
                try:
                    record = json.loads(line_text)
                    record_kind = record["record"]
                except (ValueError, TypeError, KeyError):
                    raise ValueError(
                        f"{path.name}, line {line_number}: {line_text[:40]!r} is not an exported record."
                        " Export the campaign again."
                    ) from None
                if line_number == 1 and (record_kind != "format" or record.get("version") != FORMAT):
                    raise ValueError(
                        f"{path.name}, line 1: the file must start with the record of format {FORMAT}, but"
                        f" starts with {line_text[:60]!r}. Export the campaign again with this version."
                    )
                try:
                    if line_number > 1:
                        importer.add(record)
                except ValueError as error:
                    raise ValueError(f"{path.name}, line {line_number}: {error}") from None
            if line_number == 0:
                raise ValueError(f"{path.name}: the file is empty. Export the campaign again.")
            importer.settle()
        except IntegrityError as error:
            driver_message = str(error.orig).strip().splitlines()[0]
            raise ValueError(
                f"{path.name}, up to line {line_number}: the store has other records with the same names"
                f" ({driver_message}). Import the file into another store."
            ) from None
    return importer.new


class _Import:
    """Import of the records of one file.

    Rows of the same kind and campaign are collected in memory, and inserted with one statement before a
    record of another kind needs their ids.

    Args:
        connection: connection with a write transaction.
        now: time of the import, seconds since 1970.
    """

    def __init__(self, connection: Connection, now: float):
        self.connection = connection
        self.now = now
        self.new = 0  # number of new judgements
        self.campaigns: dict[str, int] = {}  # name of a campaign -> its id in the store
        self.trainable: set[str] = set()  # names of the campaigns whose preferences may train a reward
        self.annotators: dict[str, int] = {}  # name of an annotator -> id in the store
        # (kind, campaign) -> name of a row in the file -> id of the row in the store
        self.ids: dict[tuple[str, str], dict] = {}
        self.waiting: dict = {}  # rows that are not inserted yet: name of the row in the file -> its columns
        self.kind: tuple[str, str] | None = None  # (kind, campaign) of the waiting rows

    def add(self, record: dict) -> None:
        """Add one record of the file to the store, or collect it until `_write` inserts it.

        Raises:
            ValueError: the kind is unknown, a field is missing, or a value is invalid.
        """
        record_kind = record["record"]
        add_methods = {
            "campaign": self._add_campaign,
            "annotator": self._add_annotator,
            **dict.fromkeys(RECORD_KINDS, self._add_row),
        }
        if record_kind not in add_methods:
            raise ValueError(
                f"the kind of record {record_kind!r} is unknown. Export the campaign again with this version."
            )
        try:
            add_methods[record_kind](record)
        except KeyError as error:
            raise ValueError(
                f"the record of kind {record_kind} has no field {error}. Export the campaign again."
            ) from None

    def settle(self) -> None:
        """Insert the waiting rows, and compute the columns UNEXPORTED_COLUMNS of the imported campaigns."""
        self._write()
        undos = judgements.alias("back")
        is_undone = select(undos.c.id).where(undos.c.takes_back == judgements.c.id).exists()
        # The judgement of an assignment that counts is its last choice that no undo takes back.
        valid_choices = (
            judgements.c.assignment_id == assignments.c.id,
            judgements.c.type == "choice",
            ~is_undone,
        )
        last_choice = select(func.max(judgements.c.id)).where(*valid_choices).scalar_subquery()
        # An undo opens its assignment again, also if the assignment was released before.
        undos_of_assignment = (judgements.c.assignment_id == assignments.c.id, judgements.c.type == "undo")
        last_undo = select(func.max(judgements.c.received_at)).where(*undos_of_assignment).scalar_subquery()
        is_reopened = assignments.c.answered.is_(None) & (
            assignments.c.released.is_(None) | (assignments.c.released < last_undo)
        )
        uses_slot = (
            assignments.c.pair_id == pairs.c.id,
            assignments.c.kind == Kind.PAIR.value,
            assignments.c.released.is_(None),
        )
        # An assignment of kind 'pair' uses a slot of its pair until it is released.
        used_slots = select(func.count()).where(*uses_slot).scalar_subquery()
        for campaign_id in self.campaigns.values():
            update_assignments = update(assignments).where(assignments.c.campaign_id == campaign_id)
            self.connection.execute(update_assignments.values(answered=last_choice, undone=None))
            self.connection.execute(update_assignments.where(is_reopened).values(undone=last_undo))
            self.connection.execute(
                update(pairs).where(pairs.c.campaign_id == campaign_id).values(taken=used_slots)
            )

    def _add_campaign(self, record: dict) -> None:
        """Insert a campaign, or check that the store has it with the same settings.

        Raises:
            ValueError: the settings cannot be read, or the store has another campaign of this name.
        """
        self._write()
        campaign_name = record["name"]
        settings_json = json.dumps(record["settings"], sort_keys=True)
        try:
            parsed_settings = settings_from_json(settings_json)
        except (KeyError, TypeError, ValueError):
            parsed_settings = None
        if parsed_settings is None or parsed_settings.name != campaign_name:
            raise ValueError(
                f"the settings of campaign {campaign_name!r} cannot be read. Export the campaign again with"
                " this version."
            )
        # Settings are compared as JSON text with sorted keys, the form in which the store writes them.
        stored_row = self.connection.execute(
            select(campaigns).where(campaigns.c.name == campaign_name)
        ).first()
        if stored_row is not None and stored_row.settings != settings_json:
            raise ValueError(
                f"the store has another campaign with the name {campaign_name!r}. Import the file into"
                " another store."
            )
        column_values = _checked(campaigns, {**record, "settings": settings_json})
        self.trainable |= {campaign_name} if parsed_settings.mode is not Mode.STUDY else set()
        self.campaigns[campaign_name] = (
            stored_row.id
            if stored_row
            else self.connection.execute(
                insert(campaigns).returning(campaigns.c.id), column_values
            ).scalar_one()
        )

    def _add_annotator(self, record: dict) -> None:
        """Add an annotator without a token, unless the store has an annotator of this name.

        Raises:
            ValueError: the role or the name is invalid.
        """
        # Tokens are not exported. An imported annotator gets a token with the command new-token.
        column_values = _checked(
            annotators, {"created": self.now, **record, "token_hash": None, "revoked": None}
        )
        if column_values["role"] not in (*ROLES, JUDGE) or not (
            NAME.fullmatch(column_values["name"]) or column_values["name"] == LOCAL
        ):
            raise ValueError(
                f"the annotator {column_values['name']!r} with the role {column_values['role']!r} is invalid:"
                f" the role must be one of {', '.join(ROLES)}. Export the campaign again."
            )
        stored_annotator = find_or_add(
            self.connection, column_values["name"], column_values["role"], column_values["created"]
        )
        if (stored_annotator.role == JUDGE) != (column_values["role"] == JUDGE):
            raise ValueError(
                f"the annotator {column_values['name']!r} is a judge in one of the store and the file, and a"
                " person in the other. Import the file into another store."
            )
        self.annotators[record["name"]] = stored_annotator.id

    def _add_row(self, record: dict) -> None:
        """Add a shape, pair, assignment or judgement to the waiting rows, unless the store has it.

        Raises:
            ValueError: a record to which this one refers is missing, or a value is invalid.
        """
        record_kind = record["record"]
        campaign_name = record["campaign"]
        table_description = RECORD_KINDS[record_kind]
        linked_ids: dict[str, Any] = {}  # column -> id of the row to which it refers
        for column, linked_kind in table_description.links.items():
            linked_name = (
                record.get(column.removesuffix("_id"))
                if table_description.table.c[column].nullable
                else record[column.removesuffix("_id")]
            )
            # Only a judgement refers to a record of its own kind. Its key is unique only together with the
            # annotator, who is the same for both.
            linked_row_name = (
                (linked_ids["annotator_id"], linked_name) if linked_kind == record_kind else linked_name
            )
            linked_ids[column] = (
                None if linked_name is None else self._id(linked_kind, campaign_name, linked_row_name)
            )
        row_name = (
            (linked_ids["annotator_id"], record[table_description.name])
            if record_kind == "judgement"
            else record[table_description.name]
        )
        if (record_kind, campaign_name) != self.kind:
            self._write()
            self.kind = record_kind, campaign_name
        # A record that the store has already is skipped.
        if row_name in self._row_ids(record_kind, campaign_name) or row_name in self.waiting:
            return
        # Leases begin at the time of the import. `settle` counts the used slots after all rows were added.
        column_values = {
            **record,
            **linked_ids,
            "campaign_id": self.campaigns[campaign_name],
            "leased": self.now,
            "taken": 0,
        }
        self.waiting[row_name] = _checked(table_description.table, column_values)
        if record_kind == "shape" and campaign_name in self.trainable:
            # Held-out seeds must not train a reward. A blind study trains none, and may contain them.
            reject_held_out_seeds([record["seed"]], f"campaign {campaign_name}")
        self.new += record_kind == "judgement"

    def _id(self, record_kind: str, campaign_name: str, row_name) -> int:
        """Return the id of the row to which a record refers.

        Raises:
            ValueError: the file does not contain the row before this record.
        """
        # An undo may refer to a judgement that is still waiting.
        if (record_kind, campaign_name) == self.kind and row_name in self.waiting:
            self._write()
        ids = self.annotators if record_kind == "annotator" else self._row_ids(record_kind, campaign_name)
        if row_name not in ids:
            # the name of a judgement is (id of the annotator, key), of which the key is in the file
            shown_name = row_name[1] if isinstance(row_name, tuple) else row_name
            raise ValueError(
                f"the file has no {record_kind} {shown_name!r} before this record, which refers to it. Export"
                " the campaign again."
            )
        return ids[row_name]

    def _row_ids(self, record_kind: str, campaign: str) -> dict:
        """Return a dict that maps the names of a campaign's rows of one kind to their ids in the store.

        The first call for a campaign and a kind reads the ids from the store.

        Raises:
            ValueError: the file does not contain the campaign before this record.
        """
        if (record_kind, campaign) not in self.ids:
            if campaign not in self.campaigns:
                raise ValueError(
                    f"the file has no campaign {campaign!r} before this record, which belongs to it. Export"
                    " the campaign again."
                )
            table_columns = RECORD_KINDS[record_kind].table.c
            selected_columns = (
                table_columns.id,
                table_columns[RECORD_KINDS[record_kind].name],
                *([table_columns.annotator_id] if record_kind == "judgement" else []),
            )
            id_rows = self.connection.execute(
                select(*selected_columns).where(table_columns.campaign_id == self.campaigns[campaign])
            )
            self.ids[record_kind, campaign] = {
                (annotator_ids[0], row_name) if annotator_ids else row_name: row_id
                for row_id, row_name, *annotator_ids in id_rows
            }
        return self.ids[record_kind, campaign]

    def _write(self) -> None:
        """Insert the waiting rows, and store their ids."""
        if self.waiting and self.kind is not None:
            row_ids = insert_all(
                self.connection, RECORD_KINDS[self.kind[0]].table, list(self.waiting.values())
            )
            self._row_ids(*self.kind).update(zip(self.waiting, row_ids, strict=True))
            self.waiting = {}


def _checked(table: Table, record: dict) -> dict:
    """Return the values of a record for every column of a table except the id. A missing value is None.

    Raises:
        ValueError: a value has a wrong type. SQLite itself would accept it.
    """
    column_values: dict[str, Any] = {}
    for column in table.columns:
        if column.name == "id":
            continue
        value = record.get(column.name)
        # JSON has a single type for numbers, so an integer is valid in a column of floats.
        python_types = (int, float) if column.type.python_type is float else (column.type.python_type,)
        is_allowed_null = value is None and column.nullable
        # `true` of JSON is a bool, which is a subclass of int in Python.
        if not is_allowed_null and (isinstance(value, bool) or not isinstance(value, python_types)):
            raise ValueError(
                f"the field {column.name} is {value!r}, but must be of type {python_types[-1].__name__}."
                " Export the campaign again."
            )
        column_values[column.name] = value
    if column_values.get("votes") is not None:
        check_stored(column_values["votes"])
    if column_values.get("judge") is not None:
        check_judge_origin(column_values["judge"])
    return column_values


def import_ranked_seeds(
    store: Store, path: str | Path, campaign: str | None = None, annotator: str = "imported"
) -> int:
    """Create a campaign from a ranked-seeds table, in which one annotator has answered all pairs.

    Args:
        store: store in which the campaign is created.
        path: CSV file of the table.
        campaign: name of the campaign; None: the name of the file without its suffix.
        annotator: name of the annotator, who is added if necessary.

    Returns:
        Number of pairs.

    Raises:
        ValueError: the file is not such a table, or the name of the campaign is in use.
    """
    path = Path(path)
    labels = load_labels(path)
    # Tables with other columns may contain ties, which would be read as preferences here.
    if not is_ranked_table(path):
        header_line = read_text(path).partition("\n")[0].strip()
        raise ValueError(
            f"{path.name}, line 1: the columns must be the row number, rank1 and rank2, but the line is"
            f" {header_line[:80]!r}. Write the line as ,rank1,rank2 if the file has these columns."
        )
    campaign_name = campaign or path.stem
    origin_fields = {"origin": "ranked-seeds table", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    # A table contains no repeats and no gold checks. Its hash is stored as the origin of the answers.
    campaign_settings = CampaignSettings(
        name=campaign_name, repeat_share=0, swap_share=0, gold_every=0, extra=origin_fields
    )
    # A table contains seeds only. The other fields of the shapes are unknown and get an empty value.
    empty_fields: dict[str, Any] = {
        "generator": "",
        "source": "",
        "psi": math.nan,
        "level": math.nan,
        "resolution": 0,
        "triangles": 0,
    }
    planned_pairs = [
        PlannedPair(
            first=Shape(seed=label.winner, **empty_fields), second=Shape(seed=label.loser, **empty_fields)
        )
        for label in labels
    ]
    stored_annotator = store.annotator_without_token(annotator)
    with store.database.write((Lock.SCHEMA, 1)) as connection:
        now = store.clock()
        campaign_id, pair_ids = create(connection, campaign_settings, planned_pairs, now)
        _answer_all(
            connection, {"campaign_id": campaign_id, "annotator_id": stored_annotator.id}, pair_ids, now
        )
    return len(labels)


def export_ranked_seeds(store: Store, path: str | Path, **filters) -> None:
    """Write the labels of a store as a ranked-seeds table, with rows numbered from 0.

    Ties are left out, because the format cannot contain them.

    Args:
        store: store that contains the labels.
        path: CSV file.
        filters: keyword arguments of `LabelFilters`, which select the labels; none: the default selection.

    Raises:
        ValueError: no label except ties passes the filters.
    """
    labels = store_preferences(store, LabelFilters(**filters))
    decided_labels = [label for label in labels if not label.tie]
    if not decided_labels:
        tie_text = f"; {len(labels)} of the labels are ties" if labels else ""
        raise ValueError(
            "export: no preference passes the filters"
            f" ({why_left_out(store, LabelFilters(**filters), Mode.LABEL)}{tie_text}). Remove some of the"
            " filters, or label more pairs."
        )
    table_lines = [
        ",rank1,rank2",
        *(f"{row_number},{label.winner},{label.loser}" for row_number, label in enumerate(decided_labels)),
    ]
    write_atomic(path, ("\n".join(table_lines) + "\n").encode())


def _answer_all(connection: Connection, common_columns: dict, pair_ids: list[int], now: float) -> None:
    """Insert an assignment for each pair, and an answer to it that prefers the first shape of the pair.

    Args:
        connection: connection with a write transaction.
        common_columns: values of the columns campaign_id and annotator_id.
        pair_ids: ids of the pairs.
        now: time of the answers, seconds since 1970.
    """
    campaign_id = common_columns["campaign_id"]
    pair_numbers = range(len(pair_ids))
    # The lowest bit of a hash decides the side of each pair, so that the sides can be computed again.
    left_bits = [
        hashlib.sha256(f"{campaign_id} {pair_number}".encode()).digest()[0] & 1
        for pair_number in pair_numbers
    ]
    assignment_ids = insert_all(
        connection,
        assignments,
        [
            {
                **common_columns,
                "token": secrets.token_urlsafe(18),
                "pair_id": pair_id,
                "sequence": pair_number + 1,
                "kind": Kind.PAIR.value,
                "first_is_left": left_bit,
                "leased": now,
            }
            for pair_id, pair_number, left_bit in zip(pair_ids, pair_numbers, left_bits, strict=True)
        ],
    )
    connection.execute(
        insert(judgements),
        [
            {
                **common_columns,
                "key": f"{campaign_id}-{pair_number}",
                "type": "choice",
                "choice": (Choice.LEFT if left_bit else Choice.RIGHT).value,
                "assignment_id": assignment_id,
                "milliseconds": 0,
                "views": "[]",
                "received_at": now,
                "page_version": "import",
            }
            for assignment_id, pair_number, left_bit in zip(
                assignment_ids, pair_numbers, left_bits, strict=True
            )
        ],
    )
    # The subquery has one row, because each of these assignments has exactly one judgement.
    judgement_query = (
        select(judgements.c.id).where(judgements.c.assignment_id == assignments.c.id).scalar_subquery()
    )
    connection.execute(
        update(assignments).where(assignments.c.campaign_id == campaign_id).values(answered=judgement_query)
    )
    connection.execute(update(pairs).where(pairs.c.campaign_id == campaign_id).values(taken=pairs.c.places))
