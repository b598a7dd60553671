"""How long vLLM's own kernels take on this CPU: a program that reads shapes from stdin and writes seconds to stdout.

    python -m lowbit_server.engine.kernel_times < request.json > times.json

The request is an object of two lists. A row of `products` has `inputs`, `outputs`, `tokens` and `quantization`, the
configuration of a checkpoint whose linears are of one scheme (null: bfloat16); one of `attention` has `heads`,
`kv_heads`, `head_dim`, `fp8`, `streams`, `queries` and `context`. The answer has the seconds of one call for each
row, in order, null where vLLM refuses the shape, and what was measured with.

A product is one of vLLM's linear layers, built, prepared and called as in a model, so that vLLM chooses the kernel.
Copies of it lie in more memory than caches hold, and each call is of the next one, as in a model of many layers.
Threads and the cores that they are bound to are the engine's: what measures is started as its workers are.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.version import __version__ as vllm_version

from lowbit_core.kv_cache import BLOCK_TOKENS

BOUND = "--bound"  # this process has the threads of a worker
EVICT_BYTES = 128 << 20  # copies lie in about so much memory
MOST_COPIES = 64
WEIGHT_BYTES, CODE_BYTES = 2, 0.75  # of a number: bfloat16, and a quantized one, about
LEAST_CALLS, LEAST_S = 8, 0.25  # of each row
QUANTILE = 0.1  # of calls' seconds: what else runs on the machine makes some longer, none shorter
MOST_S = 6.0  # of a row, where one call takes long
STREAM_BYTES = 256 << 20  # of each of two tensors that are copied, for the bandwidth
REFUSALS = (ValueError, RuntimeError, AssertionError, NotImplementedError)  # vLLM's, where it has no kernel

Row = Mapping[str, Any]


def main() -> None:
    request = sys.stdin.read()
    if BOUND in sys.argv:
        sys.stdout.write(json.dumps(measure(json.loads(request))) + "\n")
        return
    with OMPProcessManager(VllmConfig()).configure_omp_envs(0, 0):
        command = [sys.executable, "-m", "lowbit_server.engine.kernel_times", BOUND]
        sys.exit(subprocess.run(command, input=request, text=True, check=False).returncode)


def measure(request: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The answer to a request, measured by this process's threads."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.inference_mode(), _as_in_a_worker():
        return {
            "engine": vllm_version,
            "threads": torch.get_num_threads(),
            "bandwidth": _bandwidth(),
            "products": _products_s(request["products"]),
            "attention": [_attention_s(row) for row in request["attention"]],
        }


@contextmanager
def _as_in_a_worker() -> Iterator[None]:
    """vLLM's layers ask for a configuration and for groups of ranks; this process is the only one."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{Path(folder) / 'ranks'}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield


def _bandwidth() -> float:
    """Bytes a second that are read and written while one tensor is copied into another (McCalpin's STREAM, 1995)."""
    source = torch.zeros(STREAM_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * STREAM_BYTES / _call_s([lambda: target.copy_(source)])


def _products_s(rows: Sequence[Row]) -> list[float | None]:
    """Of each row; layers are built once for all rows of one matrix."""
    seconds: list[float | None] = [None] * len(rows)
    matrices: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        key = json.dumps([row["inputs"], row["outputs"], row["quantization"]])
        matrices.setdefault(key, []).append(place)
    for places in matrices.values():
        row = rows[places[0]]
        size = row["inputs"] * row["outputs"] * (CODE_BYTES if row["quantization"] else WEIGHT_BYTES)
        try:
            layers = [_linear(row) for _ in range(_copies(size))]
        except REFUSALS as error:
            _refused(row, error)
            continue
        for place in places:
            tokens = torch.randn(rows[place]["tokens"], row["inputs"])
            seconds[place] = _call_s([_call(layer, tokens) for layer in layers])
    return seconds


def _call(layer: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(tokens)


def _linear(row: Row) -> torch.nn.Module:
    quantization = row["quantization"]
    layer: torch.nn.Module = ReplicatedLinear(
        row["inputs"],
        row["outputs"],
        bias=False,
        quant_config=CompressedTensorsConfig.from_config(dict(quantization)) if quantization else None,
        prefix="linear",
    )
    for name, parameter in layer.named_parameters():
        if name == "weight_shape":
            parameter.copy_(torch.tensor([row["outputs"], row["inputs"]]))
        elif parameter.is_floating_point() and parameter.element_size() > 1:
            parameter.fill_(0.01)
        else:  # codes: any bits are some
            parameter.view(torch.uint8).random_(0, 64)
    layer.quant_method.process_weights_after_loading(layer)  # type: ignore[operator, union-attr]
    return layer


def _attention_s(row: Row) -> float | None:
    """One layer's attention, keys and values in the cache already."""
    dtype = "fp8" if row["fp8"] else "auto"
    streams, queries, context = row["streams"], row["queries"], row["context"]
    blocks = -(-context // BLOCK_TOKENS)
    block_bytes = 2 * row["kv_heads"] * BLOCK_TOKENS * row["head_dim"] * (1 if row["fp8"] else 2)
    copies = _copies(streams * blocks * block_bytes)
    try:
        isa = _get_attn_isa(torch.bfloat16, BLOCK_TOKENS, row["head_dim"], dtype)
        cache = torch.zeros(
            copies * streams * blocks,
            row["kv_heads"],
            2 * BLOCK_TOKENS,
            row["head_dim"],
            dtype=torch.uint8 if row["fp8"] else torch.bfloat16,
        )
        tables = torch.arange(copies * streams * blocks, dtype=torch.int32).view(copies, streams, blocks)
        lengths = torch.full((streams,), context, dtype=torch.int32)
        starts = torch.arange(0, streams * queries + 1, queries, dtype=torch.int32)
        shared = {
            "num_reqs": streams, "num_heads": row["heads"], "num_kv_heads": row["kv_heads"],
            "head_dim": row["head_dim"], "seq_lens": lengths, "dtype": torch.bfloat16, "query_start_loc": starts,
            "causal": True, "sliding_window_size": -1, "isa": isa, "enable_kv_split": True, "kv_cache_dtype": dtype,
        }  # fmt: skip
        metadata = ops.cpu_attn_get_scheduler_metadata(**shared)
        query = torch.randn(streams * queries, row["heads"], row["head_dim"])
        keys, values = cache.chunk(2, dim=2)

        def attend(table: torch.Tensor) -> Callable[[], object]:
            return lambda: ops.cpu_attention_with_kv_cache(
                query, keys, values, torch.empty_like(query), starts, lengths, row["head_dim"] ** -0.5, True, None,
                -1, table, 0, metadata, None, kv_cache_dtype=dtype,
            )  # fmt: skip

        return _call_s([attend(table) for table in tables])
    except REFUSALS as error:
        _refused(row, error)
        return None


def _refused(row: Row, error: Exception) -> None:
    """Say that vLLM has no kernel for it here, and why."""
    shape = {key: value for key, value in row.items() if key != "quantization"}
    sys.stderr.write(f"no kernel for {shape}: {' '.join(str(error).split())[:200]}\n")


def _copies(size: float) -> int:
    return max(1, min(MOST_COPIES, round(EVICT_BYTES / size)))


def _call_s(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of a call, a low quantile over calls in turn; the first of all warms up."""
    calls[0]()
    seconds: list[float] = []
    began = time.perf_counter()
    for call in cycle(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
        passed = time.perf_counter() - began
        if passed > MOST_S or (len(seconds) >= LEAST_CALLS and passed > LEAST_S):
            return float(torch.tensor(seconds, dtype=torch.float64).quantile(QUANTILE))
    raise AssertionError


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main()
