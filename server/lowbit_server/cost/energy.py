"""Joules that the machine's own counters have counted since the server was ready, by device.

GPUs: NVML's energy counter (engine/nvml.py). Processors: RAPL, as Linux shows it in /sys/class/powercap, which only
root may read unless the operator allows it (since CVE-2020-8694). Both count whoever uses the device. What cannot be
read is absent; nothing is estimated.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
READ_S = 10.0  # RAPL's counter wraps, after ten minutes at the soonest on today's servers
ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")  # AMD's too; intel-rapl-mmio has the same counters a second time
COUNTED = re.compile(r"package-\d+|dram")  # core and uncore are parts of a package, psys holds several


@dataclass(frozen=True)
class EnergyReading:
    """A counter of one device in joules. `wraps`: where it begins again at zero, where that is known."""

    source: str  # nvml or rapl
    device: str
    joules: float
    wraps: float | None = None


Readings = Callable[[], Iterable[EnergyReading]]


class EnergyMeter:
    """Joules by device, summed over wraps and resets of what is read. A device that stops answering keeps its sum."""

    def __init__(self, sources: Iterable[Readings]) -> None:
        self._sources = tuple(sources)
        self._last: dict[tuple[str, str], float] = {}
        self._joules: dict[tuple[str, str], float] = {}

    def read(self) -> dict[tuple[str, str], float]:
        """Joules since the first call, by source and device."""
        for one in (reading for source in self._sources for reading in source()):
            place = one.source, one.device
            before = self._last.get(place, one.joules)
            passed = one.joules - before
            if passed < 0:  # it wrapped, or a driver that was loaded again has begun anew
                passed = one.joules + (one.wraps - before if one.wraps else 0.0)
            self._last[place] = one.joules
            self._joules[place] = self._joules.get(place, 0.0) + passed
        return dict(self._joules)

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Read often enough for no wrap to be missed while the block runs."""
        self.read()
        reading = asyncio.create_task(self._keep_reading())
        try:
            yield
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _keep_reading(self) -> None:
        while True:
            await asyncio.sleep(READ_S)
            self.read()


def read_rapl(powercap: Path = POWERCAP) -> list[EnergyReading]:
    """The counters of packages, and of memory, which is no part of one; empty where none may be read."""
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if not ZONE.fullmatch(zone.name):
            continue
        try:
            if (name := _name(zone, powercap)) is not None:
                joules, wraps = _joules(zone / "energy_uj"), _joules(zone / "max_energy_range_uj")
                found.append(EnergyReading("rapl", name, joules, wraps))
        except (OSError, ValueError):
            continue
    return found


def _name(zone: Path, powercap: Path) -> str | None:
    """`package-0`, or `dram-0` of package-0; None for what is counted elsewhere too."""
    name = (zone / "name").read_text(encoding="ascii").strip()
    if not COUNTED.fullmatch(name):
        return None
    if name != "dram":
        return name
    package = (powercap / zone.name.rpartition(":")[0] / "name").read_text(encoding="ascii").strip()
    return name + package.removeprefix("package")


def _joules(file: Path) -> float:
    return int(file.read_text(encoding="ascii")) / 1e6
