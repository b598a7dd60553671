"""What is said of kernels' speeds on this processor, and where the numbers come from."""

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.schemes.table import RESULTS, TABLE, table

from lowbit_core.cpu_speeds import (
    SETS,
    KernelSpeed,
    instructions,
    lacks_zentorch,
    measured,
    of_kernels,
    processor,
)

FAST = KernelSpeed("W8A8", "Eight", "avx512_vnni", "a Xeon", "1B", 1.6, {1: 1.5, 16: 1.4})
SLOW = replace(FAST, scheme="W4A16", kernel="Four", prompt=0.5, output={1: 1.2, 16: 0.8})


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fpu avx2 avx512f avx512_vnni avx512_bf16 amx_int8", "amx_int8"),
        ("fpu avx2 avx512f avx512_vnni avx512_bf16", "avx512_bf16"),
        ("avx512_vnni avx512f avx2", "avx512_vnni"),
        ("fpu avx2", "avx2"),
        ("fpu sse4_2", None),
    ],
)
def test_a_processor_is_known_by_its_best_instructions(tmp_path: Path, flags: str, found: str | None) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nmodel name : any\nflags\t\t: {flags}\n\nprocessor : 1\n")
    assert instructions(cpuinfo) == found


def test_a_processor_is_called_what_its_maker_calls_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Maker's 64-Core\nflags\t: avx2\n")
    assert processor(file) == "Maker's 64-Core"
    assert processor(tmp_path / "none")


def test_a_system_without_cpuinfo_is_not_known(tmp_path: Path) -> None:
    assert instructions(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("vendor", "flags", "installed", "lacks"),
    [
        ("AuthenticAMD", "avx2 avx512f", False, True),
        ("AuthenticAMD", "avx2 avx512f", True, False),
        ("AuthenticAMD", "avx2", False, False),
        ("GenuineIntel", "avx2 avx512f", False, False),
    ],
)
def test_zentorch_is_offered_where_vllm_would_use_it(
    tmp_path: Path, vendor: str, flags: str, installed: bool, lacks: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id : {vendor}\nflags : {flags}\n")
    assert lacks_zentorch(cpuinfo, installed=installed) is lacks


def test_slower_means_slower_in_anything_beyond_noise() -> None:
    assert SLOW.slower
    assert not FAST.slower
    assert not replace(FAST, prompt=0.98).slower


def test_rows_are_those_of_the_kernel_and_of_processors_alike() -> None:
    assert of_kernels(["Four", "Other"], "avx512_vnni", [FAST, SLOW]) == [SLOW]
    assert of_kernels(["Four"], "amx_int8", [FAST, SLOW]) == []
    assert of_kernels(["Four"], None, [FAST, SLOW]) == []


def test_the_words_have_every_ratio() -> None:
    assert SLOW.in_words() == (
        "prompts at 0.50 of bf16's tokens/s, output at 1.20 with 1 stream, 0.80 with 16 streams "
        "(1B on AVX-512 with VNNI)"
    )


def test_the_table_is_what_the_committed_results_give() -> None:
    assert TABLE.read_text(encoding="utf-8") == table(RESULTS)
    assert all(row.instructions in SETS and row.output for row in measured())
