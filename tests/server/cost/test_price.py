"""The cost of a million tokens, against the division done by hand."""

from typing import TYPE_CHECKING

import pytest

from lowbit_server.cost.price import WINDOW_S, Cost

if TYPE_CHECKING:
    from tests.server.conftest import Clock


def test_it_is_the_price_of_the_window_over_the_tokens_of_the_window(clock: "Clock") -> None:
    cost = Cost(3.6, clock)  # 0.001 a second
    clock.now_s += 50
    cost.begin()
    assert cost.per_million() == {}
    clock.now_s += 100
    cost.add(3000, 1000)
    assert cost.per_million() == {"generated": pytest.approx(100.0), "all": pytest.approx(25.0)}
    clock.now_s += 400  # idle, and paid for
    assert cost.per_million()["generated"] == pytest.approx(500.0)
    cost.add(0, 4000)
    assert cost.per_million() == {"generated": pytest.approx(100.0), "all": pytest.approx(62.5)}
    clock.now_s += 300  # the first tokens have left the window of 600 s
    assert cost.per_million() == {"generated": pytest.approx(150.0), "all": pytest.approx(150.0)}
    clock.now_s += WINDOW_S
    assert cost.per_million() == {}


def test_prompts_alone_have_a_cost_too(clock: "Clock") -> None:
    cost = Cost(3600.0, clock)
    clock.now_s += 2
    cost.add(1_000_000, 0)
    assert cost.per_million() == {"all": pytest.approx(2.0)}
