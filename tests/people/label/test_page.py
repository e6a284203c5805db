"""The label page in a real browser: answers and undo by keyboard and by touch, views from all sides, texts
for screen readers.
"""

import statistics

import numpy as np
import pytest

from eg3d_rlhf.people.label.entities import Mode
from tests.people.label.browser import ENGLISH, LESSON, Page, bumpy_ball, large, needs_chromium, plan, rows
from tests.people.label.plans import HOLE, singles

pytestmark = needs_chromium
NEXT_PAIR = 300  # milliseconds
PHONE = {
    "viewport": {"width": 390, "height": 700},
    "has_touch": True,
    "is_mobile": True,
    "device_scale_factor": 2,
}


def alike(image: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two images agree except for the rounding of edges."""
    return (
        image.shape == other.shape
        and (np.abs(image - other).max(-1) > 24).mean() < 0.002
        and np.abs(image - other).mean() < 0.5
    )


def blank(image: np.ndarray) -> bool:
    return (np.abs(image - image[2, 2]).max(-1) > 24).mean() < 0.02


@pytest.mark.long
def test_thirty_pairs_by_keyboard_two_undone_and_a_reload(serve, page):
    keys = [("ArrowLeft", "left"), ("ArrowRight", "right"), ("ArrowDown", "tie")]
    served = serve(plan(40, training=1), large)
    label = page(served.url).open()
    _practise(label)
    left = label.side_image("left")
    right = label.side_image("right")
    assert not blank(left) and not blank(right)
    assert (np.abs(left - right).max(-1) > 24).mean() > 0.05

    given = [(label.press(keys[i % 3][0]), keys[i % 3][1]) for i in range(20)]
    undone = []
    for _ in range(2):
        label.press("u")
        undone.append(label.state("pair.assignment"))
    assert undone == [given[19][0], given[18][0]]
    assert label.state("done") == 18
    label.sent()

    label.page.reload()
    label.ready()
    assert label.state("pair.assignment") == undone[1], "a reload shows the open pair again"
    assert label.page.locator("#helpDialog[open]").count() == 0
    given = given[:18] + [(label.press(keys[i % 3][0]), keys[i % 3][1]) for i in range(1, 13)]
    assert (given[18][0], given[19][0]) == (undone[1], undone[0])
    label.sent()

    kept = [(r.assignment, r.choice.value) for r in rows(served) if not r.undone and r.kind != "training"]
    assert sorted(kept) == sorted(given) and len(given) == 30
    assert [r.assignment for r in rows(served) if r.undone] == [undone[1], undone[0]]
    assert all(r.milliseconds >= 200 and "front" in r.views and r.page_version for r in rows(served))
    times = label.page.evaluate("performance.getEntriesByName('next-pair').map(mark => mark.duration)")
    assert len(times) >= 8 and statistics.median(times) < NEXT_PAIR
    assert min(label.state("triangles").values()) >= 30_000


def _practise(label: Page) -> None:
    assert label.page.evaluate("document.documentElement.dataset.training") == "true"
    label.answer("ArrowLeft")
    label.ready("explained")
    assert LESSON in label.page.inner_text("#explanation")
    assert label.page.locator(".better").count() == 1
    label.answer("Enter")
    label.ready(ahead=2)
    assert label.state("done") == 0, "practice does not count"


@pytest.mark.long
def test_both_sides_share_one_camera(serve, page):
    planned = plan(3)
    same = bumpy_ball(1, 4000)
    served = serve(planned, lambda shape: same)
    label = page(served.url, reduced_motion="reduce").open()
    start = label.side_image("left")
    assert alike(start, label.side_image("right")) and not blank(start)
    seen = {}
    for name, look in {
        "drag": lambda: label.drag("left", 90, -40),
        "drag right": lambda: label.drag("right", 60, 50),
        "zoom": lambda: label.page.mouse.wheel(0, -300),
        "turn": lambda: label.page.keyboard.press("Shift+ArrowRight"),
        "pan": lambda: label.page.keyboard.press("j"),
        **{key: lambda key=key: label.page.keyboard.press(key) for key in "23456"},
    }.items():
        before = label.page.evaluate("JSON.stringify(window.labelState.orbit)")
        look()
        label.page.wait_for_function(
            "before => JSON.stringify(window.labelState.orbit) !== before", arg=before
        )
        label.drawn()
        cameras = label.state("cameras")
        assert cameras["left"] == cameras["right"]
        seen[name] = cameras["left"]["view"]
    assert len({tuple(view) for view in seen.values()}) == len(seen), "every movement changes the view"
    rotated = label.side_image("left")
    assert alike(rotated, label.side_image("right"))
    assert (np.abs(rotated - start).max(-1) > 24).mean() > 0.05
    label.page.keyboard.press("0")
    label.drawn()
    assert alike(label.side_image("left"), start)
    label.press("ArrowDown")
    label.sent()
    assert {"front", "orbit", "zoom", "pan", "left", "below"} <= set(rows(served)[0].views)


def test_a_campaign_that_opens_its_pairs_at_the_back_view(serve, page):
    served = serve(plan(2, training=0), campaign={"view": "back"})
    label = page(served.url).open()
    label.drawn()
    back_view = label.side_image("left")
    assert label.state("orbit")["yaw"] == pytest.approx(np.pi)
    label.page.keyboard.press("1")
    label.page.wait_for_function("() => Math.abs(Math.sin(window.labelState.orbit.yaw / 2)) < 1e-6")
    label.drawn()
    assert not alike(label.side_image("left"), back_view)
    label.page.keyboard.press("0")
    label.drawn()
    assert alike(label.side_image("left"), back_view)
    label.press("ArrowDown")
    label.sent()
    assert {"back", "front"} <= set(rows(served)[0].views)


def test_skipping_takes_a_reason_and_needs_no_mouse(serve, page):
    served = serve(plan(8))
    label = page(served.url).open()
    first = label.state("pair.assignment")
    label.answer("s")
    assert label.page.get_by_role("dialog", name=ENGLISH["skip.title"]).is_visible()
    label.page.keyboard.press("Escape")
    label.answer("s")
    assert label.press("2") == first
    label.answer("s")
    label.page.keyboard.press("ArrowUp")
    label.press("Enter")
    label.sent()
    assert [(r.choice.value, r.reason) for r in rows(served)] == [("skip", "identical"), ("skip", "other")]
    label.page.keyboard.press("?")
    assert label.page.get_by_role("dialog", name=ENGLISH["help.title"]).is_visible()


def test_a_screen_reader_hears_what_happens(serve, page):
    served = serve(plan(8))
    label = page(served.url).open()
    for role, *keys in [
        *(("button", f"answer.{choice}") for choice in ("left", "tie", "right")),
        *(("button", key) for key in ("skip", "undo", "help", "view.front")),
        ("img", "shape.left", "from.front"),
        ("img", "shape.right", "from.front"),
        ("progressbar", "progress"),
        ("toolbar", "tools"),
        ("group", "answer"),
    ]:
        name = ", ".join(ENGLISH[key] for key in keys)
        assert label.page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    label.press("ArrowLeft")
    place = ENGLISH["place.pairs"].format(place=2, total="8")
    assert label.page.inner_text("[role=status][aria-live=polite]").startswith(
        f"{ENGLISH['said.left']} {place}"
    )
    nameless = (
        "[...document.querySelectorAll('button, a')].filter(e => !(e.ariaLabel ||"
        " e.textContent.trim())).length"
    )
    assert label.page.evaluate(nameless) == 0
    label.page.keyboard.press("4")
    name = f"{ENGLISH['shape.left']}, {ENGLISH['from.back']}"
    assert label.page.get_by_role("img", name=name, exact=True).count() == 1


@pytest.mark.long
def test_a_phone(serve, page):
    served = serve(plan(8))
    label = page(served.url, **PHONE).open()
    left, right = (label.page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
    assert left["y"] + left["height"] <= right["y"] and left["width"] > 350 and left["height"] > 150
    assert label.page.evaluate(
        "document.documentElement.scrollHeight <= innerHeight && document.documentElement.scrollWidth <="
        " innerWidth"
    )
    middle = (left["x"] + left["width"] / 2, left["y"] + left["height"] / 2)
    before = label.state("orbit")
    _touch(label, [middle], [(middle[0] + 60, middle[1])])
    rotated = label.state("orbit")
    assert rotated["yaw"] != before["yaw"] and rotated["distance"] == before["distance"]
    x, y = middle
    _touch(label, [(x - 30, y), (x + 30, y)], [(x - 90, y), (x + 90, y)])
    assert label.state("orbit")["distance"] == pytest.approx(rotated["distance"] / 3, rel=0.02)
    assert label.state("orbit")["yaw"] == pytest.approx(rotated["yaw"])
    assert not blank(label.side_image("left")) and not blank(label.side_image("right"))
    target = label.page.get_by_role("button", name=ENGLISH["answer.bottom"])
    assert target.bounding_box()["height"] >= 44
    target.tap()
    label.sent()
    assert [r.choice.value for r in rows(served)] == ["right"]
    assert {"orbit", "zoom"} <= set(rows(served)[0].views)


def _touch(label: Page, start: list[tuple], end: list[tuple], steps: int = 6) -> None:
    wire = label.context.new_cdp_session(label.page)
    for step in range(steps + 1):
        points = [
            {"x": a + (c - a) * step / steps, "y": b + (d - b) * step / steps, "id": i}
            for i, ((a, b), (c, d)) in enumerate(zip(start, end, strict=True))
        ]
        wire.send(
            "Input.dispatchTouchEvent",
            {"type": "touchStart" if step == 0 else "touchMove", "touchPoints": points},
        )
    wire.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    label.drawn()


# ---- one shape at a time


@pytest.fixture
def single(serve, page):
    def go(scale, training=0, **context):
        campaign = {"scale": scale, "swap_share": 0, "gold_every": 0}
        served = serve(singles(8, training=training), mode=Mode.SINGLE, campaign=campaign)
        return page(served.url, **context).open(), served

    return go


@pytest.mark.long
def test_thumbs_by_keyboard_with_practice_and_undo(single):
    label, served = single("thumbs", training=1)
    assert not label.page.locator("#right").is_visible() and not blank(label.side_image("left"))
    width = label.page.locator("#left").bounding_box()["width"]
    assert width > 0.9 * label.page.locator(".stage").bounding_box()["width"]
    label.answer("ArrowDown")
    label.ready("explained")
    assert label.page.inner_text("#explanationTitle") == ENGLISH["lesson.yes"]
    assert HOLE in label.page.inner_text("#explanation")
    label.answer("Enter")
    label.ready(ahead=2)
    label.page.keyboard.press("ArrowLeft")
    assert label.state("done") == 0, "sides mean nothing here"
    label.page.keyboard.press("2")
    label.press("ArrowUp")
    assert label.page.inner_text("[role=status][aria-live=polite]").startswith(
        f"{ENGLISH['said.up']} {ENGLISH['place.single'].format(place=2, total='8')}"
    )
    second = label.press("ArrowDown")
    label.press("u")
    assert label.state("pair.assignment") == second
    label.press("ArrowUp")
    label.sent()
    counted = [row for row in rows(served) if row.kind != "training" and not row.undone]
    assert [row.choice.value for row in counted] == ["up", "up"] and "left" in counted[0].views
    assert [row.choice.value for row in rows(served) if row.undone] == ["down"]
