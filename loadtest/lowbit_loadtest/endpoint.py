"""Items scored through a served endpoint, for `lowbit evaluate --target`.

Requests are those of the load test's quality questions (`quality/scorer.py`), a few in flight at a time. A directory
stands for the model that the server serves from it; where the server tells its manifest, it must be the directory's.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from lowbit_core.access import DIRECT, Access, api_key
from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item
from lowbit_core.evals.scoring import Answer, answer
from lowbit_core.log import get_logger
from lowbit_core.manifest import read_manifest
from lowbit_loadtest.generate.http.proxy import find_proxy
from lowbit_loadtest.generate.http.target import Target, open_http, split_query
from lowbit_loadtest.generate.preflight import PREFLIGHT_TIMEOUT_S, served_models
from lowbit_loadtest.quality.scorer import Scorer, Unsupported, find_scorer

CONCURRENCY = 8
API_KEY = "LOWBIT_API_KEY"

log = get_logger("loadtest")


class ServedModel:
    """A model at an endpoint that can score continuations."""

    def __init__(self, target: Target, sends_ids: bool) -> None:
        self.target, self._sends_ids = target, sends_ids

    @property
    def model(self) -> str:
        """Its name there."""
        return self.target.model

    def answers(self, items: Sequence[Item]) -> Iterator[Answer]:
        """Each item's answer as it comes; the loop runs only while one is waited for."""
        with asyncio.Runner() as runner:
            http = runner.run(_opened(self.target))
            scorer = Scorer(http, self.target, 1, self._sends_ids)
            waiting, asked = iter(items), set[asyncio.Task[Answer]]()
            loop = runner.get_loop()
            while True:
                while len(asked) < CONCURRENCY and (item := next(waiting, None)) is not None:
                    asked.add(loop.create_task(_ask(scorer, item)))
                if not asked:
                    break
                done, asked = runner.run(_first_of(asked))
                yield from (task.result() for task in done)
            runner.run(http.aclose())


def connect(url: str, name: str, access: Access = DIRECT) -> ServedModel:
    """The server at `url` with the model `name`, a served name or a directory; ConfigError where it is not."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--target {url!r} is no URL; give http://HOST:PORT")
    proxy, said = find_proxy(url)
    if said is not None:
        log.info(said)
    key = api_key(API_KEY, os.environ.get(API_KEY))
    url, query = split_query(url)
    return asyncio.run(_connect(Target(url, name, key, access=access.with_query(query), proxy=proxy)))


async def _connect(target: Target) -> ServedModel:
    async with open_http(target) as http:
        target = replace(target, model=await _served_name(http, target))
        try:
            scorer = await find_scorer(http, target, 1)
        except Unsupported as error:
            raise ConfigError(f"--target {target.shown} cannot score continuations: {error}") from None
    return ServedModel(target, scorer.sends_ids)


async def _served_name(http: httpx.AsyncClient, target: Target) -> str:
    name, served = target.model, await served_models(http, target)
    directory = Path(name).expanduser()
    if served is None:
        if directory.is_dir():
            raise ConfigError(f"--target {target.shown} lists no models; give the served name as MODEL")
        return name
    if name in served:
        return name
    if directory.is_dir():
        if (model := await _model_with_manifest(http, directory)) in served:
            return str(model)
        if directory.resolve().name in served:
            return directory.resolve().name
    raise ConfigError(f"MODEL {name!r} is not served at {target.shown}; served are: {', '.join(served)}")


async def _model_with_manifest(http: httpx.AsyncClient, directory: Path) -> str | None:
    """The name of the model that is served with the directory's manifest; ConfigError if it is served with another."""
    ours = read_manifest(directory)
    if ours is None:
        return None
    response = await http.get("../lowbit/checkpoint", timeout=PREFLIGHT_TIMEOUT_S)
    theirs = _manifest_in(response) if response.status_code == httpx.codes.OK else None
    if theirs is None:
        return None
    if theirs.get("created") != ours.created:
        raise ConfigError(
            f"the server has a checkpoint made {theirs.get('created')}, {directory} was made {ours.created}; "
            "serve this one, or give the served name as MODEL"
        )
    return str(response.json().get("model"))


def _manifest_in(response: httpx.Response) -> dict[str, Any] | None:
    try:
        manifest = response.json()["manifest"]
    except (ValueError, KeyError, TypeError):
        return None
    return manifest if isinstance(manifest, dict) else None


async def _opened(target: Target) -> httpx.AsyncClient:
    return open_http(target)


async def _ask(scorer: Scorer, item: Item) -> Answer:
    try:
        prompts = [await scorer.prepare(request) for request in item.requests]
    except (httpx.HTTPError, ValueError, KeyError, TypeError, OSError):
        return answer(item, None)  # /tokenize was lost
    scored = [await scorer.score(prompt) for prompt in prompts]
    whole = [one for one in scored if one is not None]
    return answer(item, whole if len(whole) == len(scored) else None)


async def _first_of(
    asked: set[asyncio.Task[Answer]],
) -> tuple[set[asyncio.Task[Answer]], set[asyncio.Task[Answer]]]:
    return await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
