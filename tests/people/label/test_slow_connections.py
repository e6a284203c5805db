"""Thousands of slow and silent connections without a token: those who are logged in notice nothing, and newcomers still get in."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from eg3d_rlhf.people.label.store import Store
from tests.people.label import serving
from tests.people.label.load import REPO, Annotator, ServerProcess, Work
from tests.people.label.test_load import free_port

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl not found; install Debian's package openssl"),
    pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit not found; install Debian's package util-linux"),
]
CROWD, COUNT, SECONDS = 10, 2000, 25.0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of its own, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-out", folder / "cert.pem", "-keyout", folder / "key.pem"], check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


class Watch(threading.Thread):
    """Looks at a process's memory until it is told to stop."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.first, self.most, self.over = pid, self.megabytes(pid), 0.0, threading.Event()

    @property
    def processor(self) -> float:
        """Seconds of processor time so far."""
        with open(f"/proc/{self.pid}/stat") as stat:
            return sum(int(word) for word in stat.read().rpartition(")")[2].split()[11:13]) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def megabytes(pid: int) -> float:
        """Resident memory, in MB."""
        with open(f"/proc/{pid}/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))

    def run(self) -> None:
        """Keep the largest."""
        while not self.over.wait(0.2):
            self.most = max(self.most, self.megabytes(self.pid))


async def newcomers(tokens: dict[str, str], base: str, work: Work, pause: float) -> list[float]:
    """One after another logs in and answers once; the seconds that each took."""
    seconds = []
    for name, token in tokens.items():
        began = time.monotonic()
        await Annotator(name, token, base, work, 1, 0.01).run()
        seconds.append(round(time.monotonic() - began, 2))
        await asyncio.sleep(pause)
    return seconds


async def siege(server: ServerProcess, crowd: list[Annotator], late: dict[str, str], flags: list[str]) -> dict:
    """Annotators at work, then the attack, with newcomers in its midst; then one more newcomer when it is over. Returns the figures."""
    work, new = crowd[0].work, Work()
    tasks = [asyncio.create_task(annotator.run()) for annotator in crowd]
    await asyncio.sleep(2)
    early = len(work.seconds)
    await asyncio.sleep(5)
    calm, begun = work.seconds[early:], len(work.seconds)
    watch = Watch(server.process.pid)
    watch.start()
    used = watch.processor
    port = server.base.rsplit(":", 1)[1]
    command = ["nice", sys.executable, "-m", "tests.people.label.attack", port, str(COUNT), str(SECONDS), *flags]
    attack = await asyncio.create_subprocess_exec(*command, cwd=REPO, stdout=subprocess.PIPE)
    await asyncio.sleep(6)
    during = {name: late[name] for name in list(late)[:-1]}
    came = await newcomers(during, server.base, new, 2.0)
    counts = json.loads((await attack.communicate())[0])
    under, over = work.seconds[begun:], time.monotonic()
    watch.over.set()
    used = watch.processor - used
    await newcomers({name: late[name] for name in late if name not in during}, server.base, new, 0)
    recovery = time.monotonic() - over
    for annotator in crowd:
        annotator.count = 0
    await asyncio.gather(*tasks)
    percentile = lambda seconds: round(1000 * float(np.percentile(seconds, 95)), 1)  # noqa: E731
    return {
        "calm p95": percentile(calm), "p95": percentile(under), "slowest": round(1000 * max(under), 1), "submissions": len(under),
        "processor": round(used / SECONDS, 2), "sent again": sum(n > 1 for n in work.sent.values()),
        "newcomers": came, "recovery": round(recovery, 2),
        "memory": round(watch.most - watch.first, 1), "lines": len(server.log.read_text().splitlines()), **counts,
    }  # fmt: skip


def besieged(folder, memory, tls, many: bool, files: int | None = None) -> dict:
    """A server of its own under attack, its database in the folder `memory`; the figures."""
    settings, url = serving.settings(), f"sqlite:///{memory / 'labels.db'}"
    with Store.open(url) as store:
        campaign = store.create_campaign(settings, serving.plan(2000, training=2, gold=4))
        tokens = {f"annotator{i}": store.add_annotator(f"annotator{i}") for i in range(CROWD + 4)}
        cache = serving.ShapeCache(folder / "cache")
        shapes = [shape for _, shape in store.shapes(campaign)]
    serving.fill(cache, shapes[:1])
    for shape in shapes[1:]:
        link = cache._path(shape, ".shp.gz")
        link.parent.mkdir(exist_ok=True)
        link.hardlink_to(cache.mesh(shapes[0]))
    server = ServerProcess(url, settings.name, folder / "cache", serving.static(folder), free_port(), tls, files)
    server.start()
    try:
        work, names = Work(), list(tokens)
        crowd = [Annotator(name, tokens[name], server.base, work, 10_000, 0.3) for name in names[:CROWD]]
        flags = [*(["--tls"] if tls else []), *(["--many"] if many else [])]
        return asyncio.run(siege(server, crowd, {name: tokens[name] for name in names[CROWD:]}, flags))
    finally:
        server.kill()


@pytest.mark.parametrize(("tls", "many", "files"), [
    (False, False, None), (False, True, None), (True, False, None), (True, True, None), (False, True, 1024), (True, False, 1024),
])  # fmt: skip
def test_slow_connections(tmp_path, certificate, capsys, tls, many, files):
    shm = Path("/dev/shm")  # commits that wait for a busy disk are another matter, see test_load.py
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as memory:
        found = besieged(tmp_path, Path(memory), certificate if tls else None, many, files)
    with capsys.disabled():
        print(json.dumps({"tls": tls, "many": many, "files": files, **found}))
    assert found["connected"] >= COUNT and found["submissions"] > 100
    assert found["p95"] < 100 and found["sent again"] == 0
    assert max(found["newcomers"]) < 10 and found["recovery"] < 10
    assert found["memory"] < 100 and found["lines"] < 100
