"""NVML through the real nvidia-ml-py, against a stand-in for the driver's library that is built here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowbit_server.engine.nvml import Nvml, gpus_in_use

SOURCE = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static int devices[2] = {0, 1};
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = &devices[index]; return 0; }
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length) {
    strncpy(uuid, *(int *)handle ? "GPU-b" : "GPU-a", length); return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
    if (*(int *)handle && FAILS) return 15;  /* NVML_ERROR_GPU_IS_LOST */
    memory->total = 80ULL << 30; memory->used = 30ULL << 30; memory->free = 50ULL << 30; return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    static unsigned long long spent = 5000000;
    if (*(int *)handle && FAILS) return 3;  /* NVML_ERROR_NOT_SUPPORTED: before Volta */
    *millijoules = spent += 1500; return 0;
}
const char *nvmlErrorString(int code) { return "GPU is lost"; }
"""
READ = """
import json
from dataclasses import asdict
from lowbit_server.engine.nvml import Nvml
nvml = Nvml()
print(json.dumps([[asdict(one) for one in nvml.read()] for _ in range(2)]))
"""
ENERGY = """
import json
from lowbit_server.cost.energy import EnergyMeter
from lowbit_server.engine.nvml import Nvml
nvml = Nvml()
meter = EnergyMeter([lambda: nvml.energy("1,0", 2)])
print(json.dumps([[[*place, joules] for place, joules in meter.read().items()] for _ in range(3)]))
"""


def read_with(folder: Path, fails: int, program: str = READ) -> list[Any]:
    compiler = shutil.which("gcc")
    assert compiler is not None, "the stand-in for NVIDIA's library needs gcc"
    (folder / "nvml.c").write_text(SOURCE)
    library = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", f"-DFAILS={fails}", "-o", str(library), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout))


def test_each_gpu_is_read_as_the_driver_counts_it(tmp_path: Path) -> None:
    first, again = read_with(tmp_path, fails=0)
    assert first == again
    assert [(gpu["index"], gpu["uuid"]) for gpu in first] == [(0, "GPU-a"), (1, "GPU-b")]
    assert (first[0]["total"], first[0]["used"], first[0]["free"]) == (80 << 30, 30 << 30, 50 << 30)


def test_a_lost_gpu_ends_the_totals_and_not_the_server(tmp_path: Path) -> None:
    assert read_with(tmp_path, fails=1) == [[], []]


def test_the_energy_of_each_gpu_is_joules_since_the_first_reading(tmp_path: Path) -> None:
    first, again, third = read_with(tmp_path, 0, ENERGY)
    assert first == [["nvml", "GPU-b", 0.0], ["nvml", "GPU-a", 0.0]]
    assert again == [["nvml", "GPU-b", 3.0], ["nvml", "GPU-a", 3.0]]
    assert third == [["nvml", "GPU-b", 6.0], ["nvml", "GPU-a", 6.0]]


def test_a_gpu_without_an_energy_counter_is_left_out(tmp_path: Path) -> None:
    assert [[one[1] for one in reading] for reading in read_with(tmp_path, 1, ENERGY)] == [["GPU-a"]] * 3


@pytest.mark.parametrize(
    ("visible", "count", "used"),
    [
        (None, 2, [0, 1]),
        (None, 9, [0, 1, 2]),
        ("2,0", 1, [2]),
        ("2, 0", 2, [2, 0]),
        ("GPU-cc,0", 2, [2, 0]),
        ("GPU-c", 1, [2]),
        ("GPU-", 2, []),  # begins several
        ("0,-1,1", 3, [0]),
        ("0,7,1", 3, [0]),
        ("MIG-1f2e", 1, []),
        ("", 1, []),
        ("NoDevFiles", 1, []),
    ],
)
def test_only_the_gpus_that_the_server_may_use_count(
    visible: str | None, count: int, used: list[int]
) -> None:
    assert gpus_in_use(["GPU-aa", "GPU-bb", "GPU-cc"], visible, count) == used


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has a GPU")
def test_without_a_driver_there_is_nothing_to_say() -> None:
    assert Nvml().read() == ()
    assert Nvml().energy(None, 8) == ()
