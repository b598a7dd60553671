"""Cards: which kernels run there, and rooflines against numbers worked out by hand."""

import pytest

from lowbit_core.errors import ConfigError
from lowbit_plan.cards import LAUNCH_S, SHARE_OF_BANDWIDTH, SHARE_OF_RATE, cards, find_card
from lowbit_plan.work import Attention, Product
from lowbit_quantize.catalog import CATALOG

PRESETS = {preset.name: preset for preset in CATALOG.presets}
NAMES = ("H100", "H200", "A100", "B200", "L40S", "L4", "A10", "RTX 4090", "RTX 5090", "MI300X")


def test_every_card_names_its_data_sheet_and_computes_in_bfloat16() -> None:
    assert set(cards()) == set(NAMES)
    assert all(card.source and card.rates["bf16"] for card in cards().values())


@pytest.mark.parametrize(
    ("card", "runs", "lacks"),
    [
        ("A100", {"W4A16", "W8A8"}, {"W3A16"}),
        ("H100", {"W4A16", "W8A8", "FP8_DYNAMIC"}, {"W3A16"}),
        ("B200", {"W4A16", "FP8_DYNAMIC", "NVFP4"}, {"W8A8", "W3A16"}),
        ("RTX 5090", {"W4A16", "FP8_DYNAMIC", "NVFP4"}, {"W8A8"}),
        ("MI300X", {"W4A16", "W8A8", "FP8_DYNAMIC"}, {"W3A16", "NVFP4"}),
    ],
)
def test_a_card_runs_the_schemes_of_the_table_of_processors(
    card: str, runs: set[str], lacks: set[str]
) -> None:
    found = {name for name in PRESETS if cards()[card].kernel(name)}
    assert runs <= found
    assert not lacks & found


def test_one_token_takes_the_time_to_move_its_weights() -> None:
    card = find_card("l4")
    product = Product(4096, 4096, None, 2 * 4096 * 4096)
    moved = 2 * 4096 * 4096 + 2 * (4096 + 4096)
    assert card.product_s(product, 1) == pytest.approx(moved / (SHARE_OF_BANDWIDTH * 300e9) + LAUNCH_S)


def test_many_tokens_take_the_time_to_compute_them_in_the_schemes_numbers() -> None:
    card = find_card("L4")
    operations = 2 * 4096 * 4096 * 8192
    for scheme, rate in (("FP8_DYNAMIC", 242.5e12), ("W4A16", 121e12), ("W8A8", 242.5e12)):
        preset = PRESETS[scheme]
        product = Product(4096, 4096, preset.make(preset.group_size), 4096 * 4096)
        assert card.product_s(product, 8192) == pytest.approx(operations / (SHARE_OF_RATE * rate) + LAUNCH_S)


def test_four_bit_floats_are_computed_in_bfloat16_where_the_card_has_none() -> None:
    preset = PRESETS["NVFP4"]
    product = Product(4096, 4096, preset.make(preset.group_size), 4096 * 2048)
    assert find_card("H100").rate("NVFP4") == find_card("H100").rate(None)
    assert find_card("B200").rate("NVFP4") == pytest.approx(SHARE_OF_RATE * 9000e12)
    assert find_card("B200").product_s(product, 8192) < find_card("H100").product_s(product, 8192)


def test_attention_of_a_token_takes_the_time_to_read_the_cache() -> None:
    one = Attention(32, 8, 128, fp8=False)
    seconds = find_card("H100").attention_s(one, streams=4, queries=1, context=8192)
    assert seconds == pytest.approx(4 * 2 * 8 * 128 * 8192 * 2 / (0.8 * 3350e9) + LAUNCH_S)


@pytest.mark.parametrize("name", ["rtx4090", "RTX-4090", "rtx 4090"])
def test_a_card_is_found_however_its_name_is_written(name: str) -> None:
    assert find_card(name).name == "RTX 4090"


def test_an_unknown_card_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"--on H1000: not known; .*allowed are cpu, H100, .*MI300X"):
        find_card("H1000")
