"""Double clicks, double taps, bouncing and held keys: a burst of presses answers the pair on which it began,
and no other.
"""

import random

import pytest

from tests.people.label.browser import Page, bumpy_ball, needs_chromium, plan, rows
from tests.people.label.plans import QUIET
from tests.people.label.serving import GENEROUS

pytestmark = needs_chromium


CLOCK = """
const stamp = Object.getOwnPropertyDescriptor(Event.prototype, 'timeStamp').get;
const now = performance.now.bind(performance);
window.at = null; // the time, once a test sets it
performance.now = () => window.at ?? now();
Object.defineProperty(Event.prototype, 'timeStamp', { get() { return window.at ?? stamp.call(this); } });
"""
PASS = """async ([milliseconds, frames]) => {
  for (let i = 0; i < frames; i += 1) await new Promise((resolve) => { requestAnimationFrame(resolve); });
  window.at += milliseconds;
}"""
SPOTS = {
    "left": "[data-choice=left]",
    "tie": "[data-choice=tie]",
    "right": "[data-choice=right]",
    "skip": "#skip",
    "undo": "#undo",
    "help": "#openHelp",
    "pane": "#left",
}
CHOICES = ("left", "tie", "right")
KEYS = (
    *3 * ("ArrowLeft", "ArrowRight", "ArrowDown"),
    " ",
    "Enter",
    "1",
    "2",
    "4",
    "s",
    "u",
    "c",
    "?",
    "Escape",
)


class Bursts:
    """Presses of all kinds with 10 to 300 ms between them, in the browser's own events; their times are the
    script's.
    """

    def __init__(self, label: Page, rng: random.Random):
        self.label = label
        self.page = label.page
        self.rng = rng
        self.spots = {}
        for name, at in SPOTS.items():
            box = self.page.locator(at).bounding_box()
            self.spots[name] = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.evaluate("window.at = performance.now()")

    def wait(self, milliseconds: int, frames: int = 0) -> None:
        """Let so much of the page's time pass, after it had time for so many frames."""
        self.page.evaluate(PASS, [milliseconds, frames])

    def press(self) -> str:
        kind = self.rng.choice(
            ["click", "click", "tap", "tap", "key", "key", "held", "slow click", "both", "focused", "focused"]
        )
        spot = self.rng.choice([*self.spots, *CHOICES, *CHOICES])
        key = self.rng.choice(KEYS)
        mouse = self.page.mouse
        keyboard = self.page.keyboard
        if kind == "click":
            mouse.click(*self.spots[spot])
        elif kind == "tap":
            self.page.touchscreen.tap(*self.spots[spot])
        elif kind == "key":
            keyboard.press(key)
        elif kind == "held":
            keyboard.down(key)
            for _ in range(self.rng.randint(2, 14)):
                self.wait(self.rng.choice([30, 30, 250]))
                keyboard.down(key)
            keyboard.up(key)
        elif kind == "slow click":
            mouse.move(*self.spots[spot])
            mouse.down()
            self.wait(self.rng.randint(50, 290))
            mouse.up()
        elif kind == "both":  # the mouse is down while a key is
            mouse.move(*self.spots[spot])
            mouse.down()
            keyboard.press(key)
            mouse.up()
        else:  # who came to the button by Tab
            key = self.rng.choice([" ", "Enter"])
            self.page.evaluate("at => document.querySelector(at).focus()", SPOTS[spot])
            keyboard.press(key)
        return f"{kind} {spot} {key!r}"

    def made(self) -> list[str]:
        """A burst. Now and then the page has shown what comes next before the next press, as it does in
        earnest.
        """
        done = [self.press()]
        for _ in range(self.rng.randint(1, 4)):
            gap = self.rng.randint(10, 300)
            self.wait(gap, self.rng.choice([0, 3]))
            done.append(f"{gap} ms {self.press()}")
        return done

    def settle(self) -> None:
        """Half a second after the last press, the dialogs that it opened closed, a pair is there to be
        judged.
        """
        self.wait(500, 1)
        while self.page.evaluate("document.querySelector('dialog[open]') !== null"):
            self.page.keyboard.press("Escape")
            self.wait(500, 1)
        self.label.ready()
        self.wait(0, 3)

    def deliberate(self) -> str:
        """An answer half a second after the last press."""
        self.wait(500)
        how = self.rng.choice(["click", "tap", "key", "focused", "skip"])
        if how == "click":
            self.page.mouse.click(*self.spots["left"])
        elif how == "tap":
            self.page.touchscreen.tap(*self.spots["right"])
        elif how == "key":
            self.page.keyboard.press("ArrowDown")
        elif how == "focused":
            self.page.focus(SPOTS["tie"])
            self.page.keyboard.press(self.rng.choice([" ", "Enter"]))
        else:  # two presses that belong together
            self.page.keyboard.press("s")
            self.wait(self.rng.randint(100, 600))
            self.page.keyboard.press(self.rng.choice("123"))
        return how


@pytest.mark.long
@pytest.mark.parametrize(("bursts", "seed"), [(30, 1), (1000, 2)])
def test_a_burst_answers_one_pair_at_most_and_half_a_second_later_all_is_taken(serve, page, bursts, seed):
    served = serve(
        plan(2 * bursts + 10), lambda shape: bumpy_ball(shape.seed % 6, 400), campaign=QUIET, limits=GENEROUS
    )
    label = page(served.url, has_touch=True)
    label.page.add_init_script(CLOCK)
    burst = Bursts(label.open(), random.Random(seed))
    answers = []
    for _ in range(bursts):
        burst.settle()
        burst.wait(500)
        before = label.state("done")
        made = burst.made()
        burst.settle()
        answers.append(label.state("done") - before)
        assert answers[-1] <= 1, made
        how = burst.deliberate()
        burst.wait(0, 1)
        assert label.state("done") == before + answers[-1] + 1, (made, how)
    label.sent()
    kept = [row.assignment for row in rows(served) if not row.undone]
    assert (
        len(set(kept)) == len(kept) == sum(answers) + bursts
        and sum(answer == 1 for answer in answers) > 0.5 * bursts
    )
