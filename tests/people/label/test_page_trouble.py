"""The label page in a real browser where something goes wrong or has to wait: connection, session, another
window, the server, shapes.
"""

from tests.people.label.browser import ENGLISH, needs_chromium, plan, rows

REASON = "the density does not cross the level 10"  # for which a shape cannot be prepared

pytestmark = needs_chromium


def test_a_pair_answered_in_another_window_is_passed_over(serve, page):
    served = serve(plan(8))
    tab = page(served.url).open()
    other = page(served.url).open()
    assert tab.state("pair.assignment") == other.state("pair.assignment")
    first = tab.press("ArrowLeft")
    tab.sent()
    assert other.press("ArrowRight") == first
    other.page.wait_for_selector("#toast:not([hidden])")
    assert other.page.inner_text("#toast") == ENGLISH["answeredElsewhere"]
    other.sent()
    assert [(r.assignment, r.choice.value) for r in rows(served)] == [(first, "left")]
    other.answer("u")  # only the server knows what came last
    other.page.wait_for_function("first => window.labelState.pair.assignment === first", arg=first)
    assert [r.undone for r in rows(served)] == [True]
    other.forgive("409")


def test_trouble_at_the_server_loses_nothing(serve, page):
    served = serve(plan(8))
    label = page(served.url)
    replies = [
        {"status": 503, "headers": {"Retry-After": "0"}},
        {"status": 403},
        {"status": 429, "headers": {"Retry-After": "1"}},
    ]
    missing = []
    reason = "No such shape."

    def fail_first(route):
        route.fulfill(json={"error": "No.", "remedy": ""}, **replies.pop(0)) if replies else route.continue_()

    def without_the_first(route):
        missing[:] = missing or [route.request.url]
        (
            route.fulfill(status=404, json={"error": reason, "remedy": ""})
            if route.request.url in missing
            else route.continue_()
        )

    label.page.route("**/api/judgements", fail_first)

    label.page.route("**/api/shapes/*", without_the_first)
    label.page.goto(served.url)
    label.ready("failed")
    label.answer("Enter")
    assert (
        reason in label.page.inner_text("#notice") and label.page.locator("[data-choice=left]").is_disabled()
    )
    label.answer("s")
    label.page.keyboard.press("3")
    label.ready()
    label.press("ArrowLeft")
    label.sent()
    assert [(r.choice.value, r.reason) for r in rows(served)] == [("skip", "broken"), ("left", None)]
    label.forgive("Failed to load resource")


def test_failed_shapes_are_named_and_not_called_ready(serve, page):
    """While some shapes are missing, where all have failed, and on the organiser's page."""
    served = serve(plan(8), meshes=lambda shape: None)
    shapes = [shape for _, shape in served.store.shapes(served.campaign)]
    cache = served.options.cache
    for shape in shapes[:4]:
        cache.put_failure(shape, REASON)
    label = page(served.url)
    label.page.goto(served.url)
    label.ready("waiting")
    text = label.page.inner_text("#notice")
    assert f"0 of {len(shapes)}" in text and "4 could not" in text
    for shape in shapes[4:]:
        cache.put_failure(shape, REASON)
    label.ready("refused")
    assert ENGLISH["ready.none"] in label.page.inner_text("#notice")
    label.page.goto(served.url + "/admin")
    label.page.wait_for_function(
        "() => document.querySelector('#preparedNote').textContent.includes('failed')"
    )
    note = label.page.inner_text("#preparedNote")
    assert f"{len(shapes)} failed" in note and REASON in note and "--set level" in note
    assert label.page.inner_text("#prepared") == f"0 of {len(shapes)}"
