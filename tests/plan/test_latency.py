"""Latencies are sums over what stands in the model, of speeds that are handed in."""

from dataclasses import dataclass

import pytest

from lowbit_plan.latency import first_token, inter_token
from lowbit_plan.work import Attention, Product, RoutedExperts, Work

SMALL, LARGE = Product(64, 128, None, 1000), Product(128, 64, None, 3000)
HEAD, ONE = Product(64, 512, None, 5000), Attention(4, 2, 16, fp8=False)
EXPERTS = RoutedExperts(8, 2, (SMALL,))
WORK = Work(5, {SMALL: 3, LARGE: 2}, {EXPERTS: 4}, {ONE: 5}, HEAD)


@dataclass
class FakeSpeeds:
    """A microsecond for each byte and token of products, one for each query and key of attention; notes queries."""

    def product_s(self, product: Product, tokens: int) -> float:
        return 1e-6 * product.bytes * tokens

    def attention_s(self, one: Attention, streams: int, queries: int, context: int) -> float:
        return 1e-6 * streams * queries * context

    def experts_s(self, experts: RoutedExperts, tokens: int) -> float:
        return 1e-3 * tokens

    def beside_s(self, layers: int, streams: int, queries: int) -> float:
        return 1e-3 * layers


def test_a_token_of_every_stream_goes_through_all_that_stands_in_the_model() -> None:
    found = inter_token(WORK, FakeSpeeds(), streams=4, context=100)
    assert found.products == pytest.approx(1e-6 * 4 * (3 * 1000 + 2 * 3000))
    assert found.experts == pytest.approx(4 * 4e-3)
    assert found.attention == pytest.approx(5 * 4 * 100e-6)
    assert found.head == pytest.approx(4 * 5000e-6)
    assert found.beside == pytest.approx(5e-3)
    assert found.total == pytest.approx(sum(found.parts().values()))


def test_a_prompt_is_computed_in_the_engines_steps_and_its_head_once_a_step() -> None:
    found = first_token(WORK, FakeSpeeds(), prompt=3000)
    assert found.products == pytest.approx(1e-6 * 3000 * 9000)
    assert found.attention == pytest.approx(5e-6 * (2048 * 2048 + 952 * 3000))
    assert found.head == pytest.approx(2 * 5000e-6)
    assert found.beside == pytest.approx(5e-3)
