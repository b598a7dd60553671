"""One run of one tool as the kernel counts it. Standard library only."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from provenance import versions


@dataclass(frozen=True)
class Measurement:
    """One run of one tool, as the kernel counted it, and what the tool said of itself."""

    wall_s: float
    user_s: float
    system_s: float
    peak_rss_bytes: int
    output_bytes: int
    load_average: float  # of the machine over the minute before the start
    versions: dict[str, str]
    reported: dict[str, float]

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


def measured(name: str, command: Sequence[str], variables: Mapping[str, str], out: Path) -> Measurement:
    """Run `command`, which writes the directory `out`, and count it; exits when it fails.

    `command[0]` lies beside the Python of the tool's environment. stderr and stdout stay beside `out`.
    """
    shutil.rmtree(out, ignore_errors=True)
    log, answer = out.with_name(f"{name}.log"), out.with_name(f"{name}.stdout")
    load_average = os.getloadavg()[0]
    started_s = time.perf_counter()
    with log.open("wb") as stderr, answer.open("wb") as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=variables)
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{name} ended with status {process.returncode}; its log is {log}")
    return Measurement(
        wall_s=round(wall_s, 1),
        user_s=round(usage.ru_utime, 1),
        system_s=round(usage.ru_stime, 1),
        peak_rss_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        output_bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        load_average=round(load_average, 2),
        versions=versions(Path(command[0]).with_name("python")),
        reported=numbers(answer.read_text(encoding="utf-8").splitlines()[-1]),
    )


def numbers(line: str) -> dict[str, float]:
    """The numeric entries of the JSON object in a tool's last line; its paths and names stay out."""
    return {key: value for key, value in json.loads(line).items() if type(value) in (int, float)}
