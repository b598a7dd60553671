"""What vLLM's classes ask for before they are made: a configuration, and its groups of ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's configuration of a tiny model."""
    from vllm.config import ModelConfig, VllmConfig

    model: Path = write_tiny_model(tmp_path_factory.mktemp("model"), "llama")
    return VllmConfig(model_config=ModelConfig(model=str(model)))


@pytest.fixture
def one_rank(vllm_config: Any, tmp_path: Path) -> Iterator[Any]:
    """vLLM's groups of ranks, of this process alone, under that configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'ranks'}", 0, "gloo")
        initialize_model_parallel(1)
        yield vllm_config
    destroy_model_parallel()
    destroy_distributed_environment()
