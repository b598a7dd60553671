"""What a run costs: wall and CPU time, and in which phase the wall time went.

One phase runs at a time and each begins where another ends, so that their seconds add up to those of the run. A GPU
works behind the process that gives it work: what one phase has queued may be waited for in the next.
"""

import resource
import time

from lowbit_core.manifest import RunRecord

PREPARE = "prepare"
BASE, BASELINES, COMPRESSED = "base model", "baselines", "compressed model"
OBSERVE, EXPERTS = "observe", "experts"
WRITE, COMPARE, CONCLUDE = "write layers", "compare", "reload and record"


class Clock:
    """Wall and CPU time since it was made, by phase, and the process's peak memory."""

    def __init__(self) -> None:
        self._wall = self._since = time.monotonic()
        self._cpu = time.process_time()
        self._phase, self._seconds = PREPARE, {PREPARE: 0.0}

    def begin(self, phase: str) -> None:
        """End the phase that runs, and begin or go on with another."""
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        self._seconds.setdefault(phase, 0.0)
        self._phase, self._since = phase, now

    def record(self, device: str) -> RunRecord:
        """What the run has cost so far."""
        self.begin(self._phase)
        return RunRecord(
            device=device,
            seconds=round(self._since - self._wall, 2),
            cpu_seconds=round(time.process_time() - self._cpu, 2),
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            phases_s={phase: round(seconds, 2) for phase, seconds in self._seconds.items()},
        )
