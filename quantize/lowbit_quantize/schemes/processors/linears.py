"""Which processors run linears of each scheme: vLLM's classes for it, and the machines that each of them takes.

One row a scheme, read in vLLM 0.32's source; tests/contract/test_vllm_processors.py holds every row against the one
that is installed. The order of kernels is vLLM's, which takes the first that fits. Sources, below
`vllm/model_executor`: the class of a scheme from `_get_scheme_from_parts` of
`layers/quantization/compressed_tensors/compressed_tensors.py`, its least compute capability from its own
`get_min_capability`; the kernels from the tables of `kernels/linear/__init__.py`; what a kernel takes from its
`get_min_capability`, `is_supported` and `can_implement`. That CUTLASS has no int8 for Blackwell is said by its C++
source (`csrc/libtorch_stable/quantization/w8a8/cutlass`), not by Python.
"""

from dataclasses import replace

from lowbit_quantize.schemes.processors.kernels import (
    ADA,
    AMPERE,
    AMX,
    AMX_FP8,
    BLACKWELL,
    BLACKWELL_ULTRA,
    BY_TOKEN,
    CDNA3,
    CDNA4,
    EMULATED,
    FLASHINFER,
    GEFORCE_BLACKWELL,
    HOPPER,
    HUMMING,
    QUARK,
    ROUNDED,
    TURING,
    UNROUNDED,
    ZENTORCH,
    EngineKernel,
    Processors,
    cpu,
    cuda,
    rocm,
    weights_alone,
    xpu,
)

# `supports_per_head_quant_scales` of `vllm/v1/attention/backends`, and what the CPU's attention reads.
SCALES_OF_HEADS = "NVIDIA's from 9.0 (Hopper) on, with FlashAttention 3 or later; no CPU"
_WNA16 = ("CompressedTensorsWNA16", TURING, "_POSSIBLE_KERNELS")
_HUMMING = cuda("HummingLinearKernel", TURING, needs=HUMMING)
_CONCH = "conch-triton-kernels"
_FOUR_BITS = (
    cuda("MacheteLinearKernel", HOPPER, HOPPER),
    cuda("MarlinLinearKernel", TURING),
    cuda("ConchLinearKernel", AMPERE, needs=_CONCH),
    cuda("ExllamaLinearKernel", 60, needs="float16"),
    cuda("TritonW4A16LinearKernel"),
    _HUMMING,
    rocm("RDNA3W4A16LinearKernel", "gfx1100"),
    rocm("RDNAHybridW4A16LinearKernel", "gfx11 and gfx12"),
    rocm("TritonW4A16LinearKernel"),
    rocm("ConchLinearKernel", _CONCH),
    rocm("ExllamaLinearKernel", "float16"),
    xpu("XPUwNa16LinearKernel"),
    cpu("ZentorchWNA16LinearKernel", ZENTORCH),
    cpu("CPUWNA16LinearKernel"),
)
_WITHOUT_ZEROS = ("RDNA3W4A16LinearKernel", "ExllamaLinearKernel")
_EIGHT_BITS = (
    cuda("MacheteLinearKernel", HOPPER, HOPPER),
    cuda("MarlinLinearKernel", TURING),
    cuda("ConchLinearKernel", AMPERE, needs=_CONCH),
    cuda("ExllamaLinearKernel", 60, needs="float16"),
    _HUMMING,
    rocm("ConchLinearKernel", _CONCH),
    rocm("ExllamaLinearKernel", "float16"),
)
_TORCH_FP8 = "ChannelWiseTorchFP8ScaledMMLinearKernel"
_FP8_DYNAMIC = (
    cuda("CutlassFP8ScaledMMLinearKernel", ADA),
    cuda(_TORCH_FP8, ADA),
    cuda("MarlinFP8ScaledMMLinearKernel", TURING, how=UNROUNDED),
    cuda("HummingFP8ScaledMMLinearKernel", TURING, needs=HUMMING),
    rocm("RowWiseTorchFP8ScaledMMLinearKernel", CDNA3),
    rocm(_TORCH_FP8, CDNA3),
    xpu("XPUW8A16FP8LinearKernel", how=UNROUNDED),
    xpu("XPUW8A8FP8LinearKernel"),
    cpu(_TORCH_FP8),
)
_FP8_STATIC = (
    cuda("FlashInferFP8ScaledMMLinearKernel", BLACKWELL, needs=FLASHINFER),
    cuda("CutlassFP8ScaledMMLinearKernel", ADA),
    cuda("PerTensorTorchFP8ScaledMMLinearKernel", ADA),
    cuda("MarlinFP8ScaledMMLinearKernel", TURING, how=UNROUNDED),
    cuda("HummingFP8ScaledMMLinearKernel", TURING, needs=HUMMING),
    rocm("PerTensorTorchFP8ScaledMMLinearKernel", CDNA3),
    xpu("XPUW8A16FP8LinearKernel", how=UNROUNDED),
    xpu("XPUW8A8FP8LinearKernel"),
)
_FP8_BLOCK = (
    cuda("FlashInferFp8DeepGEMMDynamicBlockScaledKernel", HOPPER, HOPPER, "flashinfer and deep_gemm"),
    cuda("DeepGemmFp8BlockScaledMMKernel", HOPPER, needs="deep_gemm"),
    cuda("CutlassFp8BlockScaledMMKernel", HOPPER),
    cuda("B12xFp8BlockScaledMMKernel", GEFORCE_BLACKWELL, needs="b12x"),
    cuda("MarlinFP8ScaledMMLinearKernel", TURING, how=UNROUNDED),
    cuda("HummingFP8ScaledMMLinearKernel", TURING, needs=HUMMING),
    cuda("TritonFp8BlockScaledMMKernel", ADA),
    cuda("BlockWiseTorchFP8ScaledMMLinearKernel", HOPPER, HOPPER),
    rocm("AiterFp8BlockScaledMMKernel", "aiter"),
    rocm("TritonFp8BlockScaledMMKernel", CDNA3),
    xpu("XPUFp8BlockScaledMMKernel"),
    xpu("TritonFp8BlockScaledMMKernel"),
    xpu("BlockWiseTorchFP8ScaledMMLinearKernel"),
    cpu("CPUFp8W8A8BlockScaledMMKernel", AMX_FP8, BY_TOKEN),
    cpu("CPUFp8BlockScaledMMKernel", AMX, UNROUNDED),
)
_INT8 = (
    cuda("CutlassInt8ScaledMMLinearKernel", TURING, HOPPER),
    cuda("HummingInt8ScaledMMLinearKernel", TURING, needs=HUMMING),
    rocm("AiterInt8ScaledMMLinearKernel", "aiter"),
    rocm("TritonInt8ScaledMMLinearKernel"),
    xpu("TritonInt8ScaledMMLinearKernel"),
    cpu("ZentorchInt8ScaledMMLinearKernel", ZENTORCH),
    cpu("CPUInt8ScaledMMLinearKernel"),
)
_NVFP4 = ("CompressedTensorsW4A4Fp4", TURING, "_POSSIBLE_NVFP4_KERNELS")
_NVFP4_ALONE = (
    cuda("FlashInferCuteDslNvFp4W4A16LinearKernel", BLACKWELL, needs=FLASHINFER, how=UNROUNDED),
    cuda("MarlinNvFp4LinearKernel", TURING, how=UNROUNDED),
)
_NVFP4_HUMMING = cuda("HummingNvFp4LinearKernel", TURING, needs=HUMMING, how=UNROUNDED)
_NVFP4_KERNELS = (
    cuda("FlashInferCuteDslNvFp4LinearKernel", BLACKWELL, BLACKWELL_ULTRA, FLASHINFER),
    cuda("FlashInferCutlassNvFp4LinearKernel", BLACKWELL, needs=FLASHINFER),
    cuda("FlashInferB12xNvFp4LinearKernel", GEFORCE_BLACKWELL, needs=FLASHINFER),
    cuda("CutlassNvFp4LinearKernel", BLACKWELL),
    *_NVFP4_ALONE,
    cuda("TorchNvFp4LinearKernel", BLACKWELL, BLACKWELL_ULTRA),
    cuda("EmulationNvFp4LinearKernel", TURING, how=EMULATED),
    _NVFP4_HUMMING,
    rocm("EmulationNvFp4LinearKernel", how=EMULATED),
)
_MXFP4 = ("CompressedTensorsW4A4Mxfp4", AMPERE, "_POSSIBLE_MXFP4_KERNELS")
_MXFP4_KERNELS = (
    cuda("FlashInferMxFp4LinearKernel", BLACKWELL, needs=FLASHINFER),
    cuda("MarlinMxFp4LinearKernel", TURING, how=UNROUNDED),
    cuda("HummingMxFp4LinearKernel", TURING, needs=HUMMING, how=UNROUNDED),
    cuda("B12xMxFp4LinearKernel", GEFORCE_BLACKWELL, needs="b12x"),
    cuda("EmulationMxfp4LinearKernel", needs=QUARK, how=EMULATED),
    rocm("AiterMxfp4LinearKernel", f"{CDNA4} and aiter"),
    rocm("EmulationMxfp4LinearKernel", QUARK, EMULATED),
    xpu("XPUMxFp4LinearKernel"),
)
_MXFP8 = ("CompressedTensorsW8A8Mxfp8", TURING, "_POSSIBLE_MXFP8_KERNELS")
_MXFP8_KERNELS = (
    cuda("FlashInferCutedslMxfp8LinearKernel", BLACKWELL, BLACKWELL_ULTRA, FLASHINFER),
    cuda("FlashInferCutlassMxfp8LinearKernel", BLACKWELL, needs=FLASHINFER),
    cuda("MarlinMxfp8LinearKernel", TURING, how=UNROUNDED),
    cuda("B12xMxfp8LinearKernel", GEFORCE_BLACKWELL, needs="b12x"),
    cuda("EmulationMxfp8LinearKernel", TURING, how=EMULATED),
    cuda("HummingMxfp8LinearKernel", TURING, needs=HUMMING, how=UNROUNDED),
    rocm("RocmDotScaledMxfp8LinearKernel", CDNA4),
    rocm("EmulationMxfp8LinearKernel", how=EMULATED),
    xpu("XPUMxFp8LinearKernel"),
    xpu("EmulationMxfp8LinearKernel", how=EMULATED),
)
_INT4_ROUNDED = tuple(  # only Humming's rounds the inputs of 4-bit weights
    kernel if kernel is _HUMMING else replace(kernel, how=UNROUNDED) for kernel in _FOUR_BITS
)


_MXFP4_ALONE = tuple(  # vLLM has one class for both: where inputs are rounded, these are too
    replace(kernel, how={"": ROUNDED, UNROUNDED: ""}.get(kernel.how, kernel.how)) for kernel in _MXFP4_KERNELS
)


def _fp8(table: str, kernels: tuple[EngineKernel, ...]) -> Processors:
    return Processors("CompressedTensorsW8A8Fp8", ADA, table, kernels, "CompressedTensorsW8A16Fp8", TURING)


_CUTLASS_W4A8 = cuda("CutlassW4A8LinearKernel", HOPPER, HOPPER)

LINEARS: dict[str, Processors] = {
    **{f"W{bits}A16": Processors(*_WNA16, kernels=(_HUMMING,)) for bits in (2, 3, 5, 6)},
    "W4A16": Processors(*_WNA16, kernels=_FOUR_BITS),
    "W4A16_ASYM": Processors(*_WNA16, kernels=tuple(k for k in _FOUR_BITS if k.name not in _WITHOUT_ZEROS)),
    "W8A16": Processors(*_WNA16, kernels=_EIGHT_BITS),
    "W8A8": Processors("CompressedTensorsW8A8Int8", TURING, "_POSSIBLE_INT8_KERNELS", _INT8),
    "FP8": _fp8("_POSSIBLE_FP8_KERNELS", _FP8_STATIC),
    "FP8_DYNAMIC": _fp8("_POSSIBLE_FP8_KERNELS", _FP8_DYNAMIC),
    "FP8_BLOCK": _fp8("_POSSIBLE_FP8_BLOCK_KERNELS", _FP8_BLOCK),
    "NVFP4": Processors(*_NVFP4, kernels=_NVFP4_KERNELS),
    "NVFP4A16": Processors(*_NVFP4, kernels=weights_alone((*_NVFP4_ALONE, _NVFP4_HUMMING))),
    "MXFP4": Processors(*_MXFP4, kernels=_MXFP4_KERNELS),
    "MXFP4A16": Processors(*_MXFP4, kernels=_MXFP4_ALONE),
    "MXFP8": Processors(*_MXFP8, kernels=_MXFP8_KERNELS),
    "W4AFP8": Processors("CompressedTensorsW4A8Fp8", HOPPER, "_POSSIBLE_KERNELS", (_CUTLASS_W4A8,)),
    "W4A8": Processors("CompressedTensorsWNA8Int", TURING, "_POSSIBLE_KERNELS", _INT4_ROUNDED),
}
