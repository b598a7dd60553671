"""A GGUF file's weights, read one at a time, and unpacked into safetensors for a walk that reads each several times.

transformers knows the names and undoes what llama.cpp changes (the order of rotary rows, say), but loads whole models
only. Its tables do the same here, tensor by tensor. Experts, which llama.cpp stacks, are cut into single ones.
"""

import json
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
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
from lowbit_quantize.model.sources.gguf_model import EXPERT_COUNTS, EXPERT_SIZES, GgufModel
from lowbit_quantize.model.sources.gguf_positions import ROPE_FREQS
from lowbit_quantize.model.weights import INDEX_NAME

LAYER = "blk."
BLOCK_ROWS = 4096
STACK = re.compile(r"(?P<experts>.*\.experts)\.(?P<linear>[a-z_]+\.weight)")  # what transformers calls one
SHARED_GATE = ".ffn_gate_inp_shexp."  # one row, stored as a vector
EXPERT_KEY = re.compile(r"[^.]+\.(?P<key>expert_.*)")


@dataclass(frozen=True)
class _Place:
    """Where a tensor is; of a stack, (experts, out, in), the entry."""

    path: Path
    tensor: ReaderTensor
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = tuple(int(size) for size in reversed(self.tensor.shape))
        if self.expert is not None:
            return sizes[1:]
        return (1, *sizes) if SHARED_GATE in self.tensor.name and len(sizes) == 1 else sizes


class _Level:
    """A module as transformers asks it for names, without the modules so far below it.

    transformers makes the whole table of names anew for each module that it comes to, of which only the model and
    its base have names that GGUF knows.
    """

    def __init__(self, module: nn.Module, below: int) -> None:
        self._module, self._below = module, below
        self.config, self.state_dict = getattr(module, "config", None), module.state_dict

    def named_children(self) -> list[tuple[str, "_Level"]]:
        children = self._module.named_children() if self._below else ()
        return [(name, _Level(child, self._below - 1)) for name, child in children]


class GgufFile:
    """Its tensors, of all its parts, as bfloat16, by the names of `skeleton`, the model without weights.

    Raises ModelError where a part cannot be read, or has tensors or stretched positions that the model does not know,
    which transformers would leave out.
    """

    def __init__(self, reference: ModelReference, skeleton: nn.Module) -> None:
        self._model, self._config = GgufModel(reference.path), reference.config
        self.path, self.files = reference.path, {part.name for part in self._model.parts}
        processor = TENSOR_PROCESSORS.get(self._model.architecture, TensorProcessor)
        self._processor = processor(self._config.to_dict())
        names = get_gguf_hf_weights_map(_Level(skeleton, 1), self._processor)
        self._places: dict[str, _Place] = {}
        for path in self._model.parts:
            reader = open_part(path)
            self._refuse_unread(path, reader, names)
            for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
                self._refuse_type(path, tensor)
            for tensor in reader.tensors:
                if tensor.name in names:
                    self._places.update(_places(names[tensor.name], path, tensor))

    def _refuse_unread(self, path: Path, reader: GGUFReader, names: Collection[str]) -> None:
        known = {ROPE_FREQS} if self._model.stretching else set()  # it is in the configuration
        unread = [tensor.name for tensor in reader.tensors if tensor.name not in {*names, *known}]
        unread += [name for name in reader.fields if ".rope.scaling." in name or _is_unread(name)]
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
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, _: str) -> str:
        """As safetensors calls what is read."""
        return "BF16"

    def read(self, name: str) -> Tensor:
        """One tensor; an embedding or a head, which can outweigh a layer, by blocks of rows."""
        place = self._places[name]
        if place.expert is not None:
            return self._rows(place, place.expert, 1)[0]
        rows = len(place.tensor.data)
        step = rows if place.tensor.name.startswith(LAYER) else BLOCK_ROWS
        values = torch.empty(place.shape, dtype=torch.bfloat16)
        for start in range(0, rows, step):
            values[start : start + step] = self._rows(place, start, min(step, rows - start))
        return values

    def _rows(self, place: _Place, start: int, count: int) -> Tensor:
        """`count` entries of the first dimension from `start` on.

        They are read and not mapped: the pages of a mapped file would count as memory of the process.
        """
        tensor = place.tensor
        rows, *row = tensor.data.shape
        offset = int(tensor.data_offset) + start * (int(tensor.n_bytes) // rows)
        try:
            stored = np.fromfile(place.path, tensor.data.dtype, count * math.prod(row), offset=offset)
            block = dequantize(stored.reshape(count, *row), tensor.tensor_type)
        except (ValueError, OSError, NotImplementedError) as error:
            raise ModelError(f"{place.path}: {tensor.name} cannot be read: {error}") from error
        undone = self._processor.process(block, tensor.name).weights
        return torch.from_numpy(undone).to(torch.bfloat16)

    def unpack(self, directory: Path) -> None:
        """Write a directory of safetensors, a file for each decoder layer and for each tensor outside of them, with the
        tokenizer and the generation settings that the file has.
        """
        directory.mkdir(parents=True)
        places: dict[str, str] = {}
        shards = [(shard, list(names)) for shard, names in groupby(sorted(self._places, key=_shard), _shard)]
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


def _places(name: str, path: Path, tensor: ReaderTensor) -> Iterator[tuple[str, _Place]]:
    """The tensors of the model that one of the file is, by transformers' name for it: of a stack, its experts'."""
    stack = STACK.fullmatch(name)
    if stack is None:
        yield name, _Place(path, tensor)
        return
    for expert in range(len(tensor.data)):
        yield f"{stack['experts']}.{expert}.{stack['linear']}", _Place(path, tensor, expert)


def _is_unread(field: str) -> bool:
    """Whether this is a key about experts of which nothing is known (their scale, a gate's function, say)."""
    said = EXPERT_KEY.fullmatch(field)
    return said is not None and said["key"] not in (*EXPERT_COUNTS, *EXPERT_SIZES)


def _shard(name: str) -> str:
    layer = re.search(r"\.(\d+)\.", name)
    return f"layer-{int(layer[1]):05d}.safetensors" if layer else f"{name}.safetensors"
