"""`lowbit quantize --dry-run`: what can be known of a run before its first token. Nothing is read but headers and text.

It refuses what a run would refuse, and then says what engines will make of the result.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from lowbit_core.cpu_speeds import KernelSpeed, instructions, of_kernels
from lowbit_core.manifest import UnopenedRecord
from lowbit_quantize.check import effort, forecast
from lowbit_quantize.check.memory import memory_bound_bytes
from lowbit_quantize.check.sharding import PARALLEL_SIZES, obstacles
from lowbit_quantize.check.structure import structure_words
from lowbit_quantize.check.unopened import unopened_records
from lowbit_quantize.check.weights import checked_base, stored_weights
from lowbit_quantize.model.reference import ModelReference, find_model
from lowbit_quantize.plan import Plan, make_plan
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.run.directory import check_disk, refuse_foreign
from lowbit_quantize.schemes.processors.linears import LINEARS, SCALES_OF_HEADS
from lowbit_quantize.schemes.processors.sparsity import gains
from lowbit_quantize.schemes.scheme import KERNELS, Scheme

GIB = 1 << 30
UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
KERNEL_NAMES = {"gpu": "GPU", "cpu": "CPU"}


def dry_run(
    model: str,
    recipe: Recipe,
    gpu_memory_gib: float,
    stream_memory_bytes: int,
    out: Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The report on a model and a recipe; raises what a run into `out` would raise before its first token."""
    reference = find_model(model, trust_remote_code=trust_remote_code)
    return report_on(reference, recipe, gpu_memory_gib, stream_memory_bytes, out)


def report_on(
    reference: ModelReference,
    recipe: Recipe,
    gpu_memory_gib: float,
    stream_memory_bytes: int,
    out: Path | None = None,
) -> dict[str, Any]:
    """`dry_run` on a model that was found; of one on the hub, configuration and tokenizer are enough."""
    plan = make_plan(reference, recipe)
    if out is not None:
        refuse_foreign(out)
    texts = load_texts(recipe.calibration, recipe.quality, reference.tokenizer(), plan.config.vocab_size)
    carried = carried_bytes(plan)
    streams = forecast.streams_bytes(plan, *texts)
    run_disk = forecast.run_disk_bytes(plan, streams, stream_memory_bytes, carried)
    if out is not None:
        check_disk(out, run_disk)
    return {
        "model": reference.name,
        "parameters": plan.parameters,
        "checkpoint_bytes": forecast.disk_bytes(plan, carried),
        "tensor_bytes": forecast.tensor_bytes(plan, carried),
        "run_disk_bytes": run_disk,
        "streams_bytes": streams,
        "memory_bound_bytes": memory_bound_bytes(plan, streams),
        "base_bytes": plan.parameters * forecast.BASE_BYTES,
        "effort": effort.report(plan, *texts),
        "gpu_memory_gib": gpu_memory_gib,
        "experts": plan.experts,
        "structure": structure_words(plan),
        "unopened": [record.model_dump() for record in unopened_records(plan)],
        "schemes": _schemes(plan),
        "sparsity": _sparsity(plan),
        "scales_of_heads": SCALES_OF_HEADS if plan.scales_by_head else None,
        "tensor_parallel": [_serving(plan, size, gpu_memory_gib) for size in PARALLEL_SIZES],
    }


def carried_bytes(plan: Plan) -> int:
    """Check the weights, and count what lies beside the model; a hub model's are not fetched for this."""
    if plan.reference.kind == "hub":
        return 0
    base = checked_base(plan, stored_weights(plan))
    return base.carried_bytes if base else 0


def _serving(plan: Plan, size: int, gpu_memory_gib: float) -> dict[str, Any]:
    served: dict[str, Any] = {
        "ranks": size,
        "weights_bytes_per_rank": forecast.rank_bytes(plan, size),
        "kv_bytes_per_token_per_rank": forecast.kv_bytes_per_token(plan, size),
        "kv_tokens": forecast.kv_tokens(plan, size, gpu_memory_gib * GIB),
        "obstacles": {kernel: obstacles(plan, kernel, size) for kernel in KERNELS},
    }
    if plan.experts:
        served["expert_parallel_obstacles"] = {
            kernel: obstacles(plan, kernel, size, expert_parallel=True) for kernel in KERNELS
        }
    return served


def _schemes(plan: Plan) -> list[dict[str, Any]]:
    """Of each scheme: how many linears have it, where it runs, and how fast on processors like this one."""
    counts = Counter(entry.scheme for entry in plan.modules.values())
    of_experts = {entry.scheme for name, entry in plan.modules.items() if plan.architecture.in_experts(name)}
    here = instructions()
    return [
        {
            "scheme": scheme.name,
            "linears": count,
            "gpus": scheme.gpus,
            "cpu": not scheme.obstacles("cpu"),
            "cpus": _cpus(scheme),
            "vllm": _vllm(scheme),
            "experts": scheme.experts.processors if scheme in of_experts else None,
            "measured_here": [asdict(row) for row in of_kernels(scheme.cpu_kernels, here)],
        }
        for scheme, count in counts.items()
    ]


def _sparsity(plan: Plan) -> list[dict[str, Any]]:
    """Of each pattern of zeros: how many linears get it, by what, and which runtime gains from it."""
    pruners = Counter(entry.pruner for entry in plan.modules.values() if entry.pruner)
    return [
        {
            "sparsity": str(pruner.sparsity),
            "method": pruner.name,
            "linears": count,
            "zeros": pruner.sparsity.zeros,
            "bytes_saved": 0,
            "gains": gains(pruner.sparsity),
        }
        for pruner, count in pruners.items()
    ]


def _cpus(scheme: Scheme) -> str:
    row = LINEARS.get(scheme.name)
    return row.cpus if row else "no CPU" if scheme.obstacles("cpu") else "CPUs"


def _vllm(scheme: Scheme) -> dict[str, Any] | None:
    """vLLM's class for a scheme and its kernels by platform, in its order; None of a scheme that has no row."""
    row = LINEARS.get(scheme.name)
    if row is None:
        return None
    kernels: dict[str, list[str]] = {}
    for kernel in row.kernels:
        kernels.setdefault(kernel.platform, []).append(kernel.name)
    return {"class": row.scheme_class, "lowest_compute_capability": row.lowest / 10, "kernels": kernels}


def _scheme_rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for found in report["schemes"]:
        where = f"{found['cpus']}; GPUs: {found['gpus']}"
        yield found["scheme"], f"{found['linears']} linears; runs on {where}"
        if found["experts"]:
            yield f"{found['scheme']} experts", f"run on {found['experts']}"
        for row in found["measured_here"] if found["cpu"] else ():
            yield f"{found['scheme']} on this CPU", KernelSpeed(**row).in_words()


def _hours(seconds: float) -> str:
    """In the unit that a person would use."""
    return next(f"{seconds / size:.1f} {unit}" for size, unit in UNITS if seconds >= size or size == 1)


def table(report: dict[str, Any]) -> Group:
    """The report for a person."""
    facts = Table(show_header=False, title=report["model"])
    if report["structure"]:
        facts.add_row("structure", report["structure"])
    facts.add_row("checkpoint", f"{report['checkpoint_bytes'] / GIB:.2f} GiB")
    facts.add_row("disk during the run", f"{report['run_disk_bytes'] / GIB:.2f} GiB")
    facts.add_row(
        "memory of the run", f"below {report['memory_bound_bytes'] / GIB:.2f} GiB (on a GPU: there)"
    )
    facts.add_row("read of the base", f"{report['base_bytes'] / GIB:.2f} GiB")
    facts.add_row("time on this processor", f"about {_hours(report['effort']['seconds_here'])}")
    for gpu, seconds in report["effort"]["seconds_of_products_on"].items():
        facts.add_row(
            f"time on one {gpu}", f"{_hours(seconds)} of products (by its maker's figures, not measured)"
        )
    if report["experts"]:
        facts.add_row("experts a layer", str(report["experts"]))
    for record in report["unopened"]:
        facts.add_row("plain transformers", str(UnopenedRecord(**record)))
    for name, words in _scheme_rows(report):
        facts.add_row(name, words)
    for found in report["sparsity"]:
        words = f"{found['linears']} linears by {found['method']}; zeros are stored, so no bytes are saved"
        facts.add_row(f"sparsity {found['sparsity']}", f"{words}; {found['gains']}")
    if report["scales_of_heads"]:
        facts.add_row("FP8 cache, scales of heads", f"read by {report['scales_of_heads']}")
    serving = Table(
        "tensor parallel", "weights a rank", f"KV tokens in {report['gpu_memory_gib']:g} GiB each", "vLLM"
    )
    for row in report["tensor_parallel"]:
        fits = f"{row['kv_tokens']:,}" if row["kv_tokens"] else "weights do not fit"
        serving.add_row(
            str(row["ranks"]), f"{row['weights_bytes_per_rank'] / GIB:.2f} GiB", fits, _verdicts(row)
        )
    return Group(facts, serving)


def _verdicts(row: dict[str, Any]) -> str:
    lines = [f"{KERNEL_NAMES[kernel]}: {_verdict(found)}" for kernel, found in row["obstacles"].items()]
    for kernel, found in row.get("expert_parallel_obstacles", {}).items():
        if found != row["obstacles"][kernel]:
            lines.append(f"{KERNEL_NAMES[kernel]}, expert parallel: {_verdict(found)}")
    return "\n".join(lines)


def _verdict(found: list[str]) -> str:
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"no: {found[0]}{more}" if found else "yes"
