"""How fast the engine's CPU kernels are beside bf16, as measured by benchmarks/schemes on the processors we had.

What decides is the set of instructions: a processor without bf16's own multiplies computes it in float32.
`measured.json` is written by benchmarks/schemes/table.py and by nobody else.
"""

import json
import platform
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# The first set that a processor has, best first, and its name.
SETS = {
    "amx_int8": "AMX",
    "avx512_bf16": "AVX-512 with BF16",
    "avx512_vnni": "AVX-512 with VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
ZENTORCH_EXTRA = "pip install with the extra cpu-amd"
NOISE = 0.03  # less than this is not called slower


@dataclass(frozen=True)
class KernelSpeed:
    """Tokens per second over bf16's: of a prompt, and of output by number of streams; `model` says of what."""

    scheme: str
    kernel: str
    instructions: str
    processor: str
    model: str
    prompt: float
    output: dict[int, float]

    @property
    def slower(self) -> bool:
        """Whether something of it is slower than bf16."""
        return min(self.prompt, *self.output.values()) < 1 - NOISE

    def in_words(self) -> str:
        """The ratios, for a person."""
        outputs = ", ".join(f"{ratio:.2f} with {_streams(count)}" for count, ratio in self.output.items())
        return (
            f"prompts at {self.prompt:.2f} of bf16's tokens/s, output at {outputs} "
            f"({self.model} on {SETS[self.instructions]})"
        )


def lacks_zentorch(cpuinfo: Path = CPUINFO, *, installed: bool | None = None) -> bool:
    """Whether vLLM would have faster kernels on this AMD processor with zentorch, which is not there."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return False
    there = find_spec("zentorch") is not None if installed is None else installed
    return "AuthenticAMD" in text and "avx512" in text and not there


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


def instructions(cpuinfo: Path = CPUINFO) -> str | None:
    """The best set of instructions of this processor, a key of SETS; None where it has none of them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return next((name for name in SETS if name in flags), None)


def processor(cpuinfo: Path = CPUINFO) -> str:
    """The maker's name of it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@cache
def measured() -> tuple[KernelSpeed, ...]:
    """Every row of the table."""
    rows = json.loads(files(__package__).joinpath("measured.json").read_text(encoding="utf-8"))
    return tuple(
        KernelSpeed(**row | {"output": {int(count): ratio for count, ratio in row["output"].items()}})
        for row in rows
    )


def of_kernels(
    kernels: Collection[str], here: str | None, rows: Iterable[KernelSpeed] | None = None
) -> list[KernelSpeed]:
    """What was measured of these kernels on processors with the instructions `here`."""
    known = measured() if rows is None else rows
    return [row for row in known if row.kernel in kernels and row.instructions == here]
