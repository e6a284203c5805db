"""What the labelling application writes can be read by its owner alone; what was there keeps its rights."""

import os
import stat

import pytest

from eg3d_rlhf.people.label.server.gate import AccessLog
from eg3d_rlhf.people.label.server.identity import kept_secret
from eg3d_rlhf.people.label.store import open_store
from training.storage import write_atomic


@pytest.fixture(autouse=True)
def ordinary_umask():
    """As most accounts have it: what is made can be read by all."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def rights(path) -> int:
    """The permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_its_owners_alone(tmp_path):
    folder = tmp_path / "runs" / "labels"
    with open_store(f"sqlite:///{folder / 'labels.db'}", create=True) as store:
        store.add_annotator("ann")
        log = AccessLog(folder / "access.jsonl")
        log.write("start", {})
        log.close()
        kept_secret(folder / "server.key")
        write_atomic(folder / "design.json", b"{}", private=True)
        found = {path.name: rights(path) for path in folder.iterdir()}
    assert set(found) == {"labels.db", "labels.db-wal", "labels.db-shm", "access.jsonl", "server.key", "design.json"}
    assert set(found.values()) == {0o600}
    assert (rights(folder), rights(folder.parent)) == (0o700, 0o755)


def test_what_was_there_keeps_its_rights(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "labels.db").touch(0o640)
    with open_store(f"sqlite:///{tmp_path / 'labels.db'}", create=True):
        pass
    (tmp_path / "access.jsonl").touch(0o644)
    log = AccessLog(tmp_path / "access.jsonl")
    log.write("start", {})
    log.close()
    assert (rights(tmp_path / "labels.db"), rights(tmp_path / "access.jsonl"), rights(tmp_path)) == (0o640, 0o644, 0o755)
    write_atomic(tmp_path / "report.json", b"{}")
    assert rights(tmp_path / "report.json") == 0o644
