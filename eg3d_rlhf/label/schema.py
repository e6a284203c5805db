"""Tables of the store.

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

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

VERSION = 2  # of this description; migrations.py leads there from earlier ones

metadata = MetaData()
Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up in INTEGER PRIMARY KEY alone


def _key() -> Column:
    return Column("id", Id, primary_key=True)


def _to(table: str, name: str | None = None, null: bool = False) -> Column:
    return Column(name or f"{table[:-1]}_id", Id, ForeignKey(f"{table}.id"), nullable=null)


def _unique(name: str, *columns, where: str | None = None) -> Index:
    condition = {"sqlite_where": text(where), "postgresql_where": text(where)} if where else {}
    return Index(name, *columns, unique=True, **condition)


def _partial(name: str, *columns, where: str) -> Index:
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


schema_versions = Table(
    "schema_versions", metadata,
    Column("version", Integer, primary_key=True, autoincrement=False), Column("applied", Double, nullable=False),
)  # fmt: skip

campaigns = Table(
    "campaigns", metadata,
    _key(), Column("name", Text, nullable=False, unique=True), Column("settings", Text, nullable=False),
    Column("created", Double, nullable=False),
)  # fmt: skip

shapes = Table(
    "shapes", metadata,
    _key(), _to("campaigns"), Column("position", Integer, nullable=False), Column("asset", Text, nullable=False, unique=True),
    Column("generator", Text, nullable=False), Column("source", Text, nullable=False), Column("seed", BigInteger, nullable=False),
    Column("psi", Double), Column("level", Double),  # null: not known
    Column("resolution", Integer, nullable=False), Column("triangles", Integer, nullable=False),
    Column("degradation", Text, nullable=False, server_default=text("''")),
    UniqueConstraint("campaign_id", "position"),
)  # fmt: skip

pairs = Table(
    "pairs", metadata,
    _key(), _to("campaigns"), Column("position", Integer, nullable=False), _to("shapes", "first_id"), _to("shapes", "second_id"),
    Column("kind", Text, nullable=False), Column("expected", Text), Column("explanation", Text, nullable=False),
    Column("places", Integer, nullable=False), Column("taken", Integer, nullable=False, server_default=text("0")),
    UniqueConstraint("campaign_id", "position"),
    CheckConstraint("taken >= 0 AND taken <= places", name="pairs_places"),
    _partial("pairs_open", "campaign_id", "position", where="kind = 'pair' AND taken < places"),
)  # fmt: skip

annotators = Table(
    "annotators", metadata,
    _key(), Column("name", Text, nullable=False, unique=True), Column("role", Text, nullable=False),
    Column("token_hash", Text, unique=True), Column("created", Double, nullable=False), Column("revoked", Double),
)  # fmt: skip

sessions = Table(
    "sessions", metadata,
    Column("id_hash", Text, primary_key=True), _to("annotators"), Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False, index=True),
)  # fmt: skip

assignments = Table(
    "assignments", metadata,
    _key(), Column("token", Text, nullable=False, unique=True), _to("campaigns"), _to("annotators"), _to("pairs"),
    Column("sequence", Integer, nullable=False), Column("kind", Text, nullable=False), Column("first_is_left", Integer, nullable=False),
    Column("leased", Double, nullable=False),  # last time the annotator was seen with it
    Column("released", Double),  # when its place was given to others
    Column("answered", Id),  # judgement that counts
    Column("undone", Double),  # when its answer was last taken back, until it is answered again
    UniqueConstraint("campaign_id", "annotator_id", "sequence"),
    _unique("assignments_once", "annotator_id", "pair_id", where="kind IN ('pair', 'training')"),
    _partial("assignments_open", "campaign_id", "leased", where="answered IS NULL AND released IS NULL"),
    Index("assignments_pair", "pair_id"),
)  # fmt: skip

judgements = Table(
    "judgements", metadata,
    _key(), _to("campaigns"), _to("annotators"), Column("key", Text, nullable=False),
    Column("type", Text, nullable=False),  # 'choice' or 'undo'
    _to("assignments", null=True),  # null: an undo that found nothing
    Column("choice", Text), Column("reason", Text), Column("milliseconds", BigInteger), Column("views", Text),
    Column("answered_at", Double), Column("received_at", Double, nullable=False),
    _to("judgements", "takes_back", null=True),
    Column("page_version", Text, nullable=False, server_default=text("''")),
    UniqueConstraint("annotator_id", "key"), UniqueConstraint("takes_back"),
    CheckConstraint("(type = 'choice') = (choice IS NOT NULL)", name="judgements_type"),
    Index("judgements_when", "campaign_id", "annotator_id", "received_at"),
    Index("judgements_assignment", "assignment_id"),
)  # fmt: skip
