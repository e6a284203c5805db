"""A labelling server for tests: a small campaign of made-up shapes, prepared at once, and clients of every
kind.
"""

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
from fastapi import FastAPI

from eg3d_rlhf.people.label.entities import CampaignSettings, Kind, Mode, PlannedPair, Shape
from eg3d_rlhf.people.label.server.app import create_app
from eg3d_rlhf.people.label.server.http_server import Server, listen
from eg3d_rlhf.people.label.server.identity import server_secret
from eg3d_rlhf.people.label.server.options import AppOptions, Limits
from eg3d_rlhf.people.label.server.served_shapes import Addresses
from eg3d_rlhf.people.label.shape_files import ShapeCache, compress, encode_mesh
from eg3d_rlhf.people.label.store import Store

NAMES = {"a": "baseline-network", "b": "finetuned-network"}  # of the two generators
FIRST_SEED = 7_654_321
SAME = {"Sec-Fetch-Site": "same-origin"}

GENEROUS = Limits(anonymous=(1e4, 1e5), guesses=(1e4, 1e5), requests=(1e4, 1e5))  # for tests of other things


def shape(generator: str, seed: int) -> Shape:
    digest = hashlib.sha256(generator.encode()).hexdigest()
    source = f"/secret/{NAMES[generator]}.safetensors"
    return Shape(
        generator=digest, source=source, seed=seed, psi=0.7125, level=10.25, resolution=128, triangles=30_000
    )


def mesh(seed: int, vertices: int = 40) -> bytes:
    """A made-up mesh as it lies in the cache."""
    rng = np.random.default_rng(seed)
    return compress(encode_mesh(rng.normal(size=(vertices, 3)), rng.integers(0, vertices, (2 * vertices, 3))))


def plan(pairs: int, training: int = 2, gold: int = 2) -> list[PlannedPair]:
    """Pairs of one seed each, 'a' first; every pair has its own seed."""
    made = []
    for i in range(training + gold + pairs):
        kind = Kind.TRAINING if i < training else Kind.GOLD if i < training + gold else Kind.PAIR
        expected = None if kind is Kind.PAIR else ("first", "second")[i % 2]
        explanation = "The other one has a hole." if kind is Kind.TRAINING else ""
        first, second = (shape(g, FIRST_SEED + i) for g in "ab")
        if kind is not Kind.PAIR:
            second = replace(
                second, generator=first.generator, source=first.source, seed=FIRST_SEED + 5000 + i
            )
        made.append(
            PlannedPair(first=first, second=second, kind=kind, expected=expected, explanation=explanation)
        )
    return made


def settings(mode: Mode = Mode.LABEL, **values) -> CampaignSettings:
    extra = {"network": NAMES["b"]}
    return CampaignSettings(
        **{"name": f"{NAMES['a']}-against-{NAMES['b']}", "mode": mode, "seed": 3, "extra": extra, **values}
    )


def fill(cache: ShapeCache, shapes: Iterable[Shape], vertices: Callable[[Shape], int] = lambda s: 40) -> None:
    for drawn in shapes:
        cache.put_mesh(drawn, mesh(drawn.seed, vertices(drawn)))


@dataclass
class Served:
    """A running server's parts, and clients of it."""

    options: AppOptions
    store: Store
    campaign: int  # id
    app: FastAPI
    url: str = ""
    addresses: Addresses | None = None

    def asset(self, address: str) -> str:
        """The store's token of the shape at an address."""
        if self.addresses is None:
            secret = self.options.secret or server_secret(self.options.cache.folder / "server.key")
            self.addresses = Addresses(secret, (asset for asset, _ in self.store.shapes(self.campaign)))
        return self.addresses.asset(address)

    def client(self, token: str | None = None, **headers: str) -> httpx.Client:
        """A client without cookies; with a token, it sends it."""
        if token:
            headers["Authorization"] = f"Bearer {token}"
        # no TLS here: spares loading certificates
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, verify=False)

    def browser(self, token: str | None = None) -> httpx.Client:
        """A client as a page is: same-origin, with its CSRF token; logged in where a token is given."""
        client = self.client(**SAME)
        if token:
            assert login(client, token).status_code == 303
        client.headers["X-CSRF-Token"] = client.get("/api/session").json()["csrf"]
        return client


def routes(served: Served, filled: bool = True) -> list[tuple[str, str]]:
    """All methods and paths of the application, with 'abc' for what varies."""
    pairs = []
    pending = list(served.app.routes)
    while pending:
        route = pending.pop()
        pending += getattr(getattr(route, "original_router", None), "routes", [])
        path = getattr(route, "path", None)
        if path is not None and getattr(route, "methods", None):
            path = re.sub(r"\{\w+\}", "abc", path) if filled else path
            pairs += [(method, path) for method in route.methods]
    return sorted(set(pairs))


def login(client: httpx.Client, token: str):
    page = client.get("/login").text
    csrf = page.split('name="csrf" value="')[1].split('"')[0]
    return client.post("/login", data={"token": token, "csrf": csrf})


@contextlib.contextmanager
def running(folder: Path, config: dict | None = None, **values) -> Iterator[Served]:
    """`build` what the values say and serve it from a thread; `config` as the arguments of `Server`."""
    served = build(folder, **values)
    listening = listen("127.0.0.1", 0, served.options.limits)
    scheme = "https" if config and "certificate" in config else "http"
    served.url = f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with serve_in_thread(Server(served.app, listening, served.options.limits, **(config or {}))):
            yield served
    finally:
        served.store.close()


@contextlib.contextmanager
def serve_in_thread(server: Server) -> Iterator[None]:
    """Run a server in a thread, from its first to its last answer."""
    started = threading.Event()
    server.hooks_startup.append(started.set)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()


def build(
    folder: Path,
    pairs: int = 12,
    mode: Mode = Mode.LABEL,
    exposed: bool = False,
    prepared: bool = True,
    url: str | None = None,
    planned: list[PlannedPair] | None = None,
    campaign: dict | None = None,
    clock: Callable[[], float] = time.time,
    **options,
) -> Served:
    """Make store, campaign, cache and application in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store.open(url or f"sqlite:///{folder / 'labels.db'}", clock=clock)
    made = settings(mode, **(campaign or {}))
    planned = plan(pairs) if planned is None else planned
    number = store.create_campaign(made, planned)
    cache = ShapeCache(folder / "cache")
    if prepared:
        fill(cache, (s for _, s in store.shapes(number)))
    values = {
        "store": store,
        "campaign": made.name,
        "cache": cache,
        "exposed": exposed,
        "static": static(folder),
        **options,
    }
    options = AppOptions(**values)
    return Served(options, store, number, create_app(options))


def static(folder: Path) -> Path:
    path = folder / "static"
    path.mkdir(exist_ok=True)
    for name in ("index.html", "admin.html"):
        (path / name).write_text(f"<!doctype html><title>{name}</title>")
    (path / "app.js").write_text("'use strict';\n" * 50)
    (path / "notes.py").write_text("print()")
    return path


def answer(client: httpx.Client, assignment: str, key: str, choice: str = "left", **values):
    body = {
        "key": key,
        "assignment": assignment,
        "choice": choice,
        "milliseconds": 900,
        "views": ["front"],
        "answered_at": 1.7e9,
        "page_version": "t",
    }
    return client.post("/api/judgements", json={**body, **values})
