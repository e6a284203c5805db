"""Bringing a database to the schema's version: made whole when new, led there step by step when older; and the append-only triggers.

Each step is a list of statements per dialect, run in one transaction with the row that records it. A step is never edited once released.
"""

import time

from sqlalchemy import Connection, inspect, select

from eg3d_rlhf.label.database import Database, Lock
from eg3d_rlhf.label.schema import VERSION, metadata, schema_versions

REFUSAL = "judgements are append-only: take one back with a further record"

SQLITE_TRIGGERS = (
    f"CREATE TRIGGER judgements_no_update BEFORE UPDATE ON judgements BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
    f"CREATE TRIGGER judgements_no_delete BEFORE DELETE ON judgements BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
    "CREATE TRIGGER judgements_no_replace BEFORE INSERT ON judgements WHEN EXISTS (SELECT 1 FROM judgements WHERE id = NEW.id"  # OR REPLACE
    " OR (annotator_id = NEW.annotator_id AND key = NEW.key) OR takes_back = NEW.takes_back)"
    f" BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
)
POSTGRES_TRIGGERS = (
    "CREATE FUNCTION judgements_refuse() RETURNS trigger LANGUAGE plpgsql AS"
    f" $$ BEGIN RAISE EXCEPTION '{REFUSAL}' USING ERRCODE = 'integrity_constraint_violation'; END $$",
    "CREATE TRIGGER judgements_no_change BEFORE UPDATE OR DELETE ON judgements FOR EACH ROW EXECUTE FUNCTION judgements_refuse()",
    "CREATE TRIGGER judgements_no_truncate BEFORE TRUNCATE ON judgements FOR EACH STATEMENT EXECUTE FUNCTION judgements_refuse()",
)

STEPS: dict[int, dict[str, tuple[str, ...]]] = {
    # logins that survive a restart; the page's version with each judgement; shapes damaged on purpose; when an answer was undone;
    # INSERT OR REPLACE is no way round the triggers
    2: {
        "sqlite": (
            "CREATE TABLE sessions (id_hash TEXT NOT NULL PRIMARY KEY, annotator_id INTEGER NOT NULL REFERENCES annotators (id),"
            " created DOUBLE NOT NULL, expires DOUBLE NOT NULL)",
            "CREATE INDEX ix_sessions_expires ON sessions (expires)",
            "ALTER TABLE judgements ADD COLUMN page_version TEXT NOT NULL DEFAULT ''",
            "ALTER TABLE shapes ADD COLUMN degradation TEXT NOT NULL DEFAULT ''",
            "ALTER TABLE assignments ADD COLUMN undone DOUBLE",
            SQLITE_TRIGGERS[2],
        ),
        "postgresql": (
            "CREATE TABLE sessions (id_hash TEXT NOT NULL PRIMARY KEY, annotator_id BIGINT NOT NULL REFERENCES annotators (id),"
            " created DOUBLE PRECISION NOT NULL, expires DOUBLE PRECISION NOT NULL)",
            "CREATE INDEX ix_sessions_expires ON sessions (expires)",
            "ALTER TABLE judgements ADD COLUMN page_version TEXT NOT NULL DEFAULT ''",
            "ALTER TABLE shapes ADD COLUMN degradation TEXT NOT NULL DEFAULT ''",
            "ALTER TABLE assignments ADD COLUMN undone DOUBLE PRECISION",
        ),
    },
}


def migrate(database: Database, create: bool) -> int:
    """Bring the schema to VERSION; returns the version it was at, 0 for a new database.

    Raises: ValueError for a database of a later version, one of something else, and an empty one unless `create`.
    """
    with database.read() as connection:
        if _version(connection, database, create) == VERSION:
            return VERSION
    with database.write((Lock.SCHEMA, 0)) as connection:
        found = _version(connection, database, create)  # another process may have been faster
        if found == 0:
            metadata.create_all(connection, checkfirst=False)
            _run(connection, SQLITE_TRIGGERS if database.sqlite else POSTGRES_TRIGGERS)
            _record(connection, VERSION)
        for version in range(max(found, 1) + 1, VERSION + 1) if found else ():
            _run(connection, STEPS[version]["sqlite" if database.sqlite else "postgresql"])
            _record(connection, version)
    return found


def _version(connection: Connection, database: Database, create: bool) -> int:
    tables = set(inspect(connection).get_table_names())
    if "schema_versions" not in tables:
        foreign = sorted(tables & set(metadata.tables))
        if foreign:
            raise ValueError(
                f"store {database.name}: expected a labelling store, got tables {', '.join(foreign)} without a schema version. "
                "Name another database."
            )
        if not create:
            raise ValueError(f"store {database.name}: expected a labelling store, got a database without one. Check the URL.")
        return 0
    found = max(connection.execute(select(schema_versions.c.version)).scalars(), default=0)
    if found > VERSION:
        raise ValueError(f"store {database.name}: expected schema version {VERSION} or earlier, got {found}. Update this program.")
    if found == 0:
        raise ValueError(f"store {database.name}: expected a schema version, got none recorded. Restore the database from a copy.")
    return found


def _run(connection: Connection, statements: tuple[str, ...]) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement)


def _record(connection: Connection, version: int) -> None:
    connection.execute(schema_versions.insert().values(version=version, applied=time.time()))
