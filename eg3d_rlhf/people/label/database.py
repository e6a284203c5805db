"""Database of the labelling application: connection by URL, tables, and the two kinds of transaction.

A transaction either only reads, or it writes; write transactions follow one after another.

SQLite runs with a write-ahead log, `synchronous=FULL` (a commit is on the disk when it returns), foreign
keys, and BEGIN IMMEDIATE for writing. Writers of one process wait for a lock of this module, because SQLite
itself waits by sleeping. Writers of other processes wait for up to BUSY_SECONDS. PostgreSQL runs at the
isolation level READ COMMITTED. Writers take advisory locks in ascending order, and hold them until the
commit.

| table       | holds                                                            | changes                  |
| ----------- | ---------------------------------------------------------------- | ------------------------ |
| campaigns   | settings, as JSON                                                | never                    |
| shapes      | one row per shape of a campaign, with its asset token            | rows added               |
| pairs       | the plan; `taken` of the `places` (slots) are assigned           | taken; rows added        |
| annotators  | names, roles, hashes of tokens                                   | revoked                  |
| sessions    | hashes of login cookies                                          | rows added and deleted   |
| assignments | who sees which pair when, on which sides; which judgement counts | answered, undone, leased |
| judgements  | received choices and undos; triggers reject any change           | never                    |

Rows are added to `shapes` and `pairs` of a stored campaign only if it learns from its answers.

A pair has one slot for each annotator who shall answer it (column `places`). An assignment of kind 'pair'
uses a slot of its pair while its column `released` is null. The database itself rejects more assignments of a
pair than it has slots, a second assignment of a pair to one annotator, a second use of a key, and a second
undo of a judgement.
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

BUSY_SECONDS = 30  # longest wait of an SQLite writer for writers of other processes, in seconds
CONNECT_SECONDS = 5  # longest wait for a connection to PostgreSQL, in seconds
VERSION = (
    4  # version of the tables; a store of a version that is neither this one nor in UPGRADES is rejected
)
# Version -> statement that turns the tables of this version into those of the next one. Version 4 has added
# the origin of judges' answers; all answers of older stores are of people.
UPGRADES = {3: "ALTER TABLE judgements ADD COLUMN judge TEXT"}
EXAMPLES = "sqlite:///labels.db or postgresql://user@host/database"


class Lock(enum.IntEnum):
    """Advisory locks of a writer on PostgreSQL, in the order in which they must be taken."""

    SCHEMA = 1  # creation of tables (number 0), campaigns (number 1) and annotators (number 2)
    ANNOTATOR = 2  # answers and undos of the annotator whose id is the number
    CAMPAIGN = 3  # assignment of pairs of the campaign whose id is the number


class Database:
    """Connections to a database, and transactions on it. The object is thread-safe."""

    def __init__(self, url: str, create: bool):
        """Connect to a database.

        Args:
            url: URL of the database, see `parse_url`.
            create: True creates the SQLite file if it does not exist.

        Raises:
            FileNotFoundError: the SQLite file or its folder does not exist.
            ValueError: the URL is invalid, or the file is not an SQLite database.
            OSError: the connection fails.
        """
        self.url = parse_url(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        # path of the SQLite file; for PostgreSQL it is the name of the database, and is not used
        sqlite_path = Path(self.url.database or "")
        # Without this check, SQLite would create an empty file.
        if self.sqlite and not create and not sqlite_path.is_file():
            raise FileNotFoundError(
                f"store: there is no database at {sqlite_path}. Check the path, or label some pairs first,"
                " which creates the database."
            )
        if self.sqlite and create and not sqlite_path.parent.is_dir():
            raise FileNotFoundError(
                f"store: the folder {sqlite_path.parent} of the database {sqlite_path.name} does not exist."
                " Create the folder, or choose another one."
            )
        # The file must be readable for its owner only, so it is created here and not by SQLite. SQLite gives
        # its -wal and -shm files the same permissions.
        if self.sqlite and create:
            # The file exists already when a store is opened again. Any other error is reported by the
            # connection below.
            with contextlib.suppress(OSError):
                os.close(os.open(sqlite_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        self.engine = _engine(self.url, self.sqlite)
        # On PostgreSQL, single statements need no BEGIN and ROLLBACK, which would be two more round trips.
        self._reader = (
            self.engine if self.sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        )
        self._write_lock = threading.Lock()  # held by the SQLite writer of this process
        # An engine connects at its first use. This connection reports a wrong address immediately.
        try:
            with self.read():
                pass
        except DatabaseError as error:
            self.close()
            # error.orig is the error of the driver. SQLAlchemy's own message also contains the statement and
            # a link.
            driver_message = str(error.orig).strip().splitlines()[0]
            if self.sqlite and "not a database" in driver_message:
                raise ValueError(
                    f"store {self.name}: the file is not an SQLite database. Choose the file of a label"
                    " store, or the name of a new file."
                ) from None
            raise OSError(
                f"store {self.name}: the connection failed: {driver_message}. Check the address, and whether"
                " you may access the database."
            ) from None

    @property
    def name(self) -> str:
        """Return the URL for messages, with its password hidden."""
        return self.url.render_as_string(hide_password=True)

    def read(self) -> Connection:
        """Open a connection for reading, which must be used in a `with` statement.

        On SQLite, all statements of the connection see the same state of the database. On PostgreSQL, each
        statement sees the state that is committed when it runs.
        """
        return self._reader.connect()

    @contextlib.contextmanager
    def write(self, *locks: tuple[Lock, int]) -> Iterator[Connection]:
        """Open a write transaction inside the context.

        It is committed, and on the disk, when the context ends without an error, and rolled back after an
        error.

        Args:
            locks: (lock, number) in ascending order. They are used on PostgreSQL only, because SQLite has
                only one writer at a time.
        """
        if self.sqlite:
            with (
                self._write_lock,
                self.engine.connect().execution_options(immediate=True) as connection,
                connection.begin(),
            ):
                yield connection
            return
        with self.engine.begin() as connection:
            for lock, number in locks:
                connection.execute(
                    text("SELECT pg_advisory_xact_lock(:kind, :number)"),
                    # The second key of an advisory lock is a signed 32-bit integer.
                    {"kind": int(lock), "number": number % 2**31},
                )
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def insert_all(connection: Connection, table: Table, rows: Sequence[Mapping]) -> list[int]:
    """Insert rows into a table in few statements, and return their ids in the order of the rows.

    Args:
        connection: connection with a write transaction.
        table: table with a column `id`.
        rows: values of the other columns.
    """
    # On PostgreSQL several writers insert at once, so the statement must return the ids.
    if connection.dialect.name != "sqlite":
        return list(
            connection.execute(
                insert(table).returning(table.c.id, sort_by_parameter_order=True), rows
            ).scalars()
        )
    # SQLite has one writer, and gives new rows consecutive ids after the largest one, so the ids are known.
    last_id = connection.execute(select(func.max(table.c.id))).scalar() or 0
    connection.execute(insert(table), rows)
    return list(range(last_id + 1, last_id + 1 + len(rows)))


def parse_url(url: str) -> URL:
    """Parse the URL of a label store. The driver of PostgreSQL is psycopg 3.

    Raises:
        ValueError: the text is not a URL, the database is neither SQLite nor PostgreSQL, or it is an SQLite
            database in memory.
    """
    try:
        parsed_url = make_url(url)
    except (ArgumentError, ValueError):
        raise ValueError(
            f"store: {url!r} is not the URL of a database. Write a URL such as {EXAMPLES}."
        ) from None
    backend_name = parsed_url.get_backend_name()
    # Each connection to a database in memory would get its own empty database.
    if backend_name == "sqlite" and parsed_url.database in (None, "", ":memory:"):
        raise ValueError(
            f"store: the URL {url!r} names no file. Write the URL of a file, such as sqlite:///labels.db."
        )
    if backend_name == "postgresql":
        return parsed_url.set(drivername="postgresql+psycopg")
    if backend_name != "sqlite":
        raise ValueError(
            f"store: the database {backend_name} is not supported. Use SQLite or PostgreSQL: {EXAMPLES}."
        )
    return parsed_url.set(drivername="sqlite")


def _engine(url: URL, sqlite: bool) -> Engine:
    """Make the engine, which is a pool of connections, with the settings in the docstring of this module."""
    if not sqlite:
        try:
            return create_engine(
                url,
                pool_size=20,
                max_overflow=40,
                # Connections that the server has closed in the meantime are replaced.
                pool_pre_ping=True,
                connect_args={"connect_timeout": CONNECT_SECONDS},
            )
        except ImportError:
            raise ValueError(
                "store: PostgreSQL needs the package psycopg 3, which is not installed. Run pip install"
                " 'eg3d-rlhf[postgres]'."
            ) from None
    # check_same_thread=False: a connection of the pool is used by different threads, one after another.
    engine = create_engine(
        url, pool_size=20, max_overflow=60, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
    )
    event.listen(engine, "connect", _prepare_connection)
    # Python's driver would begin a transaction only at the first change.
    event.listen(engine, "begin", _begin)
    return engine


def _prepare_connection(connection: sqlite3.Connection, _record) -> None:
    """Apply the settings in the docstring of this module to a new connection to SQLite."""
    connection.isolation_level = None  # `_begin` starts transactions, not the driver
    # Without recursive_triggers, INSERT OR REPLACE would delete a judgement without its trigger.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """Begin a transaction on SQLite."""
    # BEGIN IMMEDIATE takes the write lock at once. A plain BEGIN that writes later can fail with SQLITE_BUSY
    # when another writer has committed since.
    connection.exec_driver_sql(
        "BEGIN IMMEDIATE" if connection.get_execution_options().get("immediate") else "BEGIN"
    )


metadata = sa.MetaData()
# SQLite assigns new ids only to a column of type INTEGER PRIMARY KEY, not to BIGINT.
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _key() -> sa.Column:
    """Make the column `id`, which is the primary key."""
    return sa.Column("id", Id, primary_key=True)


def _to(table: str, name: str | None = None, null: bool = False) -> sa.Column:
    """Make a column with the id of a row of `table`.

    Args:
        table: name of the table, a plural in -s.
        name: name of the column; None: the singular of `table` with the ending `_id`.
        null: True if the column may be null.
    """
    # table[:-1] is the singular
    return sa.Column(name or f"{table[:-1]}_id", Id, sa.ForeignKey(f"{table}.id"), nullable=null)


def _column(sql_type, name: str, null: bool = False, **column_arguments) -> sa.Column:
    """Make a column of a table, which may be null only if `null` is True.

    Args:
        sql_type: type of the values, a type of SQLAlchemy.
        name: name of the column.
        null: True if the column may be null.
        column_arguments: further keyword arguments of sa.Column.
    """
    return sa.Column(name, sql_type, nullable=null, **column_arguments)


def _partial(name: str, *columns: str, where: str, unique: bool = False) -> sa.Index:
    """Make a partial index, which contains only the rows that satisfy the SQL condition `where`."""
    return sa.Index(
        name, *columns, unique=unique, sqlite_where=sa.text(where), postgresql_where=sa.text(where)
    )


_text, _real, _int = (functools.partial(_column, sql_type) for sql_type in (sa.Text, sa.Double, sa.Integer))

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
    _real("level", null=True),  # null: unknown, as for imported tables of seeds
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
    _real("leased"),  # last time at which the annotator's page requested the assignment
    _real("released", null=True),  # time at which its slot was freed for other annotators; null: not released
    sa.Column("answered", Id),  # id of the judgement that counts; null: not answered
    _real("undone", null=True),  # time at which its answer was taken back; null again after the next answer
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
    _to("assignments", null=True),  # null: an undo when there was no answer to take back
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
    _text("judge", null=True),  # origin of the answer of a judge, as JSON; null: the answer of a person
    sa.UniqueConstraint("annotator_id", "key"),
    sa.UniqueConstraint("takes_back"),
    sa.CheckConstraint("(type = 'choice') = (choice IS NOT NULL)", name="judgements_type"),
    sa.Index("judgements_when", "campaign_id", "annotator_id", "received_at"),
    sa.Index("judgements_assignment", "assignment_id"),
)

APPEND_ONLY = "judgements cannot be changed or deleted: add an undo to take a judgement back"

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
    """Create the tables of an empty database in one transaction, or bring those of an older store up to date.

    Several processes may call this at once.

    Args:
        database: database, which may be a label store already.
        create: True creates the tables if there are none.

    Raises:
        ValueError: the database has tables of another program or another version, or no tables and `create`
            is False.
    """
    with database.read() as connection:
        if _is_store(connection, database, create):
            return
    with database.write((Lock.SCHEMA, 0)) as connection:
        # Another process may have created the tables before this one got the lock.
        if _is_store(connection, database, create) or _upgrade(connection):
            return
        # checkfirst=False: a table that exists already raises an error, because its columns were not checked.
        metadata.create_all(connection, checkfirst=False)
        for trigger_statement in SQLITE_TRIGGERS if database.sqlite else POSTGRES_TRIGGERS:
            connection.exec_driver_sql(trigger_statement)
        # The version makes the database a label store.
        connection.execute(schema_versions.insert().values(version=VERSION, applied=time.time()))


def stored_version(connection: sa.Connection) -> int | None:
    """Return the version of the tables of a label store; None if the table of versions is empty."""
    return max(connection.execute(sa.select(schema_versions.c.version)).scalars(), default=None)


def _upgrade(connection: sa.Connection) -> bool:
    """Bring the tables of an older label store to the present version. Return False for an empty database.

    Args:
        connection: connection with a write transaction that has the lock (Lock.SCHEMA, 0).
    """
    if "schema_versions" not in sa.inspect(connection).get_table_names():
        return False
    while (version := stored_version(connection)) in UPGRADES:
        connection.exec_driver_sql(UPGRADES[version])
        connection.execute(schema_versions.insert().values(version=version + 1, applied=time.time()))
    return True


def _is_store(connection: sa.Connection, database: Database, create: bool) -> bool:
    """Return True if a database is a label store of the present version.

    Return False if it is a store of an older version, or no store and `create` is True.

    Raises:
        ValueError: the database has tables of another program or another version, or it is not a label store
            and `create` is False.
    """
    table_names = set(sa.inspect(connection).get_table_names())
    if "schema_versions" not in table_names:
        # Tables that have the names of this module, but no version, belong to another program.
        foreign_tables = sorted(table_names & set(metadata.tables))
        if foreign_tables:
            raise ValueError(
                f"store {database.name}: the database has the tables {', '.join(foreign_tables)} of another"
                " program. Choose another database."
            )
        if not create:
            raise ValueError(
                f"store {database.name}: the database contains no label store. Check the URL, or label some"
                " pairs first, which creates the store."
            )
        return False
    version = stored_version(connection)
    if version in UPGRADES:
        return False
    if version != VERSION:
        raise ValueError(
            f"store {database.name}: its tables have version {version}, but this program needs version"
            f" {VERSION}. Use the version of the program that created the store."
        )
    return True
