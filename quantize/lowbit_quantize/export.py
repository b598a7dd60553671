"""Write a checkpoint that stock vLLM opens with no flag: one shard per layer, and the default format's packing.

That format is compressed-tensors' `pack-quantized`; packing and configuration classes are its package's. The
others are in `formats.py`. A tensor that is not finite is refused here, whatever made it.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import NumericsError
from lowbit_quantize.compress import CompressedLinear
from lowbit_quantize.durable import write_tensors
from lowbit_quantize.grid import SCALE_DTYPE, Rounded
from lowbit_quantize.journal import ShardRecord, recorded
from lowbit_quantize.kv_scales import KVScales
from lowbit_quantize.memory import without_compiler
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.source import INDEX_NAME, is_finite

with without_compiler():  # the library compiles a function for 4-bit floats, which is not called here
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class CheckpointWriter:
    """Writes shards as the walk produces them and the index and configuration at the end."""

    def __init__(self, directory: Path, shards: int, scratch: Path | None = None) -> None:
        """`scratch` is where files are until they are whole, on the disk of `directory`."""
        self.directory, self._shards, self._scratch = directory, shards, scratch or directory
        self._written: list[ShardRecord] = []

    def write_shard(self, tensors: Mapping[str, Tensor]) -> ShardRecord | None:
        """Write one shard; raises NumericsError on a tensor that is not finite."""
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise NumericsError(f"the tensor {name} is not finite; it is not written")
        file = f"model-{len(self._written) + 1:05d}-of-{self._shards:05d}.safetensors"
        write_tensors(self.directory / file, tensors, self._scratch)
        record = ShardRecord(
            file=file,
            written=recorded(self.directory / file),
            tensors=list(tensors),
            tensor_bytes=_bytes(tensors),
        )
        self._written.append(record)
        return record

    def adopt(self, shards: Iterable[ShardRecord]) -> None:
        """Go on after shards that an earlier process wrote."""
        self._written += shards

    def finish(self, base: Path, config: Mapping[str, Any], tool_file: str | None = None) -> None:
        """Write the index, config.json, and the base model's tokenizer and generation files.

        `tool_file` gets a copy of the quantization configuration.
        """
        file_of = {name: shard.file for shard in self._written for name in shard.tensors}
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(file_of.items()))}
        _write_json(self.directory / INDEX_NAME, index)
        _write_json(self.directory / "config.json", config)
        if tool_file:
            _write_json(self.directory / tool_file, config["quantization_config"])
        for name in TOKENIZER_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, self.directory / name)

    @property
    def tensor_bytes(self) -> int:
        return sum(shard.tensor_bytes for shard in self._written)


class NothingWritten(CheckpointWriter):
    """The writer of a trial: it weighs what it is given, and no file is made."""

    def __init__(self) -> None:
        super().__init__(Path(), 0)
        self._bytes = 0

    @property
    def tensor_bytes(self) -> int:
        return self._bytes

    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        self._bytes += _bytes(tensors)

    def finish(self, base: Path, config: Mapping[str, Any], tool_file: str | None = None) -> None:
        pass


def layer_tensors(
    layer: nn.Module,
    name: str,
    attention: str,
    linears: Mapping[str, CompressedLinear],
    kv_scales: KVScales | None,
    packer: Callable[[Rounded], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The tensors of one decoder layer, by their full names; `packer` stores a linear in the chosen format."""
    packed = {f"{linear}.weight" for linear in linears}
    tensors = {f"{name}.{key}": value for key, value in layer.state_dict().items() if key not in packed}
    for linear, result in linears.items():
        tensors.update({f"{name}.{linear}.{key}": value for key, value in packer(result.rounded).items()})
    if kv_scales:
        tensors[f"{name}.{attention}.k_scale"] = torch.tensor([kv_scales.k_scale], dtype=torch.float32)
        tensors[f"{name}.{attention}.v_scale"] = torch.tensor([kv_scales.v_scale], dtype=torch.float32)
    return tensors


def pack(rounded: Rounded) -> dict[str, Tensor]:
    """The tensors of one linear in `pack-quantized`."""
    bits = rounded.spec.bits
    tensors = {
        "weight_packed": pack_to_int32(rounded.codes, bits),
        "weight_scale": rounded.scale.to(SCALE_DTYPE),
        "weight_shape": torch.tensor(rounded.codes.shape, dtype=torch.int64),
    }
    if not rounded.spec.symmetric:
        tensors["weight_zero_point"] = pack_to_int32(rounded.zero.to(torch.int8), bits, packed_dim=0)
    return tensors


def served_config(config: Any, quantization: dict[str, Any] | None, dtype: torch.dtype) -> dict[str, Any]:
    """The base configuration with its `quantization_config`, as transformers and vLLM read it."""
    data: dict[str, Any] = config.to_diff_dict()
    data.pop("_name_or_path", None)
    data.pop("quantization_config", None)
    data["dtype"] = str(dtype).removeprefix("torch.")
    if quantization:
        data["quantization_config"] = quantization
    return data


def quantization_config(recipe: Recipe, unquantized: list[str]) -> dict[str, Any] | None:
    """compressed-tensors' own configuration for a recipe; None where nothing is compressed."""
    weights, kv = recipe.weights, recipe.kv_cache.dtype == "fp8"
    if weights.method == "none" and not kv:
        return None
    groups = {}
    if weights.method != "none":
        arguments = QuantizationArgs(
            num_bits=weights.bits,
            type="int",
            symmetric=weights.symmetric,
            strategy="group" if weights.inputs_per_scale else "channel",
            group_size=weights.inputs_per_scale,
        )
        groups["group_0"] = QuantizationScheme(targets=["Linear"], weights=arguments)
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized" if weights.method != "none" else "dense",
        quantization_status="compressed",
        ignore=unquantized,
        kv_cache_scheme=QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="tensor")
        if kv
        else None,
    )
    dumped: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return dumped


def read_plain_experts(quantization: dict[str, Any]) -> None:
    """Make transformers read routed experts that are not quantized, where other things are.

    transformers (5.19) unpacks a model's experts by the first group whose pattern says "experts", else by any
    group, whether or not they are quantized; only under an FP8 scheme does it take tensors without a scale as they
    are. The group that is added here matches no module, and tells vLLM nothing.
    """
    weights = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["re:^no_module_has_this_name[.]experts$"], weights=weights)
    quantization["config_groups"]["plain_experts"] = json.loads(scheme.model_dump_json())


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
