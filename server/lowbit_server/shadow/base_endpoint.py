"""The base model behind an OpenAI-compatible endpoint of vLLM, such as `lowbit serve`, asked for log-probabilities.

`/v1/completions` takes token ids as the prompt, and answers `prompt_logprobs` with those of each of its tokens, given
the ones before.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from lowbit_server.shadow.divergence import LogProbs
from lowbit_server.shadow.key_file import read_key

TIMEOUT_S = 120.0


class BaseError(Exception):
    """The base did not answer, or not what was asked for. The text is one line and holds nothing of a request."""


class BaseEndpoint:
    """`url`: its root, without /v1. `key_file` holds an API key; it is read for every request, so it may change."""

    def __init__(
        self, url: str, key_file: Path | None = None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._key_file, self._model = key_file, ""
        self._client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, transport=transport)

    async def score(self, tokens: Sequence[int], first: int, top: int) -> list[LogProbs]:
        """Log-probabilities of the `top` likeliest tokens, and of the one that is there, at `tokens[first:]`.

        Raises BaseError.
        """
        try:
            if not self._model:
                self._model = await self._only_model()
            body = {
                "model": self._model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0.0,
                "prompt_logprobs": top,
            }  # fmt: skip
            document = await self._ask("POST", "/v1/completions", body)
            return prompt_logprobs(document["choices"][0]["prompt_logprobs"], tokens, first)
        except httpx.HTTPError as error:
            raise BaseError(f"{type(error).__name__}: the base did not answer") from None
        except (LookupError, TypeError, ValueError, AttributeError):
            raise BaseError("the base's answer has no log-probabilities of the prompt's tokens") from None

    async def close(self) -> None:
        await self._client.aclose()

    async def _only_model(self) -> str:
        """The name of the base: adapters have a parent, and the other names of one model stand behind its first."""
        models = (await self._ask("GET", "/v1/models"))["data"]
        return str([one["id"] for one in models if not one.get("parent")][0])  # noqa: RUF015  # LookupError

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        headers = {}
        if self._key_file is not None:
            headers["authorization"] = f"Bearer {read_key(self._key_file)}"
        answer = await self._client.request(method, path, json=body, headers=headers)
        if answer.status_code != 200:
            self._model = ""  # it may be another server by now
            raise BaseError(f"the base answered {answer.status_code} to {method} {path}")
        document: dict[str, Any] = answer.json()
        return document


def prompt_logprobs(given: Any, tokens: Sequence[int], first: int) -> list[LogProbs]:
    """vLLM's list for each position of the prompt, from `first` on; ValueError or KeyError where it does not fit."""
    if len(given) != len(tokens):
        raise ValueError("another number of tokens")
    found: list[LogProbs] = []
    for token, entries in zip(tokens[first:], given[first:], strict=True):
        position = {int(name): float(entry["logprob"]) for name, entry in entries.items()}
        if token not in position:
            raise ValueError("the prompt's own token is missing")
        found.append(position)
    return found
