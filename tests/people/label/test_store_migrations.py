"""Databases of earlier versions are led to the present one with what they hold; others are refused."""

import sqlite3

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import DBAPIError

from eg3d_rlhf.people.label import database
from eg3d_rlhf.people.label.database import VERSION
from eg3d_rlhf.people.label.entities import CampaignSettings, Choice
from eg3d_rlhf.people.label.store import Store
from tests.people.label.plans import HASH, answer, plan

VERSION_1 = """
CREATE TABLE schema_versions (version INTEGER NOT NULL PRIMARY KEY, applied {real} NOT NULL);
CREATE TABLE campaigns (id {id}, name TEXT NOT NULL UNIQUE, settings TEXT NOT NULL, created {real} NOT NULL);
CREATE TABLE shapes (id {id}, campaign_id {to} NOT NULL REFERENCES campaigns (id), position INTEGER NOT NULL, asset TEXT NOT NULL UNIQUE,
  generator TEXT NOT NULL, source TEXT NOT NULL, seed BIGINT NOT NULL, psi {real}, level {real}, resolution INTEGER NOT NULL,
  triangles INTEGER NOT NULL, UNIQUE (campaign_id, position));
CREATE TABLE pairs (id {id}, campaign_id {to} NOT NULL REFERENCES campaigns (id), position INTEGER NOT NULL,
  first_id {to} NOT NULL REFERENCES shapes (id), second_id {to} NOT NULL REFERENCES shapes (id), kind TEXT NOT NULL, expected TEXT,
  explanation TEXT NOT NULL, places INTEGER NOT NULL, taken INTEGER DEFAULT 0 NOT NULL, UNIQUE (campaign_id, position),
  CONSTRAINT pairs_places CHECK (taken >= 0 AND taken <= places));
CREATE INDEX pairs_open ON pairs (campaign_id, position) WHERE kind = 'pair' AND taken < places;
CREATE TABLE annotators (id {id}, name TEXT NOT NULL UNIQUE, role TEXT NOT NULL, token_hash TEXT UNIQUE, created {real} NOT NULL,
  revoked {real});
CREATE TABLE assignments (id {id}, token TEXT NOT NULL UNIQUE, campaign_id {to} NOT NULL REFERENCES campaigns (id),
  annotator_id {to} NOT NULL REFERENCES annotators (id), pair_id {to} NOT NULL REFERENCES pairs (id), sequence INTEGER NOT NULL,
  kind TEXT NOT NULL, first_is_left INTEGER NOT NULL, leased {real} NOT NULL, released {real}, answered {to},
  UNIQUE (campaign_id, annotator_id, sequence));
CREATE UNIQUE INDEX assignments_once ON assignments (annotator_id, pair_id) WHERE kind IN ('pair', 'training');
CREATE INDEX assignments_open ON assignments (campaign_id, leased) WHERE answered IS NULL AND released IS NULL;
CREATE INDEX assignments_pair ON assignments (pair_id);
CREATE TABLE judgements (id {id}, campaign_id {to} NOT NULL REFERENCES campaigns (id),
  annotator_id {to} NOT NULL REFERENCES annotators (id), key TEXT NOT NULL, type TEXT NOT NULL,
  assignment_id {to} REFERENCES assignments (id), choice TEXT, reason TEXT, milliseconds BIGINT,
  views TEXT, answered_at {real}, received_at {real} NOT NULL, takes_back {to} UNIQUE REFERENCES judgements (id),
  UNIQUE (annotator_id, key), CONSTRAINT judgements_type CHECK ((type = 'choice') = (choice IS NOT NULL)));
CREATE INDEX judgements_when ON judgements (campaign_id, annotator_id, received_at);
CREATE INDEX judgements_assignment ON judgements (assignment_id);
"""
TYPES = {
    "sqlite": {"id": "INTEGER NOT NULL PRIMARY KEY", "to": "INTEGER", "real": "DOUBLE"},
    "postgresql": {"id": "BIGSERIAL NOT NULL PRIMARY KEY", "to": "BIGINT", "real": "DOUBLE PRECISION"},
}  # fmt: skip
TRIGGERS = {
    "sqlite": [
        "CREATE TRIGGER judgements_no_update BEFORE UPDATE ON judgements BEGIN SELECT RAISE(ABORT, 'judgements are append-only'); END",
        "CREATE TRIGGER judgements_no_delete BEFORE DELETE ON judgements BEGIN SELECT RAISE(ABORT, 'judgements are append-only'); END",
    ],
    "postgresql": [
        "CREATE FUNCTION judgements_refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'judgements are append-only' USING ERRCODE = 'integrity_constraint_violation'; END $$",
        "CREATE TRIGGER judgements_no_change BEFORE UPDATE OR DELETE ON judgements FOR EACH ROW EXECUTE FUNCTION judgements_refuse()",
        "CREATE TRIGGER judgements_no_truncate BEFORE TRUNCATE ON judgements FOR EACH STATEMENT EXECUTE FUNCTION judgements_refuse()",
    ],
}  # fmt: skip
SETTINGS = '{"annotators_per_pair": 1, "gold_every": 0, "mode": "label", "name": "old", "repeat_share": 0, "swap_share": 0}'
CONTENT = [
    "INSERT INTO schema_versions VALUES (1, 1700000000)",
    f"INSERT INTO campaigns (name, settings, created) VALUES ('old', '{SETTINGS}', 1700000000)",
    *[
        "INSERT INTO shapes (campaign_id, position, asset, generator, source, seed, psi, level, resolution, triangles)"
        f" VALUES (1, {i}, 'asset{i}', '{HASH}', '', {i}, 0.7, 10, 128, 30000)" for i in range(4)
    ],
    *[
        "INSERT INTO pairs (campaign_id, position, first_id, second_id, kind, explanation, places, taken)"
        f" VALUES (1, {i}, {2 * i + 1}, {2 * i + 2}, 'pair', '', 1, {1 - i})" for i in range(2)
    ],
    "INSERT INTO annotators (name, role, token_hash, created) VALUES ('ann', 'annotator', 'aa', 1700000000)",
    "INSERT INTO assignments (token, campaign_id, annotator_id, pair_id, sequence, kind, first_is_left, leased, answered)"
    " VALUES ('tok', 1, 1, 1, 1, 'pair', 0, 1700000100, 1)",
    "INSERT INTO judgements (campaign_id, annotator_id, key, type, assignment_id, choice, milliseconds, views, received_at)"
    " VALUES (1, 1, 'k', 'choice', 1, 'right', 900, '[\"front\"]', 1700000200)",
]  # fmt: skip


@pytest.fixture(params=[1, 2])
def old_url(database_url, request):
    """A database as version 1 or 2 made it, with one judgement."""
    engine = create_engine(database_url)
    kind = engine.dialect.name
    with engine.begin() as c:
        for statement in [*VERSION_1.format(**TYPES[kind]).split(";\n"), *TRIGGERS[kind], *CONTENT]:
            if statement.strip():
                c.exec_driver_sql(statement)
        if request.param == 2:
            for statement in (*database.STEPS[2], *(database.SQLITE_STEPS[2] if kind == "sqlite" else ())):
                c.exec_driver_sql(statement.format(id=TYPES[kind]["to"], real=TYPES[kind]["real"]))
            c.exec_driver_sql("INSERT INTO schema_versions VALUES (2, 1710000000)")
    engine.dispose()
    return database_url


def described(url: str) -> dict:
    """Columns, keys and indices of all tables, free of the order in which they were made."""
    engine = create_engine(url)
    found = inspect(engine)
    tables = {}
    for table in found.get_table_names():
        columns = {c["name"]: (str(c["type"]), c["nullable"]) for c in found.get_columns(table)}
        indices = {i["name"]: (tuple(i["column_names"]), bool(i["unique"])) for i in found.get_indexes(table)}
        unique = {tuple(u["column_names"]) for u in found.get_unique_constraints(table)}
        foreign = {(tuple(f["constrained_columns"]), f["referred_table"]) for f in found.get_foreign_keys(table)}
        primary = tuple(found.get_pk_constraint(table)["constrained_columns"])
        tables[table] = (columns, {k: v for k, v in indices.items() if v[0] not in unique}, unique, foreign, primary)
    sqlite = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    postgres = "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal AND tgrelid = 'judgements'::regclass"
    with engine.connect() as c:
        triggers = set(c.exec_driver_sql(sqlite if engine.dialect.name == "sqlite" else postgres).scalars())
    engine.dispose()
    return {**tables, "triggers": triggers}


def test_earlier_versions_are_led_to_the_present_with_its_judgements(old_url):
    with Store.open(old_url) as store:
        (row,) = store.judgements()
        assert (row.annotator, row.left.seed, row.right.seed, row.choice, row.page_version) == ("ann", 1, 0, Choice.RIGHT, "")
        assert (row.left if row.choice == Choice.LEFT else row.right).seed == 0 and row.left.degradation == ""
        assert (row.left.file, row.left.condition, row.votes, row.comment) == ("", "", {}, None)
        campaign, ann = store.campaign("old").id, store.annotators()[0].id
        (shown,) = store.assignments(campaign, ann)
        store.submit(campaign, ann, answer(shown, "k2", page_version="2", comment="eh"))
        assert store.undo(campaign, ann, "u") == shown.token and store.session(store.open_session(ann, 10)).name == "ann"
        with pytest.raises(DBAPIError, match="append-only"), store.database.write() as c:
            c.execute(text("UPDATE judgements SET page_version = 'x'"))
        with store.database.read() as c:
            assert list(c.execute(text("SELECT version FROM schema_versions ORDER BY version")).scalars()) == list(range(1, VERSION + 1))
    with Store.open(old_url) as again:
        rows = list(again.judgements(include_undone=True))
        assert [(row.votes, row.comment) for row in rows] == [({}, None), ({}, "eh")]


def test_an_upgraded_database_equals_a_new_one(old_url, request, tmp_path):
    Store.open(old_url).close()
    sqlite = old_url.startswith("sqlite")
    new_url = f"sqlite:///{tmp_path / 'new.db'}" if sqlite else request.getfixturevalue("postgres_server").new_database()
    Store.open(new_url).close()
    old, new = described(old_url), described(new_url)
    assert set(old) == set(new)
    for table in new:
        assert old[table] == new[table], table


def test_a_failed_step_leaves_the_old_version_whole(old_url, monkeypatch):
    monkeypatch.setitem(database.STEPS, VERSION, (*database.STEPS[VERSION], "CREATE TABLE campaigns (id INTEGER)"))
    with pytest.raises(DBAPIError):
        Store.open(old_url)
    assert "file" not in described(old_url)["shapes"][0]
    monkeypatch.undo()
    with Store.open(old_url) as store:
        assert len(list(store.judgements())) == 1


def test_opening_twice_at_once_makes_one_schema(database_url):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store.open(database_url), range(4)))
    stores[0].create_campaign(CampaignSettings(name="c"), plan(1))
    assert [s.campaign().settings.name for s in stores] == ["c"] * 4
    for store in stores:
        store.close()


def test_a_later_version_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'l.db'}"
    with Store.open(url) as store, store.database.write() as c:
        c.execute(text(f"INSERT INTO schema_versions VALUES ({VERSION + 1}, 0)"))
    with pytest.raises(ValueError, match=f"version {VERSION} or earlier, got {VERSION + 1}. Update"):
        Store.open(url)


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("labels.db", ValueError, "expected a database URL"), ("mysql://host/db", ValueError, "expected SQLite or PostgreSQL"),
        ("sqlite://", ValueError, "expected a file"), ("sqlite:///:memory:", ValueError, "expected a file"),
        ("sqlite:///{tmp}/none/l.db", FileNotFoundError, "expected a folder"), ("sqlite:///{tmp}/text.db", ValueError, "another kind"),
        ("sqlite:///{tmp}/foreign.db", ValueError, "tables pairs without a schema version"),
    ],
)  # fmt: skip
def test_what_is_no_store_is_refused(tmp_path, url, error, words):
    (tmp_path / "text.db").write_text("seed,seed\n" * 500)
    with sqlite3.connect(tmp_path / "foreign.db") as other:
        other.execute("CREATE TABLE pairs (x)")
    other.close()
    with pytest.raises(error, match=words):
        Store.open(url.format(tmp=tmp_path))


def test_a_store_that_must_exist_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="got nothing there"):
        Store.open(f"sqlite:///{tmp_path / 'l.db'}", create=False)
    sqlite3.connect(tmp_path / "l.db").close()
    (tmp_path / "l.db").touch()
    with pytest.raises(ValueError, match="got a database without one"):
        Store.open(f"sqlite:///{tmp_path / 'l.db'}", create=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "l.db"]


def test_messages_hold_no_password(tmp_path):
    pytest.importorskip("psycopg", reason="psycopg not found; pip install 'eg3d-rlhf[postgres]'")
    with pytest.raises(OSError, match="Check the address") as caught:
        Store.open(f"postgresql://ann:secret@/labels?host={tmp_path}")
    assert "secret" not in str(caught.value) and "psycopg" in str(caught.value)
