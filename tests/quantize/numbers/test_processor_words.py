"""What a row of the tables of processors says to a person: what the first kernel that needs nothing does."""

import pytest

from lowbit_quantize.schemes.processors.kernels import (
    AMX,
    AMX_FP8,
    BLACKWELL,
    EMULATED,
    HOPPER,
    HUMMING,
    TURING,
    UNROUNDED,
    EngineKernel,
    Processors,
    cpu,
    cuda,
    rocm,
)


def row(*kernels: EngineKernel, lowest: int = TURING) -> Processors:
    return Processors("Class", lowest, "table", kernels)


def test_a_fallback_that_stands_first_is_what_runs() -> None:
    fallback, real = cuda("MarlinAny", TURING, how=UNROUNDED), cuda("Real", HOPPER)
    assert row(real, fallback).gpus == (
        "NVIDIA's from 9.0 (Hopper) on, 7.5 (Turing) to 8.9 (Ada) with inputs as they are"
    )
    assert row(fallback, real).gpus == "NVIDIA's from 7.5 (Turing) on with inputs as they are"


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ([], "none"),
        ([cuda("A", HOPPER, HOPPER)], "NVIDIA's 9.0 (Hopper) alone"),
        ([cuda("A", TURING, HOPPER)], "NVIDIA's from 7.5 (Turing) to 9.0 (Hopper)"),
        ([cuda("A", BLACKWELL, needs="x")], "NVIDIA's from 10.0 (Blackwell) on with x"),
        ([cuda("A", BLACKWELL, needs="x"), cuda("B", BLACKWELL)], "NVIDIA's from 10.0 (Blackwell) on"),
        (
            [cuda("A", BLACKWELL, needs="x"), cuda("B", BLACKWELL, how=UNROUNDED)],
            "NVIDIA's from 10.0 (Blackwell) on with x or else with inputs as they are",
        ),
        (
            [cuda("A", BLACKWELL, needs="x", how=UNROUNDED), cuda("B", BLACKWELL)],
            "NVIDIA's from 10.0 (Blackwell) on with x with inputs as they are or else as the scheme says",
        ),
        ([rocm("A", "x"), rocm("B", how=EMULATED)], "AMD's with x or else emulated"),
        ([rocm("A", "x"), rocm("B", "y"), rocm("C")], "AMD's"),
    ],
)
def test_words_follow_the_order_of_kernels(kernels: list[EngineKernel], words: str) -> None:
    assert row(*kernels).gpus == words


def test_two_ranges_of_generations_with_a_gap_are_said_apart() -> None:
    assert row(cuda("A", TURING, TURING), cuda("B", HOPPER)).gpus == (
        "NVIDIA's from 9.0 (Hopper) on, 7.5 (Turing)"
    )


def test_humming_stands_before_marlin_on_hopper_alone() -> None:
    marlin, humming = cuda("MarlinAny", TURING, how=UNROUNDED), cuda("Humming", TURING, needs=HUMMING)
    found = row(marlin, humming)
    assert found.on_nvidia(HOPPER) == (humming, marlin)
    assert found.on_nvidia(BLACKWELL) == (marlin,)
    assert "9.0 (Hopper) with humming-kernels or else with inputs as they are" in found.gpus


def test_an_older_class_takes_gpus_below_the_newer_ones() -> None:
    kernels = (cuda("Real", TURING), cuda("MarlinAny", TURING, how=UNROUNDED))
    found = Processors("New", HOPPER, "table", kernels, "Old", TURING)
    assert found.gpus == "NVIDIA's from 9.0 (Hopper) on, 7.5 (Turing) to 8.9 (Ada) with inputs as they are"


def test_cpus_are_named_by_what_they_need() -> None:
    found = row(cpu("A", AMX_FP8), cpu("B", AMX, UNROUNDED))
    assert found.cpus == "CPUs with AMX-FP8 or with AMX with inputs as they are"
    assert found.words == f"none; {found.cpus}"
    assert row().cpus == "no CPU"
    assert row(cpu("A", how=UNROUNDED)).cpus == "CPUs with inputs as they are"
