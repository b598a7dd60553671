"""What each key has used this month: counted at once in memory, written to the usage file every second.

A server that is killed loses what ended within the last `WRITE_S` seconds and the time of one write, and nothing
that was written before; one that is stopped loses nothing. A write that fails is tried again with all that has come.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable

from lowbit_core.log import get_logger
from lowbit_server.cost.usage_file import Counts, UsageFile, month_of

WRITE_S = 1.0  # so much is lost at most when the process is killed
READ_S = 2.0  # how old the counts of other servers on the same file may be
NOTHING = Counts()

log = get_logger("serve.usage")


class UsageBook:
    """Counts by key and month. All but `write` belongs to the event loop; `now` gives seconds since 1970."""

    def __init__(self, file: UsageFile, now: Callable[[], float] = time.time) -> None:
        self._file, self.now = file, now
        self._coming: dict[tuple[str, str], Counts] = {}
        self._leaving: dict[tuple[str, str], Counts] = {}  # being written
        self._month, self._read_at = month_of(now()), now()
        self._written = file.add({}, self._month)
        self._writing = asyncio.Lock()
        self.failures, self._failing = 0, False  # writes that failed, and whether the last one did

    @property
    def month(self) -> str:
        """The current month in UTC, as `2026-11`."""
        return month_of(self.now())

    def add(self, key: str, counts: Counts) -> None:
        """Count what has ended now."""
        place = self.month, key
        self._coming[place] = self._coming.get(place, NOTHING) + counts

    def used(self, key: str) -> Counts:
        """What a key has used this month on every server with this file, as far as this one knows."""
        place = month, _ = self.month, key
        written = self._written.get(key, NOTHING) if month == self._month else NOTHING
        return written + self._leaving.get(place, NOTHING) + self._coming.get(place, NOTHING)

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Write every second while the block runs, and at its end."""
        writing = asyncio.create_task(self._keep_writing())
        try:
            yield
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            await self.write()
            self._file.close()
            if lost := sum(one.tokens for one in self._leaving.values()):
                log.error("usage file: the last %d tokens could not be written and are lost", lost)

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(WRITE_S)
            await asyncio.shield(self.write())

    async def write(self) -> None:
        """Write what is to be written; an error is logged and counted, and nothing is lost by it."""
        async with self._writing:
            month, now_s = self.month, self.now()
            due = month != self._month or not 0 <= now_s - self._read_at < READ_S
            if not self._coming and not self._leaving and not due:
                return
            for place, counts in self._coming.items():  # what an earlier attempt left goes along
                self._leaving[place] = self._leaving.get(place, NOTHING) + counts
            self._coming = {}
            try:
                written = await asyncio.to_thread(self._file.add, dict(self._leaving), month)
            except sqlite3.Error as error:
                if not self._failing:
                    log.error("usage file: %s; the counts stay in memory and are written later", error)
                self._failing, self.failures = True, self.failures + 1
                return
            self._leaving, self._month, self._written, self._read_at = {}, month, written, now_s
            self._failing = False
