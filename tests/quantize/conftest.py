"""Tiny models, written once for the whole test session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tests.tiny_models import CONFIGS, write_tiny_model

# One family of each kind: separate linears, fused ones, norms around norms with an offset, norms after, experts,
# shared experts beside them, and a latent cache.
KINDS = ("llama", "phi3", "gemma3_text", "olmo2", "qwen3_moe", "qwen2_moe", "deepseek_v2")
ROUTED = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "deepseek_v2")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(family)` is the directory of a tiny model of that family."""
    return cache(lambda family: write_tiny_model(tmp_path_factory.mktemp(family), family))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """One family of each kind, for what runs a model."""
    return str(request.param)


@pytest.fixture(params=tuple(CONFIGS))
def any_family(request: pytest.FixtureRequest) -> str:
    """Every family, for what costs little."""
    return str(request.param)


@pytest.fixture(params=ROUTED)
def moe_family(request: pytest.FixtureRequest) -> str:
    """Every family with routed experts."""
    return str(request.param)
