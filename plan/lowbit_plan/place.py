"""Where a model is to be served: what of a processor decides which schemes run, and how its memory is counted."""

from dataclasses import dataclass
from pathlib import Path

from lowbit_core.cpu_speeds import CPUINFO, instructions, lacks_zentorch, processor
from lowbit_core.kv_cache import CPU_RUNTIME_BYTES, bytes_for, tokens_that_fit
from lowbit_plan.cards import Card, find_card
from lowbit_plan.profile import this_machine
from lowbit_quantize.check import forecast
from lowbit_quantize.plan import Plan
from lowbit_quantize.schemes.processors.linears import LINEARS

FP8_CACHE_CPUS = (
    "amx_int8",
    "avx512_bf16",
    "avx512_vnni",
    "avx512f",
)  # vLLM's attention on CPUs, `_get_attn_isa`
FP8_CACHE_CAPABILITY = 89  # of NVIDIA's; below, what reads FP8 depends on the attention backend
FP8_CPU = (
    "FP8_DYNAMIC",
    "FP8",
    "FP8_BLOCK",
)  # run on CPUs to be proven, not to be served: ten times slower than bf16


@dataclass(frozen=True)
class Place:
    """This machine's CPU, or a card. `share` of its memory is used; `runtime` goes beside weights and cache."""

    name: str
    card: Card | None
    share: float
    runtime: int
    set_of_instructions: str | None = None
    zentorch: bool = False

    def runs(self, scheme: str) -> bool:
        """Whether vLLM has a kernel for linears of this scheme that is meant to be served with."""
        if self.card is not None:
            return self.card.kernel(scheme) is not None
        row = LINEARS.get(scheme)
        return row is not None and bool(row.cpu_kernels) and scheme not in FP8_CPU

    def runs_experts(self, plan: Plan) -> bool:
        """Whether it runs the routed experts of a plan as they are stored."""
        schemes = {entry.scheme for name, entry in plan.modules.items() if plan.architecture.in_experts(name)}
        if self.card is None:
            return not schemes or self.set_of_instructions == "amx_int8" or self.zentorch
        return all(scheme.experts.misfit is None for scheme in schemes)

    def caches_fp8(self, plan: Plan) -> bool:
        """Whether it keeps keys and values in FP8."""
        if plan.architecture.latent_cache or not plan.architecture.kv_scales:
            return False
        if self.card is None:
            return self.set_of_instructions in FP8_CACHE_CPUS
        return self.card.capability is None or self.card.capability >= FP8_CACHE_CAPABILITY

    def kv_bytes(self, plan: Plan, streams: int, context: int) -> int:
        """The least cache that holds so many streams of this context."""
        per_token = forecast.kv_bytes_per_token(plan, 1)
        if self.card is None:
            return bytes_for(streams, context, per_token)
        return streams * -(-context // forecast.BLOCK_TOKENS) * forecast.BLOCK_TOKENS * per_token

    def kv_tokens(self, plan: Plan, weights: int, memory: int) -> int:
        """Tokens that fit beside the weights into so much memory; 0 where these do not."""
        if self.card is not None:
            return forecast.kv_tokens(plan, 1, memory)
        left = int(self.share * memory) - weights - self.runtime
        return tokens_that_fit(max(0, left), forecast.kv_bytes_per_token(plan, 1))


def find_place(name: str, cpuinfo: Path = CPUINFO) -> Place:
    """`cpu`, or a card by its name; raises ConfigError for neither."""
    if name.casefold() == "cpu":
        zentorch = this_machine()["zentorch"] == "yes" and "AMD" in processor(cpuinfo)
        return Place(
            f"this machine ({processor(cpuinfo)})", None, 1.0, CPU_RUNTIME_BYTES, instructions(cpuinfo),
            zentorch=zentorch and not lacks_zentorch(cpuinfo),
        )  # fmt: skip
    card = find_card(name)
    return Place(card.name, card, forecast.USABLE, forecast.OVERHEAD_BYTES)
