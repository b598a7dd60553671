"""What a finished run says of itself: the manifest, made out of what the walk left behind."""

import resource
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit_core.manifest import (
    BaseModelRecord,
    ExpertsRecord,
    KVCacheRecord,
    KVLayerRecord,
    Manifest,
    QualityRecord,
    RunRecord,
    SizeRecord,
    StarvedExpert,
    record_files,
)
from lowbit_quantize import quality
from lowbit_quantize.formats import FORMATS
from lowbit_quantize.identity import tool_versions
from lowbit_quantize.recipe import Recipe

if TYPE_CHECKING:
    from lowbit_quantize.pipeline import Walk


@dataclass
class Clock:
    """Wall and CPU time since it was made, and the process's peak memory."""

    wall: float = 0.0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def record(self, device: str) -> RunRecord:
        """What the run has cost so far."""
        return RunRecord(
            device=device,
            seconds=round(time.monotonic() - self.wall, 2),
            cpu_seconds=round(time.process_time() - self.cpu, 2),
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def manifest_of(walk: "Walk", measured: QualityRecord, clock: Clock, out: Path) -> Manifest:
    """The manifest of the checkpoint in `out`, whose other files are all written."""
    plan, decoder = walk.plan, walk.decoder
    reference, recipe = plan.reference, plan.recipe
    named = map(plan.architecture.published_name, plan.skeleton.state_dict())
    stored = [name for name in named if name in decoder.weights]
    kv_layers = [KVLayerRecord(layer=i, **asdict(scales)) for i, scales in sorted(walk.kv_scales.items())]
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
            quantized_parameters=walk.quantized_parameters,
            linear_bits_per_weight=round(8 * walk.packed_bytes / max(1, walk.quantized_parameters), 4),
        ),
        modules=walk.modules,
        kv_cache=KVCacheRecord(dtype="fp8_e4m3", source=_kv_source(recipe), layers=kv_layers)
        if kv_layers
        else None,
        experts=_experts_record(walk),
        calibration=walk.calibration_text.record,
        quality=measured,
        gate=quality.judge(measured, recipe.quality),
        files=record_files(out),
        versions=tool_versions(),
        run=clock.record(str(decoder.device)),
    )


def _experts_record(walk: "Walk") -> ExpertsRecord | None:
    if not walk.plan.architecture.moe_block:
        return None
    experts, pruning = int(walk.decoder.config.num_experts), walk.plan.pruning
    return ExpertsRecord(
        experts=experts,
        kept=pruning.kept if pruning else experts,
        criterion=pruning.recipe.criterion if pruning else None,
        kept_by_layer=walk.kept_experts,
        router_distillation=walk.router_distillation,
        starved=[
            StarvedExpert(layer=layer, expert=expert, tokens=tokens)
            for (layer, expert), tokens in sorted(walk.starved.items())
        ],
    )


def _kv_source(recipe: Recipe) -> str:
    if FORMATS[recipe.format].carries_kv_scales:
        return "largest magnitude on the calibration text, clipped where that rounds better"
    return f"unit scales: the {recipe.format} format carries none"
