"""Tokens per second over a sliding window, with a clock turned by hand."""

from typing import TYPE_CHECKING

import pytest

from lowbit_server.engine.throughput import Throughput
from lowbit_server.sliding_window import BUCKETS_PER_WINDOW, SlidingWindow

if TYPE_CHECKING:
    from tests.server.conftest import Clock


def test_steady_rate_is_measured_exactly(clock: "Clock") -> None:
    window = SlidingWindow(10.0, clock)
    for _ in range(200):
        clock.now_s += 0.1
        window.add(5)
    assert window.per_second() == pytest.approx(50.0, rel=0.02)


def test_idle_server_reads_zero_without_being_told(clock: "Clock") -> None:
    window = SlidingWindow(10.0, clock)
    window.add(1000)
    assert window.per_second() == 100.0
    clock.now_s += 9.8
    assert window.per_second() == 100.0
    clock.now_s += 0.4
    assert window.per_second() == 0.0


def test_memory_does_not_grow_with_steps(clock: "Clock") -> None:
    window = SlidingWindow(10.0, clock)
    for _ in range(100_000):
        clock.now_s += 0.001
        window.add(1)
    assert len(window._buckets) <= BUCKETS_PER_WINDOW
    assert window.per_second() == pytest.approx(1000.0, rel=0.02)


def test_prompt_and_generation_are_counted_apart(clock: "Clock") -> None:
    throughput = Throughput(10.0, clock)
    throughput.record(prompt_tokens=70, generation_tokens=0)
    throughput.record(prompt_tokens=0, generation_tokens=3)
    assert throughput.prompt.per_second() == 7.0
    assert throughput.generation.per_second() == pytest.approx(0.3)
