"""The page without a network: a reload keeps the open pair, its shapes and the answers that wait, and never
shows those of another annotator.
"""

import contextlib

import pytest

from eg3d_rlhf.people.label.server.app import create_app
from eg3d_rlhf.people.label.server.http_server import Server, listen
from tests.people.label.browser import ENGLISH, needs_chromium, plan, rows
from tests.people.label.serving import serve_in_thread

pytestmark = needs_chromium
READY = (
    "async () => { await navigator.serviceWorker.ready; return (await caches.keys()).some((name) =>"
    " name.startsWith('eg3d-page-')); }"
)
KEPT = "async (count) => (await (await caches.open('eg3d-shapes')).keys()).length >= count"


class Switched:
    """A server that can be stopped and started again on its port."""

    def __init__(self, served):
        self.served = served
        self.port = 0
        self.start()

    def start(self) -> None:
        listening = listen("127.0.0.1", self.port)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.stack = contextlib.ExitStack()
        options = self.served.options
        self.stack.enter_context(serve_in_thread(Server(create_app(options), listening, options.limits)))

    def stop(self) -> None:
        self.stack.close()


def _kept(label, shapes: int = 4) -> None:
    assert label.page.evaluate(READY)
    label.ready(ahead=4)
    label.page.wait_for_function(KEPT, arg=shapes)


@pytest.mark.long
def test_a_reload_while_offline_keeps_the_pair_and_three_answers(serve, page):
    served = serve(plan(12))
    server = Switched(served)
    label = page(server.url).open()
    _kept(label)
    first = label.state("pair.assignment")
    label.offline = True
    server.stop()
    label.context.set_offline(True)
    label.page.reload()
    label.ready()
    assert label.state("pair.assignment") == first, "the open pair stays"
    given = [label.press("ArrowLeft") for _ in range(2)]
    label.page.reload()
    label.ready()
    given.append(label.press("ArrowRight"))
    assert label.state("queued") == 3 and label.state("done") == 3 and rows(served) == []
    server.start()
    label.context.set_offline(False)
    label.sent()
    assert [(row.assignment, row.choice) for row in rows(served)] == list(
        zip(given, ["left", "left", "right"], strict=True)
    )
    assert given[0] == first and label.state("state") == "label"
    label.press("ArrowLeft")
    label.sent()
    label.page.goto("about:blank")
    server.stop()
    label.forgive("Failed to load resource")


@pytest.mark.long
def test_signing_out_and_another_annotator_leave_nothing(serve, page):
    served = serve(plan(12), exposed=True)
    tokens = {name: served.store.add_annotator(name) for name in ("ada", "bob")}
    label = page(served.url)
    label.sign_in(tokens["ada"], begin=True)
    _kept(label)
    assert "ada" in label.page.evaluate("localStorage.getItem('eg3d-offline')")
    hers = label.state("pair.assignment")
    label.context.clear_cookies()  # her session ends without her
    label.sign_in(tokens["bob"], begin=True)
    label.context.set_offline(True)
    label.offline = True
    label.page.reload()
    label.ready()
    assert label.state("pair.assignment") != hers
    kept = label.page.evaluate("localStorage.getItem('eg3d-offline')")
    assert "ada" not in kept and hers not in kept
    label.page.click("#signOut")
    label.wait("text => document.body.innerText.includes(text)", ENGLISH["error.connection"])
    assert label.page.url.rstrip("/") == served.url.rstrip("/"), "the page reports that it cannot sign out"
    label.context.set_offline(False)
    label.page.reload()
    label.ready()
    label.page.click("#signOut")
    label.page.wait_for_url("**/login")
    left = (
        "async () => [localStorage.getItem('eg3d-offline'), (await caches.keys()).filter((name) => name ==="
        " 'eg3d-shapes')]"
    )
    assert label.page.evaluate(left) == [None, []]
    label.forgive("Failed to load resource")
