"""An event loop whose time passes only when a test says so."""

import asyncio
from typing import Any

SPINS = 30  # enough for anything that one step can start to come to rest


class SteppedLoop(asyncio.SelectorEventLoop):
    """Timers are due by `now_s`."""

    now_s = 1000.0

    def time(self) -> float:
        return self.now_s

    def settle(self) -> None:
        """Run everything that can run without time passing."""
        for _ in range(SPINS):
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:  # type: ignore[attr-defined]
                return

    def advance(self, seconds: float) -> None:
        """Let time pass, and run what that wakes."""
        self.now_s += seconds
        self.settle()

    def start(self, work: Any) -> "asyncio.Task[Any]":
        """A task that runs as far as it can."""
        task = self.create_task(work)
        self.settle()
        return task

    def close(self) -> None:
        """Cancel what still runs, so that nothing of it runs when it is collected."""
        if not self.is_closed():
            for task in asyncio.all_tasks(self):
                task.cancel()
            self.settle()
        super().close()
