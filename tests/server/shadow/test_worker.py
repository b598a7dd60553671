"""The shadow's queue: never beside a request, bounded, and quiet when something fails."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lowbit_server.shadow import worker
from lowbit_server.shadow.base_endpoint import BaseError
from lowbit_server.shadow.divergence import SERVED_TOP, TOP, LogProbs
from lowbit_server.shadow.sampler import Answer, Sampler
from lowbit_server.shadow.worker import MOST_WAITING, Shadow

ANSWER = Answer((1, 2, 3), (4, 5))


def lists(tokens: Sequence[int], first: int) -> list[LogProbs]:
    return [{token: -0.1, 99: -2.5} for token in tokens[first:]]


class Base:
    """Stands for the base's endpoint: answers, fails or hangs as a test says."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], int, int]] = []
        self.fails, self.closed, self.gate = False, False, asyncio.Event()
        self.gate.set()

    async def score(self, tokens: Sequence[int], first: int, top: int) -> list[LogProbs]:
        self.asked.append((tuple(tokens), first, top))
        await self.gate.wait()
        if self.fails:
            raise BaseError("the base answered 500")
        return lists(tokens, first)

    async def close(self) -> None:
        self.closed = True


class Bench:
    """A shadow with a base, an engine and a switch for whether a request runs."""

    def __init__(self, most_tokens: int = 100) -> None:
        self.base, self.idle, self.engine = Base(), True, list[tuple[tuple[int, ...], int, int]]()
        self.engine_fails = False
        self.shadow = Shadow(self.base, lambda: self.idle, most_tokens, longest_pause_s=0.05)  # type: ignore[arg-type]

    async def served(self, tokens: Sequence[int], first: int, top: int) -> list[LogProbs]:
        self.engine.append((tuple(tokens), first, top))
        if self.engine_fails:
            raise RuntimeError("out of memory")
        return lists(tokens, first)

    async def until(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not what():
                await asyncio.sleep(0.01)

    def count(self, outcome: str) -> int:
        return self.shadow.outcomes[outcome]


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_an_answer_is_scored_by_both_and_forgotten(bench: Bench) -> None:
    answer = Answer((1, 2, 3), (4, 5))
    kept = weakref.ref(answer)
    async with bench.shadow.kept(bench.served, 1000):
        bench.shadow.take(answer)
        del answer
        await bench.until(lambda: bench.count("scored") == 1)
        assert bench.base.asked == [((1, 2, 3, 4, 5), 3, TOP)]
        assert bench.engine == [((1, 2, 3, 4, 5), 3, SERVED_TOP)]
        found = bench.shadow.divergence
        assert (found.answers, found.tokens) == (1, 2)
        assert found.mean == pytest.approx(0, abs=1e-6)
        await asyncio.sleep(3 * worker.LOOK_S)
        gc.collect()
        assert kept() is None
    assert bench.base.closed


async def test_nothing_is_asked_while_a_request_runs(bench: Bench) -> None:
    bench.idle = False
    async with bench.shadow.kept(bench.served, 1000):
        bench.shadow.take(ANSWER)
        await asyncio.sleep(4 * worker.LOOK_S)
        assert (bench.base.asked, bench.engine, bench.shadow.waiting) == ([], [], 1)
        bench.idle = True
        await bench.until(lambda: bench.count("scored") == 1)


async def test_a_request_that_comes_ends_a_scoring_which_is_done_again_later(bench: Bench) -> None:
    bench.base.gate.clear()
    async with bench.shadow.kept(bench.served, 1000):
        bench.shadow.take(ANSWER)
        await bench.until(lambda: len(bench.base.asked) == 1)
        bench.idle = False
        await bench.until(lambda: bench.shadow.waiting == 1)
        bench.base.gate.set()
        await asyncio.sleep(3 * worker.LOOK_S)
        assert (len(bench.base.asked), bench.engine) == (1, [])
        bench.idle = True
        await bench.until(lambda: bench.count("scored") == 1)
    assert sum(bench.shadow.outcomes.values()) == 1


async def test_a_base_that_is_this_very_server_does_not_keep_it_busy_for_ever(bench: Bench) -> None:
    """Its scoring is a request here, which interrupts the scoring."""
    bench.base.gate.clear()

    async def busy() -> None:
        while not bench.count("interrupted"):
            await bench.until(lambda: len(bench.base.asked) > 0)
            bench.idle = False
            bench.base.asked.clear()
            await bench.until(lambda: bench.shadow.waiting == 1 or bench.count("interrupted") == 1)
            bench.idle = True

    async with bench.shadow.kept(bench.served, 1000):
        bench.shadow.take(ANSWER)
        await asyncio.wait_for(busy(), 30)
        assert bench.shadow.waiting == 0
        bench.base.gate.set()
        bench.shadow.take(ANSWER)
        await bench.until(lambda: bench.count("scored") == 1)


async def test_a_full_queue_drops_what_comes_and_counts_it(bench: Bench) -> None:
    for _ in range(MOST_WAITING + 7):
        bench.shadow.take(ANSWER)
    assert (bench.shadow.waiting, bench.count("queue_full")) == (MOST_WAITING, 7)


async def test_long_answers_are_scored_up_to_the_bound_and_long_prompts_not_at_all() -> None:
    bench = Bench(most_tokens=5)
    async with bench.shadow.kept(bench.served, 5):  # of which the engine needs one
        bench.shadow.take(Answer((1, 2), tuple(range(10, 20))))
        bench.shadow.take(Answer((1, 2, 3, 4), (5,)))
        bench.shadow.take(Answer((1, 2), ()))
        await bench.until(lambda: bench.count("scored") == 1)
    assert bench.engine == [((1, 2, 10, 11), 2, SERVED_TOP)]
    assert bench.count("too_long") == 2


async def test_errors_of_the_base_are_counted_said_once_and_followed_by_a_pause(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.base.fails = True
    async with bench.shadow.kept(bench.served, 1000):
        for _ in range(3):
            bench.shadow.take(ANSWER)
        await bench.until(lambda: bench.count("base_failed") == 3)
        assert caplog.text.count("the base answered 500") == 1
        assert bench.engine == []
        bench.base.fails = False
        bench.shadow.take(ANSWER)
        await bench.until(lambda: bench.count("scored") == 1)


async def test_an_engine_that_fails_is_counted_and_the_next_answer_is_tried(bench: Bench) -> None:
    bench.engine_fails = True
    async with bench.shadow.kept(bench.served, 1000):
        bench.shadow.take(ANSWER)
        await bench.until(lambda: bench.count("engine_failed") == 1)
        bench.engine_fails = False
        bench.shadow.take(ANSWER)
        await bench.until(lambda: bench.count("scored") == 1)


async def test_a_server_that_stops_does_not_wait_for_the_base(bench: Bench) -> None:
    bench.base.gate.clear()
    async with asyncio.timeout(1), bench.shadow.kept(bench.served, 1000):
        bench.shadow.take(ANSWER)
        await bench.until(lambda: len(bench.base.asked) == 1)
    assert bench.base.closed


def test_the_share_is_drawn_and_what_ended_by_itself_is_handed_on() -> None:
    handed: list[Any] = []
    sampler = Sampler(0.1, handed.append, seed=0)
    assert 0.08 < sum(sampler.draws() for _ in range(5000)) / 5000 < 0.12
    for name in ("a", "b", "c"):
        sampler.watch(name, lambda: ANSWER)
    sampler.aborted("a")
    sampler.finished("b")
    sampler.finished("a")
    sampler.finished("never drawn")
    assert handed == [ANSWER]
    assert all(Sampler(1.0, handed.append).draws() for _ in range(100))
