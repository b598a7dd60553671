"""Which processors run linears of each scheme: vLLM's classes for it, and the machines that each of them takes.

One row a scheme, read in vLLM 0.32's source; tests/contract/test_vllm_processors.py holds every row against the one
that is installed. The order of kernels is vLLM's, which takes the first that fits. Sources, below
`vllm/model_executor`: the class of a scheme from `_get_scheme_from_parts` of
`layers/quantization/compressed_tensors/compressed_tensors.py`, its least compute capability from its own
`get_min_capability`; the kernels from the tables of `kernels/linear/__init__.py`; what a kernel takes from its
`get_min_capability`, `is_supported` and `can_implement`. That CUTLASS has no int8 for Blackwell is said by its C++
source (`csrc/libtorch_stable/quantization/w8a8/cutlass`), not by Python.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Platform = Literal["cuda", "rocm", "xpu", "cpu"]
UNROUNDED, BY_TOKEN, ROUNDED = (
    "with inputs as they are",
    "with inputs rounded by token",
    "with inputs rounded",
)
EMULATED = "emulated"
TURING, AMPERE, ADA, HOPPER, BLACKWELL, BLACKWELL_ULTRA, GEFORCE_BLACKWELL = 75, 80, 89, 90, 100, 109, 120
GENERATIONS = {
    70: "Volta", TURING: "Turing", AMPERE: "Ampere", ADA: "Ada", HOPPER: "Hopper", BLACKWELL: "Blackwell",
    GEFORCE_BLACKWELL: "Blackwell of workstations",
}  # fmt: skip
HUMMING = "humming-kernels"


@dataclass(frozen=True)
class LinearKernel:
    """A class of vLLM that computes linears on a platform.

    Of NVIDIA's GPUs it takes those whose compute capability, times ten, lies from `lowest` to `highest`. `needs` is
    what must be there beside vLLM, or which of a platform's processors it takes. `how` says what it does otherwise
    than the scheme: it rounds no inputs, or in another way, or unpacks the weights each time.
    """

    name: str
    platform: Platform
    lowest: int = 0
    highest: int | None = None
    needs: str = ""
    how: str = ""


@dataclass(frozen=True)
class Processors:
    """A row: vLLM's class for a scheme, the least compute capability (times ten) that it asks for, and its kernels.

    `table` is vLLM's name of the list that the kernels stand in. `older_class` is the one for GPUs below `lowest`, down
    to `older_lowest`: it leaves inputs as they are.
    """

    scheme_class: str
    lowest: int
    table: str
    kernels: tuple[LinearKernel, ...]
    older_class: str = ""
    older_lowest: int | None = None

    def on(self, platform: Platform) -> tuple[LinearKernel, ...]:
        """The kernels of a platform, in vLLM's order."""
        return tuple(kernel for kernel in self.kernels if kernel.platform == platform)

    @property
    def cpu_kernels(self) -> Sequence[str]:
        """Names of the classes that compute on CPUs."""
        return tuple(kernel.name for kernel in self.on("cpu"))

    @property
    def cpus(self) -> str:
        """Which CPUs, for a person."""
        return _whose("CPUs", self.on("cpu")) or "no CPU"

    @property
    def gpus(self) -> str:
        """Which GPUs, for a person."""
        makers = (self._nvidia(), _whose("AMD's", self.on("rocm")), _whose("Intel's", self.on("xpu")))
        return "; ".join(filter(None, makers)) or "none"

    def _nvidia(self) -> str:
        """Ranges of generations, each of which reaches below those before it."""
        ranges: dict[str, int] = {}
        for how in (ROUNDED, "", UNROUNDED, EMULATED):
            kernels = [kernel for kernel in self.on("cuda") if kernel.how == how]
            for some in ([kernel for kernel in kernels if not kernel.needs], kernels):
                lowest = min((self._lowest(kernel) for kernel in some), default=None)
                if lowest is not None and all(lowest < other for other in ranges.values()):
                    needed = "" if any(not kernel.needs for kernel in some) else f"with {_needs(some)}"
                    ranges[" ".join(filter(None, (_range(lowest, some), needed, how)))] = lowest
        return f"NVIDIA's {', '.join(ranges)}" if ranges else ""

    def _lowest(self, kernel: LinearKernel) -> int:
        older = self.older_lowest if kernel.how == UNROUNDED else None
        return max(kernel.lowest, self.lowest if older is None else older)


def _range(lowest: int, kernels: Iterable[LinearKernel]) -> str:
    start = f"{lowest / 10:.1f} ({GENERATIONS[lowest]})"
    highest = [kernel.highest for kernel in kernels]
    if None in highest:
        return f"from {start} on"
    last = max(one for one in GENERATIONS if one <= max(filter(None, highest)))
    return f"{start} alone" if last == lowest else f"from {start} to {last / 10:.1f} ({GENERATIONS[last]})"


def _whose(maker: str, kernels: Sequence[LinearKernel]) -> str:
    """A platform's processors: by the first kernel that takes all of them, or else with what its kernels need.

    Where that kernel is an emulation, those before it come first.
    """
    of_all = next((kernel for kernel in kernels if not kernel.needs), None)
    before = kernels[: kernels.index(of_all)] if of_all else kernels
    if of_all and (of_all.how != EMULATED or not before):
        return " ".join(filter(None, (maker, of_all.how)))
    taken = [kernel for kernel in before if not kernel.how] or before
    if not taken:
        return ""
    words = " ".join(filter(None, (maker, f"with {_needs(taken)}", taken[-1].how)))
    return f"{words}, others {of_all.how}" if of_all else words


def _needs(kernels: Iterable[LinearKernel]) -> str:
    return " or ".join(dict.fromkeys(kernel.needs for kernel in kernels if kernel.needs))


def _cuda(
    name: str, lowest: int = 0, highest: int | None = None, needs: str = "", how: str = ""
) -> LinearKernel:
    return LinearKernel(name, "cuda", lowest, highest, needs, how)


def _rocm(name: str, needs: str = "", how: str = "") -> LinearKernel:
    return LinearKernel(name, "rocm", needs=needs, how=how)


def _xpu(name: str, needs: str = "", how: str = "") -> LinearKernel:
    return LinearKernel(name, "xpu", needs=needs, how=how)


def _cpu(name: str, needs: str = "", how: str = "") -> LinearKernel:
    return LinearKernel(name, "cpu", needs=needs, how=how)


# `supports_per_head_quant_scales` of `vllm/v1/attention/backends`, and what the CPU's attention reads.
SCALES_OF_HEADS = "NVIDIA's from 9.0 (Hopper) on, with FlashAttention 3 or later; no CPU"
ZENTORCH, AMX = "AMD's Zen and zentorch", "AMX"
_WNA16 = ("CompressedTensorsWNA16", TURING, "_POSSIBLE_KERNELS")
_HUMMING = _cuda("HummingLinearKernel", TURING, needs=HUMMING)
_CONCH = "conch-triton-kernels"
_FOUR_BITS = (
    _cuda("MacheteLinearKernel", HOPPER, HOPPER),
    _cuda("MarlinLinearKernel", TURING),
    _cuda("ConchLinearKernel", AMPERE, needs=_CONCH),
    _cuda("ExllamaLinearKernel", 60, needs="float16"),
    _cuda("TritonW4A16LinearKernel"),
    _HUMMING,
    _rocm("RDNA3W4A16LinearKernel", "gfx1100"),
    _rocm("RDNAHybridW4A16LinearKernel", "gfx11 and gfx12"),
    _rocm("TritonW4A16LinearKernel"),
    _rocm("ConchLinearKernel", _CONCH),
    _rocm("ExllamaLinearKernel", "float16"),
    _xpu("XPUwNa16LinearKernel"),
    _cpu("ZentorchWNA16LinearKernel", ZENTORCH),
    _cpu("CPUWNA16LinearKernel"),
)
_WITHOUT_ZEROS = ("RDNA3W4A16LinearKernel", "ExllamaLinearKernel")
_EIGHT_BITS = (
    _cuda("MacheteLinearKernel", HOPPER, HOPPER),
    _cuda("MarlinLinearKernel", TURING),
    _cuda("ConchLinearKernel", AMPERE, needs=_CONCH),
    _cuda("ExllamaLinearKernel", 60, needs="float16"),
    _HUMMING,
    _rocm("ConchLinearKernel", _CONCH),
    _rocm("ExllamaLinearKernel", "float16"),
)
_TORCH_FP8 = "ChannelWiseTorchFP8ScaledMMLinearKernel"
_FP8_DYNAMIC = (
    _cuda("CutlassFP8ScaledMMLinearKernel", ADA),
    _cuda(_TORCH_FP8, ADA),
    _cuda("MarlinFP8ScaledMMLinearKernel", TURING, how=UNROUNDED),
    _cuda("HummingFP8ScaledMMLinearKernel", TURING, needs=HUMMING),
    _rocm("RowWiseTorchFP8ScaledMMLinearKernel", "CDNA3 (MI300) or later"),
    _rocm(_TORCH_FP8, "CDNA3 (MI300) or later"),
    _xpu("XPUW8A16FP8LinearKernel", how=UNROUNDED),
    _xpu("XPUW8A8FP8LinearKernel"),
    _cpu(_TORCH_FP8),
)
_FP8_STATIC = (
    _cuda("FlashInferFP8ScaledMMLinearKernel", BLACKWELL, needs="flashinfer"),
    _cuda("CutlassFP8ScaledMMLinearKernel", ADA),
    _cuda("PerTensorTorchFP8ScaledMMLinearKernel", ADA),
    _cuda("MarlinFP8ScaledMMLinearKernel", TURING, how=UNROUNDED),
    _cuda("HummingFP8ScaledMMLinearKernel", TURING, needs=HUMMING),
    _rocm("PerTensorTorchFP8ScaledMMLinearKernel", "CDNA3 (MI300) or later"),
    _xpu("XPUW8A16FP8LinearKernel", how=UNROUNDED),
    _xpu("XPUW8A8FP8LinearKernel"),
)
_FP8_BLOCK = (
    _cuda("FlashInferFp8DeepGEMMDynamicBlockScaledKernel", HOPPER, HOPPER, "flashinfer and deep_gemm"),
    _cuda("DeepGemmFp8BlockScaledMMKernel", HOPPER, needs="deep_gemm"),
    _cuda("CutlassFp8BlockScaledMMKernel", HOPPER),
    _cuda("B12xFp8BlockScaledMMKernel", GEFORCE_BLACKWELL, needs="b12x"),
    _cuda("MarlinFP8ScaledMMLinearKernel", TURING, how=UNROUNDED),
    _cuda("HummingFP8ScaledMMLinearKernel", TURING, needs=HUMMING),
    _cuda("TritonFp8BlockScaledMMKernel", ADA),
    _cuda("BlockWiseTorchFP8ScaledMMLinearKernel", HOPPER, HOPPER),
    _rocm("AiterFp8BlockScaledMMKernel", "aiter"),
    _rocm("TritonFp8BlockScaledMMKernel", "CDNA3 (MI300) or later"),
    _xpu("XPUFp8BlockScaledMMKernel"),
    _xpu("TritonFp8BlockScaledMMKernel"),
    _xpu("BlockWiseTorchFP8ScaledMMLinearKernel"),
    _cpu("CPUFp8W8A8BlockScaledMMKernel", "AMX-FP8", BY_TOKEN),
    _cpu("CPUFp8BlockScaledMMKernel", AMX, UNROUNDED),
)
_INT8 = (
    _cuda("CutlassInt8ScaledMMLinearKernel", TURING, HOPPER),
    _cuda("HummingInt8ScaledMMLinearKernel", TURING, needs=HUMMING),
    _rocm("AiterInt8ScaledMMLinearKernel", "aiter"),
    _rocm("TritonInt8ScaledMMLinearKernel"),
    _xpu("TritonInt8ScaledMMLinearKernel"),
    _cpu("ZentorchInt8ScaledMMLinearKernel", ZENTORCH),
    _cpu("CPUInt8ScaledMMLinearKernel"),
)
_NVFP4 = ("CompressedTensorsW4A4Fp4", TURING, "_POSSIBLE_NVFP4_KERNELS")
_NVFP4_W4A4 = (
    _cuda("FlashInferCuteDslNvFp4LinearKernel", BLACKWELL, BLACKWELL_ULTRA, "flashinfer"),
    _cuda("FlashInferCutlassNvFp4LinearKernel", BLACKWELL, needs="flashinfer"),
    _cuda("FlashInferB12xNvFp4LinearKernel", GEFORCE_BLACKWELL, needs="flashinfer"),
    _cuda("CutlassNvFp4LinearKernel", BLACKWELL),
    _cuda("TorchNvFp4LinearKernel", BLACKWELL, BLACKWELL_ULTRA),
)
_NVFP4_W4A16 = (
    _cuda("FlashInferCuteDslNvFp4W4A16LinearKernel", BLACKWELL, needs="flashinfer", how=UNROUNDED),
    _cuda("MarlinNvFp4LinearKernel", TURING, how=UNROUNDED),
    _cuda("HummingNvFp4LinearKernel", TURING, needs=HUMMING, how=UNROUNDED),
)
_NVFP4_EMULATED = (
    _cuda("EmulationNvFp4LinearKernel", TURING, how=EMULATED),
    _rocm("EmulationNvFp4LinearKernel", how=EMULATED),
)
_MXFP4 = ("CompressedTensorsW4A4Mxfp4", AMPERE, "_POSSIBLE_MXFP4_KERNELS")
_MXFP4_W4A4 = (
    _cuda("FlashInferMxFp4LinearKernel", BLACKWELL, needs="flashinfer"),
    _cuda("B12xMxFp4LinearKernel", GEFORCE_BLACKWELL, needs="b12x"),
    _rocm("AiterMxfp4LinearKernel", "CDNA4 (MI350) and aiter"),
    _xpu("XPUMxFp4LinearKernel"),
)
_MXFP4_W4A16 = (
    _cuda("MarlinMxFp4LinearKernel", TURING, how=UNROUNDED),
    _cuda("HummingMxFp4LinearKernel", TURING, needs=HUMMING, how=UNROUNDED),
)
_MXFP4_EMULATED = (
    _cuda("EmulationMxfp4LinearKernel", how=EMULATED),
    _rocm("EmulationMxfp4LinearKernel", how=EMULATED),
)
_MXFP8 = ("CompressedTensorsW8A8Mxfp8", TURING, "_POSSIBLE_MXFP8_KERNELS")
_MXFP8_KERNELS = (
    _cuda("FlashInferCutedslMxfp8LinearKernel", BLACKWELL, BLACKWELL_ULTRA, "flashinfer"),
    _cuda("FlashInferCutlassMxfp8LinearKernel", BLACKWELL, needs="flashinfer"),
    _cuda("MarlinMxfp8LinearKernel", TURING, how=UNROUNDED),
    _cuda("B12xMxfp8LinearKernel", GEFORCE_BLACKWELL, needs="b12x"),
    _cuda("HummingMxfp8LinearKernel", TURING, needs=HUMMING, how=UNROUNDED),
    _rocm("RocmDotScaledMxfp8LinearKernel", "CDNA4 (MI350)"),
    _xpu("XPUMxFp8LinearKernel"),
    _cuda("EmulationMxfp8LinearKernel", TURING, how=EMULATED),
    _rocm("EmulationMxfp8LinearKernel", how=EMULATED),
    _xpu("EmulationMxfp8LinearKernel", how=EMULATED),
)


_INT4_ROUNDED = (
    tuple(  # only Humming's rounds the inputs of 4-bit weights; it stands before Marlin's on Hopper alone
        replace(kernel, lowest=HOPPER, highest=HOPPER)
        if kernel is _HUMMING
        else replace(kernel, how=UNROUNDED)
        for kernel in _FOUR_BITS
    )
)


def _weights_alone(kernels: Iterable[LinearKernel]) -> tuple[LinearKernel, ...]:
    """For a scheme of weights alone: inputs as they are is then what it says."""
    return tuple(replace(kernel, how="") for kernel in kernels)


_MXFP4_ALONE = (  # vLLM has one class for both, and takes the kernels that round first
    *(replace(kernel, how=ROUNDED) for kernel in _MXFP4_W4A4),
    *_weights_alone(_MXFP4_W4A16),
    *_MXFP4_EMULATED,
)


def _fp8(table: str, kernels: tuple[LinearKernel, ...]) -> Processors:
    return Processors("CompressedTensorsW8A8Fp8", ADA, table, kernels, "CompressedTensorsW8A16Fp8", TURING)


_CUTLASS_W4A8 = _cuda("CutlassW4A8LinearKernel", HOPPER, HOPPER)

PROCESSORS: dict[str, Processors] = {
    **{f"W{bits}A16": Processors(*_WNA16, kernels=(_HUMMING,)) for bits in (2, 3, 5, 6)},
    "W4A16": Processors(*_WNA16, kernels=_FOUR_BITS),
    "W4A16_ASYM": Processors(*_WNA16, kernels=tuple(k for k in _FOUR_BITS if k.name not in _WITHOUT_ZEROS)),
    "W8A16": Processors(*_WNA16, kernels=_EIGHT_BITS),
    "W8A8": Processors("CompressedTensorsW8A8Int8", TURING, "_POSSIBLE_INT8_KERNELS", _INT8),
    "FP8": _fp8("_POSSIBLE_FP8_KERNELS", _FP8_STATIC),
    "FP8_DYNAMIC": _fp8("_POSSIBLE_FP8_KERNELS", _FP8_DYNAMIC),
    "FP8_BLOCK": _fp8("_POSSIBLE_FP8_BLOCK_KERNELS", _FP8_BLOCK),
    "NVFP4": Processors(*_NVFP4, kernels=(*_NVFP4_W4A4, *_NVFP4_W4A16, *_NVFP4_EMULATED)),
    "NVFP4A16": Processors(*_NVFP4, kernels=_weights_alone(_NVFP4_W4A16)),
    "MXFP4": Processors(*_MXFP4, kernels=(*_MXFP4_W4A4, *_MXFP4_W4A16, *_MXFP4_EMULATED)),
    "MXFP4A16": Processors(*_MXFP4, kernels=_MXFP4_ALONE),
    "MXFP8": Processors(*_MXFP8, kernels=_MXFP8_KERNELS),
    "W4AFP8": Processors("CompressedTensorsW4A8Fp8", HOPPER, "_POSSIBLE_KERNELS", (_CUTLASS_W4A8,)),
    "W4A8": Processors("CompressedTensorsWNA8Int", TURING, "_POSSIBLE_KERNELS", _INT4_ROUNDED),
}
