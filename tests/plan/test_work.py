"""What a step computes, against numbers worked out by hand from the tiny models' configurations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit_plan.work import Attention, Product, RoutedExperts, steps_of, work_of
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.plan import Plan, make_plan
from lowbit_quantize.recipe import parse_recipe

TEXT = {"max_seq_length": 64}


def planned(directory: Path, **sections: Any) -> Plan:
    data = {"kv_cache": {"dtype": "none"}, "calibration": TEXT, "quality": TEXT} | sections
    return make_plan(find_model(str(directory)), parse_recipe(data, "of a test"))


def test_products_are_those_that_engines_fuse(tiny_model: Callable[[str], Path]) -> None:
    # hidden 128, 4 heads and 2 heads of keys of 32 channels, middle 192, 3 layers
    work = work_of(planned(tiny_model("llama"), passes=[]))
    assert {(one.inputs, one.outputs, one.bytes): count for one, count in work.products.items()} == {
        (128, 128 + 64 + 64, 2 * 128 * 256): 3,
        (128, 128, 2 * 128 * 128): 3,
        (128, 2 * 192, 2 * 128 * 384): 3,
        (192, 128, 2 * 192 * 128): 3,
    }
    assert work.attention == {Attention(4, 2, 32, fp8=False): 3}
    assert (work.head.inputs, work.head.outputs, work.layers) == (128, 512, 3)


def test_a_product_has_the_bytes_of_its_scheme(tiny_model: Callable[[str], Path]) -> None:
    rules = [
        {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]},
        {"match": "*.layers.1.*", "scheme": "W8A8", "methods": ["rtn"]},
    ]
    work = work_of(planned(tiny_model("llama"), modules=rules))
    down = {one.name: one.bytes for one in work.products if one.inputs == 192}
    # 4 bits and a bfloat16 scale for 64 inputs, the shape as two int64; int8 and a float32 scale for each output
    assert down == {
        "W4A16:64": 192 * 128 // 2 + 2 * 3 * 128 + 16,
        "W8A8:channel": 192 * 128 + 4 * 128,
    }
    assert sorted(work.products.values()) == [1] * 4 + [2] * 4


def test_experts_are_counted_apart_from_products(tiny_model: Callable[[str], Path]) -> None:
    work = work_of(planned(tiny_model("qwen3_moe"), passes=[]))
    (experts,) = work.experts
    assert (experts.count, experts.used) == (8, 2)
    assert [(one.inputs, one.outputs) for one in experts.products] == [(128, 128), (64, 128)]
    assert all(one.outputs != 64 for one in work.products)


def test_pruned_experts_are_gone(tiny_model: Callable[[str], Path]) -> None:
    passes = [{"prune_experts": {"prune_ratio": 0.5, "criterion": "reap"}}]
    (experts,) = work_of(planned(tiny_model("qwen3_moe"), passes=passes)).experts
    assert experts.count == 4


def test_experts_touched_are_what_dealing_tokens_out_gives() -> None:
    product = Product(64, 128, None, 2 * 64 * 128)
    experts = RoutedExperts(8, 2, (product,))
    assert experts.touched(1) == pytest.approx(2)
    # two tokens: 2 + 2 experts, less 2 x 2/8 that are the same on the mean
    assert experts.touched(2) == pytest.approx(3.5)
    assert experts.bytes_read(1) == 2 * product.bytes
    assert experts.operations(3) == 3 * 2 * 2 * 64 * 128


def test_attention_operations_are_those_of_a_causal_mask() -> None:
    one = Attention(4, 2, 32, fp8=False)
    # queries 1 to 3 of a context of 5 see 3, 4 and 5 keys; two products of 4 heads x 32 channels for each
    assert one.operations(3, 5) == 2 * 2 * 4 * 32 * (3 + 4 + 5)
    assert one.cache_bytes(10) == 2 * 2 * 32 * 10 * 2
    assert Attention(4, 2, 32, fp8=True).cache_bytes(10) == one.cache_bytes(10) / 2


def test_an_fp8_cache_shows_in_the_attention(tiny_model: Callable[[str], Path]) -> None:
    cache = {"dtype": "fp8", "skip_layers": [0]}
    work = work_of(planned(tiny_model("llama"), passes=[], kv_cache=cache))
    assert work.attention == {Attention(4, 2, 32, fp8=False): 1, Attention(4, 2, 32, fp8=True): 2}


def test_a_long_prompt_takes_several_steps() -> None:
    assert [steps_of(prompt) for prompt in (1, 2048, 2049, 8192)] == [1, 1, 2, 4]
