"""bitsandbytes' NF4 and INT8 as transformers loads them, for training adapters: the base is quantized anew.

Neither holds our codes, so the linears that the checkpoint quantizes are read from its base again, and what was proven
of the checkpoint does not hold of the result, which has no manifest.

- `nf4`: blocks of 64 numbers along the rows, each with its absmax, float32; a number divided by it is the nearest of
  16 quantiles of a normal distribution (Dettmers et al., 2023, arXiv 2305.14314), two in a byte, the first in the high
  bits.
- `int8`: rows with their absmax, float32 (`SCB`), and w = absmax / 127 · code of the weight in float16 (Dettmers et
  al., 2022, arXiv 2208.07339).

Layout: bitsandbytes 0.50, `QuantState.as_dict` and `Int8Params`; held against both, and against transformers' loader,
by benchmarks/formats/bitsandbytes_layout.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_core.errors import CheckpointError
from lowbit_core.model_shape import shape_from_config
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.model.reference import ModelReference, fetch_weights, find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.run.companions import CARD, copy_companions
from lowbit_quantize.run.directory import check_disk
from lowbit_quantize.run.writer import CheckpointWriter

BLOCK = 64
SHARD_BYTES = 16 << 30  # of the base
SMALLEST = 1e-38  # that is divided by
HEAD = "lm_head"
LARGEST_CODE = 127
MATRIX = 2  # dimensions
QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
ANEW = "codes of the checkpoint (its base is quantized anew, and nothing is proven of that)"


class BitsAndBytes:
    """The target `bitsandbytes`; `base` says where the base is, if that is not the hub or it moved."""

    name = "bitsandbytes"
    readers = "transformers and PEFT with bitsandbytes"
    one_file = False

    def __init__(self, format: str = "nf4", base: str | None = None) -> None:
        self._format, self._base = format, base

    def supports(self, checkpoint: Checkpoint) -> str | None:
        record = checkpoint.manifest.base
        if not checkpoint.modules:
            return "it holds quantized linears only, and this checkpoint has none"
        if checkpoint.manifest.experts is not None:
            return "transformers opens no stacked experts in it"
        if record.kind == "gguf" or record.dequantized:
            return f"it is made of the base's own numbers, and {record.name} is quantized itself"
        if self._base is None and record.kind != "hub":
            return f"it is made of the base, {record.name}, which is not on the hub; give --base MODEL, where it is"
        return None

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        check_disk(out, checkpoint.manifest.size.bytes)
        reference = self._find(checkpoint)
        weights = WeightFiles(reference.path)
        if lacking := [name for name in checkpoint.modules if f"{name}.weight" not in weights]:
            raise CheckpointError(
                f"the base {reference.path} has no tensor {lacking[0]}.weight, so it is not written"
            )
        left_alone = _left_alone(checkpoint, weights)
        shards, packed = list(_shards(weights)), 0
        writer = CheckpointWriter(out, len(shards))
        for names in shards:
            shard = writer.begin_shard(5 * len(names))
            for name in names:
                module = name.removesuffix(".weight")
                if module in checkpoint.modules and module != name:
                    parts = PACK[self._format](weights.read(name))
                    packed += sum(part.nbytes for part in parts.values())
                    shard.add({f"{module}.{part}": tensor for part, tensor in parts.items()})
                else:
                    shard.add({name: weights.read(name)})
            shard.close()
        config = reference.written_config or checkpoint.config
        dtype = shape_from_config(config).dtype or "bfloat16"
        writer.finish({**config, "quantization_config": quantization_of(self._format, left_alone, dtype)})
        beside = [name for name in checkpoint.other_files if name != CARD]  # which tells of the checkpoint
        copy_companions(checkpoint.directory, beside, out)
        return Exported(writer.tensor_bytes, packed, [ANEW], with_manifest=False)

    def _find(self, checkpoint: Checkpoint) -> ModelReference:
        """The base, which must be the one that the checkpoint was made of."""
        record = checkpoint.manifest.base
        reference = find_model(self._base or "@".join(filter(None, (record.name, record.revision))))
        fetch_weights(reference)
        if reference.kind == "gguf" or reference.sha256 != record.sha256:
            raise CheckpointError(
                f"{self._base or record.name} is not the base that the checkpoint was made of (its files have other "
                "hashes); give --base MODEL, where that is"
            )
        return reference


def nf4(weight: Tensor) -> dict[str, Tensor]:
    """A linear's tensors in NF4; `quant_state` is JSON in bytes."""
    table = torch.tensor(QUANTILES, dtype=torch.float32)
    numbers = weight.numel()
    blocks = pad(weight.float().flatten(), (0, -numbers % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(1)).flatten()
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    codes = codes[: numbers + numbers % 2]
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    return {
        "weight": (codes[::2] << 4 | codes[1::2]).unsqueeze(1),  # (numbers / 2, 1)
        "weight.absmax": absmax,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def int8(weight: Tensor) -> dict[str, Tensor]:
    """A linear's tensors in INT8; format 0 means rows as they are."""
    half = weight.to(torch.float16)
    absmax = half.abs().amax(dim=1).float()
    codes = torch.round(half * (LARGEST_CODE / absmax.clamp(min=SMALLEST)).unsqueeze(1)).to(torch.int8)
    return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


PACK = {"nf4": nf4, "int8": int8}


def quantization_of(kind: str, skipped: list[str], dtype: str) -> dict[str, Any]:
    """`quantization_config`, as transformers' BitsAndBytesConfig writes it."""
    four = kind == "nf4"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_type": "nf4" if four else "fp4",
        "bnb_4bit_compute_dtype": dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
    }


def _left_alone(checkpoint: Checkpoint, weights: WeightFiles) -> list[str]:
    """Modules with a matrix that stays, all by name: transformers quantizes each linear that it is not told of.

    It takes a name for a pattern that others may begin or end with; raises CheckpointError where that matters.
    """
    matrices = {name.removesuffix(".weight") for name in weights if len(weights.shape(name)) == MATRIX}
    names = sorted({HEAD, *checkpoint.manifest.unquantized, *matrices} - set(checkpoint.modules))
    for name in names:
        for module in checkpoint.modules:
            if re.match(name, module) or module.endswith(name):
                raise CheckpointError(
                    f"transformers would leave {module} alone because {name} is; it is not written"
                )
    return names


def _shards(weights: WeightFiles) -> Iterator[list[str]]:
    """Names of tensors, so many together as make a file of a handy size."""
    names: list[str] = []
    total = 0
    for name in weights:
        if names and total + weights.bytes(name) > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += weights.bytes(name)
    yield names
