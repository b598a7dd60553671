"""Any mixture of what is allowed: however an answer is cut, dressed and interrupted, its tokens are the server's."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_loadtest.generate.client import Client
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.request import Request

HELLO = Request(({"role": "user", "content": "Hello"},), max_tokens=64, temperature=0.0, seed=0)
WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=8
)  # no tags of thought
NOTHING: st.SearchStrategy[Any] = st.sampled_from([None, "", {}])
NOISE = st.dictionaries(
    st.sampled_from(["error", "id", "provider", "system_fingerprint", "service_tier"]), NOTHING
)
BETWEEN = st.sampled_from(["", ": ping", "id: 3", "retry: 10", "data:", "event: message", "unknown"])


class Pieces(httpx.AsyncByteStream):
    """A body in pieces of some size."""

    def __init__(self, body: bytes, size: int) -> None:
        self._body, self._size = body, size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._body), self._size):
            yield self._body[start : start + self._size]


def ask(body: bytes, size: int, lenient: bool = False) -> RequestRecord:
    """The record of an answer that is this body."""
    target = Target("http://h", "m", lenient=lenient)

    async def run() -> RequestRecord:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Pieces(body, size)))
        async with open_http(target, transport) as http:
            return await Client(http, target).complete(HELLO)

    return asyncio.run(run())


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[Any], list[str], int]:
    """Events of a sound answer, its words, and how many of them are thoughts."""
    thoughts, words = draw(st.lists(WORDS, max_size=3)), draw(st.lists(WORDS, min_size=1, max_size=5))
    key = draw(st.sampled_from(["reasoning", "reasoning_content"]))
    deltas: list[Any] = [{"role": "assistant", "content": draw(st.sampled_from(["", None]))}]
    deltas += [{key: word, "content": None} for word in thoughts] + [{"content": word} for word in words]
    events: list[Any] = [
        {**draw(NOISE), "choices": [{"delta": one, "finish_reason": None}]} for one in deltas
    ]
    events.append(
        {**draw(NOISE), "choices": [{"delta": draw(st.sampled_from([{}, None])), "finish_reason": "stop"}]}
    )
    tokens = len(thoughts) + len(words)
    usage = draw(
        st.sampled_from(
            [
                {"prompt_tokens": 7, "completion_tokens": tokens},
                {"prompt_tokens": 7, "total_tokens": 7 + tokens},
                {"input_tokens": 7, "output_tokens": tokens, "total_tokens": None},
                {"prompt_tokens": "7", "completion_tokens": float(tokens), "prompt_tokens_details": None},
            ]
        )
    )
    if draw(st.booleans()):
        events[-1]["usage"] = usage
    else:
        events.append({"choices": draw(st.sampled_from([[], None])), "usage": usage})
    return [*events, "[DONE]"], words, len(thoughts)


def written(data: st.DataObject, events: list[Any]) -> bytes:
    draw = data.draw
    newline = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    ascii_only, space = draw(st.booleans()), draw(st.sampled_from(["", " "]))
    text = ""
    for event in events:
        line = event if isinstance(event, str) else json.dumps(event, ensure_ascii=ascii_only)
        between = draw(BETWEEN)
        text += (f"{between}{newline}{newline}" if between else "") + f"data:{space}{line}{newline}{newline}"
    return text.encode()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_sound_answer_is_completed_with_the_servers_tokens(data: st.DataObject) -> None:
    events, words, thoughts = data.draw(answers())
    record = ask(written(data, events), data.draw(st.integers(1, 200)))
    assert (record.outcome, record.detail, record.notes) == (Outcome.COMPLETED, "", ())
    assert (record.prompt_tokens, record.output_tokens) == (7, len(words) + thoughts)
    assert len(record.chunk_times_s) == len(words) + thoughts
    assert record.first_answer_s == record.chunk_times_s[thoughts]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_an_answer_that_loses_any_part_of_its_end_is_never_completed(data: st.DataObject) -> None:
    events, _, _ = data.draw(answers())
    body = written(data, events)
    lost = data.draw(st.integers(1, len(body)))
    record = ask(body[:-lost], 64)
    rest = body[:-lost].rstrip(b"\r\n")
    if not rest.endswith(b"[DONE]"):
        assert record.outcome in (Outcome.CUT_OFF, Outcome.FAILED)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 50), st.booleans())
def test_no_bytes_are_an_answer_by_chance(body: bytes, size: int, lenient: bool) -> None:
    record = ask(body, size, lenient)
    assert record.outcome in (Outcome.CUT_OFF, Outcome.FAILED)
    assert record.detail
    assert "\n" not in record.detail
