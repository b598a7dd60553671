"""Sections run within a budget; what they found is written after each, so that a killed check leaves what it had."""

import json
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.place import Place
from benchmarks.quantizers.provenance import hardware, revision

REPOSITORY = Path(__file__).resolve().parents[2]
LINE_CHARS = 1500
LEAST_S = 1.0  # an alarm of 0 s would be none


@dataclass(frozen=True)
class Found:
    """What a section found; `wrong` says in one sentence each what should have been otherwise.

    `skipped` says why there was nothing to find here; empty where there was.
    """

    values: dict[str, Any]
    wrong: tuple[str, ...] = ()
    skipped: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the check; `seconds` is what it may take on a GPU: with less left it is skipped."""

    name: str
    seconds: float
    run: Callable[[Place], Found]


class OutOfTime(Exception):
    """The budget ended while a section ran."""


class Report:
    """The result so far, as it lies in `path`."""

    def __init__(self, path: Path, budget_s: float) -> None:
        self._path, self._budget_s, self._started_s = path, budget_s, time.monotonic()
        self._sections: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._facts = {
            "date": datetime.now(UTC).date().isoformat(),
            "git_revision": _revision(),
            "hardware": hardware(),
            "budget_s": budget_s,
        }

    @property
    def left_s(self) -> float:
        return self._budget_s - (time.monotonic() - self._started_s)

    @property
    def failed(self) -> list[str]:
        return [name for name, section in self._sections.items() if section["status"] == "failed"]

    def run(self, section: Section, place: Place) -> None:
        """Run a section if there is time for it; a failure is part of the result and the next section runs."""
        started_s = time.monotonic()
        if self.left_s < (LEAST_S if place.tiny else section.seconds):
            result: dict[str, Any] = {"status": "skipped", "left_s": round(self.left_s)}
        else:
            result = self._result(section, place)
            result["seconds"] = round(time.monotonic() - started_s, 1)
        self._sections[section.name] = result
        self._path.write_text(json.dumps({**self._facts, "sections": self._sections}, indent=1) + "\n")
        print(f"{section.name}: {json.dumps(result)[:LINE_CHARS]}", flush=True)

    def _result(self, section: Section, place: Place) -> dict[str, Any]:
        try:
            with _alarm(self.left_s):
                found = section.run(place)
        except Exception as error:  # whatever it is, the other sections still have something to say
            traceback.print_exc()
            return {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        if found.skipped:
            return {"status": "skipped", "why": found.skipped, **found.values}
        status = "failed" if found.wrong else "passed"
        return {"status": status, **({"wrong": found.wrong} if found.wrong else {}), **found.values}

    def summary(self) -> str:
        """The last line: how many sections passed, failed and were skipped, and where the result lies."""
        states = [section["status"] for section in self._sections.values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("passed", "failed", "skipped"))
        return f"gpu-check: {counts}, {self._budget_s - self.left_s:.0f} s, {self._path}"


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds."""

    def ring(*_: object) -> None:
        raise OutOfTime(f"the budget ended after {seconds:.0f} s of this section")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _revision() -> str | None:
    """The git revision; None where the checkout travelled without its repository."""
    try:
        return revision(REPOSITORY)
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None
