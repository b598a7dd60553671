"""Memory by device: merged over workers, bounded by the control group, fresh but never waited for."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from lowbit_server.engine.memory import (
    MAX_AGE_S,
    DeviceMemory,
    MemoryReader,
    host_memory_bytes,
    merge_workers,
)

if TYPE_CHECKING:
    from tests.server.conftest import Clock


def _worker(device: str, weights: int, free: int) -> dict[str, object]:
    return {"device": device, "weights": weights, "kv_cache": 10, "free": free, "total": 100}


def test_workers_on_one_device_add_up_what_they_hold() -> None:
    assert merge_workers([_worker("cpu", 1, 50), _worker("cpu", 2, 40)]) == (
        DeviceMemory("cpu", 3, 20, 40, 100),
    )


def test_what_nothing_counts_is_left_out_and_the_rest_is_in_use() -> None:
    (cpu,) = merge_workers([_worker("cpu", 1, 50) | {"graphs": None, "activation_peak": None}])
    assert cpu.by_component() == {"weights": 1, "kv_cache": 10, "other": 39, "free": 50, "total": 100}
    (gpu,) = merge_workers([_worker("cuda:0", 1, 50) | {"graphs": 4, "activation_peak": 9}])
    assert gpu.by_component() == {
        "weights": 1, "kv_cache": 10, "graphs": 4, "activation_peak": 9, "other": 35, "free": 50, "total": 100
    }  # fmt: skip


def test_each_gpu_has_its_own_entry() -> None:
    merged = merge_workers([_worker("cuda:1", 1, 50), _worker("cuda:0", 2, 40)])
    assert [memory.device for memory in merged] == ["cuda:0", "cuda:1"]


def test_control_group_bounds_host_memory_and_gives_back_file_pages(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    assert host_memory_bytes(tmp_path) == (400, 1000)


def test_host_memory_counts_where_no_group_limits_it(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert host_memory_bytes(tmp_path)[1] == psutil.virtual_memory().total
    assert host_memory_bytes(tmp_path / "absent")[1] == psutil.virtual_memory().total


async def test_workers_are_asked_at_most_once_in_max_age(clock: "Clock") -> None:
    asked = []

    async def read() -> tuple[DeviceMemory, ...]:
        asked.append(1)
        return (DeviceMemory("cpu", 9, 9, 9, 9),)

    reader = MemoryReader(read, (DeviceMemory("cpu", 1, 1, 1, 1),), clock)
    assert (await reader.refresh())[0].weights_bytes == 1
    clock.now_s += MAX_AGE_S
    assert (await reader.refresh())[0].weights_bytes == 9
    await reader.refresh()
    assert len(asked) == 1


async def test_hung_engine_leaves_the_last_report_standing(clock: "Clock") -> None:
    async def never() -> tuple[DeviceMemory, ...]:
        await asyncio.Event().wait()
        raise AssertionError

    reader = MemoryReader(never, (DeviceMemory("cpu", 1, 1, 1, 1),), clock, timeout_s=0.01)
    clock.now_s += MAX_AGE_S
    assert (await reader.refresh())[0].weights_bytes == 1
