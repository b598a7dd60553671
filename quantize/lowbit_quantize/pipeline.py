"""The story of a quantize run: check, walk down the model once, write, compare with the base, prove.

Two streams of hidden states walk the decoder: the base model's, on held-out text, and the compressed model's,
on held-out and on calibration text. Each layer is observed on what the compressed layers before it really give. Where
GPTQ rounds, the base model's calibration text walks too (stages.py), and for the noise floor some of its held-out text
in float32 (baselines.py).
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit_core.log import get_logger
from lowbit_core.manifest import (
    KVLayerRecord,
    Manifest,
    ModuleRecord,
    QualityRecord,
    RouterDistillationRecord,
    write_manifest,
)
from lowbit_quantize import quality
from lowbit_quantize.baselines import Baselines
from lowbit_quantize.calibration import TokenText, load_texts
from lowbit_quantize.compress import CompressedLayer, CompressedLinear
from lowbit_quantize.durable import move
from lowbit_quantize.expert_pruning import ExpertStatistics, Pruning, prune_layer, routing_of
from lowbit_quantize.export import (
    CheckpointWriter,
    NothingWritten,
    layer_tensors,
    read_plain_experts,
    served_config,
)
from lowbit_quantize.forecast import run_disk_bytes, streams_bytes
from lowbit_quantize.formats import FORMATS
from lowbit_quantize.grid import GridSpec
from lowbit_quantize.identity import identity_of
from lowbit_quantize.journal import Conclusion, Journal, LayerRecord
from lowbit_quantize.kv_scales import KVScales
from lowbit_quantize.memory import keep_freed_memory, keep_no_freed_memory, return_freed_memory
from lowbit_quantize.observe import Sample
from lowbit_quantize.output import RunDirectory, check_disk, finished_before, refuse_foreign, run_in
from lowbit_quantize.plan import Plan, check_weights, make_plan, stored_weights
from lowbit_quantize.progress import track
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.record import Clock, manifest_of
from lowbit_quantize.router_distillation import SAMPLE_TOKENS, bounded, distill_router
from lowbit_quantize.source import WeightFiles, fetch_weights, find_model
from lowbit_quantize.stages import Stages
from lowbit_quantize.stream import Decoder
from lowbit_quantize.streams import MEMORY_BYTES, Streams

if TYPE_CHECKING:
    from lowbit_quantize.gguf_file import GgufFile

log = get_logger("quantize")


def quantize(
    model: str,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    *,
    fresh: bool = False,
    stream_memory_bytes: int = MEMORY_BYTES,
) -> Manifest:
    """Quantize `model` into `out` and return the manifest that was written.

    An identical finished run is reused, an identical unfinished one is gone on with, unless `fresh`. Streams of
    hidden states beyond `stream_memory_bytes` are files.
    """
    clock = Clock()
    reference = find_model(model)
    plan = make_plan(reference, recipe)
    refuse_foreign(out)
    texts = load_texts(recipe.calibration, recipe.quality, reference.tokenizer(), reference.config.vocab_size)
    fetch_weights(reference)
    stored = stored_weights(plan)
    check_weights(plan, stored)
    identity = identity_of(plan, *texts, device)
    if not fresh and (finished := finished_before(out, identity)):
        log.info("%s already holds this very checkpoint; nothing to do", out)
        return finished
    check_disk(out, run_disk_bytes(plan, streams_bytes(plan, *texts)))
    with run_in(out, identity, fresh=fresh) as run:
        weights = stored if isinstance(stored, WeightFiles) else WeightFiles(_unpacked(stored, run))
        decoder = Decoder(reference.config, plan.architecture, weights, device, plan.skeleton)
        walk, measured = _walk(decoder, plan, texts, run, stream_memory_bytes)
        walk.write_rest()
        manifest = manifest_of(walk, measured, clock, out)
        write_manifest(out, manifest)
    return manifest


def _walk(
    decoder: Decoder, plan: Plan, texts: tuple[TokenText, TokenText], run: RunDirectory, memory_bytes: int
) -> tuple["Walk", QualityRecord]:
    """The walk whose shards lie in the output, and its quality; routers are distilled if that lowers held-out KL."""

    def walked(name: str, *, distill: bool = False, trial: bool = False) -> tuple[Walk, QualityRecord]:
        writer = (
            NothingWritten() if trial else CheckpointWriter(run.out, decoder.depth + 1, scratch=run.scratch)
        )
        walk = Walk(
            decoder,
            plan,
            *texts,
            writer,
            distill=distill,
            journal=run.journal(name),
            stream_memory_bytes=memory_bytes,
        )
        walk.run()
        return walk, walk.quality()

    if not plan.recipe.experts.router_distillation:
        return walked("walk")
    without = walked("trial", trial=True)[1].mean_kld
    walk, measured = walked("distilled", distill=True)
    record = RouterDistillationRecord(
        kept=measured.mean_kld < without, kld_without=without, kld_with=measured.mean_kld
    )
    log.info("router distillation: mean KL %.4g with, %.4g without", record.kld_with, record.kld_without)
    if not record.kept:
        walk, measured = walked("undistilled")
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
        journal: Journal | None = None,
        stream_memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Without a `journal` nothing is kept on disk but what `writer` writes."""
        self.decoder, self.plan, self.recipe, self.writer = decoder, plan, plan.recipe, writer
        self.format = FORMATS[plan.recipe.format]
        self.calibration_text, self.heldout_text = calibration, heldout
        self.journal = journal
        self.streams = Streams(decoder.device, journal.directory if journal else None, stream_memory_bytes)
        self.spec = GridSpec(
            self.recipe.weights.bits, self.recipe.weights.inputs_per_scale, self.recipe.weights.symmetric
        )
        self.stages = Stages(decoder, plan, self.spec)
        self.baselines = Baselines(decoder, plan, self.streams, heldout)
        self.modules: list[ModuleRecord] = []
        self.kv_scales: dict[int, KVScales] = {}
        self.packed_bytes = self.quantized_parameters = 0
        self.distill = distill
        self.router_distillation: RouterDistillationRecord | None = None
        self.kept_experts: dict[int, list[int]] = {}
        self.starved: dict[tuple[int, int], int] = {}  # (layer, expert): tokens

    @property
    def calibration(self) -> Tensor:
        return self.streams["calibration"]

    @property
    def heldout(self) -> Tensor:
        return self.streams["heldout"]

    @property
    def heldout_base(self) -> Tensor:
        return self.streams["heldout_base"]

    def run(self) -> None:
        """Walk every layer that is not finished and write its shard."""
        finished = self._take_up() if self.journal else 0
        if not finished:
            self._embed()
        depth = self.decoder.depth
        keep_freed_memory()
        for index in track(range(finished, depth), depth, "layers", done=finished):
            self._step(index)
            self.streams.release()
            return_freed_memory()

    def _embed(self) -> None:
        texts = {
            "calibration": self.calibration_text,
            "heldout": self.heldout_text,
            "heldout_base": self.heldout_text,
        }
        if self.plan.paired:
            texts["calibration_base"] = self.calibration_text
        for name, text in texts.items():
            shape = (*text.ids.shape, self.decoder.config.hidden_size)
            self.decoder.embed(text.ids, self.streams.new(name, shape, self.decoder.dtype))
        self.baselines.embed()

    def _take_up(self) -> int:
        """Restore what an earlier process has finished; returns the number of layers."""
        assert self.journal is not None
        self.journal.begin(self.writer.directory)
        for record in self.journal.layers:
            self._adopt(record)
        if self.journal.layers and not self.journal.conclusion:
            self.journal.load_streams(self.streams)
            log.info("going on after %d of %d layers", len(self.journal.layers), self.decoder.depth)
        return len(self.journal.layers)

    def _adopt(self, record: LayerRecord) -> None:
        """Take a finished layer's results over."""
        if record.shard:
            self.writer.adopt([record.shard])
        self.modules += record.modules
        if record.kv_scales:
            self.kv_scales[record.layer] = KVScales(**record.kv_scales.model_dump(exclude={"layer"}))
        if record.kept_experts is not None:
            self.kept_experts[record.layer] = record.kept_experts
        self.starved.update({(record.layer, expert): tokens for expert, tokens in record.starved.items()})
        self.packed_bytes += record.packed_bytes
        self.quantized_parameters += record.quantized_parameters

    def _step(self, index: int) -> None:
        self.baselines.advance_float32(index)
        layer = self.decoder.load_layer(index)
        self.decoder.advance(layer, index, self.heldout_base)
        if self.plan.pruning and self.plan.architecture.has_experts(layer):
            self._prune(layer, index, self.plan.pruning)
        base = self.streams["calibration_base"] if self.plan.paired else None
        done = self.stages.compress(layer, index, self.calibration, base)
        compressed, scales = done.layer, done.kv_scales
        self.starved.update({(index, expert): tokens for expert, tokens in done.starved.items()})
        if scales:
            self.kv_scales[index] = scales
        self.decoder.advance(layer, index, self.heldout, scales)
        self.baselines.advance_fp8_cache(index, done.base_kv_scales)
        self._write(layer, index, compressed, scales)

    def quality(self) -> QualityRecord:
        """Compare both streams at the end of the walk."""
        if self.journal and self.journal.conclusion:
            return self.journal.conclusion.quality
        keep_no_freed_memory()  # layers are small and many, logits are large
        norm, head = self.decoder.head()
        predictions = quality.compare(
            self.heldout_base, self.heldout, norm, norm, head, self.heldout_text.ids
        )
        measured = quality.summarize(
            predictions,
            self.heldout_text,
            kv_cache_included=bool(self.kv_scales),
            **self.baselines.measure(self.heldout_base, norm, head),
        )
        if self.journal:
            self.journal.conclude(Conclusion(quality=measured, base_files=self._base_files))
        return measured

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

    def _write(
        self, layer: nn.Module, index: int, compressed: CompressedLayer, scales: KVScales | None
    ) -> None:
        name = self.decoder.layer_name(index)
        linears, pack = compressed.linears, self.format.pack
        published, attention = self.plan.architecture.published_name, self.plan.architecture.attention
        stored = scales if self.format.carries_kv_scales else None
        tensors = layer_tensors(layer, name, attention, linears, stored, pack)
        shard = self.writer.write_shard({published(key): tensor for key, tensor in tensors.items()})
        modules = [self._record(published(f"{name}.{linear}"), result) for linear, result in linears.items()]
        packed = sum(_bytes(pack(result.rounded)) for result in linears.values())
        parameters = sum(result.rounded.codes.numel() for result in linears.values())
        self.modules += modules
        self.packed_bytes += packed
        self.quantized_parameters += parameters
        if not self.journal:
            return
        record = LayerRecord(
            layer=index,
            shard=shard,
            modules=modules,
            kv_scales=KVLayerRecord(layer=index, **asdict(scales)) if scales else None,
            kept_experts=self.kept_experts.get(index),
            starved={expert: tokens for (layer, expert), tokens in self.starved.items() if layer == index},
            packed_bytes=packed,
            quantized_parameters=parameters,
            base_files=self._base_files,
            streams=self.journal.save_streams(index, self.streams),
        )
        self.journal.finish(record)

    @property
    def _base_files(self) -> list[str]:
        """The base model's files that were read so far."""
        reference = self.plan.reference
        return sorted(reference.sha256 if reference.kind == "gguf" else self.decoder.weights.read_files)

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


def _unpacked(stored: "GgufFile", run: RunDirectory) -> Path:
    """The GGUF file as a directory; one that is whole is used again."""
    if not run.base.is_dir():
        log.info("unpacking %s", stored.path.name)
        stored.unpack(run.scratch / run.base.name)
        return_freed_memory()
        move(run.scratch / run.base.name, run.base)
    return run.base


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
