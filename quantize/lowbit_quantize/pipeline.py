"""The story of a quantize run: check, walk down the model once, write, compare with the base, prove.

Two streams of hidden states walk the decoder: the base model's, on held-out text, and the compressed model's,
on held-out and on calibration text. Each layer is observed on what the compressed layers before it really give.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.log import get_logger
from lowbit_core.manifest import (
    Manifest,
    ModuleRecord,
    QualityRecord,
    RouterDistillationRecord,
    write_manifest,
)
from lowbit_quantize import quality
from lowbit_quantize.attention import attention_seen_by
from lowbit_quantize.calibration import TokenText, load_texts
from lowbit_quantize.compress import CompressedLayer, CompressedLinear, compress_layer
from lowbit_quantize.expert_pruning import ExpertStatistics, Pruning, prune_layer, routing_of
from lowbit_quantize.export import (
    CheckpointWriter,
    NothingWritten,
    layer_tensors,
    read_plain_experts,
    served_config,
)
from lowbit_quantize.formats import FORMATS
from lowbit_quantize.grid import GridSpec
from lowbit_quantize.kv_scales import UNIT_SCALES, KVScales, calibrated_scales
from lowbit_quantize.memory import return_freed_memory
from lowbit_quantize.observe import KeyValueReach, LayerStatistics, Sample
from lowbit_quantize.output import UNPACKED, check_disk, finished_before, refuse_foreign, run_in
from lowbit_quantize.plan import Plan, check_weights, make_plan
from lowbit_quantize.progress import track
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.record import Clock, manifest_of
from lowbit_quantize.router_distillation import SAMPLE_TOKENS, bounded, distill_router
from lowbit_quantize.source import ModelReference, WeightFiles, fetch_weights, find_model, unpack_gguf
from lowbit_quantize.stream import Decoder

log = get_logger("quantize")


def quantize(model: str, recipe: Recipe, out: Path, device: torch.device) -> Manifest:
    """Quantize `model` into `out` and return the manifest that was written; an identical finished run is reused."""
    clock = Clock()
    reference = find_model(model)
    plan = make_plan(reference, recipe)
    refuse_foreign(out)
    texts = load_texts(recipe.calibration, recipe.quality, reference.tokenizer(), reference.config.vocab_size)
    fetch_weights(reference)
    if reference.kind != "gguf":
        check_weights(plan, WeightFiles(reference.path))
    fingerprint = _fingerprint(plan, *texts)
    if finished := finished_before(out, fingerprint):
        log.info("%s already holds this very checkpoint; nothing to do", out)
        return finished
    check_disk(out, plan.disk_bytes)
    with run_in(out, fingerprint):
        weights = WeightFiles(_unpacked(reference, out) if reference.kind == "gguf" else reference.path)
        decoder = Decoder(reference.config, plan.architecture, weights, device, plan.skeleton)
        walk, measured = _walk(decoder, plan, texts, out)
        walk.write_rest()
        manifest = manifest_of(walk, measured, clock, out)
        write_manifest(out, manifest)
    return manifest


def _walk(
    decoder: Decoder, plan: Plan, texts: tuple[TokenText, TokenText], out: Path
) -> tuple["Walk", QualityRecord]:
    """The walk whose shards lie in `out`, and its quality; routers are distilled if that lowers held-out KL."""

    def walked(writer: CheckpointWriter, *, distill: bool) -> tuple[Walk, QualityRecord]:
        walk = Walk(decoder, plan, *texts, writer, distill=distill)
        walk.run()
        return walk, walk.quality()

    if not plan.recipe.experts.router_distillation:
        return walked(CheckpointWriter(out, decoder.depth + 1), distill=False)
    without = walked(NothingWritten(), distill=False)[1].mean_kld
    walk, measured = walked(CheckpointWriter(out, decoder.depth + 1), distill=True)
    record = RouterDistillationRecord(
        kept=measured.mean_kld < without, kld_without=without, kld_with=measured.mean_kld
    )
    log.info("router distillation: mean KL %.4g with, %.4g without", record.kld_with, record.kld_without)
    if not record.kept:
        walk, measured = walked(CheckpointWriter(out, decoder.depth + 1), distill=False)
    walk.router_distillation = record
    return walk, measured


class Walk:
    """One walk down the decoder; the streams are held here and move one layer at a time."""

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        calibration: TokenText,
        heldout: TokenText,
        writer: CheckpointWriter,
        *,
        distill: bool = False,
    ) -> None:
        self.decoder, self.plan, self.recipe, self.writer = decoder, plan, plan.recipe, writer
        self.format = FORMATS[plan.recipe.format]
        self.calibration_text, self.heldout_text = calibration, heldout
        self.calibration = decoder.embed(calibration.ids)  # (sequences, tokens, hidden)
        self.heldout = decoder.embed(heldout.ids)
        self.heldout_base = self.heldout.clone()
        self.spec = GridSpec(
            self.recipe.weights.bits, self.recipe.weights.inputs_per_scale, self.recipe.weights.symmetric
        )
        self.modules: list[ModuleRecord] = []
        self.kv_scales: dict[int, KVScales] = {}
        self.packed_bytes = self.quantized_parameters = 0
        self.distill = distill
        self.router_distillation: RouterDistillationRecord | None = None
        self.kept_experts: dict[int, list[int]] = {}
        self.starved: dict[tuple[int, int], int] = {}  # (layer, expert): tokens

    def run(self) -> None:
        """Walk every layer and write its shard."""
        for index in track(range(self.decoder.depth), self.decoder.depth, "layers"):
            self._step(index)

    def _step(self, index: int) -> None:
        layer = self.decoder.load_layer(index)
        self.decoder.advance(layer, index, self.heldout_base)
        if self.plan.pruning and self.plan.architecture.has_experts(layer):
            self._prune(layer, index, self.plan.pruning)
        statistics, reach = self._observe(layer, index)
        compressed = self._compress(layer, index, statistics)
        scales = self._scales_of(reach, index, compressed)
        if index + 1 < self.decoder.depth:
            self.decoder.advance(layer, index, self.calibration, scales)
        self.decoder.advance(layer, index, self.heldout, scales)
        self._write(layer, index, compressed, scales)

    def quality(self) -> QualityRecord:
        """Compare both streams at the end of the walk."""
        return_freed_memory()  # layers are small and many, logits are large
        norm, head = self.decoder.head()
        predictions = quality.compare(
            self.heldout_base, self.heldout, norm, norm, head, self.heldout_text.ids
        )
        return quality.summarize(predictions, self.heldout_text, kv_cache_included=bool(self.kv_scales))

    def write_rest(self) -> None:
        """Write what lies outside the layers, the index, the configuration and the tokenizer."""
        weights, config, architecture = self.decoder.weights, self.decoder.config, self.plan.architecture
        names = map(architecture.published_name, self.plan.skeleton.state_dict())
        outside = [name for name in names if not name.startswith(f"{architecture.layers}.")]
        if config.tie_word_embeddings:
            outside.remove(f"{architecture.head}.weight")
        self.writer.write_shard({name: weights.read(name).to(self.decoder.dtype) for name in outside})
        config = copy.deepcopy(config)
        if self.plan.pruning:
            config.num_experts = self.plan.pruning.kept
        quantization = self.format.configuration(self.recipe, list(self.plan.unquantized))
        if quantization and self.plan.plain_experts:
            read_plain_experts(quantization)
        served = served_config(config, quantization, self.decoder.dtype)
        served["architectures"] = [type(self.plan.skeleton).__name__]
        self.writer.finish(weights.directory, served, self.format.tool_file)

    def _prune(self, layer: nn.Module, index: int, pruning: Pruning) -> None:
        """Route the calibration tokens, score the experts by what they gave, and cut out the others."""
        architecture = self.plan.architecture
        router: Any = layer.get_submodule(architecture.router)
        seen, inputs = ExpertStatistics(pruning.experts), Sample(SAMPLE_TOKENS)
        with routing_of(layer, architecture, seen, inputs):
            for _ in self.decoder.run_layer(layer, index, self.calibration):
                pass
        kept = pruning.keep(seen, index)
        experts: Any = layer.get_submodule(architecture.experts)
        prune_layer(layer, architecture, kept)
        self.kept_experts[index] = kept.tolist()
        if self.distill:
            sample = bounded(inputs.rows(), pruning.kept)
            with torch.inference_mode():
                _, gates, chosen = router(sample)
                target = experts(sample, chosen, gates)
            distill_router(layer, architecture, sample, target.clone())

    def _observe(self, layer: nn.Module, index: int) -> tuple[LayerStatistics, KeyValueReach]:
        """Run the calibration tokens through the base weights of a layer, once, and see everything."""
        architecture, method = self.plan.architecture, self.recipe.weights.method
        statistics = LayerStatistics(layer, architecture, self.decoder.device)
        observers = {} if method == "none" else statistics.observers
        reach = KeyValueReach()
        if method == "none" and self.recipe.kv_cache.dtype == "none":
            return statistics, reach
        with attention_seen_by(statistics.attended):
            self.decoder.observe(layer, index, self.calibration, observers, reach)
        if method != "none":
            self.starved.update({(index, expert): tokens for expert, tokens in statistics.starved.items()})
        return statistics, reach

    def _compress(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> CompressedLayer:
        if self.recipe.weights.method == "none":
            return CompressedLayer({}, None)
        prefix = f"{self.decoder.layer_name(index)}."
        ignored = frozenset(n.removeprefix(prefix) for n in self.plan.ignored if n.startswith(prefix))
        method = self.recipe.weights.method
        with torch.inference_mode():
            return compress_layer(layer, self.plan.architecture, statistics, self.spec, method, ignored)

    def _scales_of(self, reach: KeyValueReach, index: int, compressed: CompressedLayer) -> KVScales | None:
        """A layer's scales; None without an FP8 cache, and where a layer reads the cache of another."""
        if self.recipe.kv_cache.dtype == "none" or not reach.cached:
            return None
        scales = calibrated_scales(reach, compressed.value_divisor)
        if not self.format.carries_kv_scales:
            scales = UNIT_SCALES
        self.kv_scales[index] = scales
        return scales

    def _write(
        self, layer: nn.Module, index: int, compressed: CompressedLayer, scales: KVScales | None
    ) -> None:
        name = self.decoder.layer_name(index)
        linears, pack = compressed.linears, self.format.pack
        published, attention = self.plan.architecture.published_name, self.plan.architecture.attention
        stored = scales if self.format.carries_kv_scales else None
        tensors = layer_tensors(layer, name, attention, linears, stored, pack)
        self.writer.write_shard({published(key): tensor for key, tensor in tensors.items()})
        self.modules += [
            self._record(published(f"{name}.{linear}"), result) for linear, result in linears.items()
        ]
        self.packed_bytes += sum(_bytes(pack(result.rounded)) for result in linears.values())
        self.quantized_parameters += sum(result.rounded.codes.numel() for result in linears.values())

    def _record(self, name: str, result: CompressedLinear) -> ModuleRecord:
        weights = self.recipe.weights
        return ModuleRecord(
            name=name,
            method=weights.method,
            bits=weights.bits,
            group_size=weights.inputs_per_scale,
            symmetric=weights.symmetric,
            error=result.error,
            alpha=result.alpha,
        )


def _fingerprint(plan: Plan, calibration: TokenText, heldout: TokenText) -> dict[str, Any]:
    """What makes two runs the same run."""
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "base": plan.reference.sha256,
        "texts": [calibration.record.sha256, heldout.record.sha256],
    }


def _unpacked(reference: ModelReference, out: Path) -> Path:
    log.info("unpacking %s", reference.path.name)
    return unpack_gguf(reference, out / UNPACKED)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
