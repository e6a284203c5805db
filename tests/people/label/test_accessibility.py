"""axe-core on every page in both themes, at a desk and on a phone; axe/ is Deque's file of that name
(MPL-2.0), used in tests alone.
"""

from pathlib import Path

import pytest

from tests.people.label.browser import Page, needs_chromium, plan
from tests.people.label.plans import QUIET
from tests.people.label.test_admin_page import submit_answers

pytestmark = needs_chromium
AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text()
LONG = pytest.mark.long
THEMES = ["light", pytest.param("dark", marks=LONG)]
SCREENS = [
    pytest.param({"viewport": {"width": 1280, "height": 780}}, id="desk"),
    pytest.param(
        {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
        id="phone",
        marks=LONG,
    ),
]
GRAVE = ("serious", "critical")


def faults(page: Page) -> list[tuple]:
    """Return the serious findings of axe: rule, elements and description."""
    page.page.evaluate("document.getAnimations().forEach(one => one.finish())")
    if not page.page.evaluate("'axe' in window"):
        page.page.evaluate(AXE)
    violations = page.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    grave = [fault for fault in violations if fault["impact"] in GRAVE]
    return [
        (
            fault["id"],
            fault["impact"],
            [(node["target"], node["failureSummary"]) for node in fault["nodes"][:3]],
        )
        for fault in grave
    ]


def until(page: Page, state: str) -> None:
    for _ in range(20):
        if page.state("state") == state:
            return
        page.page.wait_for_timeout(600)
        page.page.keyboard.press("ArrowLeft")
    raise AssertionError(page.state("state"))


@LONG
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_the_label_page_in_all_its_states(serve, page, theme, screen):
    served = serve(
        plan(3, training=1), exposed=True, campaign={**QUIET, "both_bad": True, "questions": ("geometry",)}
    )
    label = page(served.url, color_scheme=theme, reduced_motion="reduce", **screen)
    label.sign_in(served.store.add_annotator("ada"))
    label.page.wait_for_selector("#helpDialog[open]")
    seen = {"welcome": faults(label)}
    label.page.keyboard.press("Enter")
    label.ready()
    seen["practice"] = faults(label)
    until(label, "explained")
    seen["explained"] = faults(label)
    label.page.wait_for_timeout(600)
    label.page.keyboard.press("Enter")
    label.ready(ahead=2)
    seen["trial"] = faults(label)
    for menu in label.page.locator("[aria-expanded]:visible").all():
        menu.click()
        seen[menu.inner_text()] = faults(label)
    for key in ("?", "s", "c", "a"):
        label.page.keyboard.press("Escape")
        label.page.wait_for_timeout(600)  # a key that comes sooner belongs to what was on the screen before
        label.page.keyboard.press(key)
        label.page.wait_for_selector("dialog[open]")
        seen[key] = faults(label)
    label.page.keyboard.press("Escape")
    until(label, "finished")
    seen["finished"] = faults(label)
    assert {state: violations for state, violations in seen.items() if violations} == {} and len(seen) >= 9


@LONG
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("screen", SCREENS)
def test_the_results_and_the_login(serve, page, theme, screen):
    served = serve(plan(24), exposed=True, campaign={"annotators_per_pair": 2, **QUIET})
    for name in ("ada", "bea"):
        submit_answers(served, served.store.add_annotator(name), "llrtllrsllllllll")
    results = page(served.url, color_scheme=theme, **screen)
    results.page.goto(served.url + "/login")
    assert faults(results) == []
    results.page.fill("#token", "x" * 32)
    results.page.keyboard.press("Enter")
    results.page.wait_for_selector("[role=alert]")
    assert faults(results) == []
    results.forgive("401")
    results.sign_in(served.store.add_annotator("chief", "admin"))
    results.page.goto(served.url + "/admin")
    results.page.wait_for_selector("#timeline svg")
    assert faults(results) == []
    results.page.click("[data-action=revoke][data-person=ada]")
    assert faults(results) == []
