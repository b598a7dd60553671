"""Log-probabilities of given continuations, from any server whose /v1/completions echoes a prompt with them.

Where the server has `/tokenize` (vLLM, Lowbit), prompts are sent as token ids, split as in core's evals, and tokens are
returned as ids. Elsewhere they are sent as text, and `text_offset` says which tokens are the continuation's. If the
server can do neither, one line says so and the load test goes on without.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from lowbit_core.errors import LowbitError
from lowbit_core.evals.items import Request, encode_pair
from lowbit_core.evals.scoring import Scored, Top
from lowbit_loadtest.generate.client import REJECTED_STATUSES
from lowbit_loadtest.generate.endpoints.piece import error_message
from lowbit_loadtest.generate.http.target import Target

TRIED_TOPS = (20, 5, 1)  # how many of the likeliest tokens; servers limit it
RETRIES = 5
RETRY_AFTER_S = 1.0
PROBE = Request("The capital of France", " is Paris.")


class Unsupported(LowbitError):
    """The server cannot score continuations; the message says what it lacks."""


@dataclass(frozen=True)
class Prompt:
    """What is sent for one request: token ids, or text, and where its continuation begins (in tokens or characters)."""

    content: list[int] | str
    begins: int

    @property
    def is_ids(self) -> bool:
        return not isinstance(self.content, str)


class Scorer:
    """Scores prompts at one server. `top` is how many of the likeliest tokens come back with texts."""

    def __init__(self, http: httpx.AsyncClient, target: Target, top: int, has_tokenize: bool) -> None:
        self._http = http
        self._target = target
        self.top = top
        self.has_tokenize = has_tokenize
        self.sends_ids = has_tokenize
        self._encoded: dict[str, list[int]] = {}  # choices share their context

    async def prepare(self, request: Request) -> Prompt:
        """The request as the server takes it."""
        if not self.sends_ids:
            return Prompt(request.context + request.continuation, len(request.context))
        seen = {text: await self._encode(text) for text in _texts(request)}
        return Prompt(*encode_pair(request, seen.__getitem__))

    async def score(self, prompt: Prompt, top: int = 1) -> Scored | None:
        """The continuation's log-probabilities; None when the server did not give them, even asked again."""
        for attempt in range(RETRIES):
            try:
                response = await self._post(prompt, top)
            except (httpx.HTTPError, OSError):
                return None
            if response.status_code not in REJECTED_STATUSES:
                return _read(response, prompt) if response.status_code == httpx.codes.OK else None
            await asyncio.sleep(RETRY_AFTER_S * (attempt + 1))
        return None

    async def _post(self, prompt: Prompt, top: int) -> httpx.Response:
        body: dict[str, Any] = {
            "model": self._target.model,
            "prompt": prompt.content,
            "echo": True,
            "logprobs": top,
            "max_tokens": 1,
            "temperature": 0,
        }
        if prompt.is_ids:
            body["return_tokens_as_token_ids"] = True
        asked = {**self._target.access.changed(body), **body}  # `--body` adds keys, and changes none of these
        return await self._http.post("completions", json=asked, timeout=self._target.timeout_s)

    async def _encode(self, text: str) -> list[int]:
        if text in self._encoded:
            return self._encoded[text]
        body = {"model": self._target.model, "prompt": text}
        response = await self._http.post("../tokenize", json=body, timeout=self._target.timeout_s)
        response.raise_for_status()
        self._encoded[text] = [int(token) for token in response.json()["tokens"]]
        return self._encoded[text]

    async def probe(self) -> None:
        """Find out what the server can do; Unsupported with the reason."""
        if self.has_tokenize:
            try:
                await self._encode("a")
            except (httpx.HTTPError, ValueError, KeyError, TypeError):
                self.sends_ids = False
        prompt, why = await self.prepare(PROBE), ""
        for top in (one for one in TRIED_TOPS if one <= self.top or one == 1):
            try:
                response = await self._post(prompt, top)
            except (httpx.HTTPError, OSError) as error:
                raise Unsupported(f"POST /v1/completions does not answer: {error}") from None
            if response.status_code != httpx.codes.OK:
                why = f"status {response.status_code}: {error_message(response.text)}"
            elif _read(response, prompt) is None:
                why = "the answer has no log-probabilities of the prompt"
            else:
                self.top = top
                return
        raise Unsupported(f"POST /v1/completions with echo and logprobs: {why}")


async def find_scorer(http: httpx.AsyncClient, target: Target, top: int) -> Scorer:
    """A scorer that works at this server; Unsupported with the reason."""
    scorer = Scorer(http, target, top, has_tokenize=True)
    await scorer.probe()
    return scorer


def _texts(request: Request) -> set[str]:
    stripped = request.context.rstrip(" ")
    return {stripped, request.context + request.continuation} - {""}


def _read(response: httpx.Response, prompt: Prompt) -> Scored | None:
    """The continuation's part of an echoed answer; None if it is not there."""
    try:
        logprobs = response.json()["choices"][0]["logprobs"]
        values, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
        inside = _inside(prompt, logprobs["text_offset"], len(values))
        scored = [(float(values[i]), _top(tops[i])) for i in inside if values[i] is not None]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if not scored:
        return None
    greedy = all(value >= max(top.values(), default=value) for value, top in scored)
    return Scored(tuple(value for value, _ in scored), greedy, tuple(top for _, top in scored))


def _inside(prompt: Prompt, offsets: Sequence[int], tokens: int) -> list[int]:
    """The positions of the continuation's tokens, without the one token that the server adds at the end."""
    if prompt.is_ids:
        return list(range(prompt.begins, min(tokens, len(prompt.content))))
    start = offsets[0]
    return [i for i in range(tokens) if prompt.begins <= offsets[i] - start < len(prompt.content)]


def _top(top: dict[str, Any] | None) -> Top:
    return {str(token): float(value) for token, value in (top or {}).items()}
