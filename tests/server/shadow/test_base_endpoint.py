"""The base's endpoint: what it is asked, and that whatever it answers is log-probabilities or one kind of error."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lowbit_core.errors import ConfigError
from lowbit_server.shadow.base_endpoint import BaseEndpoint, BaseError
from lowbit_server.shadow.key_file import read_key

TOKENS = (5, 6, 7)
MODELS = {
    "data": [
        {"id": "poet", "parent": "base"},
        {"id": "base", "parent": None},
        {"id": "alias", "parent": None},
    ]
}
LISTS = [None, {"6": {"logprob": -0.5, "rank": 1}}, {"7": {"logprob": -2.0}, "9": {"logprob": -0.25}}]


class Answering:
    """A base that answers what a test says, and what it was asked. It is no vLLM."""

    def __init__(self, status: int = 200, document: Any = None, models: Any = MODELS) -> None:
        self.status, self.models, self.seen = status, models, list[httpx.Request]()
        self.document = document if document is not None else {"choices": [{"prompt_logprobs": LISTS}]}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json=self.models)
        return httpx.Response(self.status, content=json.dumps(self.document))

    def endpoint(self, key_file: Path | None = None) -> BaseEndpoint:
        return BaseEndpoint("http://base/llm", key_file, httpx.MockTransport(self))


async def test_the_base_is_asked_for_the_tokens_themselves_with_its_own_name_and_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("lb-one\n")
    base = Answering()
    endpoint = base.endpoint(tmp_path / "key")
    assert await endpoint.score(TOKENS, 1, 20) == [{6: -0.5}, {7: -2.0, 9: -0.25}]
    (tmp_path / "key").write_text("lb-two\n")
    assert await endpoint.score(TOKENS, 2, 20) == [{7: -2.0, 9: -0.25}]
    assert [one.url.path for one in base.seen] == ["/llm/v1/models"] + ["/llm/v1/completions"] * 2
    assert [one.headers["authorization"] for one in base.seen[1:]] == ["Bearer lb-one", "Bearer lb-two"]
    asked = json.loads(base.seen[-1].content)
    assert (asked["model"], asked["prompt"], asked["prompt_logprobs"]) == ("base", [5, 6, 7], 20)
    await endpoint.close()


@pytest.mark.parametrize(
    "base",
    [
        Answering(500),
        Answering(401),
        Answering(document="[]"),
        Answering(document={"choices": []}),
        Answering(document={"choices": [{"prompt_logprobs": None}]}),
        Answering(document={"choices": [{"prompt_logprobs": LISTS[:2]}]}),
        Answering(document={"choices": [{"prompt_logprobs": [None, None, None]}]}),
        Answering(document={"choices": [{"prompt_logprobs": [None, {"8": {"logprob": -1}}, LISTS[2]]}]}),
        Answering(document={"choices": [{"prompt_logprobs": [None, {"6": {"logprob": "x"}}, LISTS[2]]}]}),
        Answering(models={"data": [{"id": "poet", "parent": "base"}]}),
        Answering(models=[]),
    ],
)
async def test_what_is_no_answer_is_one_error_that_tells_nothing_of_the_request(base: Answering) -> None:
    with pytest.raises(BaseError) as raised:
        await base.endpoint().score(TOKENS, 1, 20)
    assert "\n" not in str(raised.value)
    assert "5, 6" not in str(raised.value)


async def test_a_base_that_is_not_there_is_the_same_error() -> None:
    endpoint = BaseEndpoint("http://127.0.0.1:1")
    with pytest.raises(BaseError, match="did not answer"):
        await endpoint.score(TOKENS, 1, 20)


@pytest.mark.parametrize("text", ["", "two words", "one\ntwo", "ключ"])
def test_a_key_file_holds_one_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(ConfigError, match="--shadow-key-file"):
        read_key(tmp_path / "key")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "none")
