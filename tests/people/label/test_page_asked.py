"""The label page with more options of a campaign: both bad, questions, comments, names after the answer, the
annotator's own answers.
"""

import re

import pytest

from eg3d_rlhf.people.label.entities import Choice
from tests.people.label.browser import ENGLISH, needs_chromium, plan, rows
from tests.people.label.plans import QUIET, answer

pytestmark = needs_chromium
HOSTILE = "<img src=x onerror=alert(1)>"
EARS = "Which has the finer ears?"


def counting(served) -> list:
    """Judgements that count, as they arrived."""
    return [row for row in rows(served) if not row.undone]


@pytest.mark.long
def test_questions_both_bad_and_a_comment_by_keyboard(serve, page):
    served = serve(
        plan(6),
        campaign={**QUIET, "both_bad": True, "questions": ("geometry", f"ears={EARS}")},
    )
    label = page(served.url).open()
    geometry = ENGLISH["question.geometry"]
    assert label.page.inner_text("#askedText") == geometry
    label.answer("ArrowUp")
    assert label.page.inner_text("#askedText") == geometry, "both bad answers no question"
    label.answer("ArrowLeft")
    label.wait("text => document.querySelector('#askedText').textContent === text", EARS)
    label.answer("Backspace")
    label.page.wait_for_timeout(400)
    label.answer("ArrowRight")
    label.page.wait_for_timeout(400)
    label.answer("ArrowDown")
    label.page.wait_for_function("!document.querySelector('#bad').disabled")
    label.page.keyboard.press("c")
    label.page.keyboard.type("<i>flat</i>  ears")
    label.answer("Enter")
    assert label.page.locator("#comment").get_attribute("aria-pressed") == "true"
    label.page.wait_for_timeout(400)
    label.press("ArrowUp")
    label.sent()
    (row,) = rows(served)
    assert (row.choice, row.votes, row.comment) == (
        "bad",
        {"geometry": "right", "ears": "tie"},
        "<i>flat</i> ears",
    )
    assert label.page.locator("#comment").get_attribute("aria-pressed") == "false", "a remark is for one pair"
    assert label.page.inner_text("#askedText") == geometry


def test_without_questions_one_key_answers_and_nothing_more_is_shown(serve, page):
    served = serve(plan(4), campaign=QUIET)
    label = page(served.url).open()
    assert not label.page.locator("#asked").is_visible() and not label.page.locator("#bad").is_visible()
    label.answer("ArrowUp")
    label.press("ArrowLeft")
    label.sent()
    assert [(row.choice, row.votes, row.comment) for row in rows(served)] == [("left", {}, None)]


@pytest.mark.long
def test_an_old_answer_is_looked_at_and_changed_by_a_further_record(serve, page):
    served = serve(plan(30), campaign={**QUIET, "both_bad": True})
    label = page(served.url).open()
    given = [label.press(key) for key in ("ArrowLeft", "ArrowRight", "ArrowUp")]
    label.sent()
    waiting = label.state("pair.assignment")
    label.page.keyboard.press("a")
    lines = label.page.locator("#ownList button")
    lines.nth(2).wait_for()
    assert [line.get_attribute("data-assignment") for line in lines.all()] == given[::-1]
    lines.nth(2).click()
    label.ready()
    assert (
        label.state("pair.assignment") == given[0]
        and label.page.locator(".given").get_attribute("data-choice") == "left"
    )
    assert label.page.locator("#backToWork").is_visible()
    label.page.keyboard.press("Escape")
    label.ready()
    assert label.state("pair.assignment") == waiting and len(rows(served)) == 3, "looking changes nothing"
    assert not label.page.locator("#asked").is_visible()
    label.page.keyboard.press("a")
    lines.nth(2).wait_for()
    lines.nth(2).click()
    label.ready()
    label.page.wait_for_timeout(500)
    label.press("ArrowDown")
    label.sent()
    assert label.state("pair.assignment") == waiting and label.state("done") == 3
    assert [(row.assignment, row.choice) for row in counting(served)] == [
        (given[1], "right"),
        (given[2], "bad"),
        (given[0], "tie"),
    ]
    assert [(row.assignment, row.choice) for row in rows(served) if row.undone] == [(given[0], "left")]
    label.page.wait_for_timeout(500)
    label.press("u")
    assert label.state("pair.assignment") == given[2], "undo continues at the same place"


def test_results_show_questions_and_comments_as_text(serve, page):
    served = serve(plan(6), campaign={**QUIET, "both_bad": True, "questions": ("geometry", "ears=Which?")})
    who = served.store.annotator_without_token("local").id
    for k, (choice, geometry) in enumerate((("left", "left"), ("bad", "tie"), ("right", "left"))):
        shown = served.store.assignments(served.campaign, who, 1)[0]
        votes = {"geometry": geometry, "ears": "right"}
        served.store.submit(
            served.campaign,
            who,
            answer(shown, f"k{k}", Choice(choice), votes=votes, comment=HOSTILE if k == 1 else None),
        )
    results = page(served.url)
    results.page.goto(served.url + "/admin")
    results.page.locator("#commentRows tr").wait_for()
    assert results.page.locator("#commentRows td").all_inner_texts()[1:] == ["local", "bad", HOSTILE]
    rows_shown = [line.split("\t") for line in results.page.locator("#questionRows tr").all_inner_texts()]
    assert rows_shown == [
        ["ears", "3", "0 %", "0 %", "100 %", "1 of 2", "–"],
        ["geometry", "3", "67 %", "33 %", "0 %", "1 of 2", "–"],
    ]
    (line,) = results.page.locator("#annotators tr").all()
    assert re.findall(r"\d+", line.locator("td").nth(8).inner_text()) == ["0", "1"], "ties, and both bad"
