"""The engine that benchmarks put in vLLM's place follows the interface that it stands for."""

import asyncio

from benchmarks.mock_engine import MockEngine


def test_the_mock_engine_states_every_fact_of_an_engine() -> None:
    assert asyncio.run(MockEngine(None).facts()).vllm == "mock"
