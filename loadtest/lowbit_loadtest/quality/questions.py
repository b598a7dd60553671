"""Asks every quality question once: scored continuations and greedy probes, a few at a time.

Prompts are prepared once, so that idle and under load the same bytes are sent. Asking has an event loop of its own, in
a thread beside the load.
"""

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item, Key
from lowbit_core.evals.scoring import Answer, Scored, answer
from lowbit_core.evals.tasks import load_items, load_own_items, load_text
from lowbit_loadtest.generate.client import Client
from lowbit_loadtest.generate.endpoints import endpoint_named
from lowbit_loadtest.generate.http.target import Target, open_http
from lowbit_loadtest.generate.records import Interval, Outcome
from lowbit_loadtest.quality.probes import Probe, Reply, judge, make_probes
from lowbit_loadtest.quality.scorer import Prompt, Scorer, Unsupported, find_scorer
from lowbit_loadtest.quality.verdict import Responses
from lowbit_loadtest.scenario import Quality

TOKENIZED_AT_ONCE = 8
Question = tuple[Item, tuple[Prompt, ...]]


@dataclass(frozen=True)
class QuestionSet:
    """What is asked, ready to be sent. `unsupported` has a line for each thing that the server cannot be asked."""

    target: Target
    concurrency: int
    questions: tuple[Question, ...]
    probes: tuple[Probe, ...]
    top: int
    sends_ids: bool
    unsupported: tuple[str, ...]


def read_items(quality: Quality) -> list[Item]:
    """All items, shuffled; ConfigError where they cannot be read."""
    folder = Path(quality.tasks_dir) if quality.tasks_dir else None
    items = load_items(quality.tasks, folder, quality.limit, quality.seed)
    if quality.items_file:
        items += load_own_items(Path(quality.items_file))
    if quality.text_file:
        items += load_text(Path(quality.text_file), quality.texts, quality.text_characters, quality.seed)
    if not items and not quality.probes:
        raise ConfigError("quality asks nothing: give tasks, items_file, text_file or probes")
    random.Random(quality.seed).shuffle(items)
    return items


def prepare(quality: Quality, items: Sequence[Item], target: Target) -> QuestionSet:
    """Find out what the server can be asked, and turn items into prompts."""
    return asyncio.run(_prepare(quality, items, target))


async def _prepare(quality: Quality, items: Sequence[Item], target: Target) -> QuestionSet:
    async with open_http(target) as http:
        unsupported = []
        questions: list[Question] = []
        top, sends_ids = 1, False
        try:
            scorer = await find_scorer(http, target, quality.top_logprobs)
            top, sends_ids = scorer.top, scorer.sends_ids
            questions = await _questions(scorer, items)
        except Unsupported as error:
            unsupported.append(f"no accuracy, perplexity and KL: {error}")
        without = await _refuses_json(http, target) if quality.probes >= 3 else None
        if without:
            unsupported.append(f"no JSON probes: {without}")
    probes = make_probes(quality.probes, quality.probe_tokens, with_json=without is None)
    return QuestionSet(
        target, quality.concurrency, tuple(questions), tuple(probes), top, sends_ids, tuple(unsupported)
    )


async def _questions(scorer: Scorer, items: Sequence[Item]) -> list[Question]:
    few = asyncio.Semaphore(TOKENIZED_AT_ONCE)

    async def question(item: Item) -> Question:
        async with few:
            return item, tuple([await scorer.prepare(one) for one in item.requests])

    return list(await asyncio.gather(*map(question, items)))


async def _refuses_json(http: httpx.AsyncClient, target: Target) -> str | None:
    endpoint = endpoint_named(target.endpoint)
    if not endpoint.takes_json:
        return f"/v1/{endpoint.path} cannot be asked for JSON by schema"
    probe = next(one for one in make_probes(3, 1, with_json=True) if one.is_json)
    record = await Client(http, target).complete(probe.request)
    return None if record.outcome is Outcome.COMPLETED else record.detail


def ask_all(asked: QuestionSet, stop: threading.Event) -> Responses:
    """Ask everything, or until `stop` is set."""
    return asyncio.run(_ask_all(asked, stop))


async def _ask_all(asked: QuestionSet, stop: threading.Event) -> Responses:
    answers: dict[Key, Answer] = {}
    replies: dict[str, Reply] = {}
    in_flight: list[Interval] = []
    target = asked.target
    async with open_http(target) as http:
        scorer = Scorer(http, target, asked.top, asked.sends_ids)
        chat = Client(http, target)

        async def ask(question: Question) -> None:
            item, prompts = question
            start_s = time.monotonic()
            scored = [
                await scorer.score(prompt, asked.top if item.kind == "text" else 1) for prompt in prompts
            ]
            in_flight.append(Interval(start_s, time.monotonic()))
            answers[item.key] = _answer(item, scored)

        async def probe(one: Probe) -> None:
            record = await chat.complete(one.request)
            in_flight.append(Interval(record.sent_s, record.ended_s))
            replies[one.id] = judge(one, record)

        waiting = iter(_mixed(asked))

        async def work() -> None:
            for one in waiting:
                if stop.is_set():
                    return
                await (probe(one) if isinstance(one, Probe) else ask(one))

        await asyncio.gather(*(work() for _ in range(asked.concurrency)))
    in_order = {item.key: answers[item.key] for item, _ in asked.questions if item.key in answers}
    return Responses(in_order, replies, tuple(in_flight))


def _mixed(asked: QuestionSet) -> list[Question | Probe]:
    """Probes spread among the questions."""
    mixed: list[Question | Probe] = list(asked.questions)
    for number, one in enumerate(asked.probes):
        mixed.insert(round((number + 0.5) * (len(asked.questions) + number) / len(asked.probes)), one)
    return mixed


def _answer(item: Item, scored: Sequence[Scored | None]) -> Answer:
    """The item's answer, if all its continuations were scored; only texts keep the likeliest tokens."""
    whole = [one for one in scored if one is not None]
    found = answer(item, whole if len(whole) == len(scored) else None)
    return found if item.kind == "text" else replace(found, top=())
