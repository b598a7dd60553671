"""Each GPU's memory and energy as NVIDIA's driver reports them, through nvidia-ml-py: of the device, whoever uses it.

Without the package, the driver or the permission there are no GPUs to report, and the log says so once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_core.log import get_logger
from lowbit_server.cost.energy import EnergyReading

log = get_logger("serve.nvml")


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU."""

    index: int
    uuid: str
    total: int
    used: int
    free: int


class Nvml:
    """NVML, initialized; `read` never raises."""

    def __init__(self) -> None:
        self._library = _initialized()

    def read(self) -> tuple[GpuMemory, ...]:
        """Every GPU's memory now; empty without NVML."""
        library = self._library
        if library is None:
            return ()
        try:
            return tuple(_memory(library, index) for index in range(library.nvmlDeviceGetCount()))
        except library.NVMLError as error:
            log.warning("NVML has stopped answering: %s", error)
            self._library = None
            return ()

    def energy(self, visible: str | None, count: int) -> tuple[EnergyReading, ...]:
        """Joules since the driver was loaded of the `count` GPUs that this server uses; `visible`: as `gpus_in_use`.

        GPUs older than Volta have no such counter and are left out.
        """
        library = self._library
        if library is None:
            return ()
        try:
            handles = [library.nvmlDeviceGetHandleByIndex(one) for one in range(library.nvmlDeviceGetCount())]
            uuids = [str(library.nvmlDeviceGetUUID(handle)) for handle in handles]
        except library.NVMLError:
            return ()  # `read` says so
        used = gpus_in_use(uuids, visible, count)
        found = ((uuids[one], _millijoules(library, handles[one])) for one in used)
        return tuple(EnergyReading("nvml", uuid, mj / 1e3) for uuid, mj in found if mj is not None)


def gpus_in_use(uuids: Sequence[str], visible: str | None, count: int) -> list[int]:
    """The places in `uuids` (NVML's order) of the first `count` GPUs of CUDA_VISIBLE_DEVICES, or of all without it.

    As CUDA reads it: numbers, or beginnings of UUIDs, up to the first that is neither. Numbers mean the order of the
    bus, as vLLM takes them. A part of a GPU (MIG) has no counter of its own and ends the list too.
    """
    if visible is None:
        return list(range(len(uuids)))[:count]
    found: list[int] = []
    for entry in visible.split(","):
        named = entry.strip()
        if named.isascii() and named.isdigit() and int(named) < len(uuids):
            found.append(int(named))
            continue
        matches = [place for place, uuid in enumerate(uuids) if named and uuid.startswith(named)]
        if len(matches) != 1:
            break
        found += matches
    return found[:count]


def _initialized() -> Any:
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.info("no NVML: %s", error)
        return None
    return pynvml


def _memory(library: Any, index: int) -> GpuMemory:
    handle = library.nvmlDeviceGetHandleByIndex(index)
    found = library.nvmlDeviceGetMemoryInfo(handle)
    uuid = library.nvmlDeviceGetUUID(handle)
    return GpuMemory(index, str(uuid), int(found.total), int(found.used), int(found.free))


def _millijoules(library: Any, handle: Any) -> int | None:
    try:
        return int(library.nvmlDeviceGetTotalEnergyConsumption(handle))
    except library.NVMLError:
        return None
