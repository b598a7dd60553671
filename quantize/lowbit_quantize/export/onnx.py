"""ONNX Runtime GenAI: the graph by its own builder, the codes ours.

The builder keeps the codes of AutoGPTQ's format, so such a checkpoint is made in passing, with what that format itself
has no readers for: zero points, and a width and group size for each linear (`dynamic`). The head and the embedding stay
as they are, in float32: by itself the builder rounds the head to 4 bits. Every linear is a MatMulNBits, whose codes,
scales and zero points are held against the checkpoint's before the directory has its name.

`activations` is what MatMulNBits does with its inputs: float32 computes with the numbers that were proven, int8 rounds
each block of inputs to 8 bits (`accuracy_level` 4), which is faster and not what was proven.
Source: onnxruntime-genai 0.18, `models/loaders/gptq.py`; ONNX Runtime's ContribOperators, `com.microsoft.MatMulNBits`.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lowbit_core.errors import CheckpointError
from lowbit_core.server_process import last_words
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.export.older_format import HEAD, repack
from lowbit_quantize.export.packing import pack_last
from lowbit_quantize.run.companions import copy_companions
from lowbit_quantize.run.directory import check_disk
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Quantized

Activations = Literal["float32", "int8"]
ACCURACY_LEVELS: dict[Activations, int] = {"float32": 1, "int8": 4}
BLOCKS = (16, 32, 64, 128, 256)
BITS = (4, 8)
FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")  # whose graphs tests have held against the numbers
STRETCHES = {"llama3"}  # of positions, that the builder's graph was seen to compute right
PACKAGES = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir")
MODEL = "model.onnx"
LEFT_ALONE = ("/lm_head/MatMul", "/model/embed_tokens/Gather")  # what the builder rounds to 4 bits by itself
EMBEDDING, HEAD_WEIGHT = "model.embed_tokens.weight", "lm_head.MatMul.weight"
ENDS = {EMBEDDING: EMBEDDING, HEAD_WEIGHT: "lm_head.weight"}  # in the graph, and in the checkpoint
ROWS = 4096  # that are compared at once
NODE = re.compile(r"layers\.(\d+)/\w+/(\w+)/MatMulNBits$")
LINEAR = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
GROUP_OF = {leaf: fused for fused, leaves in FUSED.items() for leaf in leaves}
DISK_FACTOR = 3  # the checkpoint in AutoGPTQ's format, the graph's data, and room for float32's embedding


class Onnx:
    """The target `onnx`."""

    name = "onnx"
    readers = "ONNX Runtime GenAI"
    one_file = False

    def __init__(self, activations: Activations = "float32") -> None:
        self._activations = activations

    def supports(self, checkpoint: Checkpoint) -> str | None:
        kind = checkpoint.config.get("model_type")
        if kind not in FAMILIES:
            known = ", ".join(FAMILIES)
            return (
                f"the builder's graph was held against the checkpoint's own numbers for {known}, not {kind}"
            )
        if HEAD in checkpoint.modules:
            return f"the head stays as it is there, and this checkpoint quantizes {HEAD}"
        if left := checkpoint.manifest.unquantized:
            return f"the builder reads quantized linears only, and {left[0]} is none"
        for name, scheme in checkpoint.schemes.items():
            if not isinstance(scheme, Integer) or scheme.bits not in BITS or scheme.group_size not in BLOCKS:
                sizes = ", ".join(map(str, BLOCKS))
                return f"MatMulNBits holds integers of 4 or 8 bits in groups of {sizes}, not {name} in {scheme.name}"
            if LINEAR.search(name) is None:
                return f"the builder knows no linear {name}"
        if window := _window(checkpoint.config):
            return f"layers see a window of {window} tokens, and the builder's graph fails on a prompt that is longer"
        if wrong := checkpoint.stretches - STRETCHES:
            return f"the builder was not seen to compute positions right that are stretched as {min(wrong)!r}"
        if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
            return f"{missing[0]} is not installed: pip install 'lowbit[onnx]'"
        return None

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        check_disk(out, DISK_FACTOR * checkpoint.manifest.size.bytes)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-gptq-") as temporary:
            left_out = repack(checkpoint, Path(temporary), _gptq, _quantization(checkpoint)).left_out
            _build(Path(temporary), out, ACCURACY_LEVELS[self._activations])
        packed = _check(checkpoint, out)
        _copy_missing(checkpoint, out)
        total = sum(file.stat().st_size for file in out.glob(f"{MODEL}*"))
        return Exported(total, packed, left_out)


def _window(config: Mapping[str, Any]) -> int | None:
    """How many tokens a layer sees, where that is fewer than the model takes."""
    window = int(config.get("sliding_window") or 0)
    shorter = 0 < window < config.get("max_position_embeddings", 0)
    return window if shorter and config.get("use_sliding_window", True) else None


def _gptq(quantized: Quantized) -> dict[str, Tensor]:
    """AutoGPTQ's tensors; a zero point is stored as one less, modulo its width."""
    scheme, inputs = quantized.scheme, quantized.codes.shape[1]
    assert isinstance(scheme, Integer)
    codes, zeros = _unsigned(quantized)
    return {
        "qweight": pack_last(codes, scheme.bits).T.contiguous(),
        "qzeros": pack_last((zeros.T - 1) % (1 << scheme.bits), scheme.bits),
        "scales": quantized.params["scale"].T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // scheme.width(inputs),  # (in,)
    }


def _unsigned(quantized: Quantized) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and zero points (out, groups) from 0 on."""
    scheme = quantized.scheme
    assert isinstance(scheme, Integer)
    return quantized.codes.int() - scheme.lowest, quantized.params["zero"].int() - scheme.lowest


def _quantization(checkpoint: Checkpoint) -> dict[str, Any]:
    """AutoGPTQ's configuration; linears of another width or group size than the first are named one by one."""
    kinds = {name: {"bits": s.bits, "group_size": s.group_size} for name, s in _integers(checkpoint)}
    first = next(iter(kinds.values()))
    others = {f"+:{re.escape(name)}\\.": kind for name, kind in kinds.items() if kind != first}
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq", **first, "sym": True, "desc_act": False, "dynamic": others,
    }  # fmt: skip


def _integers(checkpoint: Checkpoint) -> Iterator[tuple[str, Integer]]:
    for name, scheme in checkpoint.schemes.items():
        assert isinstance(scheme, Integer)
        yield name, scheme


def _build(checkpoint: Path, out: Path, accuracy_level: int) -> None:
    """Run the builder, in a process of its own; raises CheckpointError with its last words."""
    log = checkpoint / "builder.log"
    options = [
        f"accuracy_level={accuracy_level}",
        f"nodes_to_exclude={','.join(LEFT_ALONE)}",
        "hf_token=false",
    ]
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out), "-p", "int4",
        "-e", "cpu", "-c", str(checkpoint / "cache"), "--extra_options", *options,
    ]  # fmt: skip
    with log.open("wb") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0 or not (out / MODEL).exists():
        raise CheckpointError(
            f"the builder of ONNX Runtime GenAI ended with status {status}: {last_words(log)}"
        )


def _copy_missing(checkpoint: Checkpoint, out: Path) -> None:
    """What the builder has no file for, such as generation_config.json."""
    there = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    copy_companions(checkpoint.directory, [name for name in checkpoint.other_files if name not in there], out)


def _check(checkpoint: Checkpoint, out: Path) -> int:
    """Hold the graph against the checkpoint; returns the bytes of all MatMulNBits. Raises CheckpointError."""
    import onnx_ir  # only where something is exported to ONNX

    graph = onnx_ir.load(out / MODEL).graph
    _check_ends(checkpoint, graph)
    nodes, linears = _matmuls(graph), _linears(checkpoint)
    for layer, group in sorted({(layer, GROUP_OF.get(leaf, leaf)) for layer, leaf in (*nodes, *linears)}):
        places = [(layer, leaf) for leaf in (group, *FUSED.get(group, ()))]
        theirs = [nodes[place] for place in places if place in nodes]
        ours = [_matmul(checkpoint.linear(linears[place])) for place in places if place in linears]
        if not _equal(theirs, ours):
            raise CheckpointError(
                f"the builder's {group} of layer {layer} has other codes than the checkpoint"
            )
    return sum(part.nbytes for parts in nodes.values() for part in parts)


def _linears(checkpoint: Checkpoint) -> dict[tuple[str, str], str]:
    """Names by layer and last part."""
    found = {}
    for name in checkpoint.modules:
        place = LINEAR.search(name)
        assert place is not None
        found[place[1], place[2]] = name
    return found


def _check_ends(checkpoint: Checkpoint, graph: Any) -> None:
    """The embedding and the head, where the graph has one of its own, or only the head's weight for both."""
    stored = graph.initializers
    for name, source in ENDS.items():
        weight = source if source in checkpoint.tensors else EMBEDDING
        if name not in stored and name != HEAD_WEIGHT:
            continue  # tied: the head's is looked up
        found = stored[name].const_value.numpy() if name in stored else None
        if found is None or not _same_rows(checkpoint, weight, found.T if name == HEAD_WEIGHT else found):
            raise CheckpointError(f"the builder's {name} is not the checkpoint's {weight} in float32")


def _same_rows(checkpoint: Checkpoint, name: str, found: Any) -> bool:
    if found.shape != checkpoint.shape(name):
        return False
    blocks = range(0, len(found), ROWS)
    return all(
        np.array_equal(
            checkpoint.rows(name, start, start + ROWS).float().numpy(), found[start : start + ROWS]
        )
        for start in blocks
    )


def _matmuls(graph: Any) -> dict[tuple[str, str], list[Any]]:
    """Codes, scales and zero points of each MatMulNBits, by layer and the last part of its name."""
    found = {}
    for node in graph:
        if node.op_type == "MatMulNBits" and (place := NODE.search(node.name or "")):
            parts = [
                one.const_value.numpy() for one in node.inputs[1:4] if one is not None and one.const_value
            ]
            found[place[1], place[2]] = parts
    return found


def _equal(theirs: Sequence[Sequence[Any]], ours: Sequence[Sequence[Any]]) -> bool:
    """Whether two lists of (codes, scales, zero points) are the same rows, however they are cut into matrices."""
    return bool(theirs and ours) and all(
        np.array_equal(
            *(np.concatenate([np.asarray(one[place]).reshape(-1) for one in side]) for side in (theirs, ours))
        )
        for place in range(3)
    )


def _matmul(linear: Quantized) -> tuple[Any, Any, Any]:
    """What MatMulNBits holds of a linear: lowest bits first, each row of zero points filled up to bytes."""
    scheme = linear.scheme
    assert isinstance(scheme, Integer)
    codes, zeros = (part.to(torch.uint8) for part in _unsigned(linear))
    if scheme.bits == BITS[0]:
        zeros = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))
        codes, zeros = (part[:, ::2] | part[:, 1::2] << 4 for part in (codes, zeros))
    return codes.numpy(), linear.params["scale"].float().numpy(), zeros.numpy()
