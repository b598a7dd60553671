"""What the page draws: the load of this moment, and what was proven of the checkpoint. For any key, so nothing by key.

`GET /lowbit/live` is small and cheap, because pages ask for it each second; `GET /lowbit/proof` never changes while
the server runs. docs/metrics.md has both shapes.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry

from lowbit_core.checkpoint_page.places import place_of
from lowbit_core.manifest import Manifest, ModuleRecord
from lowbit_core.module_groups import module_groups
from lowbit_server.engine.kv_scales import Scale
from lowbit_server.engine.memory import DeviceMemory
from lowbit_server.engine.throughput import Throughput
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.report import Service, kernels_in_words

VLLM = {  # vLLM's own metrics that are drawn, by the feed's names
    "prompt": "vllm:prompt_tokens_total",
    "generated": "vllm:generation_tokens_total",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "used": "vllm:kv_cache_usage_perc",
}
QUALITY: dict[str, Any] = dict.fromkeys((
    "mean_kld", "kld_stderr", "top1_agreement", "top1_stderr", "perplexity_ratio", "perplexity_ratio_stderr",
    "predictions", "domains", "kv_cache_included", "noise_floor", "kv_cache_alone",
), True) | {"heldout": {"dataset", "num_samples", "max_seq_length", "tokens"}}  # fmt: skip


class Live:
    """The load of this moment; `energy_joules` is what the devices have used since some start, where that is known."""

    def __init__(
        self,
        service: Service,
        throughput: Throughput,
        tracker: RequestTracker,
        registry: CollectorRegistry,
        memory: Callable[[], Iterable[DeviceMemory]],
        is_draining: Callable[[], bool],
        energy_joules: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service, self._throughput, self._tracker = service, throughput, tracker
        self._registry, self._memory, self._is_draining = registry, memory, is_draining
        self._energy_joules = energy_joules
        self._clock, self._began = clock, clock()

    def document(self) -> dict[str, Any]:
        """The JSON of `/lowbit/live`; null is what the engine does not say."""
        seen, energy = _gauges(self._registry), self._energy_joules()
        return {
            "model": self._service.model,
            "status": "draining" if self._is_draining() else "ready",
            "up_s": round(self._clock() - self._began, 3),
            "tokens": {"prompt": seen["prompt"], "generated": seen["generated"]},
            "tokens_per_second": {
                "prompt": self._throughput.prompt.per_second(),
                "generated": self._throughput.generation.per_second(),
            },
            "requests": {
                "active": self._tracker.active, "running": seen["running"], "waiting": seen["waiting"],
            },
            "kv_cache": {"tokens": self._service.facts.kv_tokens, "used": seen["used"]},
            "memory": {device.device: device.by_component() for device in self._memory()},
            **({} if energy is None else {"energy_joules": energy}),
        }  # fmt: skip


def _gauges(registry: CollectorRegistry) -> dict[str, float | None]:
    """Only these metrics of vLLM's are collected; of several engines the sum, or the mean share of their caches."""
    values: dict[str, list[float]] = {name: [] for name in VLLM.values()}
    for family in registry.restricted_registry(VLLM.values()).collect():
        for sample in family.samples:
            values.get(sample.name, []).append(sample.value)
    seen: dict[str, float | None] = {
        name: int(sum(values[metric])) if values[metric] else None for name, metric in VLLM.items()
    }
    shares = values[VLLM["used"]]
    return seen | {"used": sum(shares) / len(shares) if shares else None}


def proof_document(service: Service) -> dict[str, Any]:
    """The JSON of `/lowbit/proof`; what needs a manifest is null for a directory that has none."""
    manifest, facts = service.checkpoint.manifest, service.facts
    return {
        "model": service.model,
        "manifest": _proven(manifest) if manifest else None,
        "kv_scales": {
            "in_force": service.proof.scales,
            "layers": [
                {"layer": one.layer, "k": _mean(one.k_scale), "v": _mean(one.v_scale)}
                for one in facts.kv_scales
                if one.fp8
            ],
        },
        "engine": {
            "vllm": facts.vllm, "device": facts.device, "dtype": facts.dtype, "quantization": facts.quantization,
            "kv_cache_dtype": facts.kv_cache_dtype, "kv_tokens": facts.kv_tokens,
            "max_model_len": facts.max_model_len, "max_num_seqs": facts.max_num_seqs,
            "kernels": kernels_in_words(facts.layers),
        },
    }  # fmt: skip


def _proven(manifest: Manifest) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "created": True, "size": True, "gate": True, "unquantized_because": True, "quality": QUALITY,
        "base": {"name", "kind", "revision", "model_type", "dtype"}, "kv_cache": {"dtype", "source", "skip_layers"},
    }  # fmt: skip
    return {
        **json.loads(manifest.model_dump_json(include=parts)),
        "files": len(manifest.files),
        "unquantized": len(manifest.unquantized),
        "groups": [
            {
                "scheme": group.scheme, "bits": group.bits, "group_size": group.group_size,
                "methods": list(group.methods), "linears": group.linears, "bytes": group.stored_bytes,
                "bits_per_weight": group.bits_per_weight,
            }
            for group in module_groups(manifest)
        ],
        "roles": _roles(manifest.modules),
    }  # fmt: skip


def _roles(modules: Iterable[ModuleRecord]) -> list[dict[str, Any]]:
    """Quantized linears by what they are in a layer; of experts the mean error of a layer's."""
    roles: dict[str, list[tuple[int | None, ModuleRecord]]] = {}
    for module in modules:
        place = place_of(module.name)
        roles.setdefault(place.name, []).append((place.layer, module))
    return [
        {
            "role": role,
            "linears": len(found),
            "schemes": sorted({module.scheme for _, module in found}),
            "layers": _by_layer(found),
        }
        for role, found in roles.items()
    ]


def _by_layer(found: Iterable[tuple[int | None, ModuleRecord]]) -> list[dict[str, Any]]:
    layers: dict[int | None, list[ModuleRecord]] = {}
    for layer, module in found:
        layers.setdefault(layer, []).append(module)
    return [
        {
            "layer": layer,
            "scheme": "+".join(dict.fromkeys(module.scheme for module in some)),
            "error": _finite_mean(module.error for module in some),
        }
        for layer, some in layers.items()
    ]


def _finite_mean(values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _mean(scale: Scale) -> float:
    """A layer's scale, or the mean of its heads'."""
    return sum(scale) / len(scale) if isinstance(scale, tuple) else scale
