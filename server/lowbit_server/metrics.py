"""Lowbit's own metrics, beside vLLM's on the same `/metrics` (docs/metrics.md lists each one).

Values are collected at scrape time from the objects that own them; nothing here is global.
"""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lowbit_core import __version__
from lowbit_core.manifest import Manifest
from lowbit_core.module_groups import weights_summary
from lowbit_server.engine.memory import DeviceMemory
from lowbit_server.engine.nvml import GpuMemory
from lowbit_server.engine.throughput import Throughput
from lowbit_server.gateway.request_tracker import RequestTracker
from lowbit_server.production import Production
from lowbit_server.report import Service


class LowbitCollector(Collector):
    """Yields each `lowbit_` metric from the current state."""

    def __init__(
        self,
        service: Service,
        throughput: Throughput,
        tracker: RequestTracker,
        memory: Callable[[], Iterable[DeviceMemory]],
        gpus: Callable[[], Iterable[GpuMemory]],
        is_draining: Callable[[], bool],
        production: Production,
    ) -> None:
        self._production = production
        self._gpus = gpus
        self._model = service.model
        self._manifest = service.checkpoint.manifest
        self._facts = service.facts
        self._kv_scales = "unmeasured" if service.proof.scales == "unit" else service.proof.scales
        self._throughput = throughput
        self._tracker = tracker
        self._memory = memory
        self._is_draining = is_draining

    def collect(self) -> Iterator[Metric]:
        """All families, in the order of docs/metrics.md."""
        yield self._gauge(
            "lowbit_generation_tokens_per_second",
            "Generated tokens per second over the last 10 seconds.",
            self._throughput.generation.per_second(),
        )
        yield self._gauge(
            "lowbit_prompt_tokens_per_second",
            "Prompt tokens per second over the last 10 seconds, cached ones included.",
            self._throughput.prompt.per_second(),
        )
        yield self._memory_bytes()
        yield self._nvml_memory_bytes()
        yield self._gauge(
            "lowbit_kv_cache_tokens", "Tokens that the KV cache can hold.", float(self._facts.kv_tokens)
        )
        yield from self._requests()
        yield from self._overhead()
        yield from self._production.families(self._model)
        yield self._build_info()
        yield self._checkpoint_info()
        yield self._layers()
        yield from self._quality()

    def _requests(self) -> Iterator[Metric]:
        seen = self._tracker
        yield self._gauge(
            "lowbit_requests_active", "Admitted requests that have not ended.", float(seen.active)
        )
        yield self._gauge(
            "lowbit_draining",
            "1 while running requests finish before the server stops.",
            float(self._is_draining()),
        )
        for name, documentation, labels, counts in (
            ("lowbit_requests", "Requests that have ended, by outcome.", ["key", "outcome"], seen.outcomes),
            ("lowbit_key_tokens", "Tokens that the engine counted.", ["key", "kind"], seen.tokens),
        ):
            family = CounterMetricFamily(name, documentation, labels=labels)
            for values, count in sorted(counts.items()):
                family.add_metric(list(values), count)
            yield family
        cached = CounterMetricFamily(
            "lowbit_key_cached_tokens", "Prompt tokens that were found in the prefix cache.", labels=["key"]
        )
        for key, count in sorted(seen.cached.items()):
            cached.add_metric([key], count)
        yield cached
        rates = GaugeMetricFamily(
            "lowbit_key_tokens_per_second",
            "Tokens per second of requests that ended in the last 60 seconds.",
            labels=["key", "kind"],
        )
        for values, window in sorted(seen.rates.items()):
            rates.add_metric(list(values), window.per_second())
        yield rates
        rejections = CounterMetricFamily(
            "lowbit_rejections", "Requests refused before the engine saw them.", labels=["reason"]
        )
        for reason, count in sorted(seen.rejections.items()):
            rejections.add_metric([reason], count)
        yield rejections

    def _overhead(self) -> Iterator[Metric]:
        for family in self._tracker.overhead.collect():
            family.samples = [one for one in family.samples if not one.name.endswith("_created")]
            yield family

    def _gauge(self, name: str, documentation: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, documentation, labels=["model"])
        family.add_metric([self._model], value)
        return family

    def _memory_bytes(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "lowbit_memory_bytes",
            "Memory of each device by component: VRAM on a GPU, host memory on the CPU engine.",
            labels=["device", "component"],
        )
        for device in self._memory():
            for component, value in device.by_component().items():
                family.add_metric([device.device, component], float(value))
        return family

    def _nvml_memory_bytes(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "lowbit_nvml_memory_bytes",
            "Memory of each GPU as NVIDIA's driver counts it, whoever uses it.",
            labels=["gpu", "uuid", "kind"],
        )
        for gpu in self._gpus():
            for kind in ("total", "used", "free"):
                family.add_metric([str(gpu.index), gpu.uuid, kind], float(getattr(gpu, kind)))
        return family

    def _build_info(self) -> GaugeMetricFamily:
        labels = {"version": __version__, "vllm": self._facts.vllm, "device": self._facts.device}
        family = GaugeMetricFamily("lowbit_build_info", "What runs; always 1.", labels=list(labels))
        family.add_metric(list(labels.values()), 1.0)
        return family

    def _checkpoint_info(self) -> GaugeMetricFamily:
        manifest = self._manifest
        labels = {
            "model": self._model,
            "base": manifest.base.name if manifest else "",
            "kv_dtype": self._facts.kv_cache_dtype,
            "kv_scales": self._kv_scales,
            **_quality_labels(manifest),
            **(weights_summary(manifest) if manifest else self._unmeasured()),
        }
        family = GaugeMetricFamily(
            "lowbit_checkpoint_info", "The checkpoint in service; always 1.", labels=list(labels)
        )
        family.add_metric(list(labels.values()), 1.0)
        return family

    def _layers(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "lowbit_layers",
            "Layers by their type, how they are quantized, and the kernel that computes them.",
            labels=["layer", "method", "kernel"],
        )
        for kind in self._facts.layers:
            family.add_metric([kind.layer, kind.method or "", kind.kernel or ""], float(kind.count))
        return family

    def _unmeasured(self) -> dict[str, str]:
        return {"scheme": self._facts.quantization or "none", "bits": "", "group_size": "", "methods": ""}

    def _quality(self) -> Iterator[GaugeMetricFamily]:
        if manifest := self._manifest:
            yield self._gauge(
                "lowbit_checkpoint_mean_kld",
                "Mean KL divergence from the base model in nats per token, measured when it was quantized.",
                manifest.quality.mean_kld,
            )
            yield self._gauge(
                "lowbit_checkpoint_top1_agreement",
                "Share of held-out tokens where base and checkpoint rank the same token first.",
                manifest.quality.top1_agreement,
            )


def _quality_labels(manifest: Manifest | None) -> dict[str, str]:
    """To three digits, for people; the exact values are metrics of their own."""
    if manifest is None:
        return {"accepted": "", "mean_kld": "", "top1_agreement": ""}
    return {
        "accepted": str(manifest.gate.accepted).lower(),
        "mean_kld": f"{manifest.quality.mean_kld:.3g}",
        "top1_agreement": f"{manifest.quality.top1_agreement:.3g}",
    }


def exposition(engine_registry: CollectorRegistry, collector: LowbitCollector) -> bytes:
    """One page of text: the engine's metrics, then Lowbit's."""
    ours = CollectorRegistry()
    ours.register(collector)
    return generate_latest(engine_registry) + generate_latest(ours)
