"""Opening a database by URL, the two kinds of transaction the store uses (reading, and writing one at a
time), and its tables.

SQLite: write-ahead log, `synchronous=FULL` (a commit is on the disk), foreign keys, BEGIN IMMEDIATE for
writing. Writers of one process queue for a lock, because SQLite's own waiting is a sleep; writers of other
processes wait for up to BUSY_SECONDS.
PostgreSQL: READ COMMITTED; writers take advisory locks, held until the commit, in the order in which they are
named.

| table       | holds                                                            | changes                  |
| ----------- | ---------------------------------------------------------------- | ------------------------ |
| campaigns   | settings, as JSON                                                | never                    |
| shapes      | one row per shape of a campaign, with its asset token            | never                    |
| pairs       | the plan; `taken` of its `places` are given away                 | taken                    |
| annotators  | names, roles, hashes of tokens                                   | revoked                  |
| sessions    | hashes of login cookies                                          | rows come and go         |
| assignments | who sees which pair when, on which sides; which judgement counts | answered, undone, leased |
| judgements  | what arrived: choices and undos; triggers refuse any change      | never                    |

A place of a pair is held by an assignment of kind 'pair' while `released` is null. The database itself
refuses a pair more often than it has places, a second assignment of a pair to one annotator, a second use of
a key, and taking a judgement back twice.
"""

import contextlib
import enum
import functools
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Table,
    create_engine,
    event,
    func,
    insert,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DatabaseError

BUSY_SECONDS = 30
CONNECT_SECONDS = 5  # to PostgreSQL
VERSION = 3  # of the tables
EXAMPLES = "sqlite:///labels.db or postgresql://user@host/database"


class Lock(enum.IntEnum):
    """What a writer on PostgreSQL can hold, in the order in which they must be taken."""

    SCHEMA = 1
    ANNOTATOR = 2  # one annotator's answers and undos
    CAMPAIGN = 3  # giving out pairs


class Database:
    """An engine and its transactions. Thread-safe."""

    def __init__(self, url: str, create: bool):
        self.url = parse_url(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        path = Path(self.url.database or "")
        if self.sqlite and not create and not path.is_file():
            raise FileNotFoundError(
                f"store: expected a database at {path}, got nothing there. Check the path, or label some"
                " pairs first."
            )
        if self.sqlite and create and not path.parent.is_dir():
            raise FileNotFoundError(
                f"store: expected a folder {path.parent} for {path.name}, got none. Make it, or name another."
            )
        if self.sqlite and create:  # its -wal and -shm files have the same rights
            with contextlib.suppress(OSError):  # there already, or what connecting complains of below
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        self.engine = _engine(self.url, self.sqlite)
        # single statements need no BEGIN and ROLLBACK around them, which are messages to the server
        self._reader = (
            self.engine if self.sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        )
        self._turn = threading.Lock()
        try:
            with self.read():
                pass
        except DatabaseError as error:
            self.close()
            reason = str(error.orig).strip().splitlines()[0]
            if self.sqlite and "not a database" in reason:
                raise ValueError(
                    f"store {self.name}: expected an SQLite database, got a file of another kind. Name"
                    " another."
                ) from None
            raise OSError(
                f"store {self.name}: expected to connect, got: {reason}. Check the address and your rights."
            ) from None

    @property
    def name(self) -> str:
        return self.url.render_as_string(hide_password=True)

    def read(self) -> Connection:
        """A consistent look on SQLite; on PostgreSQL each statement sees what is committed. Leaves nothing
        behind where it ends.
        """
        return self._reader.connect()

    @contextlib.contextmanager
    def write(self, *locks: tuple[Lock, int]) -> Iterator[Connection]:
        """A transaction that is committed, and on the disk, when the block ends without an error."""
        if self.sqlite:
            with (
                self._turn,
                self.engine.connect().execution_options(immediate=True) as connection,
                connection.begin(),
            ):
                yield connection
            return
        with self.engine.begin() as connection:
            for kind, number in locks:
                connection.execute(
                    text("SELECT pg_advisory_xact_lock(:kind, :number)"),
                    {"kind": int(kind), "number": number % 2**31},
                )
            yield connection

    def close(self) -> None:
        self.engine.dispose()


def insert_all(c: Connection, table: Table, rows: Sequence[Mapping]) -> list[int]:
    """Insert rows, many at a time; their ids in the same order."""
    if c.dialect.name != "sqlite":
        return list(
            c.execute(insert(table).returning(table.c.id, sort_by_parameter_order=True), rows).scalars()
        )
    # there is one writer, and a new id is one more than the largest
    last = c.execute(select(func.max(table.c.id))).scalar() or 0
    c.execute(insert(table), rows)
    return list(range(last + 1, last + 1 + len(rows)))


def parse_url(url: str) -> URL:
    """A store's URL; PostgreSQL's is given psycopg 3 as its driver."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"store: expected a database URL, got {url!r}. Write it as {EXAMPLES}.") from None
    backend = parsed.get_backend_name()
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ValueError(f"store: expected a file in the URL, got {url!r}. Write it as sqlite:///labels.db.")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ValueError(f"store: expected SQLite or PostgreSQL, got {backend}. Write the URL as {EXAMPLES}.")
    return parsed.set(drivername="sqlite")


def _engine(url: URL, sqlite: bool) -> Engine:
    if not sqlite:
        try:
            return create_engine(
                url,
                pool_size=20,
                max_overflow=40,
                pool_pre_ping=True,
                connect_args={"connect_timeout": CONNECT_SECONDS},
            )
        except ImportError:
            raise ValueError(
                "store: expected psycopg 3 for PostgreSQL, got none. pip install 'eg3d-rlhf[postgres]'."
            ) from None
    engine = create_engine(
        url, pool_size=20, max_overflow=60, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
    )
    event.listen(engine, "connect", _prepare_connection)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare_connection(connection: sqlite3.Connection, _record) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(
        "BEGIN IMMEDIATE" if connection.get_execution_options().get("immediate") else "BEGIN"
    )


metadata = sa.MetaData()
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up in INTEGER PRIMARY KEY alone


def _key() -> sa.Column:
    return sa.Column("id", Id, primary_key=True)


def _to(table: str, name: str | None = None, null: bool = False) -> sa.Column:
    return sa.Column(name or f"{table[:-1]}_id", Id, sa.ForeignKey(f"{table}.id"), nullable=null)


def _column(kind, name: str, null: bool = False, **more) -> sa.Column:
    return sa.Column(name, kind, nullable=null, **more)


def _partial(name: str, *columns: str, where: str, unique: bool = False) -> sa.Index:
    return sa.Index(
        name, *columns, unique=unique, sqlite_where=sa.text(where), postgresql_where=sa.text(where)
    )


_text, _real, _int = (functools.partial(_column, kind) for kind in (sa.Text, sa.Double, sa.Integer))

schema_versions = sa.Table(
    "schema_versions", metadata, _int("version", primary_key=True, autoincrement=False), _real("applied")
)
campaigns = sa.Table(
    "campaigns", metadata, _key(), _text("name", unique=True), _text("settings"), _real("created")
)
shapes = sa.Table(
    "shapes",
    metadata,
    _key(),
    _to("campaigns"),
    _int("position"),
    _text("asset", unique=True),
    _text("generator"),
    _text("source"),
    _column(sa.BigInteger, "seed"),
    _real("psi", null=True),
    _real("level", null=True),  # null: not known
    _int("resolution"),
    _int("triangles"),
    _text("degradation", server_default=sa.text("''")),
    _text("file", server_default=sa.text("''")),
    _text("condition", server_default=sa.text("''")),
    sa.UniqueConstraint("campaign_id", "position"),
)
pairs = sa.Table(
    "pairs",
    metadata,
    _key(),
    _to("campaigns"),
    _int("position"),
    _to("shapes", "first_id"),
    _to("shapes", "second_id"),
    _text("kind"),
    _text("expected", null=True),
    _text("explanation"),
    _int("places"),
    _int("taken", server_default=sa.text("0")),
    sa.UniqueConstraint("campaign_id", "position"),
    sa.CheckConstraint("taken >= 0 AND taken <= places", name="pairs_places"),
    _partial("pairs_open", "campaign_id", "position", where="kind = 'pair' AND taken < places"),
)
annotators = sa.Table(
    "annotators",
    metadata,
    _key(),
    _text("name", unique=True),
    _text("role"),
    _text("token_hash", null=True, unique=True),
    _real("created"),
    _real("revoked", null=True),
)
sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id_hash", sa.Text, primary_key=True),
    _to("annotators"),
    _real("created"),
    _real("expires", index=True),
)
assignments = sa.Table(
    "assignments",
    metadata,
    _key(),
    _text("token", unique=True),
    _to("campaigns"),
    _to("annotators"),
    _to("pairs"),
    _int("sequence"),
    _text("kind"),
    _int("first_is_left"),
    _real("leased"),  # last time the annotator was seen with it
    _real("released", null=True),  # when its place was given to others
    sa.Column("answered", Id),  # judgement that counts
    _real("undone", null=True),  # when its answer was last taken back, until it is answered again
    sa.UniqueConstraint("campaign_id", "annotator_id", "sequence"),
    _partial(
        "assignments_once", "annotator_id", "pair_id", where="kind IN ('pair', 'training')", unique=True
    ),
    _partial("assignments_open", "campaign_id", "leased", where="answered IS NULL AND released IS NULL"),
    sa.Index("assignments_pair", "pair_id"),
)
judgements = sa.Table(
    "judgements",
    metadata,
    _key(),
    _to("campaigns"),
    _to("annotators"),
    _text("key"),
    _text("type"),  # 'choice' or 'undo'
    _to("assignments", null=True),  # null: an undo that found nothing
    _text("choice", null=True),
    _text("reason", null=True),
    _column(sa.BigInteger, "milliseconds", null=True),
    _text("views", null=True),
    _real("answered_at", null=True),
    _real("received_at"),
    _to("judgements", "takes_back", null=True),
    _text("page_version", server_default=sa.text("''")),
    _text("votes", null=True),
    _text("comment", null=True),
    sa.UniqueConstraint("annotator_id", "key"),
    sa.UniqueConstraint("takes_back"),
    sa.CheckConstraint("(type = 'choice') = (choice IS NOT NULL)", name="judgements_type"),
    sa.Index("judgements_when", "campaign_id", "annotator_id", "received_at"),
    sa.Index("judgements_assignment", "assignment_id"),
)

REFUSAL = "judgements are append-only: take one back with a further record"

SQLITE_TRIGGERS = (
    *(
        f"CREATE TRIGGER judgements_no_{change.lower()} BEFORE {change} ON judgements BEGIN SELECT"
        f" RAISE(ABORT, '{REFUSAL}'); END"
        for change in ("UPDATE", "DELETE")
    ),
    # OR REPLACE
    (
        "CREATE TRIGGER judgements_no_replace BEFORE INSERT ON judgements WHEN EXISTS (SELECT 1 FROM"
        " judgements WHERE id = NEW.id OR (annotator_id = NEW.annotator_id AND key = NEW.key) OR takes_back"
        f" = NEW.takes_back) BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END"
    ),
)
POSTGRES_TRIGGERS = (
    (
        "CREATE FUNCTION judgements_refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION '{REFUSAL}' USING ERRCODE = 'integrity_constraint_violation'; END $$"
    ),
    (
        "CREATE TRIGGER judgements_no_change BEFORE UPDATE OR DELETE ON judgements FOR EACH ROW EXECUTE"
        " FUNCTION judgements_refuse()"
    ),
    (
        "CREATE TRIGGER judgements_no_truncate BEFORE TRUNCATE ON judgements FOR EACH STATEMENT EXECUTE"
        " FUNCTION judgements_refuse()"
    ),
)


def prepare_tables(database: Database, create: bool) -> None:
    """Make the tables of a new database, whole or not at all; several processes may come at once."""
    with database.read() as connection:
        if _is_store(connection, database, create):
            return
    with database.write((Lock.SCHEMA, 0)) as connection:
        if _is_store(connection, database, create):  # another process was faster
            return
        metadata.create_all(connection, checkfirst=False)
        for statement in SQLITE_TRIGGERS if database.sqlite else POSTGRES_TRIGGERS:
            connection.exec_driver_sql(statement)
        connection.execute(schema_versions.insert().values(version=VERSION, applied=time.time()))


def _is_store(connection: sa.Connection, database: Database, create: bool) -> bool:
    tables = set(sa.inspect(connection).get_table_names())
    if "schema_versions" not in tables:
        foreign = sorted(tables & set(metadata.tables))
        if foreign:
            got = f"tables {', '.join(foreign)} without a schema version"
            raise ValueError(
                f"store {database.name}: expected a labelling store, got {got}. Name another database."
            )
        if not create:
            raise ValueError(
                f"store {database.name}: expected a labelling store, got a database without one. Check the"
                " URL."
            )
        return False
    version = max(connection.execute(sa.select(schema_versions.c.version)).scalars(), default=None)
    if version != VERSION:
        raise ValueError(
            f"store {database.name}: expected schema version {VERSION}, got {version}. Use the program that"
            " made it."
        )
    return True
