"""A headless Chromium for the page's tests, and shapes to look at."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eg3d_rlhf.people.label.entities import Kind, PlannedPair, Shape
from eg3d_rlhf.people.label.server.options import STATIC
from eg3d_rlhf.people.label.shape_files import ShapeCache, compress, encode_mesh
from tests.people.label.serving import Served, running, shape

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason=(
        "the page is tested in Chromium, driven by Playwright: apt-get install chromium, pip install"
        " playwright"
    ),
)
ENGLISH = json.loads((STATIC.parent / "web" / "src" / "texts.en.json").read_text())  # of the page, by key
LESSON = "The other one has spikes."
ARGUMENTS = [
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
]


@contextlib.contextmanager
def chromium() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=ARGUMENTS, env={**os.environ, "NO_PROXY": "*"}
        )
        try:
            yield browser
        finally:
            browser.close()


@functools.cache
def bumpy_ball(seed: int, triangles: int) -> bytes:
    """A closed surface of about so many triangles, different for every seed, as it lies in the cache."""
    rows = max(3, round((triangles / 4) ** 0.5))
    columns = 2 * rows
    theta = np.pi * (np.arange(rows + 1) / rows)[:, None]
    phi = 2 * np.pi * (np.arange(columns) / columns)[None]
    rng = np.random.default_rng(seed)
    waves = sum(
        a * np.sin(k * theta) * np.cos(m * phi + p)
        for a, k, m, p in zip(
            rng.uniform(0.04, 0.12, 6),
            rng.integers(1, 6, 6),
            rng.integers(1, 7, 6),
            rng.uniform(0, 6, 6),
            strict=True,
        )
    )
    radius = 0.3 * (1 + waves * np.sin(theta) ** 2)
    xyz = np.stack(
        [
            radius * np.sin(theta) * np.sin(phi),
            radius * np.cos(theta) + 0 * phi,
            radius * np.sin(theta) * np.cos(phi),
        ],
        -1,
    )
    at = np.arange((rows + 1) * columns).reshape(rows + 1, columns)
    a, b, c, d = (x.ravel() for x in (at[:-1], at[1:], np.roll(at, -1, 1)[1:], np.roll(at, -1, 1)[:-1]))
    return compress(
        encode_mesh(xyz.reshape(-1, 3), np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)]))
    )


def plan(pairs: int, training: int = 0) -> list[PlannedPair]:
    made = []
    for i in range(training + pairs):
        first = shape("a", 1000 + 2 * i)
        second = replace(first, seed=first.seed + 1)
        lesson = {"kind": Kind.TRAINING, "expected": "first", "explanation": LESSON} if i < training else {}
        made.append(PlannedPair(first=first, second=second, **lesson))
    return made


def small(shape: Shape) -> bytes:
    """One of six shapes of 4,000 triangles."""
    return bumpy_ball(shape.seed % 6, 4000)


def large(shape: Shape) -> bytes:
    """One of six shapes of 30,000 triangles: as in earnest."""
    return bumpy_ball(shape.seed % 6, 30_000)


@contextlib.contextmanager
def serving_page(
    folder: Path, planned: list[PlannedPair], meshes: Callable[[Shape], bytes | None] = small, **values
) -> Iterator[Served]:
    """A server with the real page.

    Args: meshes: makes the shapes' files; None leaves a shape unprepared.
    """
    cache = ShapeCache(folder / "cache")
    for drawn in (s for pair in planned for s in (pair.first, pair.second)):
        data = meshes(drawn)
        if data is not None:
            cache.put_mesh(drawn, data)
    with running(folder, planned=planned, static=STATIC, prepared=False, **values) as served:
        yield served


class Page:
    """The label page as its annotator sees it; notes errors and requests to other hosts."""

    def __init__(self, browser, url: str, **context):
        self.context = browser.new_context(**{"viewport": {"width": 760, "height": 560}, **context})
        self.page = self.context.new_page()
        self.url = url
        self.offline = False
        self.errors: list[str] = []
        self.strangers: list[str] = []  # addresses of other hosts
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._record_request)

    def _record_request(self, request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.strangers.append(request.url)

    def _note(self, message) -> None:
        expected = self.offline and "ERR_INTERNET_DISCONNECTED" in message.text
        if message.type in ("error", "warning") and not expected:
            self.errors.append(message.text)

    def open(self, path: str = "/") -> "Page":
        """Load the page and close the welcome."""
        self.page.goto(self.url + path)
        self.page.wait_for_selector("#helpDialog[open]")
        self.page.keyboard.press("Enter")
        self.ready()
        return self

    def sign_in(self, token: str, begin: bool = False) -> None:
        self.page.goto(self.url + "/login")
        self.page.fill("#token", token)
        self.page.keyboard.press("Enter")
        self.page.wait_for_url(self.url + "/")
        if begin:
            self.page.wait_for_selector("#helpDialog[open]")
            self.answer("Enter")
            self.ready()

    def forgive(self, words: str) -> None:
        """Chromium's notes of what a test has brought about."""
        self.errors = [text for text in self.errors if words not in text]

    def wait(self, expression: str, value=None, timeout: float = 20_000) -> None:
        """Wait until an expression is true in the page, or a function of `value`."""
        self.page.wait_for_function(
            expression if "=>" in expression else f"() => {expression}", arg=value, timeout=timeout
        )

    def state(self, name: str):
        """A figure of window.labelState."""
        return self.page.evaluate(f"window.labelState.{name}")

    def ready(self, state: str = "label", ahead: int = 0) -> None:
        """Wait until a pair can be judged and so many more are ready."""
        self.page.wait_for_function(
            "([state, ahead]) => window.labelState?.state === state && window.labelState.ahead >= ahead",
            arg=[state, ahead],
            timeout=20_000,
        )

    def press(self, key: str) -> str | None:
        """Look at the pair for a moment, press a key, wait for what comes next; returns the assignment that
        was answered.
        """
        before = self.state("pair?.assignment")
        self.answer(key)
        shown = (
            "before => window.labelState.pair?.assignment !== before && window.labelState.state !== 'loading'"
        )
        self.page.wait_for_function(shown, arg=before)
        return before

    def sent(self) -> None:
        self.page.wait_for_function("() => window.labelState.queued === 0", timeout=20_000)

    def side_image(self, side: str) -> np.ndarray:
        """A viewport's inner part as the screen shows it, [H, W, 3], 0..255;
        without its label and corners.
        """
        box = self.page.locator(f"#{side}").bounding_box()
        clip = {
            "x": round(box["x"]) + 12,
            "y": round(box["y"]) + 48,
            "width": int(box["width"]) - 24,
            "height": int(box["height"]) - 60,
        }
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(clip=clip))).convert("RGB")).astype(int)

    def drag(self, side: str, dx: int, dy: int) -> None:
        box = self.page.locator(f"#{side}").bounding_box()
        x = box["x"] + box["width"] / 2
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + dx, y + dy, steps=4)
        self.page.mouse.up()
        self.drawn()

    def drawn(self) -> None:
        """Wait until what has changed is on the screen."""
        self.page.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done,"
            " 10))))"
        )

    def answer(self, key: str) -> None:
        """Look at the pair for a moment and press a key."""
        self.page.wait_for_timeout(380)  # the page takes a press after a pause alone
        self.page.keyboard.press(key)


def rows(served: Served) -> list:
    return list(served.store.judgements(include_undone=True))


@pytest.fixture(scope="module")
def browser():
    """A browser for a module's tests; not for longer, as it keeps an event loop running."""
    with chromium() as driver:
        yield driver


@pytest.fixture
def serve(tmp_path):
    """Starts servers with the real page, store and shapes."""
    with contextlib.ExitStack() as stack:
        yield lambda *planned, **values: stack.enter_context(serving_page(tmp_path, *planned, **values))


@pytest.fixture
def page(browser, serve):
    """Makes pages and checks at the end that none complained or asked another host."""
    pages = []

    def make(url: str, **context) -> Page:
        pages.append(Page(browser, url, **context))
        return pages[-1]

    yield make
    for opened in pages:
        opened.context.close()
        assert opened.errors == [] and opened.strangers == []
