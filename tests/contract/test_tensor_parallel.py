"""How linears are split over ranks agrees with transformers' `base_model_tp_plan`, wherever that names a linear."""

import pytest
from tests.tiny_models import CONFIGS

from lowbit_quantize.check.sharding import SPLITS_INPUTS, parts

PREFIX = "layers.*."


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_linears_are_split_as_transformers_splits_them(family: str) -> None:
    config = CONFIGS[family]
    named = {
        name.removeprefix(PREFIX): how
        for name, how in config.base_model_tp_plan.items()
        if name.startswith(PREFIX) and name.endswith(("_proj", "_with_mqa"))
    }
    assert named
    for name, how in named.items():
        assert name.endswith(SPLITS_INPUTS) == how.startswith("rowwise"), (name, how)
        assert (parts(name, config, 8) == 1) == (how == "mla_kv_a_proj"), (name, how)
