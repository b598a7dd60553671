"""OpenVINO GenAI: the graph that its own GGUF reader makes of the target `gguf`, kept as OpenVINO's files.

GenAI reads the GGUF file itself as well (`LLMPipeline("model.gguf", "CPU")`), and makes the graph anew at each start;
the directory that is written here starts without that, and has the configuration and the chat template beside it.
W4A16 lies in the graph as uint4 codes, zero points of 8 and float16 scales for each 32 inputs, W8A16 as 8 bits; they
are held against the checkpoint's. What is not quantized is float16. Source: openvino_genai 2026.4.1,
`enable_save_ov_model`.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lowbit_core.errors import CheckpointError
from lowbit_core.server_process import last_words
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.export.gguf.target import Gguf
from lowbit_quantize.export.gguf.tensors import rotated
from lowbit_quantize.run.companions import copy_companions
from lowbit_quantize.run.directory import check_disk
from lowbit_quantize.run.writer import write_json
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Quantized

READS = ("llama", "mistral", "qwen2", "qwen3")  # model types whose GGUF the reader knows
PACKAGES = ("openvino", "openvino_genai", "openvino_tokenizers")
GRAPH = "openvino_model.xml"
BLOCK = 32
COPIES = 2  # on the disk at once: GGUF and the graph
SYMMETRIC_BITS = {4: 8, 8: 128}  # what is subtracted from unsigned codes
CONVERT = (
    "import sys, openvino_genai; "
    "openvino_genai.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
)  # fmt: skip


class OpenVino:
    """The target `openvino`."""

    name = "openvino"
    readers = "OpenVINO GenAI and its model server"
    one_file = False

    def supports(self, checkpoint: Checkpoint) -> str | None:
        kind = checkpoint.config.get("model_type")
        if kind not in READS:
            return f"OpenVINO GenAI reads {', '.join(READS)} from GGUF, not {kind}"
        if checkpoint.stretches:
            kinds = ", ".join(sorted(checkpoint.stretches))
            return f"its reader of GGUF computes positions that are stretched ({kinds}) as if they were not"
        for name, scheme in checkpoint.schemes.items():
            if not isinstance(scheme, Integer) or not scheme.symmetric or scheme.bits not in SYMMETRIC_BITS:
                return (
                    f"its reader of GGUF takes symmetric integers of 4 or 8 bits, not {name} in {scheme.name}"
                )
        if reason := Gguf().supports(checkpoint):
            return reason
        if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
            return f"{missing[0]} is not installed: pip install 'lowbit[openvino]'"
        return None

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        check_disk(out, COPIES * checkpoint.manifest.size.bytes)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-gguf-") as temporary:
            work = Path(temporary)
            exported = Gguf().write(checkpoint, work / "model.gguf")
            _convert(work)
            for file in work.glob("openvino_*"):
                shutil.move(file, out / file.name)
        _check(checkpoint, out)
        plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        write_json(out / "config.json", plain)
        copy_companions(checkpoint.directory, checkpoint.other_files, out)
        total = (out / GRAPH).with_suffix(".bin").stat().st_size
        return Exported(total, exported.packed_bytes, exported.left_out)


def _convert(work: Path) -> None:
    """Let GenAI read the GGUF file, in a process of its own; raises CheckpointError with its last words."""
    log = work / "convert.log"
    with log.open("wb") as file:
        command = [sys.executable, "-c", CONVERT, str(work / "model.gguf")]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0 or not (work / GRAPH).exists():
        raise CheckpointError(
            f"OpenVINO GenAI could not read the GGUF file, status {status}: {last_words(log)}"
        )


def _check(checkpoint: Checkpoint, out: Path) -> None:
    """Each linear's codes and scales are one product's of the graph, and no other is quantized."""
    found = Counter(_products(out / GRAPH))
    for name in checkpoint.modules:
        keys = set(_keys(checkpoint, name))
        key = next((one for one in keys if found[one]), None)
        if key is None:
            raise CheckpointError(f"the graph that OpenVINO GenAI made does not have the codes of {name}")
        found[key] -= 1
    if left := sum(found.values()):
        raise CheckpointError(f"OpenVINO GenAI rounded {left} matrices that the checkpoint keeps as they are")


def _products(graph: Path) -> Iterator[str]:
    """A digest of each quantized matrix of a graph: codes, what is subtracted, scales."""
    import openvino  # only where something is exported to OpenVINO

    for node in openvino.Core().read_model(graph).get_ops():
        if node.get_type_name() != "Constant" or not _is_code(node):
            continue
        less = _next(_next(node))
        zero = less.input_value(1).get_node()
        zeros = zero.input_value(0).get_node() if zero.get_type_name() == "Convert" else zero
        scales = _next(less).input_value(1).get_node()
        codes = _unpacked(node)
        yield _digest(codes, np.unique(_unpacked(zeros)), scales.get_data(dtype=np.float32))


def _is_code(node: Any) -> bool:
    shape = node.get_output_shape(0)
    return node.get_element_type().get_type_name() in ("u4", "u8") and len(shape) == 3 and shape[-1] == BLOCK


def _next(node: Any) -> Any:
    """The node that reads a node's output."""
    return next(iter(node.output(0).get_target_inputs())).get_node()


def _unpacked(constant: Any) -> Any:
    """Numbers of a constant; two of 4 bits lie in a byte, the low half first."""
    data = np.asarray(constant.data).reshape(-1)
    if constant.get_element_type().get_type_name() != "u4":
        return data.astype(np.uint8)
    return np.stack([data & 15, data >> 4], -1).reshape(-1)[: int(np.prod(constant.get_output_shape(0)))]


def _keys(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    """A linear's digests: its rows as they are, and in the order of GGUF's rotary embedding."""
    linear = checkpoint.linear(name)
    yield _digest(*_parts(linear, 0))
    for leaf, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if name.endswith(leaf):
            yield _digest(
                *_parts(linear, int(checkpoint.config.get(key) or checkpoint.config["num_attention_heads"]))
            )


def _parts(linear: Quantized, heads: int) -> tuple[Any, Any, Any]:
    scheme = linear.scheme
    assert isinstance(scheme, Integer)
    codes, scale = linear.codes.int() - scheme.lowest, linear.params["scale"].float()
    repeats = codes.shape[1] // BLOCK // scale.shape[1]
    if heads:
        codes, scale = rotated(codes, heads), rotated(scale, heads)
    return (
        codes.numpy().astype(np.uint8),
        [SYMMETRIC_BITS[scheme.bits]],
        scale.repeat_interleave(repeats, 1).numpy(),
    )


def _digest(codes: Any, subtracted: Any, scales: Any) -> str:
    parts = (np.asarray(codes, np.uint8), np.asarray(subtracted, np.uint8), np.asarray(scales, np.float32))
    return sha256(b"".join(part.reshape(-1).tobytes() for part in parts)).hexdigest()
