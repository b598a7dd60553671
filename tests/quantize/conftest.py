"""Tiny models, written once for the whole test session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests.tiny_models import write_tiny_model

from lowbit_quantize.architectures import ARCHITECTURES

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ALL_FAMILIES = tuple(ARCHITECTURES)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(family)` is the directory of a tiny model of that family."""
    return cache(lambda family: write_tiny_model(tmp_path_factory.mktemp(family), family))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ALL_FAMILIES)
def any_family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
