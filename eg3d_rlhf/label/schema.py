"""Tables of the store, and how a database is led to them: made whole when new, step by step when older, in one transaction.

| table       | holds                                                                                  | changes                       |
| ----------- | -------------------------------------------------------------------------------------- | ----------------------------- |
| campaigns   | settings, as JSON                                                                      | never                         |
| shapes      | one row per shape of a campaign, with its asset token                                  | never                         |
| pairs       | the plan; `taken` counts the places given away of the `places` there are               | taken                         |
| annotators  | names, roles, hashes of tokens                                                         | revoked                       |
| sessions    | hashes of login cookies                                                                | rows come and go              |
| assignments | who is shown which pair, in which order, on which sides, and which judgement counts    | answered, undone, leased, ... |
| judgements  | what arrived: choices, and undos that take one back; triggers refuse any change        | never                         |

A place of a pair is held by an assignment of kind 'pair' while `released` is null. The database itself refuses a pair more often than it
has places, a second assignment of a pair to one annotator, a second use of a key, and taking a judgement back twice.
"""

import time

import sqlalchemy as sa

from eg3d_rlhf.label.database import Database, Lock

VERSION = 2  # of this description; STEPS lead there from earlier ones

metadata = sa.MetaData()
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite counts up in INTEGER PRIMARY KEY alone


def _key() -> sa.Column:
    return sa.Column("id", Id, primary_key=True)


def _to(table: str, name: str | None = None, null: bool = False) -> sa.Column:
    return sa.Column(name or f"{table[:-1]}_id", Id, sa.ForeignKey(f"{table}.id"), nullable=null)


def _partial(name: str, *columns: str, where: str, unique: bool = False) -> sa.Index:
    return sa.Index(name, *columns, unique=unique, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


schema_versions = sa.Table(
    "schema_versions", metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False), sa.Column("applied", sa.Double, nullable=False),
)  # fmt: skip

campaigns = sa.Table(
    "campaigns", metadata,
    _key(), sa.Column("name", sa.Text, nullable=False, unique=True), sa.Column("settings", sa.Text, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
)  # fmt: skip

shapes = sa.Table(
    "shapes", metadata,
    _key(), _to("campaigns"), sa.Column("position", sa.Integer, nullable=False), sa.Column("asset", sa.Text, nullable=False, unique=True),
    sa.Column("generator", sa.Text, nullable=False), sa.Column("source", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False), sa.Column("psi", sa.Double), sa.Column("level", sa.Double),  # null: not known
    sa.Column("resolution", sa.Integer, nullable=False), sa.Column("triangles", sa.Integer, nullable=False),
    sa.Column("degradation", sa.Text, nullable=False, server_default=sa.text("''")),
    sa.UniqueConstraint("campaign_id", "position"),
)  # fmt: skip

pairs = sa.Table(
    "pairs", metadata,
    _key(), _to("campaigns"), sa.Column("position", sa.Integer, nullable=False), _to("shapes", "first_id"), _to("shapes", "second_id"),
    sa.Column("kind", sa.Text, nullable=False), sa.Column("expected", sa.Text), sa.Column("explanation", sa.Text, nullable=False),
    sa.Column("places", sa.Integer, nullable=False), sa.Column("taken", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.UniqueConstraint("campaign_id", "position"),
    sa.CheckConstraint("taken >= 0 AND taken <= places", name="pairs_places"),
    _partial("pairs_open", "campaign_id", "position", where="kind = 'pair' AND taken < places"),
)  # fmt: skip

annotators = sa.Table(
    "annotators", metadata,
    _key(), sa.Column("name", sa.Text, nullable=False, unique=True), sa.Column("role", sa.Text, nullable=False),
    sa.Column("token_hash", sa.Text, unique=True), sa.Column("created", sa.Double, nullable=False), sa.Column("revoked", sa.Double),
)  # fmt: skip

sessions = sa.Table(
    "sessions", metadata,
    sa.Column("id_hash", sa.Text, primary_key=True), _to("annotators"), sa.Column("created", sa.Double, nullable=False),
    sa.Column("expires", sa.Double, nullable=False, index=True),
)  # fmt: skip

assignments = sa.Table(
    "assignments", metadata,
    _key(), sa.Column("token", sa.Text, nullable=False, unique=True), _to("campaigns"), _to("annotators"), _to("pairs"),
    sa.Column("sequence", sa.Integer, nullable=False), sa.Column("kind", sa.Text, nullable=False),
    sa.Column("first_is_left", sa.Integer, nullable=False),
    sa.Column("leased", sa.Double, nullable=False),  # last time the annotator was seen with it
    sa.Column("released", sa.Double),  # when its place was given to others
    sa.Column("answered", Id),  # judgement that counts
    sa.Column("undone", sa.Double),  # when its answer was last taken back, until it is answered again
    sa.UniqueConstraint("campaign_id", "annotator_id", "sequence"),
    _partial("assignments_once", "annotator_id", "pair_id", where="kind IN ('pair', 'training')", unique=True),
    _partial("assignments_open", "campaign_id", "leased", where="answered IS NULL AND released IS NULL"),
    sa.Index("assignments_pair", "pair_id"),
)  # fmt: skip

judgements = sa.Table(
    "judgements", metadata,
    _key(), _to("campaigns"), _to("annotators"), sa.Column("key", sa.Text, nullable=False),
    sa.Column("type", sa.Text, nullable=False),  # 'choice' or 'undo'
    _to("assignments", null=True),  # null: an undo that found nothing
    sa.Column("choice", sa.Text), sa.Column("reason", sa.Text), sa.Column("milliseconds", sa.BigInteger), sa.Column("views", sa.Text),
    sa.Column("answered_at", sa.Double), sa.Column("received_at", sa.Double, nullable=False),
    _to("judgements", "takes_back", null=True),
    sa.Column("page_version", sa.Text, nullable=False, server_default=sa.text("''")),
    sa.UniqueConstraint("annotator_id", "key"), sa.UniqueConstraint("takes_back"),
    sa.CheckConstraint("(type = 'choice') = (choice IS NOT NULL)", name="judgements_type"),
    sa.Index("judgements_when", "campaign_id", "annotator_id", "received_at"),
    sa.Index("judgements_assignment", "assignment_id"),
)  # fmt: skip

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

STEPS: dict[int, tuple[str, ...]] = {  # for both databases, {id} and {real} being their types; never edited once released
    # logins that survive a restart; the page's version with each judgement; shapes damaged on purpose; when an answer was undone
    2: (
        "CREATE TABLE sessions (id_hash TEXT NOT NULL PRIMARY KEY, annotator_id {id} NOT NULL REFERENCES annotators (id),"
        " created {real} NOT NULL, expires {real} NOT NULL)",
        "CREATE INDEX ix_sessions_expires ON sessions (expires)",
        "ALTER TABLE judgements ADD COLUMN page_version TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE shapes ADD COLUMN degradation TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE assignments ADD COLUMN undone {real}",
    ),
}
SQLITE_STEPS: dict[int, tuple[str, ...]] = {2: SQLITE_TRIGGERS[2:]}  # INSERT OR REPLACE is no way round the triggers


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
            steps: dict[int, tuple[str, ...]] = {VERSION: SQLITE_TRIGGERS if database.sqlite else POSTGRES_TRIGGERS}
        else:
            types = {"id": "INTEGER", "real": "DOUBLE"} if database.sqlite else {"id": "BIGINT", "real": "DOUBLE PRECISION"}
            steps = {version: tuple(line.format(**types) for line in STEPS[version]) for version in range(found + 1, VERSION + 1)}
        for version, statements in steps.items():
            for statement in (*statements, *(SQLITE_STEPS[version] if found and database.sqlite else ())):
                connection.exec_driver_sql(statement)
            connection.execute(schema_versions.insert().values(version=version, applied=time.time()))
    return found


def _version(connection: sa.Connection, database: Database, create: bool) -> int:
    tables = set(sa.inspect(connection).get_table_names())
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
    found = max(connection.execute(sa.select(schema_versions.c.version)).scalars(), default=0)
    if found > VERSION:
        raise ValueError(f"store {database.name}: expected schema version {VERSION} or earlier, got {found}. Update this program.")
    if found == 0:
        raise ValueError(f"store {database.name}: expected a schema version, got none recorded. Restore the database from a copy.")
    return found
