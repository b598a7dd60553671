"""Which key a request presents, by the headers that clients send theirs in."""

import re
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers
from tests.server.gateway.key_files import key_file
from tests.server.gateway.test_middleware import CHAT, HELLO, Served

from lowbit_server.gateway.keys import KeyStore
from lowbit_server.gateway.openai_errors import ApiError
from lowbit_server.gateway.presented_key import presented_key


def headers(*pairs: tuple[str, str]) -> Headers:
    return Headers(raw=[(name.lower().encode(), value.encode()) for name, value in pairs])


@pytest.mark.parametrize(
    "pairs",
    [
        [("Authorization", "Bearer mine")],
        [("authorization", "bearer  mine ")],
        [("X-Api-Key", "mine")],
        [("api-key", " mine ")],
        [("x-api-key", "mine"), ("authorization", "Bearer mine"), ("api-key", "mine")],
        [("authorization", "Basic cHJveHk6cHJveHk="), ("x-api-key", "mine")],
        [("authorization", "Bearer "), ("api-key", ""), ("x-api-key", "mine")],
        [("x-api-key", "mine"), ("x-api-key", "mine")],
    ],
)
def test_a_key_is_found_in_any_of_its_headers(pairs: list[tuple[str, str]]) -> None:
    assert presented_key(headers(*pairs)) == "mine"


@pytest.mark.parametrize(
    "pairs", [[], [("authorization", "mine")], [("authorization", "Basic x")], [("api-key", " ")]]
)
def test_no_key_is_no_key(pairs: list[tuple[str, str]]) -> None:
    assert presented_key(headers(*pairs)) == ""


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([("authorization", "Bearer one"), ("x-api-key", "two")], "headers authorization and x-api-key hold"),
        ([("api-key", "one"), ("x-api-key", "two")], "headers x-api-key and api-key hold"),
        ([("x-api-key", "one"), ("x-api-key", "two")], "header x-api-key holds"),
        ([("authorization", "Bearer one"), ("authorization", "Bearer two")], "header authorization holds"),
    ],
)
def test_two_different_keys_are_refused_and_neither_is_shown(pairs: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(ApiError) as refused:
        presented_key(headers(*pairs))
    assert (refused.value.status, refused.value.message) == (
        401,
        f"the {said} two different API keys; send one",
    )
    assert not re.search(r"\bone\b(?!$)|\btwo\b(?! different)", refused.value.message)


async def test_every_route_takes_a_key_in_every_header(tmp_path: Path) -> None:
    served = Served(KeyStore(key_file(tmp_path / "k", {"name": "a", "admin": True}, {"name": "b"})))

    async def ask(sent: dict[str, str]) -> set[int]:
        chat = await served.client.post(CHAT, json=HELLO, headers=sent)
        metrics = await served.client.get("/metrics", headers=sent)
        return {chat.status_code, metrics.status_code}

    for sent in ({"x-api-key": "a-secret"}, {"api-key": "a-secret"}, {"authorization": "Bearer a-secret"}):
        assert await ask(sent) == {200}
    assert await ask({"x-api-key": "a-secret", "api-key": "b-secret"}) == {401}
    assert await ask({"x-api-key": "wrong"}) == {401}


async def test_a_key_is_not_asked_for_where_there_are_none() -> None:
    served = Served()
    answer: httpx.Response = await served.client.post(
        CHAT, json=HELLO, headers={"x-api-key": "one", "api-key": "two"}
    )
    assert answer.status_code == 200
