"""Methods that run inside vLLM's worker processes, called by name through `collective_rpc`.

vLLM mixes this class into its own worker (`worker_extension_cls`), so every name starts with `lowbit_` and
every result is plain JSON. They read and change nothing. Attributes of layers are read by name, because the classes
differ between backends and `_k_scale` does not.

Importing this module requests AMX from the system on CPUs that have it: vLLM's 4-bit matrix product uses AMX tiles
without requesting them, and a worker in which nothing else has done so ends with SIGILL at the first tile. It also
has the CPU engine round what it writes to an FP8 cache (`cpu_kv_cache.py`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.mem_utils import MemorySnapshot

from lowbit_server.engine.cpu_kv_cache import round_to_nearest
from lowbit_server.engine.memory import host_memory_bytes

if torch.cpu._is_amx_tile_supported():
    torch.cpu._init_amx()
if current_platform.is_cpu():
    round_to_nearest()

KERNELS = ("kernel", "moe_kernel", "fp8_linear")  # what schemes call what computes
LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\b")


class WorkerExtension:
    """Methods added to vLLM's worker."""

    def lowbit_kv_scales(self) -> list[dict[str, Any]]:
        """Each attention layer's KV scales and cache dtype, as its kernels read them."""
        layers = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        return [_kv_scales(name, layer) for name, layer in layers.items() if hasattr(layer, "_k_scale_float")]

    def lowbit_input_scales(self) -> list[dict[str, Any]]:
        """The static scale of each layer's inputs, as its kernel reads it, and the linears that it is made of.

        AMD's older FP8 reads the same bits as half the value, so vLLM doubles the scales there.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        fused = getattr(model, "packed_modules_mapping", {})
        factor = 2 if current_platform.is_fp8_fnuz() else 1
        found = ((name, getattr(module, "input_scale", None)) for name, module in model.named_modules())
        return [
            {"linears": _linears(name, fused), "scale": float(torch.as_tensor(scale).max()) / factor}
            for name, scale in found
            if scale is not None
        ]

    def lowbit_memory(self) -> dict[str, Any]:
        """Bytes that this worker holds by component, and free and total bytes of its device."""
        runner = self.model_runner  # type: ignore[attr-defined]
        model = runner.get_model()
        weights = _storage_bytes([*model.parameters(), *model.buffers()])
        kv_cache = _storage_bytes(_flatten(runner.kv_caches))
        return {
            "device": _device_name(self.device, self.parallel_config),  # type: ignore[attr-defined]
            "weights": weights,
            "kv_cache": kv_cache,
            **_device_memory(self, weights + kv_cache),
        }

    def lowbit_layers(self) -> list[dict[str, Any]]:
        """How many layers of each type are quantized how, and which kernel or attention backend computes them.

        In a mixed checkpoint layers of one type, for example `QKVParallelLinear`, may have several methods.
        """
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        counts = Counter(kind for module in model.modules() if (kind := _kind(module)) is not None)
        return [
            {"layer": layer, "method": method, "kernel": kernel, "count": count}
            for (layer, method, kernel), count in counts.items()
        ]


def _linears(name: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in fused.get(leaf, [leaf])]


def _kind(module: Any) -> tuple[str, str | None, str | None] | None:
    """Type of layer, quantization method, kernel; None for what is no layer with weights or a cache."""
    method, implementation = getattr(module, "quant_method", None), getattr(module, "impl", None)
    if method is None and implementation is None:
        return None
    chosen = getattr(module, "scheme", None) or method
    kernel = _kernel(chosen, method) or implementation
    return type(module).__name__, _type_name(chosen), _type_name(kernel)


def _type_name(thing: Any) -> str | None:
    return None if thing is None else type(thing).__name__


def _kernel(*owners: Any) -> Any:
    found = (getattr(owner, name, None) for owner in owners for name in KERNELS)
    return next((kernel for kernel in found if kernel is not None), None)


def _kv_scales(name: str, layer: Any) -> dict[str, Any]:
    found = LAYER_NUMBER.search(name)
    return {
        "layer": int(found[1]) if found else -1,
        "k_scale": _scale_in_force(name, layer, "_k_scale"),
        "v_scale": _scale_in_force(name, layer, "_v_scale"),
        "kv_dtype": str(layer.kv_cache_dtype),
    }


def _scale_in_force(name: str, layer: Any, attribute: str) -> float | list[float]:
    """GPU kernels read the tensor and CPU kernels the float: where the two differ, no one scale is in force.

    A list where each head has a scale, of which vLLM takes the largest as the float.
    """
    tensor, number = getattr(layer, attribute), float(getattr(layer, f"{attribute}_float"))
    if float(tensor.max()) != number:
        raise RuntimeError(
            f"{name}: {attribute} is {float(tensor.max())} on the device and {number} on the host"
        )
    by_head = getattr(getattr(layer, "quant_method", None), "quant_config", None)
    scheme = getattr(by_head, "kv_cache_scheme", None) or {}
    return [float(one) for one in tensor.flatten()] if scheme.get("strategy") == "attn_head" else number


def _device_name(device: Any, parallel: Any) -> str:
    """`cuda:0`, or `node1/cuda:0` with several nodes, each of which counts its devices from 0."""
    return f"node{parallel.node_rank}/{device}" if parallel.nnodes > 1 else str(device)


def _device_memory(worker: Any, weights_and_cache: int) -> dict[str, int | None]:
    """Free and total bytes. On a GPU activations are the allocator's peak less weights, cache and graphs."""
    if worker.device.type == "cpu":
        free, total = host_memory_bytes()
        return {"free": free, "total": total, "graphs": None, "activation_peak": None}
    snapshot = MemorySnapshot(device=worker.device)
    graphs = int(getattr(worker, "cudagraph_memory_estimate", 0))
    return {
        "free": int(snapshot.free_memory),
        "total": int(snapshot.total_memory),
        "graphs": graphs,
        "activation_peak": max(0, int(snapshot.torch_peak) - weights_and_cache - graphs),
    }


def _storage_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the distinct storages: tied weights and cache views count once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _flatten(caches: Any) -> Iterator[Any]:
    if isinstance(caches, (list, tuple)):
        for cache in caches:
            yield from _flatten(cache)
    else:
        yield caches
