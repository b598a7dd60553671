"""`lowbit loadtest`'s flags of the target: refused in one line with status 2 before a request, or measured."""

import argparse
import json
from typing import Any

import pytest
from tests.loadtest.conftest import FakeServer

from lowbit_core.errors import ConfigError
from lowbit_loadtest.cli import command
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.scenario import parse_scenario
from lowbit_loadtest.target_flags import add_target_arguments, check_fits, target_of


def parsed(*arguments: str) -> Target:
    parser = argparse.ArgumentParser()
    add_target_arguments(parser)
    return target_of(parser.parse_args(arguments), "LOWBIT_API_KEY")


@pytest.mark.parametrize(
    ("arguments", "endpoint"),
    [
        (("http://h",), "chat"),
        (("http://h/v1/responses",), "responses"),
        (("http://h", "--endpoint", "/v1/completions"), "completions"),
        (("http://h", "--endpoint", "v1/chat/completions"), "chat"),
        (("http://h", "--endpoint", "embeddings"), "embeddings"),
        (("http://h/v1/messages", "--endpoint", "/v1/messages"), "messages"),
    ],
)
def test_the_endpoint_is_named_by_a_flag_or_by_the_url(arguments: tuple[str, ...], endpoint: str) -> None:
    assert parsed("--target", *arguments).endpoint == endpoint


def test_a_urls_query_goes_with_every_request() -> None:
    target = parsed(
        "--target", "https://h/openai/deployments/n/chat/completions?api-version=1&x=", "--query", "a=b"
    )
    assert target.url == "https://h/openai/deployments/n/chat/completions"
    assert target.access.query == (("api-version", "1"), ("x", ""), ("a", "b"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--endpoint", "/v1/complitions"), "did you mean"),
        (("--endpoint", "/v2/completions"), "give the whole URL as --target"),
        (("--header", "X A=b"), "no header's name"),
        (("--query", "a"), "is not KEY=VALUE"),
        (("--body", "a={"), "is not JSON"),
        (("--ca-file", "/nowhere.pem"), "cannot be read"),
    ],
)
def test_a_flag_that_means_nothing_is_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        parsed("--target", "http://h", *arguments)
    assert (raised.value.exit_status, "\n" in str(raised.value)) == (2, False)


def test_an_endpoint_that_the_url_contradicts_is_refused() -> None:
    with pytest.raises(ConfigError, match="--target ends with responses, and --endpoint is chat"):
        parsed("--target", "http://h/v1/responses", "--endpoint", "chat/completions")


@pytest.mark.parametrize("key", ["k\n", "a\nx-evil: 1", "schlüssel", "k\udcff"])
def test_a_key_that_a_header_cannot_hold_is_refused_before_a_request(
    key: str, fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_API_KEY", key)
    with pytest.raises(ConfigError, match="the key in LOWBIT_API_KEY"):
        lowbit_loadtest("--target", fake_server.url)
    assert fake_server.connections == set()


@pytest.mark.parametrize(
    ("endpoint", "scenario", "words"),
    [
        ("messages", {"output": {"tokens": 3, "exact": True}}, "output.exact"),
        ("embeddings", {"slo": {"ttft_s": 1}}, "answers in one piece"),
        ("embeddings", {"quality": {"probes": 3}}, "quality asks for text"),
        ("responses", {"output": {"tokens": 3, "exact": True}, "slo": {"ttft_s": 1}}, ""),
        ("embeddings", {"slo": {"e2e_s": 1}}, ""),
    ],
)
def test_what_an_endpoint_cannot_give_is_refused(endpoint: str, scenario: dict[str, Any], words: str) -> None:
    data = {
        "arrivals": {"kind": "closed", "concurrency": 1},
        "requests": 2,
        "prompts": {"kind": "text"},
        **scenario,
    }
    if not words:
        check_fits(parse_scenario(data, "test"), Target("http://h", endpoint=endpoint))
        return
    with pytest.raises(ConfigError, match=words):
        check_fits(parse_scenario(data, "test"), Target("http://h", endpoint=endpoint))


def lowbit_loadtest(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_server_that_ends_without_done_is_counted_only_when_told(
    fake_server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--target", fake_server.url, "--requests", 2, "--concurrency", 1, "--header", "X-A=1")
    for _ in range(2):
        fake_server.script(done=False)
    assert lowbit_loadtest(*arguments, "--lenient", "--body", "top_k=5") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["notes"] == {"counted as completed without [DONE] (--lenient)": 2}
    assert (result["outcomes"]["completed"], result["output_tokens"]) == (2, fake_server.output_tokens)
    assert result["request"]["body"] == ["top_k=5"]
    assert all(body["top_k"] == 5 for body in fake_server.bodies)
