"""Nothing that a model writes runs, loads anything or leads anywhere unseen. The answers are a stand-in engine's."""

import socket
from contextlib import suppress
from select import select
from typing import Any
from urllib.parse import urlsplit

from tests.browser import Watched
from tests.server.page.attacks import HTML, MARKDOWN, answers
from tests.server.page.stand_in import Script

from lowbit_server.http.listeners import bind

SHOWN = {
    "A", "BLOCKQUOTE", "BR", "CODE", "DEL", "EM", "H4", "H5", "H6", "HR", "LI", "OL", "P", "PRE", "SPAN", "STRONG",
    "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL",
}  # fmt: skip
ATTRIBUTES = {"class", "href", "rel", "start", "tabindex", "target"}
# Each text as the chat would draw it, in the page itself, so that what it sets off goes off.
DRAW = """async (texts) => {
    const { markdown } = await import(new URL("lowbit/page/markdown.js", document.baseURI));
    const place = document.createElement("div");
    place.id = "drawn";
    document.getElementById("turns").append(place);
    for (const text of texts) {
        const one = document.createElement("div");
        one.append(markdown(text));
        place.append(one);
    }
    await new Promise((done) => setTimeout(done, 500));
}"""
FOUND = """(selector) => [...document.querySelectorAll(selector + " *")].map((one) => ({
    name: one.nodeName, attributes: Object.fromEntries([...one.attributes].map((a) => [a.name, a.value])),
    next: one.nextElementSibling?.textContent ?? "",
}))"""

INTRUDE = """async (outside) => {
    const told = [];
    addEventListener("securitypolicyviolation", (event) => told.push(event.effectiveDirective));
    const script = document.createElement("script");
    let refused = 0;
    try { script.textContent = "window.ran = 1" } catch { refused += 1 }
    try { document.body.insertAdjacentHTML("beforeend", "<b>x</b>") } catch { refused += 1 }
    const image = new Image();
    image.src = outside + "/x.png";
    const frame = document.createElement("iframe");
    frame.src = outside;
    document.body.append(script, image, frame);
    await fetch(outside).catch(() => {});
    await new Promise((done) => setTimeout(done, 300));
    return { told, refused, ran: window.ran ?? null };
}"""


def elements(tab: Watched, within: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tab.page.evaluate(FOUND, within)
    return found


def check(tab: Watched, within: str) -> list[dict[str, Any]]:
    """Hold every element of what a model wrote to the few that may be; returns the links."""
    assert tab.page.evaluate("window.ran") is None
    assert tab.elsewhere() == []
    links = []
    for one in elements(tab, within):
        name, attributes = one["name"], one["attributes"]
        if within == "#drawn" and name == "DIV" and not attributes:
            continue  # the test's own
        assert name in SHOWN, one
        assert attributes.keys() <= ATTRIBUTES, one
        if "href" in attributes:
            links.append(one)
            assert name == "A"
            assert urlsplit(attributes["href"]).scheme in ("http", "https", "mailto"), one
            assert attributes["target"] == "_blank"
            assert {"noopener", "noreferrer"} <= set(attributes["rel"].split())
    return links


def test_every_attack_in_every_place_is_inert(tab: Watched) -> None:
    tab.page.evaluate(DRAW, answers())
    links = check(tab, "#drawn")
    assert links  # some texts hold honest links
    for link in links:
        where = urlsplit(link["attributes"]["href"])
        assert link["next"] == f"[{where.netloc or where.path}]", "a link does not say where it leads"


def test_attacks_as_answers_of_the_chat_are_inert_while_they_stream_and_afterwards(
    tab: Watched, script: Script
) -> None:
    for texts in (HTML, MARKDOWN):
        script.text, script.pause_s = "\n\n".join(texts), 0
        tab.ask()
        check(tab, ".content")
        tab.page.get_by_role("button", name="New chat").click()
    script.text, script.reasoning = "done", "\n\n".join(HTML + MARKDOWN)
    tab.ask()
    tab.page.get_by_text("Reasoning").click()
    check(tab, ".thoughts")


def test_html_is_shown_as_the_text_that_it_is(tab: Watched, script: Script) -> None:
    script.text = "Write <b>bold</b> and <script>alert(1)</script>."
    tab.ask()
    assert tab.answer.inner_text() == script.text


def test_a_link_opens_elsewhere_and_shows_where_it_leads(tab: Watched, script: Script) -> None:
    script.text = "See [my bank](https://bank.example.attacker.example/login) or [mail](mailto:a@b.example)."
    tab.ask()
    assert tab.answer.inner_text() == ("See my bank [bank.example.attacker.example] or mail [a@b.example].")


def test_a_picture_is_its_words_and_its_address(tab: Watched, script: Script) -> None:
    script.text = "![a cat](https://attacker.example/cat.png)"
    tab.ask()
    assert tab.answer.inner_text() == "[picture: a cat, https://attacker.example/cat.png]"


def sent_to(listener: socket.socket) -> bytes:
    """All that came; Chromium connects ahead of a frame that it then refuses, and sends nothing."""
    found = b""
    while select([listener], [], [], 0)[0]:
        connection, _ = listener.accept()
        with connection, suppress(TimeoutError):
            connection.settimeout(0.5)
            found += connection.recv(1000)
    return found


def test_the_policy_stands_behind_all_that(tab: Watched) -> None:
    """Were something to get through, the browser would still run nothing of it and ask no other server."""
    with bind("127.0.0.1", 0) as outside:
        outside.listen()
        blocked = tab.page.evaluate(INTRUDE, f"http://127.0.0.1:{outside.getsockname()[1]}")
        assert sent_to(outside) == b"", "another server was asked for something"
    assert (blocked["refused"], blocked["ran"]) == (2, None)
    assert {"connect-src", "frame-src", "img-src"} <= set(blocked["told"])
    tab.complaints.clear()  # of the browser, about the test's own attempts
    tab.requests.clear()
