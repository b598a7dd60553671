"""Counts prompt tokens with the server's own tokenizer, and cuts made-up prompts to an exact count.

vLLM and Lowbit answer `POST /tokenize`, chat template included. A server without it is counted in words; the result
says so, and the prompt tokens that it reports itself are in every record.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import httpx

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.endpoints import endpoint_named
from lowbit_loadtest.generate.endpoints.conversation import as_prompt
from lowbit_loadtest.generate.http.target import Target
from lowbit_loadtest.generate.request import Message

FIT_ROUNDS = 6


class Counter(Protocol):
    """How many tokens a prompt has; `extra_tokens` is what the template last added to the words."""

    name: str
    extra_tokens: int

    async def count(self, messages: Sequence[Message]) -> int: ...


class ServerTokens:
    """The server's `/tokenize`."""

    name = "server"

    def __init__(self, http: httpx.AsyncClient, target: Target) -> None:
        self._http = http
        self._model = target.model
        self._has_template = endpoint_named(target.endpoint).has_template
        self.extra_tokens = 0

    async def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the conversation, with template and generation prompt, or of its text, as the endpoint takes it;
        ConfigError if refused."""
        asked: dict[str, Any] = {"prompt": as_prompt(messages)}
        if self._has_template:
            asked = {"messages": list(messages), "add_generation_prompt": True}
        response = await self._http.post("../tokenize", json={"model": self._model, **asked}, timeout=30.0)
        if response.status_code != httpx.codes.OK:
            raise ConfigError(f"/tokenize answers {response.status_code}: {response.text[:200]}")
        return int(response.json()["count"])


def text_of(message: Message) -> str:
    """All text of a message: its content, or the text of its parts, and the calls of an answer."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    calls = message.get("tool_calls")
    return " ".join([*parts, json.dumps(calls)] if calls else parts)


class WordTokens:
    """For servers without `/tokenize`: one token a word."""

    name = "words"
    extra_tokens = 0

    async def count(self, messages: Sequence[Message]) -> int:
        return sum(len(text_of(message).split()) for message in messages)


async def find_counter(http: httpx.AsyncClient, target: Target) -> Counter:
    """The server's tokenizer if it offers one, otherwise words."""
    server = ServerTokens(http, target)
    try:
        await server.count([{"role": "user", "content": "a"}])
    except (ConfigError, httpx.HTTPError, ValueError, KeyError, TypeError):
        return WordTokens()
    return server


async def fit_to_tokens(
    counter: Counter, words: Sequence[str], tokens: int, system: tuple[Message, ...] = ()
) -> tuple[Message, ...]:
    """A user message of the first words, so many that the prompt has `tokens` tokens, or as near as it comes.

    `words` repeat when they run out. Where a word is one token, the second guess is exact, and later prompts
    hit at the first because what the template adds is remembered.
    """
    prefix_tokens = sum(len(text_of(message).split()) for message in system)
    size = max(1, tokens - prefix_tokens - counter.extra_tokens)
    best: tuple[int, tuple[Message, ...]] | None = None
    last: tuple[int, int] | None = None
    for _ in range(FIT_ROUNDS):
        text = " ".join(words[position % len(words)] for position in range(size))
        messages = (*system, {"role": "user", "content": text})
        error = await counter.count(messages) - tokens
        if best is None or abs(error) < best[0]:
            best = abs(error), messages
        if error == 0 or (size == 1 and error > 0):
            break
        per_word = (error - last[1]) / (size - last[0]) if last and size != last[0] else 1.0
        last = size, error
        size = max(1, size - (round(error / max(per_word, 1.0)) or int(math.copysign(1, error))))
    assert best is not None
    counter.extra_tokens = max(0, tokens - prefix_tokens - size) if best[0] == 0 else counter.extra_tokens
    return best[1]
