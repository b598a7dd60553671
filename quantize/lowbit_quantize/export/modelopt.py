"""ModelOpt's unified checkpoint, which TensorRT-LLM reads: `hf_quant_config.json` beside packed weights.

| scheme | `quant_algo` | a linear is |
|---|---|---|
| W4A16 | W4A16_AWQ | `weight` uint8 (out / 2, in), row 2i in the low bits; `weight_scale` (out, groups) |
| FP8 | FP8 | `weight` float8 (out, in); `weight_scale`, `input_scale` one number each |
| FP8_DYNAMIC | FP8_PER_CHANNEL_PER_TOKEN | `weight` float8 (out, in); `weight_scale` (out,) |
| NVFP4 | NVFP4 | `weight` uint8 (out, in / 2), first in the low bits; `weight_scale` float8 (out, in / 16) |
| NVFP4A16 | W4A16_NVFP4 | the same |
| MXFP8 | MXFP8 | `weight` float8 (out, in); `weight_scale` uint8 (out, in / 32), exponents |

NVFP4 has `weight_scale_2` and, where inputs are rounded, `input_scale` beside it: one number each, the reciprocals of
our global scales. Other scales are float32. Scales of an FP8 cache lie at `k_proj.k_scale` and `v_proj.v_scale`. AWQ's
scales of inputs are folded, so there is no `pre_quant_scale`. Source: ModelOpt 0.47, `torch/export/quant_utils.py` and
`convert_hf_config.py`; held against them by benchmarks/formats/modelopt_layout.py. No GPU has run it: the layout is
proven.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_core.errors import CheckpointError
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.run.companions import copy_companions
from lowbit_quantize.run.directory import check_disk
from lowbit_quantize.run.writer import CheckpointWriter, write_json
from lowbit_quantize.schemes.float_blocks import FloatBlocks
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Quantized, Scheme

FILE = "hf_quant_config.json"
# The version whose layout this is; readers look at it.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
ALGORITHMS = {"FP8": "FP8", "FP8_DYNAMIC": "FP8_PER_CHANNEL_PER_TOKEN"}
BLOCKS = {"NVFP4": "NVFP4", "NVFP4A16": "W4A16_NVFP4", "MXFP8": "MXFP8"}
WITH_GROUPS = ("FP8", "NVFP4", "W4A16_NVFP4")  # that `config.json` has a group of, where there is no other
W4A16 = "W4A16_AWQ"
CACHE_PLACES = {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"}
FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
MIXED = "MIXED_PRECISION"


class ModelOpt:
    """The target `modelopt`."""

    name = "modelopt"
    readers = "TensorRT-LLM, vLLM and SGLang on NVIDIA's GPUs"
    one_file = False

    def supports(self, checkpoint: Checkpoint) -> str | None:
        if not checkpoint.modules:
            return "it holds quantized linears only, and this checkpoint has none"
        for name, scheme in checkpoint.schemes.items():
            if algorithm_of(scheme) is None:
                held = ", ".join(("W4A16 in groups", *ALGORITHMS, *BLOCKS))
                return f"it has no place for {name} in {scheme.name}: it holds {held}"
        cache = checkpoint.manifest.kv_cache
        if cache and cache.skip_layers:
            return "it holds an FP8 cache of all layers or of none"
        if cache and cache.strategy != "tensor":
            return "it holds one scale for the keys and one for the values of a layer, not of each head"
        return None

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        check_disk(out, checkpoint.manifest.size.bytes)
        writer, packed = CheckpointWriter(out, len(checkpoint.shards)), 0
        for shard in checkpoint.shards:
            tensors: dict[str, Tensor] = {}
            for name, found in checkpoint.read(shard):
                if isinstance(found, Quantized):
                    parts = pack(name, found)
                    packed += sum(part.nbytes for part in parts.values())
                    tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
                else:
                    tensors[_place(name)] = found.squeeze() if name != _place(name) else found
            writer.write_shard(tensors)
        quantization = quantization_of(checkpoint)
        writer.finish({**checkpoint.config, "quantization_config": in_config(quantization)})
        copy_companions(checkpoint.directory, checkpoint.other_files, out)
        write_json(out / FILE, {"producer": PRODUCER, "quantization": quantization})
        return Exported(writer.tensor_bytes, packed, [])


def algorithm_of(scheme: Scheme) -> dict[str, Any] | None:
    """What the file says of a linear in a scheme; None where it has no word for it."""
    if isinstance(scheme, Integer):
        if (scheme.bits, scheme.symmetric) != (4, True) or not scheme.group_size:
            return None
        return {
            "quant_algo": W4A16,
            "group_size": scheme.group_size,
            "has_zero_point": False,
            "pre_quant_scale": False,
        }
    if scheme.name in BLOCKS:
        return {"quant_algo": BLOCKS[scheme.name], "group_size": scheme.group_size}
    return {"quant_algo": ALGORITHMS[scheme.name]} if scheme.name in ALGORITHMS else None


def pack(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """A linear's tensors, by the last part of each name; raises CheckpointError where rows cannot be paired."""
    if isinstance(quantized.scheme, FloatBlocks):
        return _pack_blocks(quantized)
    scale = quantized.params["scale"].float()
    if isinstance(quantized.scheme, Integer):
        if len(quantized.codes) % 2:
            raise CheckpointError(f"it packs two outputs in a byte and {name} has {len(quantized.codes)}")
        low, high = (quantized.codes[first::2].to(torch.uint8) & 15 for first in (0, 1))
        return {"weight": low | high << 4, "weight_scale": scale}
    weight = {"weight": quantized.codes.to(torch.float8_e4m3fn)}
    if quantized.input_scale is None:
        return {**weight, "weight_scale": scale.squeeze(-1)}
    return {**weight, "weight_scale": scale[0, 0].clone(), "input_scale": torch.tensor(quantized.input_scale)}


def _pack_blocks(quantized: Quantized) -> dict[str, Tensor]:
    """Floats in blocks lie as in our files; the numbers that all of a tensor shares are factors here, not divisors."""
    stored = quantized.tensors()
    packed = {
        "weight": stored.get("weight_packed", stored.get("weight")),
        "weight_scale": stored["weight_scale"],
    }
    for name, ours in (("weight_scale_2", "weight_global_scale"), ("input_scale", "input_global_scale")):
        if ours in stored:
            packed[name] = 1 / stored[ours].squeeze()
    return {name: tensor for name, tensor in packed.items() if tensor is not None}


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """`quantization` of `hf_quant_config.json`."""
    layers = {name: algorithm_of(scheme) or {} for name, scheme in checkpoint.schemes.items()}
    kinds = list({str(kind): kind for kind in layers.values()}.values())
    cache = {"kv_cache_quant_algo": "FP8" if checkpoint.manifest.kv_cache else None}
    if len(kinds) > 1:
        return {"quant_algo": MIXED, **cache, "quantized_layers": dict(sorted(layers.items()))}
    left_alone = sorted({"lm_head", *checkpoint.manifest.unquantized} - set(layers))
    return {**kinds[0], **cache, "exclude_modules": left_alone}


def in_config(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The same for `config.json`, as ModelOpt writes it there."""
    found: dict[str, Any] = {}
    algorithm = quantization["quant_algo"]
    if algorithm == MIXED:
        found["config_groups"] = dict(_groups(quantization["quantized_layers"]))
        found["quantized_layers"] = quantization["quantized_layers"]
    elif algorithm in WITH_GROUPS:
        found["config_groups"] = {"group_0": {**_arguments(quantization), "targets": ["Linear"]}}
    found |= {"ignore": quantization.get("exclude_modules", []), "quant_algo": algorithm}
    if quantization["kv_cache_quant_algo"]:
        found["kv_cache_scheme"] = FP8_CACHE
    return {**found, "producer": PRODUCER, "quant_method": "modelopt"}


def _groups(layers: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    alike: dict[str, list[str]] = {}
    for name, said in layers.items():
        alike.setdefault(str(sorted(said.items())), []).append(name)
    for number, names in enumerate(alike.values()):
        yield f"group_{number}", {**_arguments(layers[names[0]]), "targets": sorted(names)}


def _arguments(said: Mapping[str, Any]) -> dict[str, Any]:
    """How ModelOpt describes an algorithm in `config.json`."""
    if said["quant_algo"] == W4A16:
        return {"weights": {"dynamic": False, "num_bits": 4, "type": "int", "group_size": said["group_size"]}}
    if said["quant_algo"] in BLOCKS.values():
        bits = 8 if said["quant_algo"] == "MXFP8" else 4
        numbers = {"dynamic": False, "num_bits": bits, "type": "float", "group_size": said["group_size"]}
        return {"weights": numbers} | (
            {} if "A16" in said["quant_algo"] else {"input_activations": dict(numbers)}
        )
    by_channel = {"strategy": "channel"} if said["quant_algo"] != "FP8" else {}
    return {"input_activations": dict(FP8_CACHE), "weights": {**FP8_CACHE, **by_channel}}


def _place(name: str) -> str:
    """Where a tensor that is not a linear's lies."""
    before, _, leaf = name.rpartition(".")
    return f"{before}.{CACHE_PLACES[leaf]}" if leaf in CACHE_PLACES else name
