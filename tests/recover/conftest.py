"""Tiny models and checkpoints of them, written once for the whole test session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import write_tiny_model

from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import parse_recipe

SMALL = {
    "kv_cache": "none",
    "calibration": {"num_samples": 4, "max_seq_length": 64},
    "quality": {"num_samples": 4, "max_seq_length": 64, "isolate": False},
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model(family)` is the directory of a tiny model of that family."""
    return cache(lambda family: write_tiny_model(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="session")
def checkpoint(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`checkpoint(family, scheme)` is the directory of a checkpoint, by round to nearest; `prune`: of experts alone."""

    @cache
    def made(family: str, scheme: str = "W4A16", group_size: int | str = 32, prune: bool = False) -> Path:
        rule = {"match": "*", "scheme": scheme, "group_size": group_size, "methods": ["rtn"]}
        keys: dict[str, Any] = {"modules": [rule]}
        if prune:
            keys = {"passes": [{"prune_experts": {"prune_ratio": 0.5, "criterion": "reap"}}]}
        out = tmp_path_factory.mktemp(f"{family}-{scheme}") / "checkpoint"
        quantize(str(tiny_model(family)), parse_recipe(SMALL | keys, "here"), out, torch.device("cpu"))
        return out

    return made
