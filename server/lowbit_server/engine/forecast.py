"""Whether weights and KV cache fit into memory, before anything is loaded, and which flag to change if they do not.

The weights are the sizes of the checkpoint's files, divided evenly among the devices. What the runtime and activations
take on a GPU the engine measures itself; on the CPU the server's two processes take about a GiB in addition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit_core.errors import ConfigError
from lowbit_core.kv_cache import CPU_RUNTIME_BYTES
from lowbit_server.checkpoint import Checkpoint
from lowbit_server.config import Device, ServeConfig
from lowbit_server.engine.arguments import DEFAULT_CPU_KV_CACHE_BYTES
from lowbit_server.engine.nvml import GpuMemory
from lowbit_server.flags import GIB

ENGINE_UTILIZATION = 0.9  # the engine's default of --gpu-memory-utilization


@dataclass(frozen=True)
class Forecast:
    """Bytes that one device will hold, and bytes that it has."""

    weights: int
    kv_cache: int
    runtime: int
    free: int
    total: int


def refuse_what_does_not_fit(
    config: ServeConfig,
    checkpoint: Checkpoint,
    device: Device,
    host: tuple[int, int],
    gpus: Sequence[GpuMemory],
) -> None:
    """Raise ConfigError when the forecast is above what is free; `host` is free and total bytes."""
    weights = sum(path.stat().st_size for path in checkpoint.directory.glob("*.safetensors"))
    devices = config.tensor_parallel_size * config.pipeline_parallel_size
    kv_cache = config.kv_cache_memory_bytes
    if device == "cpu":  # all devices of this node share the host's memory
        here = max(1, devices // config.nnodes)
        kv_bytes = (DEFAULT_CPU_KV_CACHE_BYTES if kv_cache is None else kv_cache) * here
        _refuse(Forecast(weights * here // devices, kv_bytes, CPU_RUNTIME_BYTES, *host), cpu=True)
    elif gpus:
        share = config.gpu_memory_utilization or ENGINE_UTILIZATION
        free = min(gpu.free if kv_cache else min(gpu.free, int(gpu.total * share)) for gpu in gpus)
        total = min(gpu.total for gpu in gpus)
        _refuse(Forecast(weights // devices, kv_cache or 0, 0, free, total), cpu=False)


def _refuse(forecast: Forecast, *, cpu: bool) -> None:
    needed = forecast.weights + forecast.kv_cache + forecast.runtime
    if needed <= forecast.free:
        return
    left = forecast.free - forecast.weights - forecast.runtime
    if forecast.kv_cache and left > 0:
        advice = f"lower --kv-cache-gib to {int(100 * left / GIB) / 100:g} at most"
    elif cpu:
        advice = "free memory, raise the container's limit, or quantize to fewer bits"
    else:
        advice = "raise --tensor-parallel-size or --gpu-memory-utilization, or quantize to fewer bits"
    runtime = f" + {forecast.runtime / GIB:.2f} of runtime" if forecast.runtime else ""
    raise ConfigError(
        f"it does not fit: {forecast.weights / GIB:.2f} GiB of weights + {forecast.kv_cache / GIB:.2f} of KV cache"
        f"{runtime} on a device with {forecast.free / GIB:.2f} GiB to give of {forecast.total / GIB:.2f}; {advice}"
    )
