"""Writes the file, and reads it back before it is anybody's."""

import math
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, dequantize
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from lowbit_core import __version__
from lowbit_core.errors import CheckpointError, ConfigError
from lowbit_core.progress import track
from lowbit_quantize.export.checkpoint import Checkpoint
from lowbit_quantize.export.exporter import Exported
from lowbit_quantize.export.gguf.families import family_of, head_size, sizes, stretching
from lowbit_quantize.export.gguf.tensors import Entry, GgufTensors
from lowbit_quantize.export.gguf.vocabulary import vocabulary_keys
from lowbit_quantize.model.sources.gguf_positions import ROPE_FREQS, llama3_factors
from lowbit_quantize.run.companions import copy_companions
from lowbit_quantize.run.directory import check_disk

FILE_TYPES = {
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
}
QUANTIZATION_VERSION = 2
GB = 1_000_000_000
EXACT = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
TURNED = re.compile(r"\.attn_[qk]\.")


class Gguf:
    """The target `gguf`.

    `rest` is what matrices are stored as that are not quantized: f16, bf16 or q8_0. With `split_max_size`, in GB, it is
    a directory of files that are each no larger, as llama.cpp's own `gguf-split` names them; it reads all by the first.
    """

    name = "gguf"
    readers = "llama.cpp, Ollama, LM Studio, OpenVINO GenAI (llama, qwen2, qwen3)"

    def __init__(self, rest: str = "f16", split_max_size: float | None = None) -> None:
        if split_max_size is not None and not 0 < split_max_size < math.inf:
            raise ConfigError(f"--split-max-size {split_max_size:g} GB: give a number above 0, for example 4")
        self._rest = rest
        self._most = None if split_max_size is None else max(1, int(split_max_size * GB))

    @property
    def one_file(self) -> bool:
        return self._most is None

    def supports(self, checkpoint: Checkpoint) -> str | None:
        try:
            config = _config(checkpoint)
            family = family_of(config)
            sizes(family, config)
            stretching(family, config)
        except CheckpointError as error:
            return str(error)
        return None

    def write(self, checkpoint: Checkpoint, out: Path) -> Exported:
        config = _config(checkpoint)
        family = family_of(config)
        tensors = GgufTensors(checkpoint, family, config, self._rest)
        check_disk(out, sum(entry.nbytes for entry in tensors.entries))
        keys = {f"{family.architecture}.{key}": value for key, value in sizes(family, config).items()}
        keys |= vocabulary_keys(checkpoint.directory, family.architecture, config)
        keys |= _told(checkpoint)
        factors = llama3_factors(stretching(family, config), head_size(config))
        parts = _parts(tensors.entries, self._most)
        files = _files(out, len(parts), checkpoint.manifest.base.name, one=self.one_file)
        for number, (file, entries) in enumerate(zip(files, parts, strict=True)):
            writer = GGUFWriter(file, family.architecture)
            for key, value in keys.items() if number == 0 else ():
                _add(writer, key, value)
            if number == 0:
                writer.add_file_type(_file_type(tensors.entries))
                writer.add_quantization_version(QUANTIZATION_VERSION)
            if len(parts) > 1:
                _say_part(writer, number, len(parts), len(tensors.entries) + (factors is not None))
            _write(writer, tensors, entries, factors if number == 0 else None)
            _check(file, tensors, entries, family.architecture, config)
        if not self.one_file:
            copy_companions(checkpoint.directory, checkpoint.other_files, out)
        packed = sum(entry.nbytes for entry in tensors.entries if entry.sources[0] in checkpoint.modules)
        total = sum(entry.nbytes for entry in tensors.entries)
        return Exported(total, packed, ["scales of an FP8 KV cache"] if tensors.left_out else [])


def _parts(entries: list[Entry], most: int | None) -> list[list[Entry]]:
    """Tensors by file, in order; a tensor that is larger than a file may be has one of its own."""
    parts: list[list[Entry]] = [[]]
    for entry in entries:
        if most and parts[-1] and sum(one.nbytes for one in (*parts[-1], entry)) > most:
            parts.append([])
        parts[-1].append(entry)
    return parts


def _files(out: Path, parts: int, name: str, *, one: bool) -> list[Path]:
    """As llama.cpp's `llama_split_path` has them."""
    if one:
        return [out]
    stem = Path(name).name
    return [out / f"{stem}-{number:05d}-of-{parts:05d}.gguf" for number in range(1, parts + 1)]


def _say_part(writer: GGUFWriter, number: int, parts: int, tensors: int) -> None:
    writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, number)
    writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, parts)
    writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, tensors)


def _config(checkpoint: Checkpoint) -> Any:
    return AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True, trust_remote_code=False)


def _file_type(entries: list[Entry]) -> LlamaFileType:
    """By what most numbers are stored as."""
    share: dict[GGMLQuantizationType, int] = {}
    for entry in entries:
        share[entry.kind] = share.get(entry.kind, 0) + int(np.prod(entry.full_shape, dtype=np.int64))
    most = max((kind for kind in share if kind in FILE_TYPES), key=lambda kind: share[kind])
    return FILE_TYPES[most]


def _told(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where the file comes from, and what was proven of the checkpoint that it is made of."""
    manifest = checkpoint.manifest
    quality = manifest.quality
    proven = {
        "mean_kld": quality.mean_kld,
        "kld_stderr": quality.kld_stderr,
        "noise_floor_kld": quality.noise_floor.mean_kld if quality.noise_floor else None,
        "top1_agreement": quality.top1_agreement,
        "predictions": quality.predictions,
    }
    return {
        "general.name": manifest.base.name,
        "general.quantized_by": f"Lowbit {__version__}",
        **{f"lowbit.quality.{name}": value for name, value in proven.items() if value is not None},
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, str(value))


def _write(
    writer: GGUFWriter, tensors: GgufTensors, entries: list[Entry], factors: torch.Tensor | None
) -> None:
    for entry in entries:
        dtype = np.dtype(np.uint8 if entry.kind != GGMLQuantizationType.F32 else np.float32)
        shape = entry.full_shape
        if dtype == np.uint8:
            shape = gguf.quant_shape_to_byte_shape(shape, entry.kind)
        writer.add_tensor_info(entry.name, shape, dtype, entry.nbytes, raw_dtype=entry.kind)
    if factors is not None:
        writer.add_tensor_info(ROPE_FREQS, tuple(factors.shape), np.dtype(np.float32), factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    for entry in track(entries, len(entries), "tensors"):
        writer.write_padding(file, file.tell())
        for piece in tensors.pieces(entry):
            file.write(np.ascontiguousarray(piece).data)
    if factors is not None:
        writer.write_padding(file, file.tell())
        file.write(factors.float().numpy().data)
    writer.write_padding(file, file.tell())
    writer.close()


def _check(path: Path, tensors: GgufTensors, entries: list[Entry], architecture: str, config: Any) -> None:
    """Hold what readers of the file will compute with against the checkpoint's numbers; raises CheckpointError."""
    reader = GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config.to_dict())
    for entry in track(entries, len(entries), "read back"):
        if tensors.rounds(entry):
            continue
        found, start = _by_rows(stored[entry.name], entry, processor), 0
        for rows in tensors.numbers(entry):
            expected = rows.to(EXACT.get(entry.kind, torch.float32)).float()
            part = torch.from_numpy(found(start, start + len(rows))).view_as(expected)
            if wrong := int((part != expected).sum()):
                raise CheckpointError(
                    f"{wrong} of the numbers of {entry.name} would be read as others; this is a fault of Lowbit, "
                    "please report it"
                )
            start += len(rows)
            reader.data._mmap.madvise(mmap.MADV_DONTNEED)  # all of it is mapped: what was read need not stay


def _by_rows(tensor: Any, entry: Entry, processor: TensorProcessor) -> Callable[[int, int], Any]:
    """What transformers makes of some rows of a tensor, float32; rows that are turned are turned together."""
    data = tensor.data.reshape(-1, tensor.data.shape[-1]) if len(entry.shape) > 1 else tensor.data

    def process(rows: Any) -> Any:
        return np.array(processor.process(dequantize(rows, entry.kind), entry.name).weights, np.float32)

    if not TURNED.search(entry.name):
        return lambda start, stop: process(data[start:stop])
    whole = process(data)
    return lambda start, stop: whole[start:stop]
