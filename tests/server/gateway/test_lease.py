"""What a request takes is given back, and what a limit says is all that gets through: one case for each kind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.gateway.key_files import key_file
from tests.server.gateway.scripted_engine import Broken, Exchange, ScriptedEngine
from tests.server.gateway.stepped_loop import SteppedLoop

from lowbit_core.cli import main
from lowbit_core.errors import ConfigError
from lowbit_server.gateway.keys import KeyStore, read_keys
from lowbit_server.gateway.lease import BODIES_AT_ONCE
from lowbit_server.gateway.middleware import BODY_S, Gateway
from lowbit_server.gateway.request_limits import Models, ServerLimits
from lowbit_server.gateway.request_tracker import LATE_S, RequestTracker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY_BYTES, PLACES = 12_000, 8


class Stack:
    """A gateway over a scripted engine, with the keys of these entries."""

    def __init__(self, loop: SteppedLoop, path: Path, *entries: dict[str, Any], **limits: Any) -> None:
        self.loop, self.tracker, self.now = loop, RequestTracker(write_log=False), 0.0
        self.admitted: list[Exchange] = []
        self.file = path / "keys"
        key_file(self.file, *entries)
        self.keys = KeyStore(self.file, lambda: self.now)
        engine = ScriptedEngine(self.tracker.engine_finished, self.admitted.append)
        settings: dict[str, Any] = {
            "max_num_queued_reqs": PLACES, "max_header_bytes": 4000, "max_body_bytes": BODY_BYTES,
            "max_prompt_characters": None, "max_output_tokens": None, "request_timeout_s": None,
        }  # fmt: skip
        self.gateway = Gateway(
            engine, ServerLimits(**settings | limits), self.keys, self.tracker, Models("tiny", {"tiny"}.__contains__),
            is_draining=lambda: False, clock=lambda: self.now,
        )  # fmt: skip

    def open(self, key: str, path: str = TEXT) -> Exchange:
        exchange = Exchange(path, {"authorization": f"Bearer {key}-secret"})
        exchange.task = self.loop.start(self.gateway(exchange.scope, exchange.receive, exchange.send))
        return exchange

    def ask(self, key: str, path: str = TEXT, /, **document: Any) -> Exchange:
        return self.send(self.open(key, path), json.dumps(document).encode())

    def send(self, exchange: Exchange, body: bytes, more: bool = False) -> Exchange:
        exchange.body(body, more)
        self.loop.settle()
        return exchange

    def order(self, exchange: Exchange, name: str, value: Any = None) -> Exchange:
        exchange.order(name, value)
        self.loop.settle()
        return exchange

    def level(self, key: str) -> float:
        tokens = self.gateway._usages._by_name[key].tokens
        assert tokens is not None
        return tokens.level()


@pytest.fixture
def loop() -> Iterator[SteppedLoop]:
    loop = SteppedLoop()
    yield loop
    loop.close()


def reason(exchange: Exchange) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(exchange.sent[1]["body"])["error"]
    return error


BROKEN = {
    "prompt": b'{"prompt": "cut \\ud83d"}',
    "user": b'{"prompt": "a", "user": "\\uDE00x"}',
    "metadata.a": b'{"prompt": "a", "metadata": {"a": "\\udc00"}}',
    "stop.1": b'{"prompt": "a", "stop": ["x", "\\ud83d"]}',
    "messages.0.content.1.text": b'{"messages": [{"content": [{"text": "a"}, {"text": "\\ud83d\\ud83d"}]}]}',
    "a name in response_format.schema": b'{"response_format": {"schema": {"\\ud83d": 1}}}',
    "a name in the document": b'{"\\udfff": 1}',
    "prompt ": b'{"prompt ": "\xff\xfe"}',
    "tools.0.name": b'{"tools": [{"name": "\xed\xa0\xbd"}]}',
    "suffix": '{"suffix": "\ud83d"}'.encode("utf-16", "surrogatepass"),
}


@pytest.mark.parametrize("field", BROKEN)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize"])
def test_text_that_is_not_unicode_is_one_400_that_names_the_field_and_costs_nothing(
    loop: SteppedLoop, tmp_path: Path, field: str, path: str
) -> None:
    stack = Stack(
        loop, tmp_path, {"name": "a", "concurrent_requests": 1, "requests_per_minute": 1, "priority": 2}
    )
    for _ in range(3):
        refused = stack.send(stack.open("a", path), BROKEN[field])
        assert refused.status == 400
        assert (reason(refused)["code"], reason(refused)["param"]) == ("invalid_unicode", field)
    stack.ask("a", prompt="sound \U0001f600")
    assert len(stack.admitted) == 1


def test_whole_pairs_and_letters_that_look_like_escapes_are_sound(loop: SteppedLoop, tmp_path: Path) -> None:
    stack = Stack(loop, tmp_path, {"name": "a"})
    for body in (
        b'{"prompt": "\\ud83d\\ude00"}',
        b'{"prompt": "C:\\\\udata \\\\ud83d"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
    ):
        stack.send(stack.open("a"), body)
    stack.send(stack.open("a"), '{"prompt": "\U0001f600"}'.encode("utf-16"))
    assert len(stack.admitted) == 4


def test_whatever_is_raised_before_the_engine_gives_the_place_back(loop: SteppedLoop, tmp_path: Path) -> None:
    def fails(_name: str) -> bool:
        raise ZeroDivisionError

    stack = Stack(loop, tmp_path, {"name": "a", "concurrent_requests": 1, "tokens_per_minute": 100})
    sound, stack.gateway._models = stack.gateway._models, Models("tiny", fails)
    for _ in range(3):
        failed = stack.ask("a", prompt="x", max_tokens=50)
        assert failed.task is not None
        assert isinstance(failed.task.exception(), ZeroDivisionError)
        assert (failed.status, reason(failed)["code"]) == (500, "internal_error")
    stack.gateway._models = sound
    assert stack.tracker.rejections == {"error": 3}
    assert stack.level("a") == 100
    assert stack.ask("a", prompt="x").admitted


@pytest.mark.parametrize(
    ("end", "value", "left"),
    [
        ("count", (0, 3, 7), 90),  # what the engine counted
        ("answer", 400, 100),  # refused by the engine: nothing
        ("answer", 500, 100),
        ("raise", None, 100),
    ],
)
def test_a_reservation_becomes_what_was_used(
    loop: SteppedLoop, tmp_path: Path, end: str, value: Any, left: float
) -> None:
    stack = Stack(loop, tmp_path, {"name": "a", "tokens_per_minute": 100})
    exchange = stack.ask("a", prompt="x" * 20, max_tokens=70)
    assert stack.level("a") == 25
    stack.order(exchange, end, value)
    stack.order(exchange, "end")
    assert stack.level("a") == left
    assert exchange.task is not None
    assert exchange.task.done()
    if end == "raise":
        assert isinstance(exchange.task.exception(), Broken)


def test_an_abort_that_the_engine_never_counts_costs_the_prompt(loop: SteppedLoop, tmp_path: Path) -> None:
    stack = Stack(loop, tmp_path, {"name": "a", "tokens_per_minute": 100})
    exchange = stack.open("a")
    exchange.heeds_disconnect = True
    stack.send(exchange, json.dumps({"prompt": "x" * 20, "max_tokens": 70}).encode())
    exchange.disconnect()
    loop.settle()
    assert exchange.done
    assert stack.level("a") == 25
    loop.advance(LATE_S)
    assert stack.level("a") == 95


def test_a_late_count_replaces_the_reservation(loop: SteppedLoop, tmp_path: Path) -> None:
    stack = Stack(loop, tmp_path, {"name": "a", "tokens_per_minute": 100})
    exchange = stack.ask("a", prompt="x" * 20, max_tokens=70)
    stack.order(exchange, "end")
    stack.tracker.engine_finished(f"cmpl-{exchange.engine_id}-0", 4, 6)
    assert stack.level("a") == 90
    loop.advance(LATE_S)
    assert stack.level("a") == 90


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": -500},
        {"n": -4},
        {"best_of": -3},
        {"max_tokens": "-9e9"},
        {"max_completion_tokens": -1.5},
    ],
)
def test_negative_numbers_fill_no_bucket(loop: SteppedLoop, tmp_path: Path, asked: dict[str, Any]) -> None:
    stack = Stack(loop, tmp_path, {"name": "a", "tokens_per_minute": 100})
    stack.order(stack.ask("a", prompt="x" * 240), "count", (0, 60, 0))
    stack.ask("a", prompt="x" * 40, **asked)
    assert stack.level("a") <= 40 - 10


@pytest.mark.parametrize(
    "asked", [{"max_tokens": 10**4000, "n": 10**4000}, {"max_tokens": 1e308}, {"n": 10**400}, {"best_of": 99}]
)
def test_absurd_numbers_are_refused_for_good(
    loop: SteppedLoop, tmp_path: Path, asked: dict[str, Any]
) -> None:
    stack = Stack(loop, tmp_path, {"name": "a", "tokens_per_minute": 90})
    refused = stack.ask("a", prompt="x", **{"max_tokens": 1, **asked})
    assert (refused.status, dict(refused.sent[0]["headers"])[b"x-should-retry"]) == (429, b"false")
    assert stack.level("a") == 90


def test_a_batch_counts_as_its_prompts(loop: SteppedLoop, tmp_path: Path) -> None:
    stack = Stack(
        loop, tmp_path, {"name": "few", "concurrent_requests": 3}, {"name": "slow", "requests_per_minute": 4},
        {"name": "short", "tokens_per_minute": 100}, {"name": "free"},
    )  # fmt: skip
    never = [
        stack.ask("few", prompt=["p"] * 4), stack.ask("slow", prompt=["p"] * 1000), stack.ask("free", prompt=["p"] * 9),
        stack.ask("short", prompt=["p"] * 3, max_tokens=40), stack.ask("few", "/v1/embeddings", input=["p"] * 4),
    ]  # fmt: skip
    assert [one.status for one in never] == [429] * 5
    assert all(b"x-should-retry" in dict(one.sent[0]["headers"]) for one in never)
    assert stack.ask("few", prompt=["p"] * 3).admitted
    assert not stack.ask("few", prompt="one more").admitted
    assert stack.ask("slow", prompt=[[1, 2], [3]]).admitted
    assert stack.ask("slow", prompt=[1, 2, 3, 4, 5]).admitted  # token ids: one prompt
    later = stack.ask("slow", prompt=["p"] * 2)
    assert (later.status, b"retry-after" in dict(later.sent[0]["headers"])) == (429, True)
    assert stack.ask("free", prompt=["p", "q"]).admitted  # 3 + 2 + 1 + 2 of 8 places
    assert not stack.ask("free", prompt="no place").admitted


def test_slow_bodies_are_inside_the_bounds_of_queue_and_key(loop: SteppedLoop, tmp_path: Path) -> None:
    stack = Stack(loop, tmp_path, {"name": "a", "concurrent_requests": 5}, {"name": "b"})
    slow = [stack.open("a") for _ in range(5)]
    assert stack.open("a").status == 429
    more = [stack.open("b") for _ in range(3)]
    assert stack.open("b").status == 429
    more[0].disconnect()
    loop.settle()
    assert stack.ask("b", prompt="x").admitted
    loop.advance(BODY_S)
    assert [one.status for one in slow] == [408] * 5
    assert stack.gateway._capacity.places_taken == 1


def test_the_bodies_of_all_requests_have_a_bound(loop: SteppedLoop, tmp_path: Path) -> None:
    stack = Stack(loop, tmp_path, {"name": "a"}, max_num_queued_reqs=1000)
    bodies = [stack.send(stack.open("a"), b" " * BODY_BYTES, more=True) for _ in range(BODIES_AT_ONCE)]
    refused = stack.ask("a", prompt="x")
    assert (refused.status, stack.tracker.rejections) == (429, {"body_memory": 1})
    bodies[0].disconnect()
    loop.settle()
    assert stack.ask("a", prompt="x").admitted
    for body in bodies[1:]:
        body.disconnect()
    loop.settle()
    assert stack.gateway._capacity.bytes_taken == len(b'{"prompt": "x"}')


@pytest.mark.parametrize("name", ["anonymous", "other"])
def test_names_that_metrics_use_are_no_keys(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"the key name {name} is taken"):
        read_keys(key_file(tmp_path / "k", {"name": name, "requests_per_minute": 1}))
    assert main(["key", name]) == 2


@pytest.mark.parametrize(
    "then",
    [
        [{"name": "a", "concurrent_requests": 1, "tokens_per_minute": 100, "priority": 3}],
        [{"name": "b", "secret": "a", "concurrent_requests": 1, "tokens_per_minute": 100}],
        [{"name": "a", "secret": "fresh", "concurrent_requests": 1, "tokens_per_minute": 100}],
    ],
    ids=["changed", "renamed", "a new secret"],
)
def test_a_key_keeps_what_it_has_used_when_the_file_changes(
    loop: SteppedLoop, tmp_path: Path, then: list[dict[str, Any]]
) -> None:
    stack = Stack(loop, tmp_path, {"name": "a", "concurrent_requests": 1, "tokens_per_minute": 100})
    running = stack.ask("a", prompt="x" * 40, max_tokens=80)
    key_file(stack.file, *then)
    stack.now += 3
    secret = then[0].get("secret", "a")
    assert stack.ask(secret, prompt="x").status == 429
    stack.order(running, "count", (0, 10, 70))
    stack.order(running, "end")
    assert stack.ask(secret, prompt="x" * 40, max_tokens=30).status == 429
    assert stack.ask(secret, prompt="x" * 40).admitted


def test_a_key_taken_out_and_put_back_has_no_fresh_start(loop: SteppedLoop, tmp_path: Path) -> None:
    entry = {"name": "a", "requests_per_minute": 1}
    stack = Stack(loop, tmp_path, entry)
    assert stack.ask("a", prompt="x").admitted
    for entries in ([{"name": "b"}], [{"name": "b"}, entry]):
        key_file(stack.file, *entries)
        stack.now += 3
        stack.ask("b", prompt="x")
    assert stack.ask("a", prompt="x").status == 429


@pytest.mark.parametrize("step", [-5000.0, 5000.0])
def test_a_clock_that_steps_fills_a_bucket_once_at_most(
    loop: SteppedLoop, tmp_path: Path, step: float
) -> None:
    stack = Stack(loop, tmp_path, {"name": "a", "requests_per_minute": 2})
    stack.now = 10_000.0
    asked = [stack.ask("a", prompt="x").status for _ in range(3)]
    stack.now += step
    again = [stack.ask("a", prompt="x").status for _ in range(3)]
    stack.now += 30
    assert asked == [0, 0, 429]
    assert again == ([0, 0, 429] if step > 0 else [429] * 3)
    assert stack.ask("a", prompt="x").admitted
