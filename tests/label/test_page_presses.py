"""Double clicks, double taps, bouncing and held keys: a burst of presses answers the pair on which it began, and no other."""

import random

import pytest

from tests.label.browser import Page, needs_chromium, plan, rows
from tests.label.serving import GENEROUS

pytestmark = needs_chromium
QUIET = {"gold_every": 0, "repeat_share": 0.0, "swap_share": 0.0}
PAUSE = 600  # milliseconds: after so many, a press is another one
KEYS = ("ArrowLeft", "ArrowRight", "ArrowDown", " ", "Enter", "4", "s", "Escape")


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


class Burst:
    """Presses with less than 0.3 s between them, in the page's own time: the clock stands still while they are made."""

    def __init__(self, label: Page, rng: random.Random):
        self.label, self.rng = label, rng
        box = {name: label.page.locator(at).bounding_box() for name, at in [
            ("left", "[data-choice=left]"), ("tie", "[data-choice=tie]"), ("right", "[data-choice=right]"), ("skip", "#skip"), ("pane", "#left"),
        ]}  # fmt: skip
        self.spots = {name: (at["x"] + at["width"] / 2, at["y"] + at["height"] / 2) for name, at in box.items()}

    def press(self) -> str:
        """One press."""
        mouse, keyboard, kind = self.label.page.mouse, self.label.page.keyboard, self.rng.choice(["click", "tap", "key", "held", "both"])
        spot, key = self.rng.choice(list(self.spots)), self.rng.choice(KEYS)
        if kind == "click":
            mouse.click(*self.spots[spot])
        elif kind == "tap":
            self.label.page.touchscreen.tap(*self.spots[spot])
        elif kind == "key":
            keyboard.press(key)
        elif kind == "held":
            keyboard.down(key)
            for _ in range(3):
                self.label.page.clock.run_for(30)
                keyboard.down(key)
            keyboard.up(key)
        else:  # the mouse is down while two keys are
            mouse.move(*self.spots[spot])
            mouse.down()
            keyboard.down("ArrowLeft")
            keyboard.down(key)
            mouse.up()
            keyboard.up(key)
            keyboard.up("ArrowLeft")
        return f"{kind} {spot} {key}"

    def made(self) -> list[str]:
        """A burst, and the time after it."""
        done = [self.press()]
        for _ in range(self.rng.randint(1, 4)):
            self.label.page.clock.run_for(self.rng.randint(0, 300))
            done.append(self.press())
        self.settle()
        return done

    def settle(self) -> None:
        """Let the page have its time until a pair waits to be judged."""
        page = self.label.page
        page.clock.run_for(PAUSE)
        while page.evaluate("window.labelState.state !== 'label' || document.querySelector('dialog[open]') !== null"):
            page.keyboard.press("Escape")
            page.clock.run_for(PAUSE)


@pytest.mark.long
@pytest.mark.parametrize("bursts", [30])
def test_a_burst_answers_one_pair_at_most(serve, page, bursts):
    served = serve(plan(2 * bursts), campaign=QUIET, limits=GENEROUS)
    label = page(served.url, has_touch=True)
    label.page.clock.install()
    label.open()
    label.page.clock.pause_at(label.page.evaluate("Date.now() + 2000"))
    burst, answers = Burst(label, random.Random(5)), []
    for _ in range(bursts):
        burst.settle()
        before = label.state("done")
        made = burst.made()
        answers.append(label.state("done") - before)
        assert answers[-1] <= 1, made
        label.page.keyboard.press("ArrowRight")  # and one that is meant is taken
        assert label.state("done") == before + answers[-1] + 1, made
    label.page.clock.resume()
    label.sent()
    kept = [row.assignment for row in rows(served)]
    assert len(set(kept)) == len(kept) == bursts + sum(answers) and sum(answers) > 0.8 * bursts
