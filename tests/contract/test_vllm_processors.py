"""The table of linears (schemes/processors/linears.py) says what the installed vLLM's source says."""

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
from tests.contract.begun import made_or_begun

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.schemes.processors.kernels import (
    GENERATIONS,
    HUMMING,
    EngineKernel,
    Platform,
    Processors,
)
from lowbit_quantize.schemes.processors.linears import LINEARS
from lowbit_quantize.schemes.scheme import Scheme

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

CLASSES = "vllm.model_executor.layers.quantization.compressed_tensors.schemes"
# What Python's source leaves to C++ (`cutlass_scaled_mm_supports_…`).
SAID_BY_CPP = {
    "CutlassFp8BlockScaledMMKernel",
    "CutlassNvFp4LinearKernel",
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
}
WORDS = {90: ("90", "Hopper"), 100: ("100", "Blackwell"), 120: ("120",), 80: ("80",), 60: ("60",)}
EVERY_KERNEL = [
    (name, kernel) for name, row in LINEARS.items() for kernel in row.kernels if kernel.platform == "cuda"
]


PRESETS = {preset.name: preset for preset in CATALOG.presets}


def scheme_of(name: str) -> Scheme:
    return PRESETS[name].make(PRESETS[name].group_size)


def dispatched(name: str, vllm_config: Any) -> str:
    """The class that vLLM makes for a scheme, or begins to make: some of them find no kernel on this processor."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    scheme = scheme_of(name)
    config = CompressedTensorsConfig({}, [], scheme.format, config={})
    parts = scheme.quantization_args()
    with set_current_vllm_config(vllm_config):
        made = made_or_begun(
            lambda: config._get_scheme_from_parts(
                parts["weights"], parts.get("input_activations"), format=scheme.format, layer_name="any"
            )
        )
    return type(made).__name__


@pytest.mark.parametrize("name", LINEARS)
def test_vllm_takes_the_class_that_the_row_names(name: str, vllm_config: Any) -> None:
    row = LINEARS[name]
    found = dispatched(name, vllm_config)
    if name == "W4AFP8":  # a compute capability of 9.0 exactly; no other processor has a class for it
        from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

        assert found == "NotImplementedError"
        parts = scheme_of(name).quantization_args()
        checked = compressed_tensors.CompressedTensorsConfig._is_fp8_w4a8
        assert checked(parts["weights"], parts["input_activations"])
        found = row.scheme_class
    assert found == row.scheme_class
    classes = vars(import_module(CLASSES))
    assert classes[found].get_min_capability() == row.lowest
    if row.older_class:
        assert classes[row.older_class].get_min_capability() == row.older_lowest


def in_vllm(row: Processors, platform: Platform) -> list[Any]:
    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum

    found: list[Any] = vars(linear)[row.table].get(PlatformEnum[platform.upper()], [])
    return found


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("platform", ["cuda", "rocm", "xpu", "cpu"])
def test_kernels_stand_in_vllms_table_of_their_platform_and_in_its_order(
    name: str, platform: Platform
) -> None:
    row = LINEARS[name]
    theirs = [kernel.__name__ for kernel in in_vllm(row, platform)]
    ours = [kernel.name for kernel in row.on(platform)]
    assert set(ours) <= set(theirs)
    assert ours == [one for one in theirs if one in ours]


def weight_types(kernel: Any) -> list[str] | None:
    """What types of weights a kernel of weights alone takes, by their names; None where it takes any."""
    from vllm.model_executor.layers.quantization.utils.machete_utils import (
        query_machete_supported_quant_types,
    )

    if kernel.__name__ == "MacheteLinearKernel":
        return [str(one) for zeros in (True, False) for one in query_machete_supported_quant_types(zeros)]
    if kernel.__name__ == "MarlinLinearKernel":  # asks the platform first, and here that is a CPU
        from vllm.model_executor.layers.quantization.utils import marlin_utils

        source = inspect.getsource(marlin_utils.query_marlin_supported_quant_types)
        named = source.partition("if has_zp:\n")[2]
        return [one for one in ("uint4", "uint4b8", "uint8b128", "uint8") if f"scalar_types.{one}" in named]
    if kernel.__name__ == "HummingLinearKernel":
        return None
    if kernel.__name__ == "XPUW4A8IntLinearKernel":
        assert "c.weight_type != scalar_types.int4" in inspect.getsource(kernel.can_implement)
        return ["int4"]
    listed = getattr(kernel, "SUPPORTED_QUANT_TYPES", None)
    if listed is None:
        constants = vars(import_module(kernel.__mro__[1 if "Zentorch" in kernel.__name__ else 0].__module__))
        lists = [value for key, value in constants.items() if "SUPPORTED" in key and "TYPES" in key]
        listed = lists[0] if lists else []
    return [str(one) for one in listed]


@pytest.mark.parametrize("name", [name for name, row in LINEARS.items() if "WNA16" in row.scheme_class])
@pytest.mark.parametrize("platform", ["cuda", "rocm", "xpu", "cpu"])
def test_no_kernel_for_integer_weights_is_left_out(name: str, platform: Platform) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16

    weights = scheme_of(name).quantization_args()["weights"]
    zeros, plain = "WNA16_ZP_SUPPORTED_TYPES_MAP", "WNA16_SUPPORTED_TYPES_MAP"
    wanted = str(vars(compressed_tensors_wNa16)[plain if weights.symmetric else zeros][weights.num_bits])
    taking = [
        kernel.__name__
        for kernel in in_vllm(LINEARS[name], platform)
        if (types := weight_types(kernel)) is None or wanted in types
    ]
    assert taking == [kernel.name for kernel in LINEARS[name].on(platform)]


@pytest.mark.parametrize(("name", "kernel"), EVERY_KERNEL, ids=lambda one: getattr(one, "name", one))
def test_the_generations_of_a_kernel_are_those_of_its_source(name: str, kernel: EngineKernel) -> None:
    row = LINEARS[name]
    found = next(one for one in in_vllm(row, "cuda") if one.__name__ == kernel.name)
    if hasattr(found, "get_min_capability"):
        assert kernel.lowest == found.get_min_capability()
    source = inspect.getsource(found)
    if kernel.lowest > row.lowest and kernel.name not in SAID_BY_CPP:
        assert any(words in source for words in WORDS[kernel.lowest])
    if kernel.needs == HUMMING:
        assert "has_humming()" in source
    if kernel.how == "emulated":
        assert "mulation" in kernel.name


def test_humming_goes_before_marlin_on_hopper_alone() -> None:
    from vllm.model_executor.layers.quantization.utils.humming import prefers_humming

    assert [one for one in GENERATIONS if prefers_humming(one)] == [90]


def test_every_scheme_has_a_row() -> None:
    assert LINEARS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_every_scheme_says_what_its_row_says(name: str) -> None:
    scheme, row = scheme_of(name), LINEARS[name]
    assert scheme.gpus == row.gpus
    assert tuple(scheme.cpu_kernels) == row.cpu_kernels
    assert bool(row.cpu_kernels) == (not scheme.obstacles("cpu"))
