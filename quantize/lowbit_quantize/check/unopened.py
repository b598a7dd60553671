"""What plain transformers does not open (experts in int8 or in blocks of floats, integers across words), one by one.

Its reader knows the format from `config.json` and the files alone, and nothing of what wrote them. Each linear must be
there as its group says, whole, in its shape, and give the numbers that were measured (a sample of them).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit_core.errors import ModelError
from lowbit_core.manifest import UnopenedRecord
from lowbit_quantize.model.files.unopened_linears import schemes_of
from lowbit_quantize.plan import Plan
from lowbit_quantize.run.journal import UnopenedLinear
from lowbit_quantize.schemes.scheme import sample_of
from lowbit_quantize.schemes.storage.stored_linears import parts_of, stored_codes, unpacked


def unopened_records(plan: Plan) -> list[UnopenedRecord]:
    """What another reader than plain transformers opens, by scheme."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, (scheme, reader) in plan.unopened.items():
        names.setdefault((scheme.name, reader), []).append(name)
    return [
        UnopenedRecord(scheme=scheme, linears=len(found), example=found[0], reader=reader)
        for (scheme, reader), found in names.items()
    ]


def unpacking_problem(out: Path, expected: Mapping[str, UnopenedLinear]) -> str | None:
    """What is wrong with these linears of a checkpoint, in words; None where nothing is."""
    missing, config = dict(expected), json.loads((out / "config.json").read_text(encoding="utf-8"))
    try:
        schemes = schemes_of(config["quantization_config"], expected)
    except ModelError as error:
        return str(error)
    if unnamed := sorted(expected.keys() - schemes.keys()):
        return f"no group of its quantization_config names {unnamed[0]}"
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for linear, parts in _parts(opened.keys(), expected).items():
                tensors = {part: opened.get_tensor(f"{linear}.{part}") for part in parts}
                if problem := _problem(linear, tensors, schemes[linear], missing.pop(linear)):
                    return problem
    if missing:
        return f"{len(missing)} linears are missing, the first is {min(missing)}"
    return None


def _parts(names: Iterable[str], expected: Mapping[str, UnopenedLinear]) -> dict[str, list[str]]:
    """What a file has of each of the linears, by the last parts of the names."""
    found: dict[str, list[str]] = {}
    for name in names:
        linear, _, part = name.rpartition(".")
        if linear in expected and part != "bias":
            found.setdefault(linear, []).append(part)
    return found


def _problem(linear: str, tensors: Mapping[str, Tensor], scheme: Any, expected: UnopenedLinear) -> str | None:
    if tensors.keys() != parts_of(scheme):
        return f"{linear} is stored as {', '.join(sorted(tensors))}, not as {', '.join(sorted(parts_of(scheme)))}"
    codes, wanted = stored_codes(scheme)
    if tensors[codes].dtype != wanted:
        return f"{linear}.{codes} is {tensors[codes].dtype}, its group says {wanted}"
    try:
        weight = unpacked(tensors, scheme)
    except Exception as error:  # whatever odd tensors make of the library's code
        return f"{linear} cannot be unpacked ({' '.join(str(error).split())[:300]})"
    if tuple(weight.shape) != expected.shape:
        return f"{linear} has the shape {tuple(weight.shape)}, {expected.shape} were measured"
    if sample_of(weight.float()) != _rounded(expected.sample, weight.dtype):
        return f"{linear} is unpacked to other numbers than were measured"
    return None


def _rounded(numbers: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Numbers as a reader has them that unpacks to `dtype`."""
    return [float(number) for number in torch.tensor(numbers, dtype=torch.float32).to(dtype)]
