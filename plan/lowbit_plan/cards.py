"""Cards by their makers' figures: memory, bandwidth, and dense operations a second by the numbers that are multiplied.

`cards.json` has a row for each, with its data sheet. Figures with sparsity are halved. Nothing here is measured: a
product takes the longer of moving its bytes at `SHARE_OF_BANDWIDTH` and computing at `SHARE_OF_RATE`, and
`LAUNCH_S` more for each kernel. The share of bandwidth and the time to launch are those of AIConfigurator's tables
(NVIDIA, 2026, `systems/*.yaml`); the share of rates and the engine's step are assumptions.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lowbit_core.errors import ConfigError
from lowbit_core.names import did_you_mean
from lowbit_plan.work import Attention, Product, RoutedExperts, steps_of
from lowbit_quantize.schemes.processors.kernels import EMULATED, UNROUNDED, EngineKernel, Platform
from lowbit_quantize.schemes.processors.linears import LINEARS

SHARE_OF_BANDWIDTH = 0.8
SHARE_OF_RATE = 0.6
LAUNCH_S = 3e-6
STEP_S = 1e-3  # scheduling, sampling, the way to the client
KERNELS_A_LAYER = 5  # beside products and attention: norms, rotation, activation, cache
TYPES = {"bf16": "bfloat16", "int8": "int8", "fp8": "FP8", "fp4": "FP4"}


@dataclass(frozen=True)
class Card:
    """Bytes, bytes a second, and operations a second, dense, by kind of number (`TYPES`); None where it has none.

    `capability` is NVIDIA's compute capability times ten; None of AMD's.
    """

    name: str
    platform: Platform
    capability: int | None
    memory: int
    bandwidth: float
    rates: dict[str, float | None]
    source: str

    def kernel(self, scheme: str) -> EngineKernel | None:
        """vLLM's first kernel for a scheme that needs nothing beside vLLM here and does not emulate; None for none."""
        row = LINEARS.get(scheme)
        if row is None:
            return None
        taken = row.on(self.platform) if self.capability is None else row.on_nvidia(self.capability)
        return next((one for one in taken if one.how != EMULATED and self._has(one)), None)

    def _has(self, kernel: EngineKernel) -> bool:
        """Whether a kernel needs nothing beside vLLM on this card."""
        return not kernel.needs or (self.capability is None and "CDNA3" in kernel.needs)

    def rate(self, scheme: str | None) -> float:
        """Operations a second of a scheme's products."""
        kernel = None if scheme is None else self.kernel(scheme)
        rounds = kernel is not None and kernel.how != UNROUNDED
        kind = _multiplied(scheme) if rounds and scheme else "bf16"
        return SHARE_OF_RATE * (self.rates.get(kind) or self.rates["bf16"] or 0.0)

    def product_s(self, product: Product, tokens: int) -> float:
        """Seconds of one product with so many tokens."""
        moved = product.bytes + 2 * tokens * (product.inputs + product.outputs)
        rate = self.rate(product.scheme.name if product.scheme else None)
        return (
            max(moved / (SHARE_OF_BANDWIDTH * self.bandwidth), product.operations(tokens) / rate) + LAUNCH_S
        )

    def attention_s(self, one: Attention, streams: int, queries: int, context: int) -> float:
        """Seconds of one layer's attention."""
        moved = streams * one.cache_bytes(context) / (SHARE_OF_BANDWIDTH * self.bandwidth)
        return max(moved, streams * one.operations(queries, context) / self.rate(None)) + LAUNCH_S

    def experts_s(self, experts: RoutedExperts, tokens: int) -> float:
        """Seconds of a layer's routed experts."""
        moved = experts.bytes_read(tokens) / (SHARE_OF_BANDWIDTH * self.bandwidth)
        scheme = experts.products[0].scheme
        rate = self.rate(scheme.name if scheme else None)
        return max(moved, experts.operations(tokens) / rate) + len(experts.products) * LAUNCH_S

    def beside_s(self, layers: int, streams: int, queries: int) -> float:
        """Seconds beside products and attention: of a token of all streams, or of a prompt."""
        return steps_of(queries) * (STEP_S + layers * KERNELS_A_LAYER * LAUNCH_S)


def _multiplied(scheme: str) -> str:
    """The kind of number that a scheme's kernels multiply."""
    if scheme in ("W8A8", "W4A8"):
        return "int8"
    if scheme.startswith("FP8") or scheme in ("MXFP8", "W4AFP8"):
        return "fp8"
    return "fp4" if scheme in ("NVFP4", "MXFP4") else "bf16"


@cache
def cards() -> dict[str, Card]:
    """Every card, by its name."""
    rows = json.loads(files(__package__).joinpath("cards.json").read_text(encoding="utf-8"))
    return {
        row["name"]: Card(
            row["name"], row["platform"], row["capability"], int(row["memory_gb"] * 1e9),
            row["bandwidth_gb_s"] * 1e9,
            {kind: rate and rate * 1e12 for kind, rate in row["dense_tflops"].items()}, row["source"],
        )
        for row in rows
    }  # fmt: skip


def find_card(name: str) -> Card:
    """The card of this name, in any case; raises ConfigError."""
    known = {one.casefold().replace(" ", ""): card for one, card in cards().items()}
    found = known.get(name.casefold().replace(" ", "").replace("-", "").replace("_", ""))
    if found is None:
        names = ["cpu", *cards()]
        raise ConfigError(
            f"--on {name}: not known; {did_you_mean(name, names)}allowed are {', '.join(names)}"
        )
    return found
