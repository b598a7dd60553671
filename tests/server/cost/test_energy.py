"""RAPL as Linux lays it out, in folders that are made here, and joules over wraps and resets."""

import os
from pathlib import Path

import pytest

from lowbit_server.cost.energy import EnergyMeter, EnergyReading, read_rapl

RANGE_UJ = 262_143_328_850


def zone(powercap: Path, folder: str, name: str, energy_uj: int | str) -> None:
    path = powercap / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")


def two_sockets(powercap: Path) -> None:
    """Two packages with memory, parts of packages, a whole platform, and the same counters by another way."""
    zone(powercap, "intel-rapl:0", "package-0", 3_000_000)
    zone(powercap, "intel-rapl:0:0", "core", 1_000_000)
    zone(powercap, "intel-rapl:0:1", "dram", 500_000)
    zone(powercap, "intel-rapl:1", "package-1", 7_000_000)
    zone(powercap, "intel-rapl:1:0", "dram", 250_000)
    zone(powercap, "intel-rapl:2", "psys", 99_000_000)
    zone(powercap, "intel-rapl-mmio:0", "package-0", 3_000_000)


def test_packages_and_memory_count_once_each(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    found = {one.device: one.joules for one in read_rapl(tmp_path)}
    assert found == {"package-0": 3.0, "dram-0": 0.5, "package-1": 7.0, "dram-1": 0.25}
    assert all(one.wraps == RANGE_UJ / 1e6 for one in read_rapl(tmp_path))


def test_without_the_counters_or_with_strange_ones_there_is_nothing(tmp_path: Path) -> None:
    assert read_rapl(tmp_path / "none") == []
    zone(tmp_path, "intel-rapl:0", "package-0", "garbage")
    (tmp_path / "intel-rapl:1").mkdir()
    assert read_rapl(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_counters_that_only_root_may_read_are_absent(tmp_path: Path) -> None:
    two_sockets(tmp_path)
    for file in tmp_path.glob("*/energy_uj"):
        file.chmod(0)
    assert read_rapl(tmp_path) == []


def test_joules_go_on_over_a_wrap_and_over_a_driver_that_begins_anew(tmp_path: Path) -> None:
    readings = [
        [EnergyReading("rapl", "package-0", 90.0, 100.0), EnergyReading("nvml", "GPU-a", 5000.0)],
        [EnergyReading("rapl", "package-0", 98.0, 100.0), EnergyReading("nvml", "GPU-a", 5010.0)],
        [EnergyReading("rapl", "package-0", 3.0, 100.0), EnergyReading("nvml", "GPU-a", 2.0)],
        [EnergyReading("rapl", "package-0", 4.0, 100.0)],
        [EnergyReading("rapl", "package-0", 4.0, 100.0), EnergyReading("nvml", "GPU-a", 3.0)],
    ]
    meter = EnergyMeter([iter(readings).__next__])
    found = [meter.read() for _ in readings]
    assert [one["rapl", "package-0"] for one in found] == [0.0, 8.0, 13.0, 14.0, 14.0]
    assert [one["nvml", "GPU-a"] for one in found] == [0.0, 10.0, 12.0, 12.0, 13.0]
