"""The table of experts (schemes/processors/experts.py) says what the installed vLLM's own code answers."""

import inspect
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
from tests.contract.asked import SaidByCpp, asked, platform
from tests.contract.begun import made_or_begun

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.schemes.processors.experts import EXPERTS
from lowbit_quantize.schemes.processors.kernels import GENERATIONS, Platform
from lowbit_quantize.schemes.scheme import Scheme

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

LAYERS = "vllm.model_executor.layers"
METHODS = f"{LAYERS}.quantization.compressed_tensors.compressed_tensors_moe"
KEYS = {  # names in `quant_utils`, of weights and of inputs
    "W8A8": ("kInt8StaticChannelSym", "kInt8DynamicTokenSym"),
    "FP8_DYNAMIC": ("kFp8StaticChannelSym", "kFp8DynamicTokenSym"),
    "FP8_BLOCK": ("kFp8Static128BlockSym", "kFp8Dynamic128Sym"),
    "NVFP4": ("kNvfp4Static", "kNvfp4Dynamic"),
    "NVFP4A16": ("kNvfp4Static", ""),
    "MXFP8": ("kMxfp8Static", "kMxfp8Dynamic"),
    "W4AFP8": ("kInt4Static", "kFp8DynamicTokenSym"),
    "W4A16": ("kInt4Static", ""),
    "W8A16": ("kInt8Static", ""),
}
BY_ORACLE = [name for name, row in EXPERTS.items() if row.table]
GROUP_SIZE = 64
PRESETS = {preset.name: preset for preset in CATALOG.presets}


class Plain(SimpleNamespace):
    """What has nothing switched on that is not given."""

    def __getattr__(self, name: str) -> bool:
        return False


# One rank, a gated SiLU, no expert parallelism, widths that every kernel takes.
CONFIG = Plain(
    moe_backend="auto",
    moe_parallel_config=Plain(ep_size=1),
    swiglu_limit=None,
    hidden_dim=1024,
    intermediate_size_per_partition_unpadded=512,
)


def scheme_of(name: str) -> Scheme:
    size = PRESETS[name].group_size
    return PRESETS[name].make(GROUP_SIZE if name[1:] in ("2A16", "3A16", "5A16", "6A16") else size)


def keys_of(name: str) -> tuple[Any, Any]:
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16
    from vllm.model_executor.layers.quantization.utils import quant_utils

    if name in KEYS:
        weights, inputs = KEYS[name]
        return vars(quant_utils)[weights], vars(quant_utils)[inputs] if inputs else None
    import torch

    scale = quant_utils.ScaleDesc(torch.float16, True, quant_utils.GroupShape(1, GROUP_SIZE))
    kind = compressed_tensors_wNa16.WNA16_SUPPORTED_TYPES_MAP[int(name[1])]
    return quant_utils.QuantKey(kind, scale, symmetric=True), None


class Kernels:
    """vLLM's classes for a scheme on a platform, in its order, by what its own code answers."""

    def __init__(self, name: str, kind: str, capability: int | None = None) -> None:
        self._name = name
        self._instead = {"current_platform": platform(kind, capability), "ops": SaidByCpp}

    def ordered(self) -> list[Any]:
        """Of one expert a time (no batches of them), with a gated SiLU: all that it would ask, in turn."""
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        module, (weights, inputs) = (
            import_module(f"{LAYERS}.fused_moe.oracle.{EXPERTS[self._name].table}"),
            keys_of(self._name),
        )
        found: list[Any] = []
        (select,) = (
            one
            for name, one in vars(module).items()
            if name.startswith("select_") and one.__module__ == module.__name__
        )
        resolve = "_mxfp8_backend_to_kernel_cls" if self._name == "MXFP8" else "backend_to_kernel_cls"

        def recorded(backend: Any) -> list[Any]:
            found.extend(vars(module)[resolve](backend))
            return []

        options = {"weight_key": weights, "activation_key": inputs, "allow_vllm_cutlass": True}
        options |= {"quant_config": scheme_of(self._name).quantization_args()["weights"]}
        options |= {"may_have_zp": False, "may_have_bias": False, "allow_tile_padding": True}
        taken = {key: value for key, value in options.items() if key in inspect.signature(select).parameters}
        asking = asked(select, {**self._instead, resolve: recorded}, packages=True)
        with suppress(NotImplementedError, ValueError):  # none is taken, so that all are asked for
            asking(CONFIG, **taken)
        return [
            one
            for one in dict.fromkeys(found)
            if "Batched" not in str(one.activation_format()) and one._supports_activation(MoEActivation.SILU)
        ]

    def taking(self, *, packages: bool) -> list[str]:
        """Names of those that take the platform and the scheme, with other packages there or not."""
        keys = keys_of(self._name)
        return [
            one.__name__
            for one in self.ordered()
            if self._answer(one, "_supports_current_device", (), packages)
            and self._answer(one, "_supports_quant_scheme", keys, packages)
        ]

    def _answer(self, kernel: Any, method: str, arguments: tuple[Any, ...], packages: bool) -> bool:
        if hasattr(kernel, "get_clses"):  # two in one: both must
            return all(self._answer(one, method, arguments, packages) for one in kernel.get_clses())
        found = inspect.getattr_static(kernel, method)
        owner = (kernel,) if isinstance(found, classmethod) else ()
        return bool(asked(found, self._instead, packages)(*owner, *arguments))


@pytest.mark.parametrize("name", BY_ORACLE)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_each_generation_of_gpus_is_offered_the_rows_kernels_in_its_order(name: str, generation: int) -> None:
    kernels = Kernels(name, "CUDA", generation)
    bare, offered = kernels.taking(packages=False), kernels.taking(packages=True)
    reached = offered[: offered.index(bare[0]) + 1] if bare else offered
    ours = EXPERTS[name].on_nvidia(generation)
    # Of Humming's classes one is named, which stands for those of other layouts.
    assert list(dict.fromkeys("HummingGroupedExperts" if "Humming" in one else one for one in reached)) == [
        kernel.name for kernel in ours
    ]
    assert [kernel.name for kernel in ours if not kernel.needs] == bare[:1]


@pytest.mark.parametrize("name", BY_ORACLE)
@pytest.mark.parametrize("kind", ["rocm", "xpu", "cpu"])
def test_kernels_of_other_platforms_stand_in_vllms_order(name: str, kind: Platform) -> None:
    kernels, ours = Kernels(name, kind.upper()), EXPERTS[name].on(kind)
    names = [one.__name__ for one in kernels.ordered()]
    assert [one for one in names if one in [kernel.name for kernel in ours]] == [
        kernel.name for kernel in ours
    ]
    if kind == "cpu":
        assert all(kernel.needs for kernel in ours)
        here = [
            one for one in kernels.ordered() if "cpu_moe" in one.__module__ or "zentorch" in one.__module__
        ]
        taking = [one.__name__ for one in here if one._supports_quant_scheme(*keys_of(name))]
        assert taking == [kernel.name for kernel in ours]


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", ["MXFP4", "MXFP4A16"])
def test_mxfp4_experts_are_given_a_kernel_by_their_class_whatever_the_file_says_of_inputs(
    name: str, generation: int
) -> None:
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts

    instead = {"current_platform": platform("CUDA", generation), "ops": SaidByCpp}
    chosen = _chosen_for_mxfp4(instead)
    assert "activation" not in inspect.signature(_mxfp4_method().__init__).parameters
    ours = EXPERTS[name].on_nvidia(generation)
    marlin = asked(inspect.getattr_static(MarlinExperts, "_supports_current_device"), instead, packages=False)
    if chosen == "MarlinExperts" and not marlin():
        assert ours == ()  # it is chosen without being asked
    else:
        assert [kernel.name for kernel in ours] == [chosen]


def test_mxfp4_experts_have_a_kernel_on_intels_gpus_and_on_no_amd_gpu_or_cpu() -> None:
    for kind in ("ROCM", "XPU", "CPU"):
        chosen = _chosen_for_mxfp4({"current_platform": platform(kind), "ops": SaidByCpp})
        found = [
            kernel.name
            for kernel in EXPERTS["MXFP4"].on("rocm" if kind == "ROCM" else "xpu" if kind == "XPU" else "cpu")
        ]
        assert found == ([] if chosen == "MarlinExperts" else [chosen])


def _mxfp4_method() -> Any:
    return vars(import_module(f"{METHODS}.compressed_tensors_moe_w4a4_mxfp4"))[
        "CompressedTensorsW4A4Mxfp4MoEMethod"
    ]


def _chosen_for_mxfp4(instead: dict[str, Any]) -> str:
    """The class of kernels that vLLM's method for MXFP4 sets, on a platform."""
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsMxfp4

    answer = asked(
        inspect.getattr_static(CutlassExpertsMxfp4, "_supports_current_device"), instead, packages=False
    )
    cutlass = type("CutlassExpertsMxfp4", (), {"_supports_current_device": staticmethod(answer)})
    method = _mxfp4_method()
    made = method.__new__(method)
    asked(method.__init__, {**instead, "CutlassExpertsMxfp4": cutlass}, packages=False)(made, CONFIG)
    name: str = made.experts_cls.__name__
    return name


@pytest.mark.parametrize("name", EXPERTS)
def test_vllm_takes_the_class_that_the_row_names(name: str, vllm_config: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    scheme, found = scheme_of(name), import_module(f"{METHODS}.compressed_tensors_moe")
    parts = {key: value for key, value in scheme.quantization_args().items() if value is not None}
    group = {key: value.model_dump() for key, value in parts.items() if hasattr(value, "model_dump")}
    config = CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": scheme.format,
            "config_groups": {
                "group_0": {"targets": ["re:.*experts.*_proj$"], "format": scheme.format, **group}
            },
            "ignore": [],
        }
    )
    layer = SimpleNamespace(
        ckpt_gate_proj_name="gate_proj",
        ckpt_up_proj_name="up_proj",
        ckpt_down_proj_name="down_proj",
        moe_config=CONFIG,
    )
    with set_current_vllm_config(vllm_config):
        made = made_or_begun(
            lambda: found.CompressedTensorsMoEMethod.get_moe_method(
                config, layer, "model.layers.0.mlp.experts"
            )
        )
    assert type(made).__name__ == EXPERTS[name].scheme_class


def test_every_scheme_that_experts_may_have_has_a_row() -> None:
    taken = {name for name in PRESETS if scheme_of(name).experts.misfit is None}
    assert taken == EXPERTS.keys()


@pytest.mark.parametrize("name", EXPERTS)
def test_a_scheme_says_of_its_experts_what_its_row_says(name: str) -> None:
    assert scheme_of(name).experts.processors == EXPERTS[name].words
