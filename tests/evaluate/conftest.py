"""Tiny models, written once for these tests."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(family)` is the directory of a tiny model of that family."""
    return cache(lambda family: write_tiny_model(tmp_path_factory.mktemp(family), family))
