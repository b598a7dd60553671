"""The page in a browser, before a stand-in engine: chat, figures, keys, a proxy's prefix, and who can use it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.browser import PHONE, Watched, watching
from tests.server.gateway.key_files import key_file
from tests.server.page.stand_in import Script, serving_the_page

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint

VIEWS = ("chat", "proof", "api")
TALK = """# A heading

Some *text* with `code`, a [link](https://a.example).

- [x] done

```
code
```

|a|b|
|-|-|
|1|2|
"""

FOCUSED = """() => {
    const one = document.activeElement, field = one.id === "question" && one.closest(".field");
    const focus = field ? getComputedStyle(field).boxShadow : getComputedStyle(one).outlineStyle;
    return one === document.body ? ["", ""] : [one.id || one.textContent.trim(), focus];
}"""


def figures(tab: Watched) -> str:
    return str(tab.page.locator(".figures").last.inner_text())


def test_a_question_is_answered_in_markdown_with_its_figures(tab: Watched, script: Script) -> None:
    script.text = "Three **bold** words, `code`.\n\n1. one\n2. two"
    tab.ask("What?")
    assert tab.page.locator(".question p").inner_text() == "What?"
    assert tab.answer.locator("strong").inner_text() == "bold"
    assert tab.answer.locator("li").all_inner_texts() == ["one", "two"]
    shown = figures(tab)
    assert "tokens/s" in shown
    assert "to first token" in shown
    assert "8 tokens" in shown.replace("\n", " ")
    assert script.asked[0]["messages"] == [{"role": "user", "content": "What?"}]
    assert tab.page.locator("#said").inner_text().startswith("Tiny-Chat has answered: 8 tokens")


def test_figures_run_while_the_answer_streams_and_stop_ends_it_on_the_server(
    tab: Watched, script: Script
) -> None:
    script.text, script.pause_s = "word " * 500, 0.02
    tab.page.fill("#question", "Go on")
    tab.page.keyboard.press("Enter")
    tab.until("parseInt(document.querySelector('.figures')?.innerText) > 0")
    early = tab.answer.inner_text()
    tab.until("Number(document.getElementById('now-generated').textContent) > 5")
    assert tab.page.locator("#now-requests").inner_text() == "1"
    assert tab.page.locator("#now-cache").inner_text() == "25 %"
    assert len(tab.answer.inner_text()) > len(early)
    tab.page.keyboard.press("Escape")
    tab.wait_for_answers()
    assert "stopped" in figures(tab)
    tab.until("document.getElementById('now-requests').textContent === '0'")
    assert script.left == 1
    assert 0 < len(tab.answer.inner_text()) < len(script.text) - 100


def test_regenerate_replaces_the_last_answer_and_keeps_the_conversation(tab: Watched, script: Script) -> None:
    script.text = "first"
    tab.ask("One?")
    script.text = "second"
    tab.ask("Two?")
    assert tab.page.get_by_role("button", name="Regenerate").count() == 1
    script.text = "third"
    tab.page.get_by_role("button", name="Regenerate").click()
    tab.wait_for_answers()
    assert tab.page.locator(".content").all_inner_texts() == ["first", "third"]
    history = [("user", "One?"), ("assistant", "first"), ("user", "Two?")]
    for asked in script.asked[1:]:
        assert [(one["role"], one["content"]) for one in asked["messages"]] == history


def test_two_models_answer_side_by_side_each_with_its_own_history_and_the_settings(
    tab: Watched, script: Script
) -> None:
    page = tab.page
    page.select_option("#beside", "poet")
    page.get_by_role("button", name="Settings").click()
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.2")
    page.fill("#max-tokens", "9")
    tab.ask("One?")
    tab.ask("Two?")
    assert page.locator(".turns > li:last-child .who").all_inner_texts() == ["Tiny-Chat", "poet"]
    boxes = [one.bounding_box() for one in page.locator(".turns > li:last-child .answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[1]["x"] >= boxes[0]["x"] + boxes[0]["width"]
    assert sorted(one["model"] for one in script.asked) == ["Tiny-Chat", "Tiny-Chat", "poet", "poet"]
    assert {(one["temperature"], one["max_tokens"]) for one in script.asked} == {(0.2, 9)}
    assert [one["role"] for one in script.asked[-1]["messages"]] == ["system", "user", "assistant", "user"]
    page.set_viewport_size(PHONE)
    boxes = [one.bounding_box() for one in page.locator(".turns > li:last-child .answer").all()]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]


def test_a_setting_out_of_its_range_is_not_sent(tab: Watched, script: Script) -> None:
    tab.page.get_by_role("button", name="Settings").click()
    tab.page.fill("#temperature", "3")
    tab.page.fill("#question", "Hello?")
    tab.page.keyboard.press("Enter")
    assert tab.page.locator("#temperature").evaluate("one => one === document.activeElement")
    assert (script.asked, tab.page.locator(".answer").count()) == ([], 0)


def test_a_refusal_and_a_stream_that_fails_are_said_where_the_answer_would_be(
    tab: Watched, script: Script
) -> None:
    script.refuses = "this prompt is too long"
    tab.ask()
    assert tab.page.locator(".answer .failed").inner_text() == "this prompt is too long"
    script.refuses, script.text, script.fails_after = None, "one two three four", 2
    tab.page.get_by_role("button", name="Regenerate").click()
    tab.wait_for_answers()
    assert tab.page.locator(".answer .failed").inner_text() == "the stand-in fails here"
    assert tab.answer.inner_text().split() == ["one", "two"]
    tab.complaints.clear()  # the browser's own line about the status 400


def test_the_page_asks_for_a_key_keeps_it_in_memory_only_and_never_writes_it_down(
    browser: Any, make_checkpoint: "MakeCheckpoint", script: Script, tmp_path: Path
) -> None:
    keys = key_file(tmp_path / "keys.yaml", {"name": "team"})
    with (
        serving_the_page(make_checkpoint(), script, keys=keys) as url,
        watching(browser, url) as tab,
    ):
        page, dialog = tab.page, tab.page.get_by_role("dialog", name="API key")
        page.goto(url)
        dialog.wait_for()
        page.wait_for_timeout(1500)
        asked = [one for one in tab.requests if one.endswith("/lowbit/live") or "/v1/" in one]
        assert asked == []  # nothing that would be refused
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The server does not know this key.").wait_for()
        tab.complaints.clear()  # the browser's own line about the status 401
        page.fill("#key", "team-secret")
        page.keyboard.press("Enter")
        tab.wait_until_ready()
        tab.ask()
        assert tab.answer.inner_text() == "Hello."
        kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert kept == [0, 0, "", f"{url}/"]
        page.get_by_role("link", name="API").click()
        assert "$LOWBIT_API_KEY" in page.locator("#api pre").first.inner_text()
        assert "team-secret" not in page.content()
        page.reload()
        dialog.wait_for()


@pytest.mark.parametrize(
    ("path", "told"), [("", True), ("/", True), ("/#proof", True), ("/", False), ("/#proof", False)]
)
def test_behind_a_proxys_prefix_everything_is_asked_for_below_it(
    browser: Any, make_checkpoint: "MakeCheckpoint", script: Script, path: str, told: bool
) -> None:
    with (
        serving_the_page(make_checkpoint(), script, root_path="/llm", told=told) as url,
        watching(browser, url) as tab,
    ):
        tab.open(path)
        tab.page.get_by_role("link", name="Chat").click()
        tab.ask()
        assert tab.answer.inner_text() == "Hello."
        assert all(one.startswith(url) for one in tab.requests), tab.requests
        assert f"{url}/v1" in tab.page.locator("#api .address").text_content()


def test_while_the_model_loads_the_page_says_how_far_and_then_begins(
    browser: Any, make_checkpoint: "MakeCheckpoint", script: Script
) -> None:
    with (
        serving_the_page(make_checkpoint(), script, loads_first=True) as url,
        watching(browser, url) as tab,
    ):
        tab.page.goto(url)
        tab.page.get_by_text("loading: starting the engine").wait_for()
        script.loaded.set()
        tab.wait_until_ready()
        tab.ask()
        assert tab.answer.inner_text() == "Hello."
        tab.complaints.clear()  # the browser's own lines about the status 503


def test_power_is_drawn_where_the_feed_has_joules_and_nowhere_else(tab: Watched) -> None:
    assert tab.page.locator(".panel.watts").is_hidden()

    def with_joules(route: Any) -> None:
        live = route.fetch().json()
        route.fulfill(json={**live, "energy_joules": 40 * live["up_s"]})

    tab.page.route("**/lowbit/live", with_joules)
    tab.until("document.getElementById('now-watts').textContent === '40 W'")
    assert tab.page.locator(".panel.watts").is_visible()


def test_what_was_proven_is_shown_with_its_errors(tab: Watched) -> None:
    tab.page.get_by_role("link", name="Proof").click()
    proof = tab.page.locator("#proof")
    text = proof.inner_text()
    for shown in (
        "Accepted by its quality gate",
        "mean_kld 0.05",
        "0.0835 ± 0.0010",
        "87.5 ± 1.0 %",
        "in force",
    ):
        assert shown in text, shown
    rows = [one.split("\t")[0].strip() for one in proof.locator(".bars tbody tr").all_inner_texts()]
    assert rows == ["all held-out text", "prose"]
    roles = proof.locator(".roles tbody th").all_inner_texts()
    assert roles == ["self_attn.q_proj", "mlp.up_proj"]


def test_a_directory_without_a_manifest_is_said_to_be_unknown(
    browser: Any, make_checkpoint: "MakeCheckpoint", script: Script
) -> None:
    directory = make_checkpoint(manifest=False)
    with serving_the_page(directory, script) as url, watching(browser, url) as tab:
        tab.open("/#proof")
        assert "Nothing was proven" in tab.page.locator("#proof").inner_text()


@pytest.mark.parametrize("name", ["Tiny-Chat", 'it\'s "a" $HOME `id` \\ name'])
@pytest.mark.parametrize("keyed", [False, True])
def test_the_lines_for_other_programs_work_as_they_stand(
    browser: Any, make_checkpoint: "MakeCheckpoint", tmp_path: Path, script: Script, name: str, keyed: bool
) -> None:
    keys = key_file(tmp_path / "keys.yaml", {"name": "team"}) if keyed else None
    with serving_the_page(make_checkpoint(), script, keys=keys, name=name) as url:
        with watching(browser, url) as tab:
            if keyed:
                tab.give_key("team-secret")
            else:
                tab.open()
            curl, python, _javascript = tab.page.locator("#api pre").all_text_contents()
        script.asked.clear()
        environment = {**os.environ, "LOWBIT_API_KEY": "team-secret", "NO_PROXY": "*"}
        streamed = subprocess.run(
            ["bash", "-c", curl], env=environment, capture_output=True, text=True, check=True
        )
        assert streamed.stdout.count("data: ") >= 2
        assert streamed.stdout.rstrip().endswith("data: [DONE]")
        whole = subprocess.run(
            [sys.executable, "-c", python], env=environment, capture_output=True, text=True, check=True
        )
        assert whole.stdout == "Hello.\n"
        assert [one["model"] for one in script.asked] == [name, name]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_in_any_view(
    browser: Any, make_checkpoint: "MakeCheckpoint", script: Script, scheme: str
) -> None:
    script.text = script.reasoning = TALK
    with (
        serving_the_page(make_checkpoint(), script) as url,
        watching(browser, url, color_scheme=scheme) as tab,
    ):
        tab.open()
        assert tab.faults() == []  # before the first question
        tab.page.select_option("#beside", "poet")
        tab.page.get_by_role("button", name="Settings").click()
        tab.page.wait_for_timeout(1100)  # one reading of the feed
        tab.ask()
        for size in (PHONE, tab.page.viewport_size):
            tab.page.set_viewport_size(size)
            for view in (*VIEWS, "live"):
                tab.show(view)
                assert tab.faults() == [], view


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_in_the_question_for_a_key(
    browser: Any, make_checkpoint: "MakeCheckpoint", script: Script, tmp_path: Path, scheme: str
) -> None:
    keys = key_file(tmp_path / "keys.yaml", {"name": "team"})
    with (
        serving_the_page(make_checkpoint(), script, keys=keys) as url,
        watching(browser, url, color_scheme=scheme) as tab,
    ):
        tab.page.goto(url)
        tab.page.get_by_role("dialog", name="API key").wait_for()
        assert tab.faults() == []


def test_everything_is_reached_by_the_keyboard_in_the_order_of_the_page(tab: Watched) -> None:
    tab.ask()
    for _ in range(25):  # round to the beginning
        tab.page.keyboard.press("Shift+Tab")
        if tab.page.evaluate(FOCUSED)[0] == "Skip to the question":
            break
    reached: list[str] = []
    while (found := tab.page.evaluate(FOCUSED))[0] not in ["", *reached]:
        name, focus = found
        reached.append(name)
        assert focus != "none", f"{name} does not show its focus"
        tab.page.keyboard.press("Tab")
    assert reached == [
        "Skip to the question", "Chat", "Proof", "API", "talk", "Regenerate", "Copy", "question", "send", "model",
        "beside", "toggle-settings", "new-chat",
    ]  # fmt: skip


def test_skipping_leads_to_the_question(tab: Watched) -> None:
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Enter")
    assert tab.page.evaluate("document.activeElement.id") == "question"


@pytest.mark.parametrize("width", [320, 390, 640, 1000, 1280])
def test_no_width_makes_the_page_wider_than_the_screen(tab: Watched, script: Script, width: int) -> None:
    script.text = (
        "`" + "long" * 80 + "`\n\n```\n" + "wide " * 80 + "\n```\n\n|" + "cell|" * 30 + "\n|" + "-|" * 30
    )
    tab.page.set_viewport_size({"width": width, "height": 800})
    tab.ask("x" * 400)
    for view in (*VIEWS, "live"):
        tab.show(view)
        wide = tab.page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
        assert max(wide) <= width, view
