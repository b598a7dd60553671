"""The sizing table of docs/deploy.md is what its formula gives."""

import math
import re

from tests.helm.chart import ROOT

GIB = 1 << 30
OVERHEAD_GIB = 2.0
USABLE = 0.9
GPUS_GB = (24, 48, 80)
COUNTS = (1, 2, 4, 8, 16)


def rows() -> list[list[str]]:
    text = (ROOT / "docs" / "deploy.md").read_text().split("## Sizing")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if re.match(r"\| [A-Z]", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def weights_gib(linears_b: float, other_b: float, bits: int) -> float:
    per_linear = 2.0 if bits == 16 else (bits + 16 / 128) / 8
    return (linears_b * per_linear + other_b * 2) * 1e9 / GIB


def smallest_gpus(needed_gib: float) -> str:
    for count in COUNTS:
        for size in GPUS_GB:
            if needed_gib / count + OVERHEAD_GIB <= USABLE * size * 1e9 / GIB:
                return f"{count} x {size} GB"
    return "more"


def test_every_row_follows_from_the_formula() -> None:
    found = rows()
    assert len(found) >= 10
    for model, linears, other, layers, kv_heads, head_dim, bits, tokens, weights, kv, gpu in found:
        kv_bits = 2 if bits == "16" else 1
        expected_kv = 2 * int(layers) * int(kv_heads) * int(head_dim) * kv_bits
        expected_kv_gib = expected_kv * int(tokens.replace(",", "")) / GIB
        expected_weights = weights_gib(float(linears), float(other), int(bits))
        assert math.isclose(float(weights), expected_weights, abs_tol=0.051), model
        assert math.isclose(float(kv), expected_kv_gib, abs_tol=0.051), model
        assert gpu == smallest_gpus(expected_weights + expected_kv_gib), model
