"""Opens a database by URL and defines the tables of the labelling store and its two kinds of transaction:
reading, and writing one at a time.

SQLite runs with a write-ahead log, `synchronous=FULL` (a commit is on the disk), foreign keys, and BEGIN
IMMEDIATE for writing. Writers of one process queue for a lock, because SQLite itself waits by sleeping.
Writers of other processes wait for up to BUSY_SECONDS.
PostgreSQL runs at READ COMMITTED. Writers take advisory locks in the order in which they are named, and hold
them until the commit.

| table       | holds                                                            | changes                  |
| ----------- | ---------------------------------------------------------------- | ------------------------ |
| campaigns   | settings, as JSON                                                | never                    |
| shapes      | one row per shape of a campaign, with its asset token            | never                    |
| pairs       | the plan; `taken` of its `places` are assigned                | taken                    |
| annotators  | names, roles, hashes of tokens                                   | revoked                  |
| sessions    | hashes of login cookies                                          | inserted, deleted         |
| assignments | who sees which pair when, on which sides; which judgement counts | answered, undone, leased |
| judgements  | received choices and undos; triggers reject any change        | never                    |

An assignment of kind 'pair' takes a place of its pair while `released` is null. The database itself rejects
more assignments of a pair than it has places, a second assignment of a pair to one annotator, a second use of
a key, and a second undo of one judgement.
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

BUSY_SECONDS = 30  # longest wait of an SQLite writer for writers of other processes
CONNECT_SECONDS = 5  # longest wait for a connection to PostgreSQL
VERSION = 3  # of the tables; a store of another version is rejected
EXAMPLES = "sqlite:///labels.db or postgresql://user@host/database"


class Lock(enum.IntEnum):
    """Advisory locks of a writer on PostgreSQL, in the order in which they must be taken."""

    SCHEMA = 1  # tables (number 0), campaigns (1) and annotators (2)
    ANNOTATOR = 2  # one annotator's answers and undos
    CAMPAIGN = 3  # giving out pairs


class Database:
    """An engine and its transactions. Thread-safe."""

    def __init__(self, url: str, create: bool):
        """Connect to a database.

        Args:
            url: as `parse_url` reads it.
            create: make a new SQLite file if there is none.

        Raises: FileNotFoundError, ValueError for a file of another kind, OSError for a failed connection.
        """
        self.url = parse_url(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        # Meaningless for PostgreSQL, and not used there.
        path = Path(self.url.database or "")
        # SQLite itself would create an empty file.
        if self.sqlite and not create and not path.is_file():
            raise FileNotFoundError(
                f"store: expected a database at {path}, found nothing there. Check the path, or label some"
                " pairs first."
            )
        if self.sqlite and create and not path.parent.is_dir():
            raise FileNotFoundError(
                f"store: expected a folder {path.parent} for {path.name}, found none. Create it, or name"
                " another."
            )
        # The file is created before SQLite does it, because it must be readable for its owner only. SQLite
        # gives its -wal and -shm files the same permissions.
        if self.sqlite and create:
            # An existing file is what a second start finds. Any other error is reported by connecting below.
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        self.engine = _engine(self.url, self.sqlite)
        # Single statements need no BEGIN and ROLLBACK around them, which would be two more round trips.
        self._reader = (
            self.engine if self.sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        )
        self._turn = threading.Lock()  # writers of this process take turns
        # Engines connect lazily. Connecting here reports a wrong address now, with the remedy.
        try:
            with self.read():
                pass
        except DatabaseError as error:
            self.close()
            # The driver's reason, without SQLAlchemy's statement and link.
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
        """The URL with its password hidden, for messages."""
        return self.url.render_as_string(hide_password=True)

    def read(self) -> Connection:
        """Open a connection for reading, to be used in a `with` statement. On SQLite all its statements see
        one consistent state; on PostgreSQL each statement sees what is committed then. Nothing is written.
        """
        return self._reader.connect()

    @contextlib.contextmanager
    def write(self, *locks: tuple[Lock, int]) -> Iterator[Connection]:
        """Run a transaction that is committed, and on the disk, when the block ends without an error.

        Args:
            locks: (lock, number) in ascending order, for PostgreSQL; SQLite has one writer anyway.
        """
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
                    # The second key of an advisory lock is a signed 32-bit integer.
                    {"kind": int(kind), "number": number % 2**31},
                )
            yield connection

    def close(self) -> None:
        self.engine.dispose()


def insert_all(c: Connection, table: Table, rows: Sequence[Mapping]) -> list[int]:
    """Insert rows, many at a time. Returns their ids in the same order."""
    # PostgreSQL: several writers insert at once, so ids must be returned by the statement.
    if c.dialect.name != "sqlite":
        return list(
            c.execute(insert(table).returning(table.c.id, sort_by_parameter_order=True), rows).scalars()
        )
    # SQLite has one writer, and the id of a new row is one more than the largest, so the ids need no query.
    last = c.execute(select(func.max(table.c.id))).scalar() or 0
    c.execute(insert(table), rows)
    return list(range(last + 1, last + 1 + len(rows)))


def parse_url(url: str) -> URL:
    """Parse the URL of a store. PostgreSQL gets psycopg 3 as its driver.

    Raises: ValueError for a URL of another form, another database, or SQLite in memory.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(f"store: expected a database URL, got {url!r}. Write it as {EXAMPLES}.") from None
    backend = parsed.get_backend_name()
    # A database in memory would be lost at the end, and each connection of the pool would get its own.
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ValueError(f"store: expected a file in the URL, got {url!r}. Write it as sqlite:///labels.db.")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ValueError(f"store: expected SQLite or PostgreSQL, got {backend}. Write the URL as {EXAMPLES}.")
    return parsed.set(drivername="sqlite")


def _engine(url: URL, sqlite: bool) -> Engine:
    """Create the engine: a pool of connections, with the settings of the module's docstring."""
    if not sqlite:
        try:
            return create_engine(
                url,
                pool_size=20,
                max_overflow=40,
                # A connection that the server has closed in the meantime is replaced instead of failing.
                pool_pre_ping=True,
                connect_args={"connect_timeout": CONNECT_SECONDS},
            )
        except ImportError:
            raise ValueError(
                "store: PostgreSQL needs psycopg 3, which is not installed. Run pip install"
                " 'eg3d-rlhf[postgres]'."
            ) from None
    # Connections move between threads of the pool. SQLite's own check would reject that.
    engine = create_engine(
        url, pool_size=20, max_overflow=60, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
    )
    event.listen(engine, "connect", _prepare_connection)
    # Python's driver would begin transactions late, at the first change.
    event.listen(engine, "begin", _begin)
    return engine


def _prepare_connection(connection: sqlite3.Connection, _record) -> None:
    connection.isolation_level = None  # `_begin` starts transactions, not the driver
    # recursive_triggers: without it, INSERT OR REPLACE would delete a judgement without firing its trigger.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    # BEGIN IMMEDIATE takes the write lock at once. A plain BEGIN that writes later can fail with SQLITE_BUSY
    # when another writer has committed since.
    connection.exec_driver_sql(
        "BEGIN IMMEDIATE" if connection.get_execution_options().get("immediate") else "BEGIN"
    )


metadata = sa.MetaData()
# SQLite assigns new ids only to a column of type INTEGER PRIMARY KEY, not to BIGINT.
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _key() -> sa.Column:
    return sa.Column("id", Id, primary_key=True)


def _to(table: str, name: str | None = None, null: bool = False) -> sa.Column:
    """Make a foreign key to `table`, by default named like its singular with `_id`."""
    return sa.Column(name or f"{table[:-1]}_id", Id, sa.ForeignKey(f"{table}.id"), nullable=null)


def _column(kind, name: str, null: bool = False, **more) -> sa.Column:
    return sa.Column(name, kind, nullable=null, **more)


def _partial(name: str, *columns: str, where: str, unique: bool = False) -> sa.Index:
    """Make a partial index: it contains only the rows for which `where` holds."""
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
    _real("leased"),  # last time at which the annotator's page asked for it
    _real("released", null=True),  # when its place of the pair was given back
    sa.Column("answered", Id),  # id of the judgement that counts; null: not answered
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
    _to("assignments", null=True),  # null: an undo when there was nothing to take back
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

APPEND_ONLY = "judgements are append-only: take one back with a further record"

SQLITE_TRIGGERS = (
    *(
        f"CREATE TRIGGER judgements_no_{change.lower()} BEFORE {change} ON judgements BEGIN SELECT"
        f" RAISE(ABORT, '{APPEND_ONLY}'); END"
        for change in ("UPDATE", "DELETE")
    ),
    # INSERT OR REPLACE deletes the old row without its triggers, unless recursive_triggers is on.
    (
        "CREATE TRIGGER judgements_no_replace BEFORE INSERT ON judgements WHEN EXISTS (SELECT 1 FROM"
        " judgements WHERE id = NEW.id OR (annotator_id = NEW.annotator_id AND key = NEW.key) OR takes_back"
        f" = NEW.takes_back) BEGIN SELECT RAISE(ABORT, '{APPEND_ONLY}'); END"
    ),
)
POSTGRES_TRIGGERS = (
    (
        "CREATE FUNCTION judgements_refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION '{APPEND_ONLY}' USING ERRCODE = 'integrity_constraint_violation'; END $$"
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
    """Create the tables of a new database in one transaction; several processes may do so at once."""
    with database.read() as connection:
        if _is_store(connection, database, create):
            return
    with database.write((Lock.SCHEMA, 0)) as connection:
        if _is_store(connection, database, create):  # another process was faster
            return
        # checkfirst=False: a table that exists already is an error, not accepted unseen.
        metadata.create_all(connection, checkfirst=False)
        for statement in SQLITE_TRIGGERS if database.sqlite else POSTGRES_TRIGGERS:
            connection.exec_driver_sql(statement)
        # Written last, within the transaction: a store without a version is no store.
        connection.execute(schema_versions.insert().values(version=VERSION, applied=time.time()))


def _is_store(connection: sa.Connection, database: Database, create: bool) -> bool:
    """Check a database. Returns True for a store, False for an empty database that may become one.

    Raises: ValueError for tables of another program, another version, or no store without `create`.
    """
    tables = set(sa.inspect(connection).get_table_names())
    if "schema_versions" not in tables:
        # Tables with our names but without a version belong to another program.
        foreign = sorted(tables & set(metadata.tables))
        if foreign:
            contents = f"tables {', '.join(foreign)} without a schema version"
            raise ValueError(
                f"store {database.name}: expected a labelling store, found {contents}. Name another database."
            )
        if not create:
            raise ValueError(
                f"store {database.name}: expected a labelling store, found a database without one. Check the"
                " URL."
            )
        return False
    version = max(connection.execute(sa.select(schema_versions.c.version)).scalars(), default=None)
    if version != VERSION:
        raise ValueError(
            f"store {database.name}: expected schema version {VERSION}, found {version}. Use the version"
            " of the program that created it."
        )
    return True
