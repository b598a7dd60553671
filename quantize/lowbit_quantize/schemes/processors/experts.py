"""Which processors run routed experts in each scheme: vLLM's classes for a fused block, which are not those of linears.

Read in vLLM 0.32's source; tests/contract/test_vllm_experts.py asks the installed one. Sources, below
`vllm/model_executor/layers`: the class of a scheme from `get_moe_method` of
`quantization/compressed_tensors/compressed_tensors_moe`; the kernels, which stand in its order for experts with a gated
SiLU on one rank or a few, from the module of `fused_moe/oracle` that a row names (`MXFP4` has none: its class chooses
by itself); what a kernel takes from its `_supports_current_device` and `_supports_quant_scheme`. What these ask of C++:
groups of FP8 products from 9.0 on, MXFP4 inputs of experts from 10.0 to below 12.0 (`csrc/…/mxfp4_experts_quant.cu`).

They differ from linears: FP8 in blocks is rounded on Ada, where linears leave inputs as they are; MXFP4 runs on no AMD
GPU, and is rounded on Blackwell's servers alone, even where a file is `MXFP4A16`.
"""

from lowbit_quantize.schemes.processors.kernels import (
    ADA,
    AMX,
    AMX_FP8,
    BLACKWELL,
    BLACKWELL_ULTRA,
    BY_TOKEN,
    CDNA3,
    CDNA4,
    DEEP_GEMM,
    EMULATED,
    FLASHINFER,
    HOPPER,
    HUMMING,
    ROUNDED,
    TURING,
    UNROUNDED,
    VOLTA,
    ZENTORCH,
    Processors,
    cpu,
    cuda,
    rocm,
    weights_alone,
    xpu,
)

# The last capability of a family, times ten, as vLLM bounds what C++ says.
_BEFORE_GEFORCE = 119
_MARLIN, _MARLIN_UNROUNDED = cuda("MarlinExperts", TURING), cuda("MarlinExperts", TURING, how=UNROUNDED)
_HUMMING = cuda("HummingGroupedExperts", TURING, needs=HUMMING)
_TRITON = cuda("TritonExperts", ADA)
_INTEGERS = ("CompressedTensorsWNA16MoEMethod", VOLTA, "int_wna16")
_INT4 = (
    _MARLIN,
    cuda("TritonWNA16Experts"),
    rocm("Rdna3WNA16Experts", "gfx1100"),
    rocm("TritonWNA16Experts"),
    xpu("XPUExpertsWNA16"),
    cpu("ZentorchExpertsInt4", ZENTORCH),
    cpu("CPUExpertsInt4", AMX),
)
_INT8_WEIGHTS = (_MARLIN, cuda("TritonWNA16Experts"), rocm("TritonWNA16Experts"))
_INT8 = (
    cuda("TritonExperts", TURING),
    rocm("TritonExperts"),
    xpu("TritonExperts"),
    cpu("ZenCPUExpertsInt8", ZENTORCH),
    cpu("PowerCPUExpertsInt8", "POWER"),
    cpu("ArmCPUExpertsInt8", "Arm"),
    cpu("CPUExpertsInt8", AMX),
)
_FP8 = ("CompressedTensorsW8A8Fp8MoEMethod", VOLTA, "fp8")
_FP8_DYNAMIC = (
    cuda("TritonOrCutlassExperts", HOPPER, BLACKWELL_ULTRA),
    _TRITON,
    _MARLIN_UNROUNDED,
    rocm("AiterExperts", "aiter"),
    rocm("TritonExperts", CDNA3),
    xpu("TritonExperts"),
)
_FP8_BLOCK = (  # on Hopper Triton's stands first
    cuda("TrtLlmFp8ExpertsMonolithic", BLACKWELL, BLACKWELL_ULTRA, FLASHINFER),
    cuda("TrtLlmFp8ExpertsModular", BLACKWELL, BLACKWELL_ULTRA, FLASHINFER),
    cuda("TritonOrDeepGemmExperts", BLACKWELL, needs=DEEP_GEMM),
    _TRITON,
    _MARLIN_UNROUNDED,
    rocm("AiterExperts", "aiter"),
    rocm("TritonExperts", CDNA3),
    xpu("XPUExpertsBlockFp8"),
    xpu("TritonExperts"),
    cpu("CPUExpertsFp8W8A8", AMX_FP8, BY_TOKEN),
    cpu("CPUExpertsFp8", AMX, UNROUNDED),
)
_NVFP4 = ("CompressedTensorsW4A4Nvfp4MoEMethod", VOLTA, "nvfp4")
_NVFP4_KERNELS = (
    cuda("TrtLlmNvFp4ExpertsMonolithic", BLACKWELL, BLACKWELL_ULTRA, FLASHINFER),
    cuda("TrtLlmNvFp4ExpertsModular", BLACKWELL, BLACKWELL_ULTRA, FLASHINFER),
    cuda("FlashInferCuteDSLExperts", BLACKWELL, BLACKWELL_ULTRA, FLASHINFER),
    cuda("FlashInferExperts", BLACKWELL, needs=FLASHINFER),
    cuda("CutlassExpertsFp4", BLACKWELL),
    _MARLIN_UNROUNDED,
    cuda("Nvfp4QuantizationEmulationTritonExperts", how=EMULATED),
    rocm("Nvfp4QuantizationEmulationTritonExperts", how=EMULATED),
    xpu("Nvfp4QuantizationEmulationTritonExperts", how=EMULATED),
)
_MXFP8_KERNELS = (
    cuda("TrtLlmFp8ExpertsMonolithic", BLACKWELL, BLACKWELL_ULTRA, FLASHINFER),
    cuda("TrtLlmFp8ExpertsModular", BLACKWELL, BLACKWELL_ULTRA, FLASHINFER),
    cuda("DeepGemmExperts", BLACKWELL, BLACKWELL_ULTRA, DEEP_GEMM),
    _MARLIN_UNROUNDED,
    cuda("Mxfp8EmulationTritonExperts", how=EMULATED),
    rocm("AiterMxfp8Experts", f"{CDNA4} and aiter"),
    rocm("Mxfp8NativeTritonExperts", CDNA4),
    rocm("Mxfp8EmulationTritonExperts", how=EMULATED),
    xpu("XPUExpertsMxFp8"),
)
_MXFP4 = ("CompressedTensorsW4A4Mxfp4MoEMethod", VOLTA, "")


EXPERTS: dict[str, Processors] = {
    **{f"W{bits}A16": Processors(*_INTEGERS, kernels=(_HUMMING,)) for bits in (2, 3, 5, 6)},
    "W4A16": Processors(*_INTEGERS, kernels=_INT4),
    "W8A16": Processors(*_INTEGERS, kernels=_INT8_WEIGHTS),
    "W8A8": Processors("CompressedTensorsW8A8Int8MoEMethod", VOLTA, "int8", _INT8),
    "FP8_DYNAMIC": Processors(*_FP8, kernels=_FP8_DYNAMIC),
    "FP8_BLOCK": Processors(*_FP8, kernels=_FP8_BLOCK),
    "NVFP4": Processors(*_NVFP4, kernels=_NVFP4_KERNELS),
    "NVFP4A16": Processors(*_NVFP4, kernels=weights_alone((_MARLIN_UNROUNDED,))),
    "MXFP4": Processors(
        *_MXFP4,
        kernels=(
            cuda("CutlassExpertsMxfp4", BLACKWELL, _BEFORE_GEFORCE),
            _MARLIN_UNROUNDED,
            xpu("XPUExpertsMxFp4"),
        ),
    ),
    "MXFP4A16": Processors(
        *_MXFP4,
        kernels=(
            cuda("CutlassExpertsMxfp4", BLACKWELL, _BEFORE_GEFORCE, how=ROUNDED),
            _MARLIN,
            xpu("XPUExpertsMxFp4", how=ROUNDED),
        ),
    ),
    "MXFP8": Processors("CompressedTensorsW8A8Mxfp8MoEMethod", VOLTA, "mxfp8", _MXFP8_KERNELS),
    "W4AFP8": Processors(
        "CompressedTensorsW4A8Fp8MoEMethod",
        VOLTA,
        "w4a8",
        (cuda("CutlassExpertsW4A8Fp8", HOPPER, HOPPER), _HUMMING),
    ),
}
