"""A GGUF file's weights, read one at a time, and unpacked into safetensors for a walk that reads each several times.

transformers knows the names and undoes what llama.cpp changes (the order of rotary rows, say), but loads whole models
only. Its tables do the same here, tensor by tensor.
"""

import json
import math
import re
from collections.abc import Collection
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from lowbit_core.durable import disk_errors
from lowbit_core.errors import ModelError
from lowbit_core.progress import track
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.model.sources.gguf_header import open_part
from lowbit_quantize.model.sources.gguf_model import GgufModel
from lowbit_quantize.model.sources.gguf_positions import ROPE_FREQS
from lowbit_quantize.model.weights import INDEX_NAME

LAYER = "blk."
BLOCK_ROWS = 4096


class GgufFile:
    """Its tensors, of all its parts, as bfloat16, by the names of `skeleton`, the model without weights.

    Raises ModelError where a part cannot be read, or has tensors or stretched positions that the model does not know,
    which transformers would leave out.
    """

    def __init__(self, reference: ModelReference, skeleton: nn.Module) -> None:
        self._model, self._config = GgufModel(reference.path), reference.config
        self.path, self.files = reference.path, {part.name for part in self._model.parts}
        self._processor = TENSOR_PROCESSORS.get(reference.model_type, TensorProcessor)(self._config.to_dict())
        names = get_gguf_hf_weights_map(skeleton, self._processor)
        self._tensors: dict[str, tuple[Path, ReaderTensor]] = {}
        for path in self._model.parts:
            reader = open_part(path)
            self._refuse_unread(path, reader, names)
            for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
                self._refuse_type(path, tensor)
            self._tensors |= {
                names[tensor.name]: (path, tensor) for tensor in reader.tensors if tensor.name in names
            }

    def _refuse_unread(self, path: Path, reader: GGUFReader, names: Collection[str]) -> None:
        known = {ROPE_FREQS} if self._model.stretching else set()  # it is in the configuration
        unread = [tensor.name for tensor in reader.tensors if tensor.name not in {*names, *known}]
        unread += [name for name in reader.fields if ".rope.scaling." in name]
        if unread:
            raise ModelError(
                f"{path} has {unread[0]}, which transformers does not read, so that another model would "
                "come out; give the model as a directory of safetensors"
            )

    def _refuse_type(self, path: Path, tensor: ReaderTensor) -> None:
        """One row of zeros says whether the numbers of this type can be read."""
        row = np.zeros((1, *tensor.data.shape[1:]), tensor.data.dtype)
        try:
            dequantize(row, tensor.tensor_type)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(
                f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, which cannot be read ({error}); "
                "give the model in another type, or its original directory"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name][1].shape))

    def dtype(self, _: str) -> str:
        """As safetensors calls what is read."""
        return "BF16"

    def read(self, name: str) -> Tensor:
        """One tensor; an embedding or a head, which can outweigh a layer, by blocks of rows.

        It is read and not mapped: the pages of a mapped file would count as memory of the process.
        """
        path, tensor = self._tensors[name]
        rows, *row = tensor.data.shape
        step = rows if tensor.name.startswith(LAYER) else BLOCK_ROWS
        values = torch.empty(self.shape(name), dtype=torch.bfloat16)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            offset = int(tensor.data_offset) + start * (int(tensor.n_bytes) // rows)
            try:
                stored = np.fromfile(path, tensor.data.dtype, count * math.prod(row), offset=offset)
                block = dequantize(stored.reshape(count, *row), tensor.tensor_type)
            except (ValueError, OSError, NotImplementedError) as error:
                raise ModelError(f"{path}: {tensor.name} cannot be read: {error}") from error
            undone = self._processor.process(block, tensor.name).weights
            values[start : start + count] = torch.from_numpy(undone)
        return values

    def unpack(self, directory: Path) -> None:
        """Write a directory of safetensors, a file for each decoder layer and for each tensor outside of them, with the
        tokenizer and the generation settings that the file has.
        """
        directory.mkdir(parents=True)
        places: dict[str, str] = {}
        shards = [(shard, list(names)) for shard, names in groupby(sorted(self._tensors, key=_shard), _shard)]
        for shard, names in track(shards, len(shards), "unpacking: files"):
            with disk_errors():
                save_file({name: self.read(name) for name in names}, directory / shard)
            places |= dict.fromkeys(names, shard)
        with disk_errors():
            self._model.write_tokenizer(directory)
        self._generation().save_pretrained(directory)
        index = {"metadata": {}, "weight_map": places}
        (directory / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")

    def _generation(self) -> GenerationConfig:
        """Generation ends at any of the tokens that the file says end it."""
        settings = GenerationConfig.from_model_config(self._config)
        ends = self._model.ends
        if len(ends) > 1:
            settings.eos_token_id = ends
        return settings


def _shard(name: str) -> str:
    layer = re.search(r"\.(\d+)\.", name)
    return f"layer-{int(layer[1]):05d}.safetensors" if layer else f"{name}.safetensors"
