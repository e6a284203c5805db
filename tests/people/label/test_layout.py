"""The pages on small screens, held either way, and zoomed in: every control can be reached and the shapes
stay large.
"""

import json

import pytest

from eg3d_rlhf.people.label.entities import Mode
from tests.people.label.browser import Page, needs_chromium, plan
from tests.people.label.plans import singles
from tests.people.label.test_admin_page import submit_answers
from tests.people.label.test_texts import TABLES, TEXTS

pytestmark = needs_chromium
PHONE = {"has_touch": True, "is_mobile": True, "device_scale_factor": 2}
SCREENS = {  # CSS pixels
    "small phone": {"viewport": {"width": 360, "height": 640}, **PHONE},
    "phone": {"viewport": {"width": 390, "height": 844}, **PHONE},
    "phone on its side": {"viewport": {"width": 844, "height": 390}, **PHONE},
    "tablet": {"viewport": {"width": 768, "height": 1024}, **PHONE},
    "desktop at 200 %": {"viewport": {"width": 640, "height": 390}, "device_scale_factor": 2},
    "desktop": {"viewport": {"width": 1280, "height": 780}},
}
SHARE = 0.4  # of the height for the shapes
# what is visible and cannot be clicked where it is: off the screen, or under something else
UNREACHABLE = """() => {
  const around = document.querySelector('dialog[open]') ?? document;
  const controls = [...around.querySelectorAll('button, a[href], select, input:not([type=hidden])')];
  const usual = controls.filter(
    (one) => one.checkVisibility({ visibilityProperty: true }) && !one.matches('.jump'),
  );
  // innerWidth grows on a phone with what is too wide
  const { clientWidth: width, clientHeight: height } = document.documentElement;
  const missed = (one) => {
    one.scrollIntoView({ block: 'nearest', inline: 'nearest' });
    const { left, right, top, bottom } = one.getBoundingClientRect();
    const hit = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
    return left < -0.5 || top < -0.5 || right > width + 0.5 || bottom > height + 0.5 || !one.contains(hit);
  };
  const cut = (one) => one.scrollWidth > one.clientWidth + 1 || one.scrollHeight > one.clientHeight + 1;
  const name = (one) => one.id || one.ariaLabel || one.textContent.trim();
  return {
    missed: usual.filter(missed).map(name),
    cut: usual.filter((one) => one.matches('button, a') && cut(one)).map(name),
    wide: document.documentElement.scrollWidth - width, names: usual.map(name),
  };
}"""

SHOWS = (
    "one => { const { x, y } = one.getBoundingClientRect(); return one.contains(document.elementFromPoint(x +"
    " 5, y + 5)); }"
)


def check(page: Page, where: str, wanted: set[str] = frozenset()) -> None:
    """Every control that shows can be clicked, shows its whole text, and the page is no wider than the
    screen.
    """
    faults = page.page.evaluate(UNREACHABLE)
    assert faults["missed"] == [] and faults["cut"] == [] and faults["wide"] <= 0, (where, faults)
    assert wanted <= set(faults["names"]), (where, wanted - set(faults["names"]))


def crowded(page: Page) -> None:
    """Figures of a large campaign, and the longest pace text."""

    def long(route):
        reply = route.fetch()
        body = reply.json()
        body["progress"] |= {"done": 1234, "total": 8765}
        route.fulfill(response=reply, body=json.dumps(body))

    page.page.route("**/api/assignments*", long)


def all_controls(label: Page, language: str, where: str) -> None:
    """Look at the page, at both menus where they are, and at the dialogs."""
    texts = TABLES[language]
    stage = label.page.evaluate(
        "document.querySelector('.stage').getBoundingClientRect().height /"
        " document.documentElement.clientHeight"
    )
    assert stage >= SHARE, (where, stage)
    check(label, where, {"openHelp", "undo", "skip"})
    more = label.page.get_by_role("button", name=texts["more"], exact=True)
    if more.is_visible():
        view = label.page.get_by_role("button", name=texts["view"], exact=True)
        for button, inside in (
            (more, {"language", "theme", "signOut", "ownAnswers"}),
            (view, {"reset", "normals", "comment"}),
        ):
            button.click()
            check(label, f"{where}, menu", inside)
            label.page.keyboard.press("Escape")
    else:
        check(label, where, {"language", "theme", "signOut", "ownAnswers", "reset", "normals", "comment"})
    for name, key in (("openHelp", "?"), ("skip", "s"), ("ownAnswers", "a"), ("comment", "c")):
        label.page.wait_for_timeout(600)
        label.page.keyboard.press(key)
        heading = label.page.locator("dialog[open] h2")
        assert heading.evaluate(SHOWS), (where, name, "opens at its heading")
        check(label, f"{where}, {name}")
        label.page.keyboard.press("Escape")


def served_for(serve, scale: str):
    """A server of pairs, of pairs of which much is asked, or of single shapes, and an annotator's token."""
    if scale == "pairs":
        served = serve(plan(8, training=1), exposed=True)
    elif scale == "asked":
        served = serve(
            plan(8), exposed=True, campaign={"both_bad": True, "questions": ("geometry", "texture", "prompt")}
        )
    else:
        served = serve(
            singles(8),
            exposed=True,
            mode=Mode.SINGLE,
            campaign={"scale": scale, "swap_share": 0, "gold_every": 0},
        )
    return served, served.store.add_annotator("Maximiliane Mustermann-Beispiel")


def fits(page, served, token: str, scale: str, screen: str, language: str) -> None:
    """One language on one screen: welcome, practice, trial, menus and dialogs."""
    where = f"{screen}, {language}, {scale}"
    label = page(served.url, locale=language, **SCREENS[screen])
    crowded(label)
    label.sign_in(token)
    label.page.wait_for_selector("#helpDialog[open]")
    check(label, f"{where}, welcome")
    label.page.keyboard.press("Enter")
    label.ready()
    if label.state("pair.training"):
        label.page.wait_for_timeout(600)
        label.answer("ArrowLeft")
        label.ready("explained")
        check(label, f"{where}, explained", {"onward"})
        label.page.wait_for_timeout(600)  # sooner, a press is taken for a slip
        label.page.keyboard.press("Enter")
        label.ready()
    all_controls(label, language, where)


@pytest.mark.long
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("scale", ["pairs", "asked", "thumbs", "scores"])
def test_the_label_page_fits(serve, page, screen, scale):
    served, token = served_for(serve, scale)
    for language in TABLES:
        fits(page, served, token, scale, screen, language)


@pytest.mark.long
@pytest.mark.parametrize("screen", SCREENS)
def test_the_results_and_the_login_fit(serve, page, screen):
    served = serve(plan(12), exposed=True, campaign={"annotators_per_pair": 2, "gold_every": 0})
    names = ["Maximiliane Mustermann-Beispiel", "W" * 60]
    for name in names:
        submit_answers(served, served.store.add_annotator(name), "llrtllrs")
    chief = served.store.add_annotator("chief", "admin")
    for language in TEXTS:
        login = page(served.url, locale=language, **SCREENS[screen])
        login.page.goto(served.url + "/login")
        check(login, f"{screen}, {language}, login", {"token"})
    login.sign_in(chief)
    login.page.goto(served.url + "/admin")
    login.page.wait_for_selector("#timeline svg")
    check(login, f"{screen}, results", {"name", "role", "theme"})
