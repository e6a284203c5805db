"""Ten annotators beside 1,500 half-sent headers without a token: those who are logged in notice nothing, and
newcomers still get in.
"""

import asyncio
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from eg3d_rlhf.people.label.store import Store
from tests.people.label import serving
from tests.people.label.attack import any_server
from tests.people.label.load import REPO, Annotator, ServerProcess, Work
from tests.people.label.test_load import free_port

pytestmark = pytest.mark.long
CROWD = 10
COUNT = 1500
SECONDS = 25.0
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CONFIGURATION = REPO / "docs" / "nginx.conf"


class MemoryMonitor(threading.Thread):
    """Records a process's memory until `over` is set."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.first, self.most, self.over = pid, self.megabytes(pid), 0.0, threading.Event()

    @property
    def processor(self) -> float:
        with open(f"/proc/{self.pid}/stat") as stat:
            return sum(int(word) for word in stat.read().rpartition(")")[2].split()[11:13]) / os.sysconf(
                "SC_CLK_TCK"
            )

    @staticmethod
    def megabytes(pid: int) -> float:
        with open(f"/proc/{pid}/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))

    def run(self) -> None:
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


async def siege(
    server: ServerProcess, crowd: list[Annotator], late: dict[str, str], flags: list[str]
) -> dict:
    """Annotators at work, then the attack, with newcomers in its midst; then one more newcomer when it is
    over. Returns the figures.
    """
    work = crowd[0].work
    new = Work()
    tasks = [asyncio.create_task(annotator.run()) for annotator in crowd]
    await asyncio.sleep(2)
    early = len(work.seconds)
    await asyncio.sleep(5)
    calm = work.seconds[early:]
    begun = len(work.seconds)
    monitor = MemoryMonitor(server.process.pid)
    monitor.start()
    used = monitor.processor
    port = server.base.rsplit(":", 1)[1]
    command = [
        "nice",
        sys.executable,
        "-m",
        "tests.people.label.attack",
        port,
        str(COUNT),
        str(SECONDS),
        *flags,
    ]
    attack = await asyncio.create_subprocess_exec(*command, cwd=REPO, stdout=subprocess.PIPE)
    await asyncio.sleep(6)
    during = {name: late[name] for name in list(late)[:-1]}
    came = await newcomers(during, server.base, new, 2.0)
    counts = json.loads((await attack.communicate())[0])
    under = work.seconds[begun:]
    over = time.monotonic()
    monitor.over.set()
    used = monitor.processor - used
    await newcomers({name: late[name] for name in late if name not in during}, server.base, new, 0)
    recovery = time.monotonic() - over
    for annotator in crowd:
        annotator.count = 0
    await asyncio.gather(*tasks)
    percentile = lambda seconds: round(1000 * float(np.percentile(seconds, 95)), 1)  # noqa: E731
    return {
        "calm p95": percentile(calm),
        "p95": percentile(under),
        "slowest": round(1000 * max(under), 1),
        "submissions": len(under),
        "processor": round(used / SECONDS, 2),
        "resent": sum(n > 1 for n in work.sent.values()),
        "newcomers": came,
        "recovery": round(recovery, 2),
        "memory": round(monitor.most - monitor.first, 1),
        "lines": len(server.log.read_text().splitlines()),
        **counts,
    }


def besieged(folder, memory, tls, many: bool) -> dict:
    """A server of its own under attack, its database in the folder `memory`; the figures."""
    settings = serving.settings()
    url = f"sqlite:///{memory / 'labels.db'}"
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
    server = ServerProcess(url, settings.name, folder / "cache", serving.static(folder), free_port(), tls)
    server.start()
    try:
        work = Work()
        names = list(tokens)
        crowd = [Annotator(name, tokens[name], server.base, work, 10_000, 0.3) for name in names[:CROWD]]
        flags = [*(["--tls"] if tls else []), *(["--many"] if many else [])]
        return asyncio.run(siege(server, crowd, {name: tokens[name] for name in names[CROWD:]}, flags))
    finally:
        server.kill()


# the second from the annotators' own address
@pytest.mark.parametrize(("tls", "many"), [(False, True), (True, False)], ids=["plain", "tls"])
def test_slow_connections(tmp_path, certificate, capsys, tls, many):
    shm = Path("/dev/shm")  # commits that wait for a busy disk are another matter, see test_load.py
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as memory:
        figures = besieged(tmp_path, Path(memory), certificate if tls else None, many)
    with capsys.disabled():
        print(json.dumps({"tls": tls, "many": many, **figures}))
    # over TLS some are closed before their handshake is done
    assert figures["connected"] + figures.get("errors", 0) >= COUNT and figures["submissions"] > 100
    assert figures["p95"] < 100 and figures["resent"] == 0
    assert max(figures["newcomers"]) < 10 and figures["recovery"] < 10
    assert figures["memory"] < 100 and figures["lines"] < 100


# ---- docs/nginx.conf, as it is but for its two ports, in front of the application


@pytest.fixture
def proxied(tmp_path, certificate):
    """A server that trusts the headers of nginx, nginx in front of it, and nginx's port."""
    log = tmp_path / "access.jsonl"
    front = free_port()
    with serving.running(
        tmp_path / "server", config={"proxy": "127.0.0.1"}, exposed=True, access_log=log
    ) as served:
        text = CONFIGURATION.read_text()
        for port, real in (
            ("listen 8443 ", f"listen 127.0.0.1:{front} "),
            ("127.0.0.1:8000", urlsplit(served.url).netloc),
        ):
            assert text.count(port) == 1
            text = text.replace(port, real)
        (tmp_path / "nginx.conf").write_text(text)
        for file in certificate:
            shutil.copy(file, tmp_path)
        settings = f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/nginx.log;"
        nginx = subprocess.Popen(
            [NGINX, "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", settings], stderr=subprocess.DEVNULL
        )
        try:
            end = time.monotonic() + 10
            while socket.socket().connect_ex(("127.0.0.1", front)):
                assert nginx.poll() is None and time.monotonic() < end, (tmp_path / "nginx.log").read_text()
                time.sleep(0.05)
            yield served, front
        finally:
            nginx.terminate()
            nginx.wait(10)


@pytest.mark.skipif(NGINX is None, reason="nginx not found; install Debian's package nginx-light")
@pytest.mark.skipif(
    os.geteuid() != 0,
    reason="Debian's nginx keeps temporary files where only root may write; run the test as root",
)
def test_the_example_configuration(proxied):
    served, port = proxied
    url = f"https://127.0.0.1:{port}"
    path = httpx.HTTPTransport(verify=any_server(), local_address="127.5.6.7")
    with httpx.Client(
        base_url=url, transport=path, headers={"X-Forwarded-For": "6.6.6.6", "Origin": url}
    ) as page:
        response = serving.login(page, served.store.add_annotator("ann"))
        assert response.status_code == 303 and "Secure" in response.headers["set-cookie"]
        page.headers["X-CSRF-Token"] = page.get("/api/session").json()["csrf"]
        pair = page.get("/api/assignments").json()["assignments"][0]
        assert page.get(f"/api/shapes/{pair['left']}").status_code == 200
        assert page.post("/api/judgements", content=b"x" * 70_000).status_code == 413
        slow = [ssl_socket(port) for _ in range(150)]
        for connection in slow:
            connection.sendall(b"GET /login HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
        began = time.monotonic()
        assert (
            serving.answer(page, pair["assignment"], "k").status_code == 201 and time.monotonic() - began < 2
        )
        for connection in (slow[0], slow[-1], silent[0], silent[-1]):
            connection.settimeout(15 - (time.monotonic() - began))
            try:
                assert connection.recv(4096) == b""
            except ConnectionResetError:
                pass
        assert 8 < time.monotonic() - began < 15
        for connection in (*slow, *silent):
            connection.close()
    entries = [json.loads(line) for line in served.options.access_log.read_text().splitlines()]
    assert {entry["address"] for entry in entries if entry["event"] == "request"} == {"127.5.6.7"}


def ssl_socket(port: int) -> ssl.SSLSocket:
    """A connection whose handshake is done."""
    return any_server().wrap_socket(socket.create_connection(("127.0.0.1", port)))
