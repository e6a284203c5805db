"""The worker as a process: it draws a campaign of a real database, and ends with its parent however that
ends.
"""

import gzip
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from eg3d_rlhf.core import bundled
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.people.label.entities import CampaignSettings, PlannedPair
from eg3d_rlhf.people.label.preparation import Preparation
from eg3d_rlhf.people.label.shape_files import ShapeCache
from eg3d_rlhf.people.label.store import Store
from tests.people.label.plans import decode_mesh, numbered

SECONDS = 90  # that a worker may take on a busy machine


@pytest.fixture(scope="module")
def generator_hash() -> str:
    if not bundled.GENERATOR.exists():
        pytest.skip("needs assets/generator.safetensors; restore assets/ from the repository")
    return load_generator().hash


@pytest.fixture
def campaign(tmp_path, generator_hash):
    """Makes a campaign of so many pairs; returns the database's URL."""

    def make(pairs: int, show_render: bool = False, failing: int | None = None, **fields) -> str:
        shapes = numbered(
            2 * pairs, generator=generator_hash, **{"resolution": 32, "triangles": 500, **fields}
        )
        if failing is not None:
            shapes[failing] = replace(shapes[failing], level=1e6)
        url = f"sqlite:///{tmp_path}/labels.db"
        with Store.open(url) as store:
            settings = CampaignSettings(name="first", show_render=show_render)
            store.create_campaign(
                settings,
                [PlannedPair(first=a, second=b) for a, b in zip(shapes[::2], shapes[1::2], strict=True)],
            )
        return url

    return make


def planned(url: str) -> list:
    with Store.open(url) as store:
        return [shape for _, shape in store.shapes(store.campaign("first").id)]


def wait_until(condition, what: str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still waiting for {what}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not count."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_stops_the_worker_is_reported_and_it_is_not_restarted_for_ever(tmp_path, monkeypatch):
    work = Preparation("sqlite:///none.db", "first", tmp_path / "cache")
    start = subprocess.Popen
    reason = "out of memory"
    dies = [sys.executable, "-c", f"import sys; sys.exit('{reason}')"]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: start(dies, **how))
    work.start()
    pids = set()
    for _ in range(6):
        pids.add(work._process.pid)
        wait_until(lambda: not work.running, "the worker's end")
        error = work.progress()["error"]
        assert "code 1" in error and str(work.log) in error and work.log.read_text().strip() == reason
        work.ensure()
    assert len(pids) == 3 and not work.running


@pytest.mark.long
def test_killed_at_any_moment_it_goes_on_where_it_was(campaign, tmp_path):
    url = campaign(20, resolution=64)
    cache = ShapeCache(tmp_path / "cache")
    shapes = planned(url)

    def count() -> int:
        return sum(cache.mesh(shape) is not None for shape in shapes)

    work = Preparation(url, "first", cache)
    work.start()
    wait_until(lambda: count() >= 3, "three shapes")
    os.kill(work._process.pid, signal.SIGKILL)
    wait_until(lambda: not work.running, "the worker's death")
    done = count()
    times = {shape.seed: cache.mesh(shape).stat().st_mtime_ns for shape in shapes if cache.mesh(shape)}
    assert done < 40 and "code -9" in work.progress()["error"]
    work.ensure()
    wait_until(lambda: work.progress()["finished"], "the rest")
    assert count() == 40 and all(
        cache.mesh(shapes[seed]).stat().st_mtime_ns == at for seed, at in times.items()
    )
    for shape in shapes:
        decode_mesh(gzip.decompress(cache.mesh(shape).read_bytes()))
    work.stop()
    assert not work.running


PARENT = """
import os, sys, time
from eg3d_rlhf.people.label.preparation import Preparation
work = Preparation(sys.argv[1], "first", sys.argv[2])
work.start()
print(work._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.long
def test_it_ends_with_a_parent_that_is_killed(campaign, tmp_path, repo):
    url = campaign(400, resolution=96)
    command = [sys.executable, "-c", PARENT, url, str(tmp_path / "cache")]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(repo)}
    )
    try:
        worker = int(parent.stdout.readline())
        wait_until(lambda: list((tmp_path / "cache").glob("*/*.shp.gz")), "the first shape")
        assert alive(worker) and os.getpriority(os.PRIO_PROCESS, worker) >= 10
        threads = len(os.listdir(f"/proc/{worker}/task"))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    wait_until(lambda: not alive(worker), "the worker's end", 10)
    assert threads <= 4  # main, the monitor of the parent, and no worker threads
    assert len(list((tmp_path / "cache").glob("*/*.shp.gz"))) < 800


def test_stop_ends_it_at_once_and_no_process_list_shows_the_databases_password(tmp_path):
    work = Preparation("postgresql://me:secret@localhost:1/none", "first", tmp_path / "cache")
    work.start()
    worker = work._process.pid
    with open(f"/proc/{worker}/cmdline", "rb") as file:
        assert b"secret" not in file.read()
    work.stop()
    work.stop()
    assert not alive(worker) and not work.running and work.progress()["finished"] is False
