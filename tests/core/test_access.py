"""The flags of how a server is reached: what they make of a request, and what cannot be sent."""

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_core.access import (
    Access,
    access_of,
    add_access_arguments,
    api_key,
    body_change,
    check_header_value,
    given_flag,
)
from lowbit_core.errors import ConfigError

BODY: dict[str, Any] = {"model": "m", "max_tokens": 9, "stream_options": {"include_usage": True}, "seed": 1}


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_access_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["seed="], {"seed": None}),
        (["nothing.there="], {}),
        (["user=me"], {"user": "me"}),
        (["user=12"], {"user": 12}),
        (['user="12"'], {"user": "12"}),
        (["top_p=0.5", "stop=null", "n=true"], {"top_p": 0.5, "stop": None, "n": True}),
        (["stream_options.include_usage=false"], {"stream_options": {"include_usage": False}}),
        (["stream_options.include_usage="], {"stream_options": {}}),
        (["stream_options="], {"stream_options": None}),
        (
            ["chat_template_kwargs.enable_thinking=false"],
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        (['provider={"order": ["a"]}', "provider.only=x"], {"provider": {"order": ["a"], "only": "x"}}),
        (["max_completion_tokens=@max_tokens"], {"max_tokens": None, "max_completion_tokens": 9}),
        (["a.b=@seed", "seed=2"], {"a": {"b": 1}, "seed": 2}),
        (["b=@nowhere"], {}),
        (["model.name=x"], {"model": {"name": "x"}}),
        (["a=b=c"], {"a": "b=c"}),
        (['at="@home"'], {"at": "@home"}),
    ],
)
def test_a_body_is_changed_as_it_is_told_and_the_given_one_is_left(
    changes: list[str], expected: dict[str, Any]
) -> None:
    before = copy.deepcopy(BODY)
    found = Access(body=tuple(map(body_change, changes))).changed(BODY)
    removed = {change[:-1] for change in changes if change.endswith("=")} | {
        change.partition("@")[2] for change in changes if "=@" in change
    }
    wanted = {**BODY, **expected}
    assert found == {
        name: value for name, value in wanted.items() if value is not None or name not in removed | {""}
    }
    assert before == BODY


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5
    )
)
def test_what_a_change_shows_makes_the_same_change(value: Any) -> None:
    from lowbit_core.access import BodyChange

    change = BodyChange(("a", "b"), value)
    assert body_change(change.shown) == change


@pytest.mark.parametrize("text", ["nothing", "=1", "a..b=1", ".a=1", "a={", 'a="', "a=[1,", "a=@", "a=@.b"])
def test_a_body_change_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--body"):
        body_change(text)


def test_a_header_is_written_with_an_equals_sign_or_as_curl_writes_it() -> None:
    access = access_of(parsed("--header", "X-A=b: c=d", "--header", "X-E: f=g", "--header", "X-Empty="))
    assert access.headers == (("X-A", "b: c=d"), ("X-E", "f=g"), ("X-Empty", ""))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("X-A", "needs a name and a value"),
        ("=b", "needs a name and a value"),
        ("X A=b", "is no header's name"),
        ("Ü=b", "is no header's name"),
        ("Content-Length=3", "belongs to the connection"),
        ("transfer-encoding: chunked", "belongs to the connection"),
        ("X-A=b\n", "ends with a line break"),
        ("X-A=b\r\nX-Evil: 1", r"has a line break \(character 2\)"),
        ("X-A=schlüssel", r"has a letter that is not ASCII \(character 5\)"),
        ("X-A=\x00", "has a control"),
        ("X-A= b", "begins or ends with a space"),
    ],
)
def test_a_header_that_cannot_be_sent_is_refused(header: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        access_of(parsed("--header", header))


def test_a_header_given_twice_is_refused_whatever_its_letters() -> None:
    with pytest.raises(ConfigError, match="--header x-a is given twice"):
        access_of(parsed("--header", "X-A=1", "--header", "x-a=2"))


@given(st.text())
def test_a_value_is_refused_or_goes_through_the_wire_as_it_is(value: str) -> None:
    try:
        checked = check_header_value("it", value)
    except ConfigError:
        assert value != value.strip() or not value.isascii() or not value.replace("\t", " ").isprintable()
    else:
        assert checked.encode("ascii") == value.encode()
        assert not {"\r", "\n"} & set(checked)


@pytest.mark.parametrize(
    "key", ["secret\n", "secret\r\n", "a\nx-evil: 1", "schlüssel", "k\udcff", "  secret", "“k”", "k\x7f"]
)
def test_a_key_that_a_header_cannot_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="the key in LOWBIT_API_KEY") as raised:
        api_key("LOWBIT_API_KEY", key)
    assert raised.value.exit_status == 2
    assert key not in str(raised.value)


def test_no_key_and_an_empty_one_are_none() -> None:
    assert api_key("A", None) is None
    assert api_key("A", "") is None


def test_certificates_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    for path in (tmp_path / "missing.pem", tmp_path / "no.pem", tmp_path):
        with pytest.raises(ConfigError, match=r"--ca-file .* cannot be read"):
            access_of(parsed("--ca-file", str(path)))


def test_the_first_flag_that_was_given_is_named() -> None:
    assert given_flag(parsed()) is None
    assert given_flag(parsed("--insecure")) == "--insecure"
    assert given_flag(parsed("--ca-file", "x")) == "--ca-file"
