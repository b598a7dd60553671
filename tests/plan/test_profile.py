"""What is measured of this machine: asked for once, kept, read again; never another machine's."""

import json
from pathlib import Path

import pytest

from lowbit_core.errors import ConfigError
from lowbit_plan.latency import first_token, inter_token
from lowbit_plan.profile import (
    PROMPT_TOKENS,
    RATE,
    Measured,
    Profile,
    Wishes,
    beside_name,
    load_profile,
    this_machine,
)
from lowbit_plan.work import Attention, Product, RoutedExperts, Work
from lowbit_quantize.catalog import CATALOG

W4A16 = next(preset for preset in CATALOG.presets if preset.name == "W4A16").make(64)
LINEAR, HEAD = Product(128, 256, W4A16, 20000), Product(128, 512, None, 131072)
ONE = Attention(4, 2, 32, fp8=False)
WORK = Work(3, {LINEAR: 3}, {}, {ONE: 3}, HEAD)


def profile(file: Path | None = None) -> Profile:
    """Of a machine that takes 2 µs a token for a linear, 5 for the head, 30 for attention, 1 ms beside."""
    return Profile(
        file, this_machine(), 1e10,
        {
            "W4A16:64 128x256 tokens 4": 8e-6, f"W4A16:64 128x256 tokens {PROMPT_TOKENS}": 1e-3,
            "none 128x512 tokens 4": 2e-5, "none 128x512 tokens 1": 5e-6,
            f"none {RATE.inputs}x{RATE.outputs} tokens {PROMPT_TOKENS}": 1e-2,
        },
        {
            "4:2:32 bf16 streams 4 queries 1 context 100": 3e-5,
            f"4:2:32 bf16 streams 1 queries {PROMPT_TOKENS} context {PROMPT_TOKENS}": 2e-3,
        },
        {beside_name("t", 4, 1): 1e-3, beside_name("t", 1, 1000): 7e-3},
    )  # fmt: skip


def test_a_token_takes_what_was_measured_of_each_kernel_and_beside() -> None:
    found = inter_token(WORK, Measured(profile(), "t"), streams=4, context=100)
    assert found.total == pytest.approx(3 * 8e-6 + 3 * 3e-5 + 2e-5 + 1e-3)


def test_a_long_prompt_is_taken_in_proportion_to_its_operations() -> None:
    found = first_token(WORK, Measured(profile(), "t"), prompt=1000)
    assert found.products == pytest.approx(3 * 1e-3 * 1000 / PROMPT_TOKENS)
    ratio = (1000 * 1001 / 2) / (PROMPT_TOKENS * (PROMPT_TOKENS + 1) / 2)
    assert found.attention == pytest.approx(3 * 2e-3 * ratio)
    assert found.beside == 7e-3


def test_wishes_are_the_kernels_that_a_prediction_reads() -> None:
    wishes = Wishes()
    inter_token(WORK, wishes, streams=4, context=100)
    first_token(WORK, wishes, prompt=1000)
    known = profile()
    known.measure(wishes.kernels)  # nothing is lacking, so no engine is asked
    assert len(wishes.kernels) == len(known.products) - 1 + len(known.attention)


def test_experts_take_the_time_to_read_those_that_are_touched_or_to_compute() -> None:
    experts = RoutedExperts(8, 2, (Product(128, 256, None, 10**6),))
    speeds = Measured(profile(), "t")
    assert speeds.experts_s(experts, 1) == pytest.approx(2 * 10**6 / 1e10)
    rate = RATE.operations(PROMPT_TOKENS) / 1e-2
    assert speeds.experts_s(experts, 10**5) == pytest.approx(2 * 2 * 128 * 256 * 10**5 / rate)


def test_a_scheme_without_a_kernel_takes_for_ever() -> None:
    known = profile()
    known.products["W4A16:64 128x256 tokens 4"] = None
    assert inter_token(WORK, Measured(known, "t"), streams=4, context=100).total == float("inf")


def test_a_profile_is_kept_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "profile.json"
    known = profile(file)
    known.keep()
    assert load_profile(file) == known


def test_another_machines_profile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    profile(file).keep()
    data = json.loads(file.read_text())
    data["machine"]["processor"] = "Another 9000"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"is of another machine or engine .*Another 9000"):
        load_profile(file)


@pytest.mark.parametrize("text", ["{}", "no", '{"lowbit_profile": 1}', "[1]"])
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="is none that lowbit plan wrote"):
        load_profile(file)
