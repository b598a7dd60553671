"""A layer's shard, written part by part, and what is recorded of the linears that it holds."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowbit_core.manifest import ModuleRecord, SparsityRecord
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.files.published_names import PublishedNames
from lowbit_quantize.run.journal import ShardRecord, UnopenedLinear
from lowbit_quantize.run.writer import CheckpointWriter
from lowbit_quantize.schemes.kv_cache import KVScales
from lowbit_quantize.schemes.scheme import Quantized
from lowbit_quantize.schemes.storage.stored_linears import reader_of
from lowbit_quantize.schemes.storage.zeros import zeros_of
from lowbit_quantize.walk.head import QuantizedHead
from lowbit_quantize.walk.layer import QuantizedLinear
from lowbit_quantize.walk.module_plan import ModulePlan, Modules


class LayerWriter:
    """One layer `name` of the model; what it is told of is on the disk, but for parts of what readers want stacked."""

    def __init__(
        self,
        writer: CheckpointWriter,
        names: PublishedNames,
        architecture: Architecture,
        entries: Modules,
        name: str,
        tensors: int | None,
    ) -> None:
        """`tensors`: the most that it can have, if it is too large to be written at once."""
        self._writer, self._names, self._architecture = writer, names, architecture
        self._shard = None if tensors is None else writer.begin_shard(tensors)
        self._entries, self._name = entries, name
        self._waiting: dict[str, Tensor] = {}
        self.modules: list[ModuleRecord] = []
        self.unopened: dict[str, UnopenedLinear] = {}

    def add(self, tensors: Mapping[str, Tensor], linears: Mapping[str, QuantizedLinear]) -> None:
        """Quantized linears of the layer and tensors beside them, by their names in it."""
        packed = {linear: one.quantized.tensors() for linear, one in linears.items()}
        parts = {f"{linear}.{key}": value for linear, some in packed.items() for key, value in some.items()}
        self._write({f"{self._name}.{key}": value for key, value in (dict(tensors) | parts).items()})
        for linear, one in linears.items():
            self._note(linear, one, sum(tensor.nbytes for tensor in packed[linear].values()))

    def close(self) -> ShardRecord:
        """The shard, whole."""
        if self._shard is None:
            return self._writer.write_shard(self._names.publish(self._waiting))
        if self._waiting:
            self._shard.add(self._names.publish(self._waiting))
        return self._shard.close()

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        if self._shard is None or any(map(self._names.is_stacked, tensors)):
            self._waiting |= tensors  # where readers want experts stacked, until all are there
        else:
            self._shard.add(self._names.publish(tensors))

    def _note(self, linear: str, one: QuantizedLinear, stored_bytes: int) -> None:
        full = f"{self._name}.{linear}"
        published, quantized = self._names.published(full), one.quantized
        weights = quantized.codes.numel()
        self.modules.append(record_of(published, self._entries[full], one, weights, stored_bytes))
        if reader_of(quantized.scheme, quantized.codes.shape, expert=self._architecture.in_experts(linear)):
            self.unopened[published] = _unopened(quantized)


def beside(module: nn.Module, linears: Mapping[str, QuantizedLinear], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a module, whose names in the layer begin with `prefix`, but the weights of quantized linears."""
    here = {f"{prefix}{key}": value for key, value in module.state_dict().items()}
    return {key: value for key, value in here.items() if key.removesuffix(".weight") not in linears}


def kv_tensors(attention: str, scales: KVScales | None) -> dict[str, Tensor]:
    """The scales of a layer's cache, by their names in it."""
    if scales is None:
        return {}
    pairs = {"k_scale": scales.k_scale, "v_scale": scales.v_scale}
    return {f"{attention}.{name}": _stored(value) for name, value in pairs.items()}


def _stored(scale: float | tuple[float, ...]) -> Tensor:
    """(1,), or (heads, 1, 1), as llm-compressor stores them and vLLM reads them."""
    if isinstance(scale, float):
        return torch.tensor([scale], dtype=torch.float32)
    return torch.tensor(scale, dtype=torch.float32).view(-1, 1, 1)


def record_of(
    name: str, entry: ModulePlan, linear: QuantizedLinear | QuantizedHead, weights: int, stored_bytes: int
) -> ModuleRecord:
    """What the manifest says of a quantized linear of so many weights."""
    return ModuleRecord(
        name=name,
        scheme=entry.scheme.name,
        bits=entry.scheme.bits,
        group_size=entry.scheme.group_size,
        symmetric=entry.scheme.symmetric,
        methods=[method.name for method in entry.methods],
        error=linear.error,
        alpha=linear.alpha,
        inputs=entry.scheme.input_quantizer.words if entry.scheme.input_quantizer else None,
        input_scale=linear.quantized.input_scale if isinstance(linear, QuantizedLinear) else None,
        weights=weights,
        bytes=stored_bytes,
        sparsity=_sparsity(entry, linear),
    )


def _sparsity(entry: ModulePlan, linear: QuantizedLinear | QuantizedHead) -> SparsityRecord | None:
    """Of the weight that is served, where a method set some of it to zero."""
    if entry.pruner is None:
        return None
    served = linear.quantized.dequantize() if isinstance(linear, QuantizedLinear) else linear.weight
    zeros = zeros_of(served)
    return SparsityRecord(
        pattern=str(entry.pruner.sparsity), zeros=round(zeros.share, 6), sha256=zeros.sha256
    )


def _unopened(quantized: Quantized) -> UnopenedLinear:
    outputs, inputs = quantized.codes.shape
    return UnopenedLinear(shape=(outputs, inputs), sample=quantized.sample())
