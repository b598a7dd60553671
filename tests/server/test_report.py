"""Which kernels run, in words, and which of them are slower than no quantization at all."""

from dataclasses import replace

from lowbit_core.cpu_speeds import KernelSpeed
from lowbit_server.engine.interface import LayerKind
from lowbit_server.report import kernels_in_words, slower_than_bf16

QKV = LayerKind("QKVParallelLinear", "CompressedTensorsW8A8Int8", "Eight", 24)
ROWS = LayerKind("RowParallelLinear", "CompressedTensorsW8A8Int8", "Eight", 48)
FOUR = LayerKind("RowParallelLinear", "CompressedTensorsWNA16", "Four", 6)
PLAIN = LayerKind("QKVParallelLinear", "UnquantizedLinearMethod", None, 6)
EIGHT = KernelSpeed("W8A8", "Eight", "avx512_vnni", "a Xeon", "1B", 1.6, {1: 1.5, 16: 1.4})
SPEEDS = (EIGHT, replace(EIGHT, scheme="W4A16", kernel="Four", prompt=0.5, output={1: 0.8, 16: 0.6}))


def test_each_kernel_of_a_mixed_checkpoint_has_its_line_and_counts_its_layers() -> None:
    assert kernels_in_words([QKV, FOUR, PLAIN, ROWS]) == [
        "Eight computes 72 layers (QKVParallelLinear, RowParallelLinear; CompressedTensorsW8A8Int8)",
        "Four computes 6 layers (RowParallelLinear; CompressedTensorsWNA16)",
    ]


def test_what_is_slower_than_bf16_on_this_processor_is_said_with_what_is_not() -> None:
    (line,) = slower_than_bf16([QKV, FOUR], "avx512_vnni", SPEEDS)
    assert line.startswith("W4A16 by Four is slower than bf16 here under some loads: prompts at 0.50")
    assert line.endswith("; faster here: W8A8")
    assert slower_than_bf16([QKV, FOUR], "amx_int8", SPEEDS) == []
    assert slower_than_bf16([QKV, PLAIN], "avx512_vnni", SPEEDS) == []
