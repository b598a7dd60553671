"""What a finished run says of itself: the manifest, made out of what the walk left behind."""

from collections.abc import Sequence
from datetime import UTC, datetime

from lowbit_core.manifest import (
    BaseModelRecord,
    ExpertsRecord,
    KVCacheRecord,
    Manifest,
    ModuleRecord,
    QualityRecord,
    SizeRecord,
    TrialRecord,
    UnderCalibratedExpert,
)
from lowbit_core.manifest_files import record_files
from lowbit_quantize.check.structure import structure_record
from lowbit_quantize.check.unopened import unopened_records
from lowbit_quantize.check.weights import Base
from lowbit_quantize.passes.prune_experts import PruneExperts
from lowbit_quantize.plan import Plan
from lowbit_quantize.quality import kl
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.run.clock import Clock
from lowbit_quantize.run.companions import Companions
from lowbit_quantize.run.directory import RunDirectory
from lowbit_quantize.run.identity import tool_versions
from lowbit_quantize.run.journal import LayerRecord
from lowbit_quantize.walk.forward import Walk


def manifest_of(
    plan: Plan,
    base: Base,
    beside: Companions,
    walk: Walk,
    calibration: TokenText,
    measured: QualityRecord,
    clock: Clock,
    run: RunDirectory,
) -> Manifest:
    """The manifest of the checkpoint in the output directory, whose other files are all written."""
    reference = plan.reference
    modules = [module for record in walk.layers for module in record.modules]
    modules += [walk.head.module] if walk.head else []
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=BaseModelRecord(
            name=reference.name,
            kind=reference.kind,
            revision=reference.revision,
            model_type=reference.model_type,
            dtype=base.weights.dtypes,
            sha256=reference.sha256,
            remote_code=reference.trust_remote_code,
            dequantized=plan.floats.words if plan.floats and base.weights.dequantized else None,
            carried=sorted(base.rest.carried),
            copied=beside.copied,
            left_out=base.rest.left_out | beside.left_out,
        ),
        recipe=plan.recipe.model_dump(mode="json"),
        size=_size(plan, walk, modules, base.weights.bytes + base.carried_bytes),
        modules=modules,
        unquantized=list(plan.unquantized_linears),
        unquantized_because=dict(plan.unquantized_because),
        unopened=unopened_records(plan),
        kv_cache=_kv_cache(plan, walk.layers),
        experts=_experts(plan, walk.layers),
        structure=structure_record(plan, run.layers.scores if run.layers else {}),
        trial=_trial(plan, run),
        figures={record.layer: record.figures for record in walk.layers if record.figures},
        calibration=calibration.record,
        quality=measured,
        gate=kl.judge(measured, plan.recipe.quality),
        files=record_files(run.out, beside.copied),
        versions=tool_versions(),
        run=clock.record(str(walk.decoder.device)),
    )


def _size(plan: Plan, walk: Walk, modules: Sequence[ModuleRecord], base_bytes: int) -> SizeRecord:
    packed = sum(module.bytes or 0 for module in modules)
    quantized = sum(module.weights or 0 for module in modules)
    return SizeRecord(
        parameters=plan.parameters,
        base_bytes=base_bytes,
        bytes=walk.writer.tensor_bytes,
        quantized_parameters=quantized,
        linear_bits_per_weight=round(8 * packed / max(1, quantized), 4),
    )


def _kv_cache(plan: Plan, layers: Sequence[LayerRecord]) -> KVCacheRecord | None:
    scales = [record.kv_scales for record in layers if record.kv_scales]
    if not scales:
        return None
    source = "largest magnitude on the calibration text, clipped where that rounds better"
    kinds = plan.architecture.kinds
    skipped = [
        number for number, kind in enumerate(kinds) if kind.attention and number not in plan.fp8_layers
    ]
    strategy = plan.recipe.kv_cache.strategy
    return KVCacheRecord(
        dtype="fp8_e4m3", source=source, layers=scales, skip_layers=skipped, strategy=strategy
    )


def _trial(plan: Plan, run: RunDirectory) -> TrialRecord | None:
    passes = [one.name for one in plan.passes if one.on_trial]
    return TrialRecord(passes=passes, **run.trial.model_dump()) if run.trial else None


def _experts(plan: Plan, layers: Sequence[LayerRecord]) -> ExpertsRecord | None:
    if plan.experts is None:
        return None
    pruning = next((one for one in plan.passes if isinstance(one, PruneExperts)), None)
    return ExpertsRecord(
        experts=plan.base_experts,
        kept=plan.experts,
        criterion=pruning.recipe.criterion if pruning else None,
        consolidate=pruning.recipe.consolidate if pruning else None,
        similarity=pruning.recipe.nearness if pruning and pruning.recipe.consolidate else None,
        absorbed_by_layer={r.layer: r.absorbed_by for r in layers if r.absorbed_by is not None},
        saliency_by_layer={r.layer: r.saliency for r in layers if r.saliency is not None},
        tokens_by_layer={r.layer: r.expert_tokens for r in layers if r.expert_tokens is not None},
        kept_by_layer={r.layer: r.kept_experts for r in layers if r.kept_experts is not None},
        under_calibrated=[
            UnderCalibratedExpert(layer=record.layer, expert=expert, tokens=tokens)
            for record in layers
            for expert, tokens in sorted(record.under_calibrated.items())
        ],
    )
