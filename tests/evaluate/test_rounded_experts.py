"""Routed experts whose inputs engines round, loaded whole: int8 ones, which transformers does not open, and FP8."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quantize.small_runs import CPU, heldout_ids, recipe_with
from torch import Tensor

from lowbit_evaluate.loaded_model import LoadedModel, load_model
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.schemes.rounding_linear import RoundingLinear


def log_probabilities(model: LoadedModel, ids: Tensor) -> Tensor:
    return torch.log_softmax((model.hidden(ids)[:, :-1].float() @ model.head.float().T).double(), -1)


@pytest.mark.parametrize(
    ("family", "scheme", "methods"),
    [("qwen3_moe", "W8A8", ["smoothquant", "rtn"]), ("mixtral", "FP8_DYNAMIC", ["rtn"])],
)
def test_experts_compute_what_was_measured(
    tiny_model: Callable[[str], Path], family: str, scheme: str, methods: list[str], tmp_path: Path
) -> None:
    base, out = tiny_model(family), tmp_path / "out"
    recipe = recipe_with({"match": "*.experts.*", "scheme": scheme, "methods": methods})
    manifest = quantize(str(base), recipe, out, CPU)
    before, after = (load_model(find_model(str(path)), CPU) for path in (base, out))
    ids = heldout_ids(base, recipe)
    p, q = (log_probabilities(model, ids) for model in (before, after))
    kld = float((p.exp() * (p - q)).sum(-1).mean())
    # bfloat16 rounds otherwise by the batch, and what is on the edge of a code or of a choice falls to the other side
    assert kld == pytest.approx(manifest.quality.mean_kld, rel=0.05, abs=2e-4)
    rounding = [name for name, module in after.model.named_modules() if isinstance(module, RoundingLinear)]
    assert len(rounding) == len(manifest.modules)
    assert all(".experts." in name for name in rounding)
