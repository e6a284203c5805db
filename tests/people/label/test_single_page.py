"""One shape at a time in a real browser: by keyboard and by touch, thumbs and scores."""

import numpy as np
import pytest

from eg3d_rlhf.people.label.entities import Mode
from tests.people.label.browser import needs_chromium, rows
from tests.people.label.plans import singles
from tests.people.label.test_page import blank

pytestmark = needs_chromium


@pytest.fixture
def single(serve, page):
    """The page of a campaign of single shapes."""

    def go(scale, training=0, **context):
        campaign = {"scale": scale, "swap_share": 0, "gold_every": 0}
        served = serve(singles(8, training=training), mode=Mode.SINGLE, campaign=campaign)
        return page(served.url, **context).open(), served

    return go


@pytest.mark.long
def test_thumbs_by_keyboard_with_practice_and_undo(single):
    label, served = single("thumbs", training=1)
    assert not label.page.locator("#right").is_visible() and not blank(label.picture("left"))
    width = label.page.locator("#left").bounding_box()["width"]
    assert width > 0.9 * label.page.locator(".stage").bounding_box()["width"]
    label.answer("ArrowDown")
    label.ready("explained")
    assert "Yes, that is it" in label.page.inner_text("#explanation") and "It has a hole." in label.page.inner_text("#explanation")
    label.answer("Enter")
    label.ready(ahead=2)
    label.page.keyboard.press("ArrowLeft")
    assert label.state("done") == 0, "sides mean nothing here"
    label.page.keyboard.press("2")
    label.press("ArrowUp")
    assert label.page.inner_text("[role=status][aria-live=polite]").startswith("Good. Shape 2 of")
    second = label.press("ArrowDown")
    label.press("u")
    assert label.state("pair.assignment") == second
    label.press("ArrowUp")
    label.sent()
    counted = [row for row in rows(served) if row.kind != "training" and not row.undone]
    assert [row.choice.value for row in counted] == ["up", "up"] and "left" in counted[0].views
    assert [row.choice.value for row in rows(served) if row.undone] == ["down"]


def test_scores_by_keyboard_and_skips(single):
    label, served = single("scores")
    for score in "305":
        label.press(score)
    label.answer("s")
    assert label.page.locator("[data-reason=identical]").count() == 0
    label.press("1")
    label.page.keyboard.press("?")
    words = label.page.inner_text("#helpDialog")
    assert "score from 0 (worst) to 5 (best)" in words and "left or right is better" not in words
    label.sent()
    assert [(row.choice.value, row.reason) for row in rows(served)] == [("3", None), ("0", None), ("5", None), ("skip", "unsure")]


@pytest.mark.parametrize(("scale", "name", "choice"), [("thumbs", "Not good", "down"), ("scores", "Score 4, good", "4")])
def test_a_phone(single, scale, name, choice):
    phone = {"viewport": {"width": 390, "height": 700}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    label, served = single(scale, **phone)
    assert label.page.locator("#left").bounding_box()["height"] > 300 and not blank(label.picture("left"))
    assert label.page.evaluate("document.documentElement.scrollHeight <= innerHeight && document.documentElement.scrollWidth <= innerWidth")
    buttons = label.page.locator("#choices button:visible")
    assert min(buttons.nth(i).bounding_box()["height"] for i in range(buttons.count())) >= 44
    assert np.ptp([buttons.nth(i).bounding_box()["width"] for i in range(buttons.count()) if scale == "thumbs"] or [0]) < 80
    label.page.wait_for_timeout(500)
    label.page.get_by_role("button", name=name, exact=True).tap()
    label.sent()
    assert [row.choice.value for row in rows(served)] == [choice]
