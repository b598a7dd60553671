"""What plain transformers does not open (experts in int8 or in blocks of floats), opened by compressed-tensors' codec.

The codec knows the format from `config.json` and the files alone, and nothing of what wrote them. Each linear must be
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
from lowbit_quantize.model.files.unopened_experts import READER, parts_of, schemes_of, unpacked
from lowbit_quantize.plan import Plan
from lowbit_quantize.run.journal import UnopenedLinear
from lowbit_quantize.schemes.scheme import sample_of


def unopened_records(plan: Plan) -> list[UnopenedRecord]:
    """What another reader than plain transformers opens, by scheme."""
    names: dict[str, list[str]] = {}
    for name, scheme in plan.unopened.items():
        names.setdefault(scheme.name, []).append(name)
    return [
        UnopenedRecord(scheme=scheme, linears=len(found), example=found[0], reader=READER)
        for scheme, found in names.items()
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
        if linear in expected:
            found.setdefault(linear, []).append(part)
    return found


def _problem(linear: str, tensors: Mapping[str, Tensor], scheme: Any, expected: UnopenedLinear) -> str | None:
    if tensors.keys() != parts_of(scheme):
        return f"{linear} is stored as {', '.join(sorted(tensors))}, not as {', '.join(sorted(parts_of(scheme)))}"
    codes = tensors.get("weight")  # packed ones are words of any number
    if codes is not None and codes.dtype != scheme.weights.pytorch_dtype():
        return f"{linear}.weight is {codes.dtype}, its group says {scheme.weights.pytorch_dtype()}"
    try:
        weight = unpacked(tensors, scheme)
    except Exception as error:  # whatever odd tensors make of the library's code
        return f"{READER} does not unpack {linear} ({' '.join(str(error).split())[:300]})"
    if tuple(weight.shape) != expected.shape:
        return f"{linear} has the shape {tuple(weight.shape)}, {expected.shape} were measured"
    if sample_of(weight.float()) != _rounded(expected.sample, weight.dtype):
        return f"{READER} unpacks {linear} to other numbers than were measured"
    return None


def _rounded(numbers: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Numbers as a reader has them that unpacks to `dtype`."""
    return [float(number) for number in torch.tensor(numbers, dtype=torch.float32).to(dtype)]
