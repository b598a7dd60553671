"""The installed vLLM gains nothing from zeros: it has no kernel that skips them, and refuses a file that names them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lowbit_quantize.schemes.processors.sparsity import gains

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

SPARSE_KERNELS = ("sparse_scaled_mm", "semi_structured", "sparse24", "sparse_24", "gptq_marlin_24")


def test_no_kernel_of_it_skips_zeros() -> None:
    spec: Any = find_spec("vllm")
    layers = Path(spec.origin).parent / "model_executor" / "layers"
    texts = [path.read_text(encoding="utf-8") for path in layers.rglob("*.py")]
    assert len(texts) > 100
    assert [kernel for kernel in SPARSE_KERNELS if any(kernel in text for text in texts)] == []
    assert "gains nothing" in gains("2:4")


def test_it_refuses_a_configuration_that_names_sparsity() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    named = {"format": "sparse-24-bitmask", "targets": ["Linear"], "sparsity_structure": "2:4"}
    config = {"config_groups": {}, "format": "dense", "quant_method": "compressed-tensors"}
    with pytest.raises(DeprecationWarning, match="Sparsity support has been removed"):
        CompressedTensorsConfig.from_config(config | {"sparsity_config": named})
