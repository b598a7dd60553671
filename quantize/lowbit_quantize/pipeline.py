"""The story of a quantize run: check, walk down the model once, write, compare with the base, prove.

Two streams of hidden states walk the decoder: the base model's, on held-out text, and the compressed model's,
on held-out and on calibration text. Each layer is observed on what the compressed layers before it really give.
"""

import platform
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core import __version__
from lowbit_core.log import get_logger
from lowbit_core.manifest import (
    BaseModelRecord,
    KVCacheRecord,
    KVLayerRecord,
    Manifest,
    ModuleRecord,
    QualityRecord,
    RunRecord,
    SizeRecord,
    record_files,
    write_manifest,
)
from lowbit_quantize import quality
from lowbit_quantize.architectures import linear_of
from lowbit_quantize.calibration import TokenText, load_texts
from lowbit_quantize.compress import CompressedLayer, CompressedLinear, compress_layer
from lowbit_quantize.export import CheckpointWriter, layer_tensors, pack, served_config
from lowbit_quantize.grid import GridSpec
from lowbit_quantize.kv_scales import KVScales, scale_of
from lowbit_quantize.observe import Covariance, KeyValueReach
from lowbit_quantize.output import UNPACKED, check_disk, finished_before, refuse_foreign, run_in
from lowbit_quantize.plan import Plan, check_weights, make_plan
from lowbit_quantize.progress import track
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.source import ModelReference, WeightFiles, fetch_weights, find_model, unpack_gguf
from lowbit_quantize.stream import Decoder

log = get_logger("quantize")


def quantize(model: str, recipe: Recipe, out: Path, device: torch.device) -> Manifest:
    """Quantize `model` into `out` and return the manifest that was written; an identical finished run is reused."""
    clock = _Clock()
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
        walk = Walk(decoder, plan, *texts, CheckpointWriter(out, decoder.depth + 1))
        walk.run()
        measured = walk.quality()
        walk.write_rest()
        manifest = _manifest(walk, measured, clock, out)
        write_manifest(out, manifest)
    return manifest


class Walk:
    """One walk down the decoder; the streams are held here and move one layer at a time."""

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        calibration: TokenText,
        heldout: TokenText,
        writer: CheckpointWriter,
    ) -> None:
        self.decoder, self.plan, self.recipe, self.writer = decoder, plan, plan.recipe, writer
        self.calibration_text, self.heldout_text = calibration, heldout
        self.calibration = decoder.embed(calibration.ids)  # (sequences, tokens, hidden)
        self.heldout = decoder.embed(heldout.ids)
        self.heldout_base = self.heldout.clone()
        self.spec = GridSpec(
            self.recipe.weights.bits, self.recipe.weights.group_size, self.recipe.weights.symmetric
        )
        self.modules: list[ModuleRecord] = []
        self.kv_scales: list[KVScales] = []
        self.packed_bytes = 0

    def run(self) -> None:
        """Walk every layer and write its shard."""
        for index in track(range(self.decoder.depth), self.decoder.depth, "layers"):
            self._step(index)

    def _step(self, index: int) -> None:
        layer = self.decoder.load_layer(index)
        self.decoder.advance(layer, index, self.heldout_base)
        statistics, reach = self._observe(layer, index)
        compressed = self._compress(layer, index, statistics)
        scales = self._scales_of(reach, compressed)
        if index + 1 < self.decoder.depth:
            self.decoder.advance(layer, index, self.calibration, scales)
        self.decoder.advance(layer, index, self.heldout, scales)
        self._write(layer, index, compressed, scales)

    def quality(self) -> QualityRecord:
        """Compare both streams at the end of the walk."""
        norm, head = self.decoder.head()
        predictions = quality.compare(
            self.heldout_base, self.heldout, norm, norm, head, self.heldout_text.ids
        )
        return quality.summarize(predictions, self.heldout_text, kv_cache_included=bool(self.kv_scales))

    def write_rest(self) -> None:
        """Write what lies outside the layers, the index, the configuration and the tokenizer."""
        weights, config, architecture = self.decoder.weights, self.decoder.config, self.plan.architecture
        names = self.plan.skeleton.state_dict()
        outside = [name for name in names if not name.startswith(f"{architecture.layers}.")]
        if config.tie_word_embeddings:
            outside.remove(f"{architecture.head}.weight")
        self.writer.write_shard({name: weights.read(name).to(self.decoder.dtype) for name in outside})
        served = served_config(config, self.recipe, list(self.plan.ignored), self.decoder.dtype)
        served["architectures"] = [type(self.plan.skeleton).__name__]
        self.writer.finish(weights.directory, served)

    def _observe(self, layer: nn.Module, index: int) -> tuple[dict[str, Covariance], KeyValueReach]:
        """Run the calibration tokens through the base weights of a layer, once, and see everything."""
        reach, statistics = KeyValueReach(), {}
        if self.recipe.weights.method != "none":
            for group in self.plan.architecture.groups:
                features = linear_of(layer, group.linears[0]).in_features
                statistics[group.linears[0]] = Covariance(features, self.decoder.device)
        observers = {name: seen.add for name, seen in statistics.items()}
        self.decoder.observe(layer, index, self.calibration, observers, reach)
        return statistics, reach

    def _compress(
        self, layer: nn.Module, index: int, statistics: Mapping[str, Covariance]
    ) -> CompressedLayer:
        if self.recipe.weights.method == "none":
            return CompressedLayer({}, None)
        prefix = f"{self.decoder.layer_name(index)}."
        ignored = frozenset(n.removeprefix(prefix) for n in self.plan.ignored if n.startswith(prefix))
        method = self.recipe.weights.method
        with torch.inference_mode():
            return compress_layer(layer, self.plan.architecture, statistics, self.spec, method, ignored)

    def _scales_of(self, reach: KeyValueReach, compressed: CompressedLayer) -> KVScales | None:
        if self.recipe.kv_cache.dtype == "none":
            return None
        divisor: Tensor | float = 1.0 if compressed.value_divisor is None else compressed.value_divisor
        scales = KVScales(scale_of(reach.key), scale_of(reach.value / divisor))
        self.kv_scales.append(scales)
        return scales

    def _write(
        self, layer: nn.Module, index: int, compressed: CompressedLayer, scales: KVScales | None
    ) -> None:
        name = self.decoder.layer_name(index)
        linears = compressed.linears
        self.writer.write_shard(layer_tensors(layer, name, self.plan.architecture.attention, linears, scales))
        self.modules += [self._record(f"{name}.{linear}", result) for linear, result in linears.items()]
        self.packed_bytes += sum(_bytes(pack(result.rounded)) for result in linears.values())

    def _record(self, name: str, result: CompressedLinear) -> ModuleRecord:
        weights = self.recipe.weights
        return ModuleRecord(
            name=name,
            method=weights.method,
            bits=weights.bits,
            group_size=weights.group_size,
            symmetric=weights.symmetric,
            error=result.error,
            alpha=result.alpha,
        )


@dataclass
class _Clock:
    """Wall and CPU time since it was made, and the process's peak memory."""

    wall: float = 0.0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def record(self, device: str) -> RunRecord:
        return RunRecord(
            device=device,
            seconds=round(time.monotonic() - self.wall, 2),
            cpu_seconds=round(time.process_time() - self.cpu, 2),
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
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


def _manifest(walk: Walk, measured: QualityRecord, clock: _Clock, out: Path) -> Manifest:
    plan, decoder = walk.plan, walk.decoder
    reference, recipe = plan.reference, plan.recipe
    stored = [name for name in plan.skeleton.state_dict() if name in decoder.weights]
    kv_layers = [
        KVLayerRecord(layer=i, k_scale=s.k_scale, v_scale=s.v_scale) for i, s in enumerate(walk.kv_scales)
    ]
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=BaseModelRecord(
            name=reference.name,
            kind=reference.kind,
            revision=reference.revision,
            model_type=reference.model_type,
            dtype="+".join(sorted({decoder.weights.dtype(name) for name in stored})),
            sha256=reference.sha256,
        ),
        recipe=recipe.model_dump(mode="json"),
        size=SizeRecord(
            parameters=plan.parameters,
            base_bytes=sum(decoder.weights.bytes(name) for name in stored),
            bytes=walk.writer.tensor_bytes,
            quantized_parameters=plan.linear_parameters,
            linear_bits_per_weight=round(8 * walk.packed_bytes / max(1, plan.linear_parameters), 4),
        ),
        modules=walk.modules,
        kv_cache=KVCacheRecord(
            dtype="fp8_e4m3", source="largest magnitude on the calibration text", layers=kv_layers
        )
        if kv_layers
        else None,
        calibration=walk.calibration_text.record,
        quality=measured,
        gate=quality.judge(measured, recipe.quality),
        files=record_files(out),
        versions={
            "lowbit": __version__,
            "python": platform.python_version(),
            **{
                name: version(name) for name in ("torch", "transformers", "compressed-tensors", "safetensors")
            },
        },
        run=clock.record(str(decoder.device)),
    )


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
