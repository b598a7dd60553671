"""Asks every quality question once: scored continuations and greedy probes, a few at a time.

Prompts are prepared before the first sitting, so that both sittings send the same bytes. A sitting runs in its own
event loop, in a thread beside the load where there is one.
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
from lowbit_loadtest.generate.client import ChatClient
from lowbit_loadtest.generate.driver import Target, open_http
from lowbit_loadtest.generate.records import Interval, Outcome
from lowbit_loadtest.quality.probes import Probe, Reply, judge, make_probes
from lowbit_loadtest.quality.scorer import Prompt, Scorer, Unsupported, find_scorer
from lowbit_loadtest.quality.verdict import Sitting
from lowbit_loadtest.scenario import Quality

TOKENIZED_AT_ONCE = 8
Question = tuple[Item, tuple[Prompt, ...]]


@dataclass(frozen=True)
class Exam:
    """What is asked, ready to be sent. `unsupported` says what the server cannot be asked, in a line each."""

    target: Target
    concurrency: int
    questions: tuple[Question, ...]
    probes: tuple[Probe, ...]
    top: int
    sends_ids: bool
    unsupported: tuple[str, ...]


def read_items(quality: Quality) -> list[Item]:
    """Every item, in an order that mixes the tasks; ConfigError before anything is sent."""
    folder = Path(quality.tasks_dir) if quality.tasks_dir else None
    items = load_items(quality.tasks, folder, quality.items, quality.seed)
    if quality.own:
        items += load_own_items(Path(quality.own))
    if quality.text:
        items += load_text(Path(quality.text), quality.texts, quality.text_characters, quality.seed)
    if not items and not quality.probes:
        raise ConfigError("quality asks nothing: give tasks, own, text or probes")
    random.Random(quality.seed).shuffle(items)
    return items


def prepare(quality: Quality, items: Sequence[Item], target: Target) -> Exam:
    """Find out what the server can be asked, and turn the items into prompts."""
    return asyncio.run(_prepare(quality, items, target))


async def _prepare(quality: Quality, items: Sequence[Item], target: Target) -> Exam:
    async with _open(target) as http:
        unsupported = []
        questions: list[Question] = []
        top, sends_ids = 1, False
        try:
            scorer = await find_scorer(http, target.model, quality.top_logprobs, target.timeout_s)
            top, sends_ids = scorer.top, scorer.sends_ids
            questions = await _questions(scorer, items)
        except Unsupported as error:
            unsupported.append(f"no accuracy, perplexity and KL: {error}")
        without = await _refuses_json(http, target) if quality.probes >= 3 else None
        if without:
            unsupported.append(f"no JSON probes: {without}")
    probes = make_probes(quality.probes, quality.probe_tokens, with_json=without is None)
    return Exam(
        target, quality.concurrency, tuple(questions), tuple(probes), top, sends_ids, tuple(unsupported)
    )


async def _questions(scorer: Scorer, items: Sequence[Item]) -> list[Question]:
    few = asyncio.Semaphore(TOKENIZED_AT_ONCE)

    async def question(item: Item) -> Question:
        async with few:
            return item, tuple([await scorer.prepare(one) for one in item.requests])

    return list(await asyncio.gather(*map(question, items)))


async def _refuses_json(http: httpx.AsyncClient, target: Target) -> str | None:
    probe = next(one for one in make_probes(3, 1, with_json=True) if one.is_json)
    record = await ChatClient(http, target.timeout_s).complete(probe.request, target.model)
    return None if record.outcome is Outcome.COMPLETED else record.detail


def sit(exam: Exam, stop: threading.Event) -> Sitting:
    """Ask everything; what is not asked when `stop` is set stays out."""
    return asyncio.run(_sit(exam, stop))


async def _sit(exam: Exam, stop: threading.Event) -> Sitting:
    answers: dict[Key, Answer] = {}
    replies: dict[str, Reply] = {}
    in_flight: list[Interval] = []
    async with _open(exam.target) as http:
        scorer = Scorer(http, exam.target.model, exam.top, exam.target.timeout_s, exam.sends_ids)
        chat = ChatClient(http, exam.target.timeout_s)

        async def ask(question: Question) -> None:
            item, prompts = question
            top = exam.top if item.kind == "text" else 1
            start_s = time.monotonic()
            scored = [await scorer.score(prompt, top) for prompt in prompts]
            in_flight.append(Interval(start_s, time.monotonic()))
            whole: list[Scored] = [one for one in scored if one is not None]
            answers[item.key] = _without_top(item, answer(item, whole if len(whole) == len(scored) else None))

        async def probe(one: Probe) -> None:
            record = await chat.complete(one.request, exam.target.model)
            in_flight.append(Interval(record.sent_s, record.ended_s))
            replies[one.id] = judge(one, record)

        waiting = iter([*_mixed(exam)])

        async def work() -> None:
            for one in waiting:
                if stop.is_set():
                    return
                await (probe(one) if isinstance(one, Probe) else ask(one))

        await asyncio.gather(*(work() for _ in range(exam.concurrency)))
    in_order = {item.key: answers[item.key] for item, _ in exam.questions if item.key in answers}
    return Sitting(in_order, replies, tuple(in_flight))


def _mixed(exam: Exam) -> list[Question | Probe]:
    """Probes spread among the questions."""
    mixed: list[Question | Probe] = list(exam.questions)
    for number, one in enumerate(exam.probes):
        mixed.insert(round((number + 0.5) * (len(exam.questions) + number) / len(exam.probes)), one)
    return mixed


def _without_top(item: Item, one: Answer) -> Answer:
    return one if item.kind == "text" else replace(one, top=())


def _open(target: Target) -> httpx.AsyncClient:
    return open_http(target)
