"""The pages in Firefox: drawn, answered by keyboard, mouse and touch, and laid out as in Chromium."""

import base64
import io
import time

import numpy as np
import pytest
from PIL import Image

from tests.people.label.browser import plan, rows
from tests.people.label.firefox import Firefox, firefox, needs_firefox
from tests.people.label.test_layout import SHARE, UNREACHABLE

pytestmark = [needs_firefox, pytest.mark.long]
LABEL, RIGHT, ENTER = "window.labelState?.state === 'label' && !document.querySelector('dialog[open]')", "\ue014", "\ue007"
SCREENS = [(360, 640, 2), (390, 844, 2), (844, 390, 1), (768, 1024, 1), (640, 390, 2), (1280, 780, 1)]  # width, height, zoom
QUIET = {"gold_every": 0, "repeat_share": 0, "swap_share": 0}


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
