"""Chromium as tests drive it: every request and every complaint of a page is kept, and held against what may be."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_S = 60  # a loaded machine answers slowly
SERIOUS = ("serious", "critical")
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; the test is skipped where Chromium or playwright is missing (scripts/chromium)."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: scripts/chromium")
    with playwright.sync_playwright() as running:
        # Without its sandbox, because tests run as root in containers; what it opens is this machine's own server.
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """One tab. `requests` and `complaints` hold all that it asked for and all that it complained about."""

    def __init__(self, browser: Any, url: str, **how: Any) -> None:
        self.url, self.requests, self.complaints, self.dialogs = url, list[str](), list[str](), list[str]()
        self.context = browser.new_context(**{"viewport": WIDE, **how})
        self.page = self.context.new_page()
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on("page", lambda page: self.dialogs.append(f"opened {page.url}"))
        self.page.on("dialog", self._dialog)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.set_default_timeout(WAIT_S * 1000)

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self, path: str = "/") -> None:
        """Open the page and wait until the server is known to answer."""
        self.page.goto(self.url + path)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until the page has heard from the server."""
        self.page.wait_for_selector("#status[data-state=ready]")

    def ask(self, question: str = "Hello?") -> None:
        """Ask in the chat and wait until every answer has ended."""
        self.page.fill("#question", question)
        self.page.keyboard.press("Enter")
        self.wait_for_answers()

    def settings(self, tokens: int, temperature: str = "0") -> None:
        """Answers of at most so many tokens, greedy unless it is said otherwise."""
        self.page.get_by_role("button", name="Settings").click()
        self.page.fill("#temperature", temperature)
        self.page.fill("#max-tokens", str(tokens))
        self.page.get_by_role("button", name="Settings").click()

    def give_key(self, key: str) -> None:
        """Answer the page's question for a key, and wait until the server has taken it."""
        self.page.goto(self.url)
        self.page.fill("#key", key)
        self.page.keyboard.press("Enter")
        self.wait_until_ready()

    def wait_for_answers(self) -> None:
        self.page.wait_for_selector(".turns > li:last-child .answer")
        self.until("!document.querySelector('[aria-busy]')")

    def until(self, expression: str) -> None:
        """Wait until an expression is true; Playwright's `wait_for_function` needs the eval that the page forbids."""
        end = time.monotonic() + WAIT_S
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"not true within {WAIT_S} s: {expression}"
            self.page.wait_for_timeout(20)

    def show(self, view: str) -> None:
        """Go to a view as a link in the page does."""
        self.page.evaluate("view => { location.hash = view }", view)
        self.page.wait_for_selector(f"body[data-view={view}]", state="attached")

    @property
    def answer(self) -> Any:
        """What the last answer holds."""
        return self.page.locator(".turns > li:last-child .answer .content").last

    def faults(self) -> list[str]:
        """Serious and critical faults of accessibility that axe finds on the page as it is now."""
        axe = pytest.importorskip(
            "axe_playwright_python.sync_playwright", reason="axe is not installed"
        ).Axe()
        found = axe.run(self.page).response["violations"]
        return [
            f"{one['id']} ({one['impact']}): {node['html'][:120]} {node['failureSummary'][-200:]}"
            for one in found
            if one["impact"] in SERIOUS
            for node in one["nodes"]
        ]

    def elsewhere(self) -> list[str]:
        """Requests that left the server."""
        ours = urlsplit(self.url)[:2]
        return [url for url in self.requests if urlsplit(url)[:2] != ours]

    def close(self) -> None:
        """Close the tab; fails where a request left the server, a window opened, or the page complained."""
        self.page.wait_for_timeout(100)  # what an answer could have set off comes a little later
        self.context.close()
        assert self.elsewhere() == []
        assert self.dialogs == [], "a dialog or another window was opened"
        assert self.complaints == []


@contextmanager
def watching(browser: Any, url: str, **how: Any) -> Iterator[Watched]:
    """A tab that is held to its rules when the block ends."""
    tab = Watched(browser, url, **how)
    yield tab
    tab.close()
