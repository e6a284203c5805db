"""The pages in Firefox: drawn, answered by keyboard, mouse and touch, and laid out as in Chromium.

It runs on a display of its own, driven by Marionette: WebDriver's commands as JSON on a socket.
"""

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.people.label.browser import plan, rows
from tests.people.label.plans import QUIET
from tests.people.label.test_layout import SHARE, UNREACHABLE

FIREFOX, DISPLAY = shutil.which("firefox-esr") or shutil.which("firefox"), shutil.which("Xvfb")
needs_firefox = pytest.mark.skipif(
    FIREFOX is None or DISPLAY is None,
    reason="the page is tested in Firefox too, which has WebGL on a display alone: apt-get install firefox-esr xvfb",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name of a reference to an element
PREFERENCES = {
    "marionette.port": 0,  # any free one, written into the profile
    "app.update.disabledForTesting": True, "datareporting.policy.dataSubmissionEnabled": False, "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0, "browser.aboutwelcome.enabled": False, "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False, "extensions.update.enabled": False, "services.settings.server": "data:,",
    "webgl.force-enabled": True,  # in software
    "dom.w3c_touch_events.enabled": 1,
}  # fmt: skip
PATIENCE = 60.0  # seconds for a start or a wait: drawing in software is slow
pytestmark = [needs_firefox, pytest.mark.long]
LABEL, RIGHT, ENTER = "window.labelState?.state === 'label' && !document.querySelector('dialog[open]')", "\ue014", "\ue007"
SCREENS = [(360, 640, 2), (390, 844, 2), (844, 390, 1), (768, 1024, 1), (640, 390, 2), (1280, 780, 1)]  # width, height, zoom


class Firefox:
    """One window."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._file, self._number = self.socket.makefile("rb"), 0
        self._read()  # the greeting
        self.call("NewSession", {"capabilities": {"alwaysMatch": {}}})

    def _read(self) -> Any:
        length = b""
        while (byte := self._file.read(1)) != b":":
            if not byte:
                raise ConnectionError("Firefox closed the connection")
            length += byte
        return json.loads(self._file.read(int(length)))

    def call(self, command: str, values: dict | None = None) -> Any:
        """The result of a WebDriver command. Raises: RuntimeError for an error of it."""
        self._number += 1
        message = json.dumps([0, self._number, f"WebDriver:{command}" if ":" not in command else command, values or {}]).encode()
        self.socket.sendall(b"%d:%s" % (len(message), message))
        _, _, error, result = self._read()
        if error:
            raise RuntimeError(f"{command}: {error['error']}: {error['message']}")
        return result.get("value", result) if isinstance(result, dict) else result

    def run(self, script: str, *values) -> Any:
        """What a script's function body returns in the page."""
        return self.call("ExecuteScript", {"script": script, "args": list(values)})

    def screen(self, width: int, height: int, zoom: float = 1.0) -> None:
        """Make the page so large, in CSS pixels, zoomed in: Firefox's window has a least width, the zoomed page has not."""
        self.call("Marionette:SetContext", {"value": "chrome"})
        self.run("gBrowser.selectedBrowser.fullZoom = arguments[0]", zoom)
        self.call("Marionette:SetContext", {"value": "content"})
        wanted = [width * zoom, height * zoom]
        for _ in range(4):
            rect = self.call("GetWindowRect")
            inner = [round(side * zoom) for side in self.run("return [innerWidth, innerHeight]")]
            if all(abs(a - b) <= zoom for a, b in zip(inner, wanted, strict=True)):
                return
            outer = [rect["width"] + wanted[0] - inner[0], rect["height"] + wanted[1] - inner[1]]
            self.call("SetWindowRect", {"width": round(outer[0]), "height": round(outer[1])})
            time.sleep(0.2)
        raise RuntimeError(f"screen: expected {wanted} pixels, got {inner}")

    def wait(self, script: str, *values) -> Any:
        """Wait until an expression is true; returns its value."""
        end = time.monotonic() + PATIENCE
        while not (found := self.run(f"return {script}", *values)):
            if time.monotonic() > end:
                raise TimeoutError(f"Firefox: {script} stayed {found!r}")
            time.sleep(0.05)
        return found

    def keys(self, text: str) -> None:
        """Press and release keys; WebDriver's code points stand for those without a character."""
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self.call("PerformActions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def press(self, selector: str, pointer: str = "mouse") -> None:
        """Click or tap the middle of an element."""
        element = self.call("FindElement", {"using": "css selector", "value": selector})
        at = {"type": "pointerMove", "origin": {ELEMENT: element[ELEMENT]}, "x": 0, "y": 0, "duration": 0}
        actions = [at, {"type": "pointerDown", "button": 0}, {"type": "pause", "duration": 60}, {"type": "pointerUp", "button": 0}]
        self.point(pointer, actions)

    def point(self, pointer: str, actions: list[dict]) -> None:
        """Move and press the 'mouse', or a finger: 'touch'."""
        source = {"type": "pointer", "id": pointer, "parameters": {"pointerType": pointer}, "actions": actions}
        self.call("PerformActions", {"actions": [source]})


@contextlib.contextmanager
def display() -> Iterator[str]:
    """An X server that draws into memory; its name."""
    read, write = os.pipe()
    command = [str(DISPLAY), "-displayfd", str(write), "-screen", "0", "1920x1920x24", "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=(write,), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(write)
    try:
        with open(read) as number:
            yield f":{number.readline().strip()}"
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def firefox(profile: Path, **preferences) -> Iterator[Firefox]:
    """A Firefox with a profile of its own, ended afterwards."""
    profile.mkdir()
    lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in (PREFERENCES | preferences).items()]
    (profile / "user.js").write_text("\n".join(lines))
    command = [str(FIREFOX), "--marionette", "--remote-allow-system-access", "--no-remote", "--profile", str(profile)]
    with contextlib.ExitStack() as stack:
        environment = {**os.environ, "DISPLAY": stack.enter_context(display()), "NO_PROXY": "*", "HOME": str(profile)}
        output = stack.enter_context((profile / "output").open("wb"))
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        stack.callback(_end, process)
        port, end = profile / "MarionetteActivePort", time.monotonic() + PATIENCE
        while not (port.is_file() and port.read_text().strip()):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"firefox: expected it to start, got: {(profile / 'output').read_text()[-2000:]}")
            time.sleep(0.1)
        driver = Firefox(int(port.read_text()))
        try:
            yield driver
        finally:
            with contextlib.suppress(OSError, RuntimeError):
                driver.call("Marionette:Quit", {"flags": ["eForceQuit"]})
            driver.socket.close()


def _end(process: subprocess.Popen) -> None:
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with firefox(tmp_path_factory.mktemp("firefox") / "profile", **{"intl.accept_languages": "de"}) as found:
        yield found


def picture(driver: Firefox, selector: str) -> np.ndarray:
    """An element's inner part as it shows, [H, W, 3]."""
    data = driver.call("TakeScreenshot", {"full": False})
    shot = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    x, y, width, height, across = driver.run(
        f"const b = document.querySelector('{selector}').getBoundingClientRect(); return [b.x, b.y, b.width, b.height, innerWidth]")
    scale = shot.width / across
    box = [scale * side for side in (x + 12, y + 40, x + width - 12, y + height - 12)]
    return np.asarray(shot.crop([round(side) for side in box])).astype(int)


def test_it_draws_and_takes_answers_by_keyboard_mouse_and_touch(serve, driver):
    served = serve(plan(8), campaign=QUIET)
    driver.screen(1280, 780)
    driver.call("Navigate", {"url": served.url + "/"})
    driver.wait("document.querySelector('#helpDialog[open]')")
    assert driver.run("return document.documentElement.lang + document.querySelector('h1').textContent") == "deWelche Form ist besser?"
    driver.keys(ENTER)
    driver.wait(LABEL)
    for side in ("#left", "#right"):
        shape = picture(driver, side)
        assert (np.abs(shape - shape[2, 2]).max(-1) > 24).mean() > 0.05, "something is drawn"
    given = []
    for act in (lambda: driver.keys(RIGHT), lambda: driver.press("[data-choice=left]"), lambda: driver.press("[data-choice=tie]", "touch")):
        time.sleep(0.7)
        given.append(driver.run("return window.labelState.pair.assignment"))
        act()
        driver.wait(f"{LABEL} && window.labelState.pair.assignment !== arguments[0]", given[-1])
    driver.wait("window.labelState.queued === 0")
    assert [(row.assignment, row.choice.value) for row in rows(served)] == list(zip(given, ["right", "left", "tie"], strict=True))
    before = driver.run("return window.labelState.orbit")
    drag = [{"type": "pointerMove", "x": 300, "y": 300}, {"type": "pointerDown", "button": 0},
            {"type": "pointerMove", "x": 380, "y": 300, "duration": 100}, {"type": "pointerUp", "button": 0}]  # fmt: skip
    driver.point("touch", drag)
    assert driver.run("return window.labelState.orbit")["yaw"] != before["yaw"]


@pytest.mark.parametrize(("width", "height", "zoom"), SCREENS)
def test_the_label_page_fits(serve, driver, width, height, zoom):
    served = serve(plan(8), campaign={**QUIET, "both_bad": True})
    driver.screen(width, height, zoom)
    driver.call("Navigate", {"url": served.url + "/"})
    driver.wait("document.querySelector('#helpDialog[open]')")
    driver.keys(ENTER)
    driver.wait(LABEL)
    assert driver.run("return document.querySelector('.stage').getBoundingClientRect().height / innerHeight") >= SHARE
    found = [driver.run(f"return ({UNREACHABLE})()")]
    for menu in ("more", "tools"):
        if driver.run("return document.querySelector(`[aria-controls=${arguments[0]}]`).checkVisibility()", menu):
            driver.press(f"[aria-controls={menu}]")
            found.append(driver.run(f"return ({UNREACHABLE})()"))
    assert all(one["missed"] == [] and one["cut"] == [] and one["wide"] <= 0 for one in found), found
    assert {"openHelp", "undo", "skip", "language", "reset"} <= {name for one in found for name in one["names"]}
    driver.call("Navigate", {"url": served.url + "/admin"})
    driver.wait("document.querySelector('#timeline')")
    found = driver.run(f"return ({UNREACHABLE})()")
    assert found["missed"] == [] and found["wide"] <= 0, found
