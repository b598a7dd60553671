"""The load test's story: find the model, keep C requests in flight until all are sent, sum up.

Closed loop: each of C streams sends its next request when its last one has ended, so the server sets the
pace. A slow server is then sent fewer requests and its queueing does not show; what users who do not wait for
one another would see needs an open loop.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import httpx

from lowbit_loadtest.client import ChatClient, ChatRequest, Message
from lowbit_loadtest.metrics import RequestRecord, Summary, summarize


@dataclass(frozen=True)
class Options:
    """One run. `target` is the server's root URL, with or without /v1."""

    target: str
    prompts: tuple[tuple[Message, ...], ...]
    model: str | None = None
    concurrency: int = 4
    requests: int = 32
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 300.0
    api_key: str | None = None


@dataclass(frozen=True)
class Result:
    model: str
    records: tuple[RequestRecord, ...]
    summary: Summary


async def run_load_test(
    options: Options,
    on_record: Callable[[RequestRecord], None],
    transport: httpx.AsyncBaseTransport | None = None,
) -> Result:
    """Run to the end; `on_record` sees each end. Raises ConfigError before the first request."""
    async with _open_http(options, transport) as http:
        client = ChatClient(http, options.timeout_s)
        model = await client.find_model(options.model)
        records = await _closed_loop(client, model, requests_of(options), options.concurrency, on_record)
    return Result(model, tuple(records), summarize(records, options.concurrency))


def requests_of(options: Options) -> list[ChatRequest]:
    """The prompts in turn; each request has its own seed, so that repeated prompts may differ."""
    prompts = islice(cycle(options.prompts), options.requests)
    return [
        ChatRequest(messages, options.max_tokens, options.temperature, options.seed + index)
        for index, messages in enumerate(prompts)
    ]


async def _closed_loop(
    client: ChatClient,
    model: str,
    requests: Sequence[ChatRequest],
    concurrency: int,
    on_record: Callable[[RequestRecord], None],
) -> list[RequestRecord]:
    waiting = iter(requests)  # shared: each stream takes the next one
    records: list[RequestRecord] = []

    async def stream(waiting: Iterator[ChatRequest]) -> None:
        for request in waiting:
            record = await client.complete(request, model)
            records.append(record)
            on_record(record)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(stream(waiting))
    return records


def _open_http(options: Options, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"{options.target.rstrip('/').removesuffix('/v1')}/v1/",
        headers={"Authorization": f"Bearer {options.api_key}"} if options.api_key else {},
        timeout=None,  # each request has one deadline, which the client holds
        transport=transport or _transport(options.concurrency),
    )


def _transport(concurrency: int) -> httpx.AsyncHTTPTransport:
    """One connection for each stream; built here, so that no proxy of the environment is measured too."""
    return httpx.AsyncHTTPTransport(
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
    )
