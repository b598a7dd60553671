"""What does not fit into memory is refused before it is loaded, with the flag that would change it."""

from typing import TYPE_CHECKING, Any

import pytest

from lowbit_core.errors import ConfigError
from lowbit_server.checkpoint import open_checkpoint
from lowbit_server.config import Device, ServeConfig
from lowbit_server.engine.forecast import refuse_what_does_not_fit
from lowbit_server.engine.nvml import GpuMemory
from lowbit_server.flags import GIB

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint

GPU = GpuMemory(0, "GPU-a", total=10 * GIB, used=2 * GIB, free=8 * GIB)
WEIGHTS = 6 * GIB


def check(make: "MakeCheckpoint", device: Device, host: float = 0, gpus: Any = (), **flags: Any) -> None:
    directory = make(manifest=False)
    with (directory / "model.safetensors").open("ab") as file:
        file.truncate(WEIGHTS)  # a hole: it takes no disk
    config = ServeConfig(directory, **flags)
    refuse_what_does_not_fit(config, open_checkpoint(config), device, (int(host * GIB), 16 * GIB), gpus)


@pytest.mark.parametrize(
    ("device", "host", "gpus", "flags"),
    [
        ("cpu", 9, (), {}),  # 6 + 2 + 1
        ("cpu", 11, (), {"tensor_parallel_size": 2}),  # 6 + 2 x 2 + 1
        ("gpu", 0, (), {}),  # nothing is known
        ("gpu", 0, (GPU,), {}),
        ("gpu", 0, (GPU,), {"kv_cache_memory_bytes": 2 * GIB}),
    ],
)
def test_what_fits_is_served(
    make_checkpoint: "MakeCheckpoint", device: Device, host: float, gpus: Any, flags: dict[str, Any]
) -> None:
    check(make_checkpoint, device, host, gpus, **flags)


@pytest.mark.parametrize(
    ("device", "host", "gpus", "flags", "words"),
    [
        ("cpu", 8.5, (), {}, "lower --kv-cache-gib to 1.5 at most"),
        ("cpu", 6.5, (), {}, "free memory, raise the container's limit"),
        ("gpu", 0, (GPU,), {"kv_cache_memory_bytes": 3 * GIB}, "lower --kv-cache-gib to 2 at most"),
        ("gpu", 0, (GPU,), {"gpu_memory_utilization": 0.5}, "raise --tensor-parallel-size or --gpu-memory"),
    ],
)
def test_what_does_not_fit_names_the_flag(
    make_checkpoint: "MakeCheckpoint",
    device: Device,
    host: float,
    gpus: Any,
    flags: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(ConfigError) as raised:
        check(make_checkpoint, device, host, gpus, **flags)
    assert "6.00 GiB of weights" in str(raised.value)
    assert words in str(raised.value)
