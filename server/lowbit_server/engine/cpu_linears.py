"""Quantized weights that vLLM 0.32 does not run on CPUs, or not on all, told by the groups of `quantization_config`.

The kinds are those of quantize's table of processors (`schemes/processors/linears.py`): a test holds the two against
each other, scheme by scheme. Here they are told by a file's own words, because other tools write such files too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

EIGHT, PACKED_BITS = 8, 4
FOR_PACKED, FOR_FP8 = "W4A16 or W8A8", "FP8_DYNAMIC or W8A8"
Arguments = Mapping[str, Any]  # compressed-tensors' arguments of weights or of inputs


@dataclass(frozen=True)
class Kind:
    """`what`: the numbers in words, with {bits} in it or not. `instead`: schemes that every CPU runs.

    `needs_amx`: a CPU with AMX runs them; others are run by none.
    """

    what: str
    matches: Callable[[Arguments, Arguments, str], bool]
    instead: str
    needs_amx: bool = False

    def words(self, weights: Arguments) -> str:
        """The numbers of a group of this kind."""
        return self.what.format(bits=weights.get("num_bits"))


def _in_blocks(weights: Arguments, _inputs: Arguments, _format: str) -> bool:
    return weights.get("type") == "float" and weights.get("strategy") in ("group", "tensor_group")


def _integers_with_fp8(weights: Arguments, inputs: Arguments, _format: str) -> bool:
    return weights.get("type") == "int" and inputs.get("type") == "float"


def _packed_otherwise(weights: Arguments, _inputs: Arguments, stored: str) -> bool:
    return (
        stored == "pack-quantized" and weights.get("type") == "int" and weights.get("num_bits") != PACKED_BITS
    )


def _static_fp8(_weights: Arguments, inputs: Arguments, _format: str) -> bool:
    # The CPU build lacks the operation that loads such weights, and its other kernel ends at a token.
    return inputs.get("type") == "float" and inputs.get("num_bits") == EIGHT and not inputs.get("dynamic")


def _fp8_blocks(weights: Arguments, _inputs: Arguments, _format: str) -> bool:
    return weights.get("type") == "float" and weights.get("strategy") == "block"


KINDS = (
    Kind("{bits}-bit floats in blocks", _in_blocks, FOR_PACKED),
    Kind("integers with FP8 inputs", _integers_with_fp8, FOR_PACKED),
    Kind("weights of {bits} bits", _packed_otherwise, FOR_PACKED),
    Kind("FP8 weights in blocks", _fp8_blocks, FOR_FP8, needs_amx=True),
    Kind("inputs rounded to FP8 by a static scale", _static_fp8, FOR_FP8),
)


def unfit_kind(group: Arguments) -> Kind | None:
    """The kind of a group's numbers, where not every CPU runs them."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    stored = str(group.get("format"))
    return next((kind for kind in KINDS if weights and kind.matches(weights, inputs, stored)), None)


def groups_of(quantization: Mapping[str, Any]) -> Iterator[Arguments]:
    """The groups of a `quantization_config`; of `quant_method: fp8` in blocks, what they would be."""
    yield from quantization.get("config_groups", {}).values()
    if quantization.get("quant_method") == "fp8" and quantization.get("weight_block_size"):
        fp8 = {"num_bits": EIGHT, "type": "float", "dynamic": True}
        yield {"weights": {**fp8, "strategy": "block"}, "input_activations": {**fp8, "strategy": "group"}}
