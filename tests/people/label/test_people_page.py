"""Login links and withdrawn access in a real browser."""

import pytest

from eg3d_rlhf.people.label.access import login_link
from tests.people.label.browser import needs_chromium, plan, rows

pytestmark = needs_chromium


@pytest.mark.long
def test_a_link_logs_in_and_answers_survive_a_withdrawal(serve, page):
    served = serve(plan(8), campaign={"gold_every": 0}, exposed=True)
    token, other = served.store.add_annotator("ann"), served.store.add_annotator("bea")
    one = page(served.url)
    asked = []
    one.page.on("request", lambda request: asked.append(f"{request.url} {request.headers}"))
    one.page.goto(login_link(served.url, token))
    one.page.wait_for_selector("#helpDialog[open]")
    assert one.page.url == served.url + "/" and one.page.inner_text("#who") == "ann"
    assert not [line for line in asked if token in line.replace(f"/login#token={token}", "", 1)], "no address or Referer holds it"
    one.page.go_back()
    assert one.page.url == "about:blank", "nor does the history of the tab"

    one.page.goto(served.url + "/login")
    one.page.evaluate(f"location.hash = '#token={other}'")  # a link pasted where the page is open already
    one.page.wait_for_selector("text=Somebody else is logged in here")
    one.page.goto(served.url + "/")
    one.page.wait_for_selector("#helpDialog[open]")
    assert one.page.inner_text("#who") == "ann", "a link takes nobody's place"
    one.page.keyboard.press("Enter")
    one.ready(ahead=1)
    one.offline = True
    one.context.set_offline(True)
    one.press("ArrowLeft")
    served.store.revoke_annotator("ann")
    one.context.set_offline(False)
    one.page.wait_for_url(served.url + "/login", timeout=20_000)
    assert "Your access was withdrawn. Ask the person who gave you the token." in one.page.inner_text("main")
    assert "still to be sent: 1." in one.page.inner_text("#waiting") and rows(served) == []
    one.page.goto(login_link(served.url, served.store.new_token("ann")))
    one.page.wait_for_url(served.url + "/")
    one.ready()
    one.sent()
    assert [row.annotator for row in rows(served)] == ["ann"]
    assert all("409" in error or "401" in error for error in one.errors)
    one.errors.clear()
