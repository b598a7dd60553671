"""One run of one tool as the kernel counts it, and the table of several. Standard library only."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from provenance import versions


@dataclass(frozen=True)
class Measurement:
    """One run of one tool, as the kernel counted it, and what the tool said of itself."""

    tool: str
    wall_s: float
    user_s: float
    system_s: float
    peak_rss_bytes: int
    output_bytes: int
    load_average: float  # of the machine over the minute before the start
    versions: dict[str, str]
    reported: dict[str, float]
    quality: dict[str, float] = field(default_factory=dict)

    @property
    def cpu_s(self) -> float:
        return self.user_s + self.system_s


def measured(tool: str, command: Sequence[str], variables: Mapping[str, str], out: Path) -> Measurement:
    """Run `command`, which writes the directory `out`, and count it; exits when it fails.

    `command[0]` lies beside the Python of the tool's environment. stderr and stdout stay beside `out`.
    """
    shutil.rmtree(out, ignore_errors=True)
    log, answer = out.with_name(f"{tool}.log"), out.with_name(f"{tool}.stdout")
    load_average = os.getloadavg()[0]
    started_s = time.perf_counter()
    with log.open("wb") as stderr, answer.open("wb") as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=variables)
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started_s
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{tool} ended with status {process.returncode}; its log is {log}")
    return Measurement(
        tool=tool,
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


def table(measurements: Sequence[Measurement]) -> str:
    """A markdown table, one line a tool."""
    lines = [
        "| tool | wall s | CPU s | peak RSS MB | output MB | KL (nats) | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in measurements:
        kl, top1 = "–", "–"
        if one.quality:
            kl = f"{one.quality['mean_kl_nats']:.4f} ± {one.quality['mean_kl_standard_error']:.4f}"
            top1 = f"{100 * one.quality['top1_agreement']:.1f} %"
        sizes = f"{one.peak_rss_bytes / 1e6:.0f} | {one.output_bytes / 1e6:.1f}"
        lines.append(f"| {one.tool} | {one.wall_s:.0f} | {one.cpu_s:.0f} | {sizes} | {kl} | {top1} |")
    return "\n".join(lines)
