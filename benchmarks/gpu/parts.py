"""The parts that a run's time is made of: what the machine can do, a Hessian, one expert, and its operations."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from benchmarks.gpu import seams
from benchmarks.gpu.place import Place, Spent
from benchmarks.gpu.report import Found
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# Rows and inputs of an expert's two weights, gate and up stacked, and how many experts the model has.
EXPERTS: dict[str, tuple[tuple[tuple[int, int], tuple[int, int]], int]] = {
    "Qwen3-30B-A3B": (((1536, 2048), (2048, 768)), 48 * 128),
    "DeepSeek-V3 671B": (((4096, 7168), (7168, 2048)), 58 * 256),
}
TINY_EXPERT = ((256, 128), (128, 128))
CHECKED = 64  # features that a Hessian is checked on, in float64
HESSIAN_ERROR = 1e-5  # relative, of the walk's own way: the products are exact, so only sums round
ROUNDED_ERROR = 2**-8  # where a batch's sum is rounded to bfloat16
TOP = 12


def machine(place: Place) -> Found:
    """What the device and the bus can do at most, for products and for copies."""
    size = 256 if place.tiny else 8192
    wide = torch.randn(size, size, device=place.device)
    narrow = wide.bfloat16()
    host = torch.empty(1 << (20 if place.tiny else 28), dtype=torch.uint8)
    values: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": place.name,
        "bfloat16_tflops": _tflops(size, place.median_ms(lambda: narrow @ narrow)),
        "float32_tflops": _tflops(size, place.median_ms(lambda: wide @ wide)),
        "to_device_gb_s": round(
            host.nbytes / 1e6 / place.median_ms(lambda: host.to(place.device, copy=True)), 1
        ),
    }
    if place.cuda:
        pinned = host.pin_memory()
        taken_ms = place.median_ms(lambda: pinned.to(place.device, non_blocking=True))
        values["to_device_pinned_gb_s"] = round(host.nbytes / 1e6 / taken_ms, 1)
    return Found(values)


def _tflops(size: int, taken_ms: float) -> float:
    return round(2 * size**3 / taken_ms / 1e9, 3)


def hessian(place: Place) -> Found:
    """The ways of computing xᵀx of bfloat16 inputs: milliseconds, and the error against float64."""
    tokens, features = (256, 256) if place.tiny else (16384, 7168)
    inputs = torch.randn(tokens, features, device=place.device).bfloat16()
    sample = inputs[:, :CHECKED].double()
    exact = sample.T @ sample
    values = {}
    for name, way in _ways(inputs, place).items():
        error = (way()[:CHECKED, :CHECKED].double() - exact).norm() / exact.norm()
        values[name] = {"ms": place.median_ms(way), "relative_error": float(error)}
    own = values["as the walk does"]["relative_error"]
    allowed = ROUNDED_ERROR if seams.rounds_products(inputs) else HESSIAN_ERROR
    wrong = (f"the walk's Hessian is off by {own:.1e}",) if not own < allowed else ()
    return Found({"tokens": tokens, "features": features, **values}, wrong)


def _ways(inputs: Tensor, place: Place) -> dict[str, Callable[[], Tensor]]:
    def widened() -> Tensor:
        wide = inputs.float()
        return wide.T @ wide

    def in_tensorfloat() -> Tensor:
        settings: Any = torch.backends.cuda.matmul
        before, settings.fp32_precision = settings.fp32_precision, "tf32"
        try:
            return widened()
        finally:
            settings.fp32_precision = before

    ways = {
        "as the walk does": lambda: seams.hessian_of(inputs) * len(inputs),
        "float32": widened,
    }
    if place.cuda:
        ways["TF32 of widened bfloat16"] = in_tensorfloat
        ways["bfloat16 into float32"] = lambda: torch.mm(inputs.T, inputs, out_dtype=torch.float32)
    return ways


def quantizing(name: str) -> Callable[[Place], Found]:
    """The section of an expert: milliseconds of GPTQ by part, in the blocks of a CPU and in those of a GPU."""

    def run(place: Place) -> Found:
        shapes, experts = EXPERTS[name]
        weights = [_weight(shape, place) for shape in (TINY_EXPERT if place.tiny else shapes)]
        values: dict[str, Any] = {}
        for kind in seams.DEVICES:
            with seams.blocks_of(kind):
                parts: Counter[str] = Counter()
                for weight, of_inputs in weights:
                    parts.update(_parts_ms(weight, of_inputs, place))
            hours = round(parts.total() * experts / 3.6e6, 3)
            by_part = {part: round(taken_ms, 2) for part, taken_ms in parts.items()}
            values[f"blocks for a {kind}"] = {
                "ms": {"all": round(parts.total(), 2)} | by_part,
                f"hours_for_{experts}_experts": hours,
            }
        return Found(values)

    return run


def _weight(shape: tuple[int, int], place: Place) -> tuple[Tensor, Tensor]:
    """A random weight (out, in) and the Hessian of twice as many random inputs as it has columns."""
    inputs = torch.randn(2 * shape[1], shape[1], device=place.device)
    return torch.randn(shape, device=place.device), inputs.T @ inputs / len(inputs)


def _parts_ms(weight: Tensor, of_inputs: Tensor, place: Place) -> dict[str, float]:
    seams.quantize_by_gptq(weight, of_inputs)  # the first call compiles and allocates
    spent = Spent(place)
    with seams.timed(seams.GPTQ_CAUSES, spent), spent.on("rest"):
        seams.quantize_by_gptq(weight, of_inputs)
    return {part: taken_s * 1e3 for part, taken_s in spent.seconds.items()}


def operations(place: Place) -> Found:
    """How many operations, and on a GPU launches, quantizing one expert of 30B-A3B is made of."""
    shapes, _ = EXPERTS["Qwen3-30B-A3B"]
    weights = [_weight(shape, place) for shape in (TINY_EXPERT if place.tiny else shapes)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.cuda else [])]
    with profile(activities=activities) as recorded:
        for weight, of_inputs in weights:
            seams.quantize_by_gptq(weight, of_inputs)
        place.wait()
    counts = Counter({event.key: event.count for event in recorded.key_averages()})
    launches = sum(count for name, count in counts.items() if "LaunchKernel" in name)
    return Found(
        {"launches": launches, "operations": counts.total(), "most_often": dict(counts.most_common(TOP))}
    )
