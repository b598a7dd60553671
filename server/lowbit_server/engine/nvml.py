"""Each GPU's memory as NVIDIA's driver reports it, through nvidia-ml-py: the whole device, whoever uses it.

Without the package, the driver or the permission there are no GPUs to report, and the log says so once.
"""

from dataclasses import dataclass
from typing import Any

from lowbit_core.log import get_logger

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
