"""Opening a database: it is created once, even by concurrent processes; a database that is no store of this
version is rejected and left unchanged.
"""

import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from eg3d_rlhf.people.label.database import VERSION
from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.people.label.entities import CampaignSettings
from eg3d_rlhf.people.label.server.identity import server_secret
from eg3d_rlhf.people.label.server.request_checks import AccessLog
from eg3d_rlhf.people.label.store import Store
from tests.people.label.plans import plan
from tests.rejections import raising
from training.storage import write_atomic


def test_opening_twice_at_once_makes_one_schema(database_url):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store.open(database_url), range(4)))
    stores[0].create_campaign(CampaignSettings(name="c"), plan(1))
    assert [s.campaign().settings.name for s in stores] == ["c"] * 4
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    "statement",
    [
        f"INSERT INTO schema_versions VALUES ({VERSION + 1}, 0)",
        "UPDATE schema_versions SET version = 1",
        "DELETE FROM schema_versions",
    ],
)
def test_another_version_is_rejected(store, tmp_path, statement):
    with store.database.write() as c:
        c.execute(text(statement))
    with raising("labels.db", f"version {VERSION}"):
        Store.open(f"sqlite:///{tmp_path / 'labels.db'}")


@pytest.mark.parametrize(
    ("url", "error", "names"),
    [
        ("labels.db", ValueError, ("'labels.db'", "sqlite:///", "postgresql://")),
        ("mysql://host/db", ValueError, ("SQLite", "PostgreSQL", "mysql")),
        ("sqlite://", ValueError, ("'sqlite://'", "sqlite:///labels.db")),
        ("sqlite:///:memory:", ValueError, ("'sqlite:///:memory:'", "sqlite:///labels.db")),
        ("sqlite:///{tmp}/none/l.db", FileNotFoundError, ("{tmp}/none",)),
        ("sqlite:///{tmp}/text.db", ValueError, ("{tmp}/text.db", "SQLite")),
        ("sqlite:///{tmp}/foreign.db", ValueError, ("{tmp}/foreign.db", "pairs")),
    ],
)
def test_what_is_no_store_is_rejected(tmp_path, url, error, names):
    (tmp_path / "text.db").write_text("seed,seed\n" * 500)
    with sqlite3.connect(tmp_path / "foreign.db") as other:
        other.execute("CREATE TABLE pairs (x)")
    other.close()
    with raising(*(name.format(tmp=tmp_path) for name in names), kind=error):
        Store.open(url.format(tmp=tmp_path))


def test_a_store_that_must_exist_is_not_made(tmp_path):
    with raising(str(tmp_path / "l.db"), kind=FileNotFoundError):
        Store.open(f"sqlite:///{tmp_path / 'l.db'}", create=False)
    sqlite3.connect(tmp_path / "l.db").close()
    (tmp_path / "l.db").touch()
    with raising(str(tmp_path / "l.db")):
        Store.open(f"sqlite:///{tmp_path / 'l.db'}", create=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "l.db"]


def test_messages_hold_no_password(tmp_path):
    pytest.importorskip("psycopg", reason="psycopg not found; pip install 'eg3d-rlhf[postgres]'")
    with raising("postgresql+psycopg://", tmp_path.name, kind=OSError) as caught:
        Store.open(f"postgresql://ann:secret@/labels?host={tmp_path}")
    assert "secret" not in str(caught.value) and "psycopg" in str(caught.value)


# ---- what is written can be read by its owner alone; what was there keeps its rights


@pytest.fixture
def ordinary_umask():
    """As most accounts have it: what is made can be read by all."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def rights(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_its_owners_alone(tmp_path, ordinary_umask):
    folder = tmp_path / "runs" / "labels"
    with open_store(f"sqlite:///{folder / 'labels.db'}", create=True) as store:
        store.add_annotator("ann")
        log = AccessLog(folder / "access.jsonl")
        log.write("start", {})
        log.close()
        server_secret(folder / "server.key")
        write_atomic(folder / "design.json", b"{}", private=True)
        rights_of = {path.name: rights(path) for path in folder.iterdir()}
    assert set(rights_of) == {
        "labels.db",
        "labels.db-wal",
        "labels.db-shm",
        "access.jsonl",
        "server.key",
        "design.json",
    }
    assert set(rights_of.values()) == {0o600}
    assert (rights(folder), rights(folder.parent)) == (0o700, 0o755)
