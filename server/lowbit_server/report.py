"""What the server says about itself: the checkpoint as it was measured, and the engine as it runs.

`GET /lowbit/checkpoint` answers with the document (docs/metrics.md has its shape).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from lowbit_core import __version__
from lowbit_core.cpu_speeds import KernelSpeed, measured
from lowbit_core.manifest import Manifest
from lowbit_core.module_groups import weights_summary
from lowbit_server.checkpoint import Checkpoint
from lowbit_server.engine.interface import EngineFacts, LayerKind
from lowbit_server.engine.kv_scales import KVProof
from lowbit_server.engine.memory import DeviceMemory


@dataclass(frozen=True)
class Service:
    """One checkpoint being served: what was measured, what runs, and which KV scales are in force."""

    model: str
    checkpoint: Checkpoint
    facts: EngineFacts
    proof: KVProof


def checkpoint_document(service: Service, memory: Iterable[DeviceMemory]) -> dict[str, Any]:
    """The JSON of `/lowbit/checkpoint`; `manifest` is null for a directory that has none."""
    manifest = service.checkpoint.manifest
    return {
        "model": service.model,
        "lowbit": __version__,
        "manifest": manifest_document(manifest) if manifest else None,
        "engine": {
            **asdict(service.facts),
            "kv_scales_in_force": service.proof.scales,
            "memory": {device.device: device.by_component() for device in memory},
        },
    }


def model_card(service: Service) -> dict[str, Any]:
    """The checkpoint in `/v1/models`, beside OpenAI's fields; quality is null where it is unknown."""
    manifest, facts = service.checkpoint.manifest, service.facts
    measured = json.loads(manifest.quality.model_dump_json()) if manifest else {}
    quality = manifest and {
        "mean_kld": measured["mean_kld"],
        "mean_kld_stderr": measured["kld_stderr"],
        "noise_floor_mean_kld": (measured["noise_floor"] or {}).get("mean_kld"),
        "top1_agreement": measured["top1_agreement"],
        "top1_agreement_stderr": measured["top1_stderr"],
        "perplexity_ratio": measured["perplexity_ratio"],
        "perplexity_ratio_stderr": measured["perplexity_ratio_stderr"],
        "accepted": manifest.gate.accepted,
    }
    return {
        "base": manifest.base.name if manifest else None,
        "weights": weights_summary(manifest) if manifest else None,
        "bytes": manifest.size.bytes if manifest else None,
        "quantization": facts.quantization,
        "kv_cache_dtype": facts.kv_cache_dtype,
        "kv_scales": service.proof.scales,
        "quality": quality,
    }


def kv_scales_in_words(service: Service) -> str:
    """One line for the log: which KV scales are in force."""
    checkpoint, proof = service.checkpoint, service.proof
    if proof.scales == "checkpoint":
        return f"KV scales: all {proof.layers} layers run with the checkpoint's"
    if proof.scales == "unused":
        return f"KV scales: not in use, the cache is {service.facts.kv_cache_dtype}"
    method = checkpoint.quantization.get("quant_method", "unquantized")
    return (
        f"KV scales: this {method} checkpoint carries none; the FP8 cache of all {proof.layers} layers "
        "runs with scale 1, which was not measured"
    )


def kernels_in_words(layers: Iterable[LayerKind]) -> list[str]:
    """A line for each method and the kernel that computes it: how many layers, and of which types."""
    lines = []
    for method, kernel in dict.fromkeys((kind.method, kind.kernel) for kind in layers if kind.kernel):
        of_it = [kind for kind in layers if (kind.method, kind.kernel) == (method, kernel)]
        types = ", ".join(dict.fromkeys(kind.layer for kind in of_it))
        count = sum(kind.count for kind in of_it)
        lines.append(f"{kernel} computes {count} layers ({types}; {method or 'unquantized'})")
    return lines


def slower_than_bf16(
    layers: Iterable[LayerKind], instructions: str | None, speeds: Iterable[KernelSpeed] | None = None
) -> list[str]:
    """A line for each kernel in use that was measured to be slower than bf16 on such a processor."""
    rows = [row for row in (measured() if speeds is None else speeds) if row.instructions == instructions]
    used = {kind.kernel for kind in layers if kind.kernel}
    fast = dict.fromkeys(row.scheme for row in rows if not row.slower)
    instead = f"; faster here: {', '.join(fast)}" if fast else ""
    return [
        f"{row.scheme} by {row.kernel} is slower than bf16 here under some loads: {row.in_words()}{instead}"
        for row in rows
        if row.slower and row.kernel in used
    ]


def manifest_document(manifest: Manifest) -> dict[str, Any]:
    """The manifest without its longest parts: each module, each file, the whole recipe.

    Numbers that are not finite are strings, as in the file, because JSON has none.
    """
    parts = {"format_version", "created", "size", "kv_cache", "quality", "gate", "versions"}
    document = json.loads(manifest.model_dump_json(include=parts))
    base = manifest.base.model_dump(mode="json", exclude={"sha256"})
    return {**document, "base": base, "weights": weights_summary(manifest)}
