"""The page in Chromium on the real engine and the demo's checkpoint: asked, answered, and the numbers move.

`LOWBIT_SCREENSHOTS=docs/images` writes the pictures that the documentation shows.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripts.demo import MODEL
from tests.browser import PHONE, Watched, chromium, watching

pytestmark = pytest.mark.engine

QUESTION = "Explain in three sentences what quantizing a language model does."
PICTURE_BYTES = 300_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


def number(tab: Watched, name: str) -> float:
    return float(tab.page.locator(f"#now-{name}").inner_text().split()[0].replace(",", ""))


def picture(tab: Watched, name: str, folder: Path) -> None:
    """A screenshot, in the documentation's folder where that is asked for."""
    path = Path(os.environ.get("LOWBIT_SCREENSHOTS") or folder) / f"{name}.png"
    tab.page.screenshot(path=path)
    assert 5_000 < path.stat().st_size <= PICTURE_BYTES


def test_a_question_is_answered_by_the_model_as_the_api_answers_it(browser: Any, server: str) -> None:
    question = "What is the capital of Germany?"
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 24,
    }
    said = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=60)
    with watching(browser, server) as tab:
        tab.open()
        tab.settings(24)
        tab.ask(question)
        assert tab.answer.inner_text().strip() == said.json()["choices"][0]["message"]["content"].strip()
        assert "Berlin" in tab.answer.inner_text()


def test_the_answer_streams_and_the_numbers_move_and_come_to_rest(browser: Any, server: str) -> None:
    with watching(browser, server) as tab:
        tab.open()
        tab.settings(400)
        tab.page.fill("#question", "Write a long story about a lighthouse and a fox.")
        tab.page.keyboard.press("Enter")
        tab.until("document.querySelector('.content')?.innerText.length > 20")
        lengths = [len(tab.answer.inner_text())]
        tab.until(f"document.querySelector('.content').innerText.length > {lengths[0] + 40}")
        tab.until("parseFloat(document.getElementById('now-generated').textContent) > 0")
        tab.until("document.getElementById('now-requests').textContent === '1'")
        tab.until("document.querySelector('#live .cache .note').innerText[0] !== '0'")
        assert "tokens/s" in tab.page.locator(".figures").inner_text()
        tab.page.get_by_role("button", name="Stop").click()
        tab.wait_for_answers()
        assert "stopped" in tab.page.locator(".figures").inner_text()
        tab.until("document.getElementById('now-requests').textContent === '0'")
        tab.until("parseFloat(document.getElementById('now-generated').textContent) === 0")


def test_the_proof_is_the_manifests_and_every_scale_is_in_force(browser: Any, server: str, demo: Any) -> None:
    with watching(browser, server) as tab:
        tab.open("/#proof")
        text = tab.page.locator("#proof").inner_text()
        assert "read back from every layer" in text
        assert "noise floor" in text
        assert tab.page.locator(".roles tbody tr").count() == 7
        kl = httpx.get(f"{server}/v1/models").json()["data"][0]["lowbit"]["quality"]["mean_kld"]
        shown = tab.page.locator(".bars .whole td").nth(1).inner_text().split(" ")[0]
        assert float(shown) == pytest.approx(kl, abs=0.0006)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Any, server: str, scheme: str) -> None:
    with watching(browser, server, color_scheme=scheme) as tab:
        tab.open()
        tab.settings(40)
        tab.ask(QUESTION)
        for view in ("chat", "proof", "api"):
            tab.show(view)
            assert tab.faults() == [], view


def test_pictures_light_dark_and_of_a_phone(browser: Any, server: str, tmp_path: Path) -> None:
    """What the documentation shows, each small enough for it."""
    with watching(browser, server) as tab:
        tab.open()
        tab.settings(160)
        tab.ask("What is the capital of Germany?")
        tab.ask(QUESTION)
        tab.ask("Write a Python function that checks whether a word is a palindrome.")
        tab.page.evaluate("document.activeElement.blur()")
        picture(tab, "page-light", tmp_path)
        tab.page.get_by_role("link", name="Proof").click()
        tab.page.evaluate("document.activeElement.blur()")
        picture(tab, "page-proof", tmp_path)
    with watching(browser, server, color_scheme="dark") as tab:
        tab.open()
        tab.page.select_option("#beside", MODEL)
        tab.settings(120, temperature="0.7")
        tab.ask("Name three uses of a small language model.")
        tab.page.evaluate("document.activeElement.blur()")
        picture(tab, "page-dark", tmp_path)
    with watching(browser, server, viewport=PHONE, device_scale_factor=1.5) as tab:
        tab.open()
        tab.settings(160)
        tab.ask("What is the capital of Germany?")
        tab.ask(QUESTION)
        tab.page.evaluate("document.activeElement.blur()")
        picture(tab, "page-phone", tmp_path)
