"""The results page in a real browser: figures as they come in, tokens, exports; login links and withdrawn
access.
"""

import contextlib
import json
import re
from dataclasses import replace

import pytest

from eg3d_rlhf.people.label.access import login_link
from eg3d_rlhf.people.label.entities import PAIR_TOTAL
from eg3d_rlhf.people.label.server.app import TEXTS
from tests.people.label.browser import Page, needs_chromium, plan, rows

pytestmark = needs_chromium
LOGIN = TEXTS["en"]


def submit_answers(served, token: str, choices: str) -> None:
    """Answer as many pairs as there are letters: l(eft), r(ight), t(ie), s(kip)."""
    words = {"l": "left", "r": "right", "t": "tie", "s": "skip"}
    with contextlib.closing(served.browser(token)) as client:
        for letter in choices:
            (pair,) = client.get("/api/assignments?count=1").json()["assignments"]
            body = {
                "key": f"{pair['assignment']}-1",
                "assignment": pair["assignment"],
                "choice": words[letter],
                "milliseconds": 2500,
                "views": ["front"],
                "answered_at": 1.7e9,
                "page_version": "t",
            }
            response = client.post(
                "/api/judgements", json={**body, **({"reason": "unsure"} if letter == "s" else {})}
            )
            assert response.status_code == 201, response.text


@pytest.mark.long
def test_results_tokens_and_exports(serve, page):
    served = serve(plan(30), campaign={"annotators_per_pair": 2, "gold_every": 0}, exposed=True)
    ada, bob = (served.store.add_annotator(name) for name in ("ada", "bob"))
    chief = served.store.add_annotator("chief", "admin")
    submit_answers(served, ada, "llrtllrs")
    submit_answers(served, bob, "lrrtlrrl")
    results = page(served.url)
    results.sign_in(chief)
    results.page.goto(served.url + "/admin")
    results.page.wait_for_function("() => document.querySelector('#judgements').textContent === '16'")
    _check_figures(results)
    submit_answers(served, ada, "ll")
    results.page.wait_for_function(
        "() => document.querySelector('#judgements').textContent === '18'", timeout=10_000
    )
    _check_tokens(results, served)
    _check_exports(results)


def _check_figures(results: Page) -> None:
    line = results.page.locator("#annotators tr", has_text="ada").locator("td")
    shown = [line.nth(i).inner_text().split("\n")[0] for i in range(10)]
    assert (shown[0], shown[1], shown[3], shown[4], shown[8], shown[9]) == (
        "ada",
        "8",
        "2.5 s",
        "4 of 6",
        "1",
        "1",
    )
    assert results.page.locator("#timeline").locator("rect.mark").count() >= 1
    assert results.page.locator("#sides").locator("svg").count() == 0  # seven answers are no share yet
    assert results.page.inner_text("#alpha") == "–", "too few pairs with two annotators"
    assert len(re.findall(r"\d+", results.page.inner_text("#alphaNote"))) == 2, (
        "how many, and how many it takes"
    )
    assert results.page.inner_text("#prepared") == "60 of 60"


def _check_tokens(results: Page, served) -> None:
    results.page.fill("#name", "carol")
    results.page.keyboard.press("Enter")
    results.page.wait_for_selector("#tokenDialog[open]")
    token = results.page.inner_text("#token")
    with served.client(token) as client:
        assert client.get("/api/session").json()["annotator"] == "carol"
    link = results.page.inner_text("#link")
    assert link == f"{served.url}/login#token={token}" and results.page.evaluate(
        "document.querySelector('#qr').naturalWidth > 50"
    )
    results.page.click("#tokenDialog [data-close]")
    results.page.wait_for_function(
        "() => !document.querySelector('#token').textContent && !document.querySelector('#qr').src"
    )
    assert results.page.locator("[data-action=revoke][data-person=chief]").count() == 0, "not oneself"
    replace = results.page.locator("[data-action=token][data-person=carol]")
    replace.focus()
    for key in ("Enter", "Shift+Tab", "Enter"):  # Cancel has the focus
        results.page.keyboard.press(key)
    results.page.wait_for_selector("#tokenDialog[open]")
    results.page.keyboard.press("Escape")
    results.page.click("[data-action=revoke][data-person=carol]")
    results.page.click("#revoke")
    results.page.wait_for_selector("#people .revoked:has-text('carol')")
    with served.client(token) as client:
        assert client.get("/api/session").status_code == 401
    shown = results.page.locator("#people li", has_text="ada").inner_text()
    assert "annotator" in shown and " 10 " in shown
    results.page.set_viewport_size({"width": 360, "height": 640})
    boxes = [
        control.bounding_box()
        for control in results.page.locator("#people button, #add input, #add button").all()
    ]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 40 for box in boxes), (
        boxes
    )


def _check_exports(results: Page) -> None:
    with results.page.expect_download() as download:
        results.page.click("a[href$='format=judgements']")
    lines = download.value.path().read_text().splitlines()
    assert len([json.loads(line) for line in lines]) >= 18


@pytest.mark.long
def test_a_link_logs_in_and_answers_survive_a_withdrawal(serve, page):
    served = serve(plan(8), campaign={"gold_every": 0}, exposed=True)
    token = served.store.add_annotator("ann")
    other = served.store.add_annotator("bea")
    label = page(served.url)
    asked = []
    label.page.on("request", lambda request: asked.append(f"{request.url} {request.headers}"))
    label.page.goto(login_link(served.url, token))
    label.page.wait_for_selector("#helpDialog[open]")
    assert label.page.url == served.url + "/" and label.page.inner_text("#who") == "ann"
    assert not [line for line in asked if token in line.replace(f"/login#token={token}", "", 1)], (
        "no address or Referer holds it"
    )
    label.page.go_back()
    assert label.page.url == "about:blank", "nor does the history of the tab"

    label.page.goto(served.url + "/login")
    label.page.evaluate(f"location.hash = '#token={other}'")  # a link pasted where the page is open already
    label.wait("text => document.querySelector('[role=alert]')?.textContent === text", LOGIN["409"])
    label.page.goto(served.url + "/")
    label.page.wait_for_selector("#helpDialog[open]")
    assert label.page.inner_text("#who") == "ann", "a link does not end the session of another annotator"
    label.page.keyboard.press("Enter")
    label.ready(ahead=1)
    label.offline = True
    label.context.set_offline(True)
    label.press("ArrowLeft")
    served.store.revoke_annotator("ann")
    label.context.set_offline(False)
    label.page.wait_for_url(served.url + "/login", timeout=20_000)
    assert label.page.inner_text("[role=alert]") == LOGIN["withdrawn"]
    assert label.page.inner_text("#waiting b") == "1" and rows(served) == []
    label.page.goto(login_link(served.url, served.store.new_token("ann")))
    label.page.wait_for_url(served.url + "/")
    label.ready()
    label.sent()
    assert [row.annotator for row in rows(served)] == ["ann"]
    assert all("409" in error or "401" in error for error in label.errors)
    label.errors.clear()


@pytest.mark.long
def test_the_state_of_a_learning_campaign_is_shown(serve, page):
    served = serve(plan(8), campaign={"gold_every": 0, "extra": {PAIR_TOTAL: 16}})
    results = page(served.url)
    results.page.goto(served.url + "/admin")
    results.page.wait_for_selector("#learningPanel:not([hidden])")
    advice = results.page.locator("#learningAdvice")
    assert "8 of 16" in advice.inner_text() and results.page.locator("#learning").locator("svg").count() == 0
    assessment = {
        "labels": 25,
        "certainty": 0.8,
        "half_cosine": 0.7,
        "random_labels": 25,
        "accuracy": 0.76,
        "accuracy_interval": [0.57, 0.88],
    }
    records = [
        {"batch": 1, "random": True, "reward": "a", "assessment": assessment},
        {"batch": 2, "random": True, "reward": "b", "assessment": assessment | {"labels": 75}},
    ]
    for number, record in enumerate(records):
        pair = plan(9 + number)[-1]
        pair = replace(pair, explanation=json.dumps(record))
        assert served.store.append_pairs(served.campaign, [pair], 8 + number)
    results.page.wait_for_function(
        "() => document.querySelector('#learningAdvice').textContent.includes('10 of 16')", timeout=10_000
    )
    # neither the agreement nor the accuracy rises over the last 50 labels
    assert "0.000" in advice.inner_text() and "stop" in advice.inner_text()
    assert results.page.locator("#learning").locator("circle").count() == 3
