"""The shadow: answers that were drawn wait in memory until the server is idle, are scored by both models, and are gone.

Never in a request's way: nothing is scored while a request runs, one that comes ends a scoring that has begun (it is
done again later), one answer is scored at a time, and answers that find the queue full are dropped and counted. An
error of the base drops the answer and makes the next one wait.
"""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from lowbit_core.errors import LowbitError
from lowbit_core.log import get_logger
from lowbit_server.shadow.base_endpoint import BaseEndpoint, BaseError
from lowbit_server.shadow.divergence import SERVED_TOP, TOP, Divergence, LogProbs, compare
from lowbit_server.shadow.sampler import Answer

MOST_WAITING = 64  # answers
LOOK_S = 0.05  # how often is looked whether the server is idle
LONGEST_PAUSE_S = 300.0  # after errors of the base
MOST_INTERRUPTIONS = 50  # of one answer: a base that is this very server would interrupt it for ever
OUTCOMES = ("scored", "queue_full", "too_long", "interrupted", "base_failed", "engine_failed")

Score = Callable[[Sequence[int], int, int], Awaitable[list[LogProbs]]]  # tokens, first position, top
T = TypeVar("T")
log = get_logger("serve.shadow")


class _InterruptedError(Exception):
    """A request came."""


class Shadow:
    """Waiting answers and what was found. `most_tokens`: an answer is scored up to there, prompt included."""

    def __init__(
        self,
        base: BaseEndpoint,
        is_idle: Callable[[], bool],
        most_tokens: int,
        longest_pause_s: float = LONGEST_PAUSE_S,
    ) -> None:
        self._base, self._is_idle, self._most_tokens = base, is_idle, most_tokens
        self._longest_pause_s = longest_pause_s
        self._waiting: deque[Answer] = deque()
        self._came = asyncio.Event()
        self._failures = 0  # of the base, one after the other
        self.divergence = Divergence()
        self.outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))

    @property
    def waiting(self) -> int:
        """Answers that are still to be scored."""
        return len(self._waiting)

    def take(self, answer: Answer) -> None:
        """An answer was drawn; it waits, unless it cannot be scored."""
        if len(answer.prompt) >= self._most_tokens or not answer.generated or not answer.prompt:
            self.outcomes["too_long"] += 1
        elif len(self._waiting) >= MOST_WAITING:
            self.outcomes["queue_full"] += 1
        else:
            self._waiting.append(answer)
            self._came.set()

    @contextlib.asynccontextmanager
    async def kept(self, served: Score, max_model_len: int) -> AsyncIterator[None]:
        """Score what waits while the block runs; `served` asks the engine, which generates one token beside."""
        self._most_tokens = min(self._most_tokens, max_model_len - 1)
        working = asyncio.create_task(self._work(served))
        try:
            yield
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await self._base.close()

    async def _work(self, served: Score) -> None:
        interruptions = 0
        while True:
            await self._came.wait()
            while self._waiting:
                await self._until_idle()
                answer = self._waiting.popleft()
                try:
                    await self._score(answer, served)
                    interruptions = 0
                except _InterruptedError:
                    interruptions += 1
                    if interruptions < MOST_INTERRUPTIONS:
                        self._waiting.appendleft(answer)
                    else:
                        self.outcomes["interrupted"] += 1
                        interruptions = 0
                del answer  # it is gone as soon as it is scored
                if self._failures:
                    await asyncio.sleep(min(self._longest_pause_s, 2.0 ** min(self._failures, 10)))
            self._came.clear()

    async def _until_idle(self) -> None:
        while not self._is_idle():
            await asyncio.sleep(LOOK_S)

    async def _score(self, answer: Answer, served: Score) -> None:
        tokens = (answer.prompt + answer.generated)[: self._most_tokens]
        first = len(answer.prompt)
        try:
            theirs = await self._while_idle(self._base.score(tokens, first, TOP))
            ours = await self._while_idle(served(tokens, first, SERVED_TOP))
            self.divergence.add([compare(*both) for both in zip(theirs, ours, strict=True)])
        except (BaseError, LowbitError, ValueError) as error:
            self._base_failed(error)
        except (_InterruptedError, asyncio.CancelledError):
            raise
        except Exception as error:  # vLLM's own: a dead engine is told by others
            log.warning("shadow: the engine did not score an answer: %s", type(error).__name__)
            self.outcomes["engine_failed"] += 1
        else:
            self.outcomes["scored"] += 1
            self._failures = 0

    def _base_failed(self, error: Exception) -> None:
        if not self._failures:
            log.warning("shadow: %s; the answer is dropped, and later ones are tried", error)
        self._failures += 1
        self.outcomes["base_failed"] += 1

    async def _while_idle(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled as soon as a request comes."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=LOOK_S)
                if not task.done() and not self._is_idle():
                    raise _InterruptedError
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
