"""Events out of bytes: the same ones however the bytes are cut, and each as soon as it is whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_loadtest.generate.http.events import Event, EventReader, OversizedEvent

TEXTS = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=12)
OBJECTS = st.dictionaries(TEXTS, TEXTS, max_size=2)
NEWLINES = st.sampled_from(["\n", "\r\n", "\r"])


def read(body: bytes, size: int) -> list[Event]:
    reader = EventReader()
    events = [
        event for start in range(0, len(body), size) for event in reader.feed(body[start : start + size])
    ]
    return [*events, *reader.end()]


def test_events_survive_any_split_into_chunks() -> None:
    body = (
        'data: {"a": "ü"}\r\n\r\n: comment\ndata: one\ndata: two\n\ndata:[DONE]\n\ndata: cut off\n'.encode()
    )
    for size in range(1, len(body) + 1):
        assert [text for text, _, _ in read(body, size)] == ['{"a": "ü"}', "one\ntwo", "[DONE]"]


@settings(max_examples=200, deadline=None)
@given(st.lists(OBJECTS, min_size=1, max_size=4), NEWLINES, st.booleans(), st.integers(1, 40), st.booleans())
def test_every_object_comes_out_once_whatever_the_lines_end_with(
    objects: list[dict[str, str]], newline: str, blank: bool, size: int, comments: bool
) -> None:
    end = newline * (2 if blank else 1)
    before = f": ping{newline}id: 7{newline}" if comments else ""
    body = "".join(f"{before}data: {json.dumps(one, ensure_ascii=False)}{end}" for one in objects)
    found = read(f"{body}data: [DONE]".encode(), size)
    assert [value for _, value, _ in found] == [*objects, None]
    assert found[-1][0] == "[DONE]"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 20))
def test_any_bytes_are_read_without_an_error_and_alike_in_every_split(body: bytes, size: int) -> None:
    assert read(body, size) == read(body, max(1, len(body)))


def test_an_event_is_there_with_its_last_byte() -> None:
    reader = EventReader()
    assert reader.feed(b'data: {"a": 1}') == []
    assert [event.value for event in reader.feed(b"\r")] == [{"a": 1}]  # not only when the next one begins
    assert reader.feed(b"\n\r\n") == []
    assert [event.name for event in reader.feed(b'event: error\ndata: {"b": 2}\n')] == ["error"]


def test_a_body_that_begins_as_json_is_no_stream() -> None:
    reader = EventReader()
    for part in (b" \n", b"{\n", b'"data":\n\n"data: 1"}'):
        assert reader.feed(part) == []
    assert reader.end() == []
    assert json.loads(bytes(reader.whole or b"")) == {"data": "data: 1"}


def test_an_endless_line_is_refused() -> None:
    reader = EventReader()
    for _ in range(4):
        assert reader.feed(b"x" * (1 << 20)) == []
    with pytest.raises(OversizedEvent):
        reader.feed(b"x")
