"""Opening a database by URL, and the two kinds of transaction the store uses: reading, and writing one at a time.

SQLite: write-ahead log, `synchronous=FULL` (a commit is on the disk), foreign keys, BEGIN IMMEDIATE for writing. Writers of one process
queue for a lock, because SQLite's own waiting is a sleep; writers of other processes wait for up to BUSY_SECONDS.
PostgreSQL: READ COMMITTED; writers take advisory locks, held until the commit, in the order in which they are named.
"""

import contextlib
import enum
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, func, insert, make_url, select, text
from sqlalchemy.exc import ArgumentError, DatabaseError, DisconnectionError

BUSY_SECONDS = 30
IDLE_SECONDS = 5.0
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
            raise FileNotFoundError(f"store: expected a database at {path}, got nothing there. Check the path, or label some pairs first.")
        if self.sqlite and create and not path.parent.is_dir():
            raise FileNotFoundError(f"store: expected a folder {path.parent} for {path.name}, got none. Make it, or name another.")
        self.engine = _engine(self.url, self.sqlite)
        # single statements need no BEGIN and ROLLBACK around them, which are messages to the server
        self._reader = self.engine if self.sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._turn = threading.Lock()
        try:
            with self.read():
                pass
        except DatabaseError as error:
            self.close()
            reason = str(error.orig).strip().splitlines()[0]
            if self.sqlite and "not a database" in reason:
                raise ValueError(f"store {self.name}: expected an SQLite database, got a file of another kind. Name another.") from None
            raise OSError(f"store {self.name}: expected to connect, got: {reason}. Check the address and your rights.") from None

    @property
    def name(self) -> str:
        """The URL without its password, for messages."""
        return self.url.render_as_string(hide_password=True)

    def read(self) -> Connection:
        """A consistent look on SQLite; on PostgreSQL each statement sees what is committed. Leaves nothing behind where it ends."""
        return self._reader.connect()

    @contextlib.contextmanager
    def write(self, *locks: tuple[Lock, int]) -> Iterator[Connection]:
        """A transaction that is committed, and on the disk, when the block ends without an error."""
        if self.sqlite:
            with self._turn, self.engine.connect().execution_options(immediate=True) as connection, connection.begin():
                yield connection
            return
        with self.engine.begin() as connection:
            for kind, number in locks:
                connection.execute(text("SELECT pg_advisory_xact_lock(:kind, :number)"), {"kind": int(kind), "number": number % 2**31})
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def insert_all(c: Connection, table: Table, rows: Sequence[Mapping]) -> list[int]:
    """Insert rows, many at a time; their ids in the same order."""
    if c.dialect.name != "sqlite":
        return list(c.execute(insert(table).returning(table.c.id, sort_by_parameter_order=True), rows).scalars())
    last = c.execute(select(func.max(table.c.id))).scalar() or 0  # there is one writer, and a new id is one more than the largest
    c.execute(insert(table), rows)
    return list(range(last + 1, last + 1 + len(rows)))


def parse_url(url: str) -> URL:
    """A store's URL; PostgreSQL's is given psycopg 3 as its driver.

    Raises: ValueError for what is no URL, another database, or an SQLite database in memory, which connections cannot share.
    """
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
            engine = create_engine(url, pool_size=20, max_overflow=40)
        except ImportError:
            raise ValueError("store: expected psycopg 3 for PostgreSQL, got none. pip install 'eg3d-rlhf[postgres]'.") from None
        _ask_idle_connections(engine)
        return engine
    engine = create_engine(url, pool_size=20, max_overflow=60, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})
    event.listen(engine, "connect", _prepare_connection)
    event.listen(engine, "begin", _begin)
    return engine


def _ask_idle_connections(engine: Engine) -> None:
    """Before a connection that was idle for IDLE_SECONDS is used, ask whether the server is still there; a lost one is replaced."""

    def returned(_connection, record) -> None:
        record.info["returned"] = time.monotonic()

    def taken(connection, record, _proxy) -> None:
        if time.monotonic() - record.info.get("returned", time.monotonic()) < IDLE_SECONDS:
            return
        try:
            alive = engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error:
            alive = False
        if not alive:
            raise DisconnectionError

    event.listen(engine, "checkin", returned)
    event.listen(engine, "checkout", taken)


def _prepare_connection(connection: sqlite3.Connection, _record) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("immediate") else "BEGIN")
