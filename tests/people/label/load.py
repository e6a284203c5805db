"""Simulated annotators at work on a server in a process of its own, which is killed now and then.

Run as a program it is that server: `python -m tests.people.label.load URL CAMPAIGN CACHE STATIC PORT
[CERTIFICATE KEY]`, on loopback, exposed, so that tokens count.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.people.label.serving import SAME

REPO = Path(__file__).resolve().parents[3]
PATIENCE = 60.0  # seconds for which a request is tried again while the server is away
# seconds between two attempts: the first, doubled until the slowest, as outbox.js does
FIRST_PAUSE = 0.5
SLOWEST = 15.0


class ServerProcess:
    """The real server; `kill` ends it as a power cut would."""

    def __init__(
        self,
        url: str,
        campaign: str,
        cache: Path,
        static: Path,
        port: int,
        tls: tuple[Path, Path] | None = None,
    ):
        """`tls`: certificate and key."""
        self.command = [
            sys.executable,
            "-m",
            "tests.people.label.load",
            url,
            campaign,
            str(cache),
            str(static),
            str(port),
        ]
        self.command += [str(path) for path in tls or ()]
        self.base = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        self.log = cache.parent / "stderr.txt"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=log
            )
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if httpx.get(f"{self.base}/health", verify=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"the server did not start: {self.process.poll()}, {self.log.read_text()[-2000:]}"
                )
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@dataclass
class Work:
    acknowledged: dict[tuple[str, str], str] = field(default_factory=dict)  # (annotator, key) -> choice
    sent: Counter = field(default_factory=Counter)  # (annotator, key) -> attempts
    seconds: list[float] = field(default_factory=list)  # of each answered submission
    duplicates: int = 0  # answers that the server had stored without an acknowledgement that arrived
    rejected: Counter = field(default_factory=Counter)  # status -> count


class Annotator:
    """One browser's worth of work: log in, then ask, look, answer,
    and send again what was not acknowledged.
    """

    def __init__(self, name: str, token: str, base: str, work: Work, count: int, look: float):
        self.name = name
        self.token = token
        self.work = work
        self.count = count
        self.look = look
        self.client = httpx.AsyncClient(base_url=base, headers=SAME, timeout=15, verify=False)
        self.rng = random.Random(name)

    async def run(self) -> None:
        async with self.client:
            page = (await self._send("GET", "/login")).text
            csrf = page.split('name="csrf" value="')[1].split('"')[0]
            await self._send("POST", "/login", data={"token": self.token, "csrf": csrf})
            self.client.headers["X-CSRF-Token"] = (await self._send("GET", "/api/session")).json()["csrf"]
            pending = []
            done = 0
            while done < self.count:
                if not pending:
                    pending = (await self._send("GET", "/api/assignments?count=3")).json()["assignments"]
                    assert pending, f"{self.name}: no pair left after {done} judgements"
                await asyncio.sleep(self.rng.expovariate(1 / self.look))
                await self._submit_answer(pending.pop(0)["assignment"], f"{self.name}-{done}")
                done += 1

    async def _submit_answer(self, assignment: str, key: str) -> None:
        choice = self.rng.choice(["left", "right", "tie"])
        body = {
            "key": key,
            "assignment": assignment,
            "choice": choice,
            "milliseconds": 900,
            "views": ["front"],
            "answered_at": time.time(),
        }
        response = await self._send(
            "POST", "/api/judgements", count=(self.name, key), json={**body, "page_version": "load"}
        )
        if response.status_code in (200, 201):
            self.work.acknowledged[self.name, key] = choice
            self.work.duplicates += response.json()["duplicate"]
        else:
            self.work.rejected[response.status_code] += 1

    async def _send(
        self, method: str, path: str, count: tuple[str, str] | None = None, **kwargs
    ) -> httpx.Response:
        end = time.monotonic() + PATIENCE
        pause = FIRST_PAUSE
        while True:
            if count:
                self.work.sent[count] += 1
            began = time.perf_counter()
            try:
                response = await self.client.request(method, path, **kwargs)
                if count:
                    self.work.seconds.append(time.perf_counter() - began)
                return response
            except httpx.TransportError:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, SLOWEST)


async def labour(annotators: list[Annotator], server: ServerProcess, kills: int, total: int) -> None:
    """Let all work at once; kill the server `kills` times, evenly over the judgements, and start it again."""
    work = annotators[0].work
    tasks = [asyncio.create_task(a.run()) for a in annotators]
    for number in range(1, kills + 1):
        while len(work.acknowledged) < total * number / (kills + 1) and not all(t.done() for t in tasks):
            await asyncio.sleep(0.02)
        server.kill()
        await asyncio.to_thread(server.start)
    await asyncio.gather(*tasks)


def main(
    url: str,
    campaign: str,
    cache: str,
    static: str,
    port: str,
    certificate: str | None = None,
    key: str | None = None,
) -> None:
    from eg3d_rlhf.people.label.server.app import serve
    from eg3d_rlhf.people.label.server.options import AppOptions, Limits
    from eg3d_rlhf.people.label.shape_files import ShapeCache
    from eg3d_rlhf.people.label.store import Store

    limits = Limits(anonymous=(1e4, 1e5))  # all annotators share one address here
    options = AppOptions(
        store=Store.open(url, create=False),
        campaign=campaign,
        cache=ShapeCache(cache),
        exposed=True,
        static=Path(static),
        limits=limits,
        access_log=Path(cache) / "access.jsonl",
    )
    pem = {"certificate": Path(certificate), "key": Path(key)} if certificate and key else {}
    serve(options, "127.0.0.1", int(port), **pem)


if __name__ == "__main__":
    main(*sys.argv[1:])
