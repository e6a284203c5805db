"""Double clicks, double taps, bouncing and held keys: a burst of presses answers the pair on which it began, and no other."""

from tests.label.browser import needs_chromium, plan, rows

pytestmark = needs_chromium
QUIET = {"gold_every": 0, "repeat_share": 0.0, "swap_share": 0.0}
PAUSE = 600  # milliseconds: after so many, a press is another one


def test_a_double_click_answers_once_and_leaves_the_keys_to_nobody(serve, page):
    served = serve(plan(12), campaign=QUIET)
    label = page(served.url).open()
    for gap in (120, 300):
        label.page.wait_for_timeout(PAUSE)
        before = label.state("done")
        label.page.click("[data-choice=left]", click_count=2, delay=10)
        label.page.click("[data-choice=right]")
        label.page.wait_for_timeout(gap)
        label.page.click("[data-choice=left]")
        for key in (" ", "Enter"):
            label.page.wait_for_timeout(PAUSE)
            label.page.keyboard.press(key)
        assert label.state("done") == before + 1
    label.page.wait_for_timeout(PAUSE)
    label.page.focus("[data-choice=right]")
    label.page.keyboard.down("Enter")  # who has come to a button by Tab answers with Space and Enter, once for each press
    for _ in range(3):
        label.page.wait_for_timeout(PAUSE)
        label.page.keyboard.down("Enter")
    label.page.keyboard.up("Enter")
    label.page.wait_for_timeout(PAUSE)
    label.page.keyboard.press(" ")
    label.sent()
    assert [row.choice for row in rows(served)] == ["left", "left", "right", "right"]


def test_two_answers_a_second_by_keys_are_all_taken(serve, page):
    served = serve(plan(16), campaign=QUIET)
    label = page(served.url).open()
    label.ready(ahead=4)
    label.page.evaluate("window.began = []; addEventListener('keydown', (event) => window.began.push(event.timeStamp), true)")
    for _ in range(8):
        label.page.wait_for_timeout(490)
        label.page.keyboard.press("ArrowLeft")
    label.sent()
    began = label.page.evaluate("window.began")
    slow = [b - a for a, b in zip(began, began[1:], strict=False)]
    assert len(rows(served)) == 8, slow


def test_the_pace_is_told_once_it_is_known_and_outlives_a_reload(serve, page):
    served = serve(plan(20), campaign=QUIET)
    label = page(served.url).open()
    for _ in range(4):
        label.press("ArrowLeft")
    label.sent()
    label.page.reload()
    label.ready(ahead=2)
    assert label.page.inner_text("#pace") == "", "three gaps tell nothing, nor do four answers of the last hour"
    for _ in range(7):
        label.press("ArrowLeft")
    told = label.page.inner_text("#pace")
    assert "an hour" in told
    label.sent()
    label.page.reload()
    label.ready()
    assert label.page.inner_text("#pace") == told
