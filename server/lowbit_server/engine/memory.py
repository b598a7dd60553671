"""Memory of each device by component: weights, KV cache, graphs, activations, other, free, total.

On a GPU these are bytes of VRAM. The CPU engine allocates from the host: there they are bytes of host memory with
`device="cpu"`, limited by the control group if the process runs in one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowbit_core.log import get_logger

COMPONENTS = ("weights", "kv_cache", "graphs", "activation_peak", "other", "free", "total")
MAX_AGE_S = 5.0  # a scrape older than this asks the workers again
TIMEOUT_S = 2.0  # a busy engine answers between two steps; a scrape does not wait for one that hangs
CGROUP = Path("/sys/fs/cgroup")

log = get_logger("serve.memory")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device; None where they are not counted (activations and graphs on the CPU)."""

    device: str
    weights_bytes: int
    kv_cache_bytes: int
    free_bytes: int
    total_bytes: int
    graphs_bytes: int | None = None
    activation_peak_bytes: int | None = None

    @property
    def other_bytes(self) -> int:
        """In use by anything else: the runtime, current activations, other processes."""
        held = self.weights_bytes + self.kv_cache_bytes + (self.graphs_bytes or 0)
        return max(0, self.total_bytes - self.free_bytes - held)

    def by_component(self) -> dict[str, int]:
        """Bytes by the value of the metric's label `component`."""
        values = {name: getattr(self, f"{name}_bytes") for name in COMPONENTS}
        return {name: value for name, value in values.items() if value is not None}


def merge_workers(reports: Iterable[Mapping[str, object]]) -> tuple[DeviceMemory, ...]:
    """One entry for each device; what workers on the same device hold is added up."""
    merged: dict[str, DeviceMemory] = {}
    for report in reports:
        one = _from_worker(report)
        known = merged.get(one.device)
        merged[one.device] = one if known is None else _add(known, one)
    return tuple(merged[device] for device in sorted(merged))


def _from_worker(report: Mapping[str, object]) -> DeviceMemory:
    names = ("weights", "kv_cache", "free", "total", "graphs", "activation_peak")
    found = {f"{name}_bytes": int(str(report[name])) for name in names if report.get(name) is not None}
    return DeviceMemory(device=str(report["device"]), **found)


def _add(known: DeviceMemory, one: DeviceMemory) -> DeviceMemory:
    return DeviceMemory(
        device=known.device,
        weights_bytes=known.weights_bytes + one.weights_bytes,
        kv_cache_bytes=known.kv_cache_bytes + one.kv_cache_bytes,
        free_bytes=min(known.free_bytes, one.free_bytes),
        total_bytes=max(known.total_bytes, one.total_bytes),
        graphs_bytes=_sum(known.graphs_bytes, one.graphs_bytes),
        activation_peak_bytes=_sum(known.activation_peak_bytes, one.activation_peak_bytes),
    )


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None and second is None else (first or 0) + (second or 0)


def host_memory_bytes(cgroup: Path = CGROUP) -> tuple[int, int]:
    """Free and total bytes of this host, or of the control group (v2) that limits this process."""
    host = psutil.virtual_memory()
    limit = _read_bytes(cgroup / "memory.max")
    used = _read_bytes(cgroup / "memory.current")
    if limit is None or used is None or limit >= host.total:
        return int(host.available), int(host.total)
    reclaimable = _read_stat(cgroup / "memory.stat", "inactive_file")
    return min(int(host.available), max(0, limit - used + reclaimable)), limit


def _read_bytes(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" means no limit


def _read_stat(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


class MemoryReader:
    """The workers' last report, renewed at most every `MAX_AGE_S` and kept if they do not answer in time."""

    def __init__(
        self,
        read: Callable[[], Awaitable[tuple[DeviceMemory, ...]]],
        first: tuple[DeviceMemory, ...],
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._read = read
        self._timeout_s = timeout_s
        self._clock = clock
        self._read_at = clock()
        self.devices = first

    async def refresh(self) -> tuple[DeviceMemory, ...]:
        """The devices' memory, at most `MAX_AGE_S` old unless the engine does not answer."""
        if self._clock() - self._read_at < MAX_AGE_S:
            return self.devices
        self._read_at = self._clock()
        try:
            self.devices = await asyncio.wait_for(self._read(), self._timeout_s)
        except TimeoutError:
            log.warning(
                "the engine did not report its memory within %.0f s; showing the last report", TIMEOUT_S
            )
        return self.devices
