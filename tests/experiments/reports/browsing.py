"""A report's page as a reader opens it: from disk, without a network; notes whatever should not happen."""

from pathlib import Path


class Reader:
    """One page in a browser context of its own, kept off the network.

    Args: browser: of `tests.people.label.browser.chromium`; context: Playwright's options of a context.
    """

    def __init__(self, browser, path: Path, **context):
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **context})
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.address = path.resolve().as_uri()
        self.errors: list[str] = []
        self.requests: list[str] = []  # for anything but the page itself
        self.page.on(
            "console",
            lambda message: message.type in ("error", "warning") and self.errors.append(message.text),
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._watch)
        self.page.goto(self.address)
        self.settle()

    def _watch(self, request) -> None:
        if request.url.split("#")[0] != self.address and not request.url.startswith(
            ("data:", "blob:", "about:")
        ):
            self.requests.append(request.url)

    def settle(self) -> None:
        """Wait until what has changed is on the screen."""
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def background(self) -> tuple[int, ...]:
        """Colour of the page's ground, 0..255."""
        text = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return tuple(int(part) for part in text[text.index("(") + 1 : text.index(")")].split(",")[:3])

    def chosen(self) -> str:
        """The point that the interactive map shows: 'before 200000'."""
        return self.page.evaluate("document.getElementById('points').dataset.chosen")

    def close(self) -> None:
        """End the context."""
        self.context.close()
