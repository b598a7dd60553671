"""A row of the tables of processors: vLLM's kernels for a scheme in its order, and what they say to a person.

vLLM takes the first kernel that fits. So what is said of a processor is what the kernels say up to the first that needs
nothing beside vLLM: those before it are taken where what they need is there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Platform = Literal["cuda", "rocm", "xpu", "cpu"]
UNROUNDED, BY_TOKEN, ROUNDED = (
    "with inputs as they are",
    "with inputs rounded by token",
    "with inputs rounded",
)
EMULATED, AS_SAID = "emulated", "as the scheme says"
VOLTA, TURING, AMPERE, ADA, HOPPER = 70, 75, 80, 89, 90
BLACKWELL, BLACKWELL_ULTRA, GEFORCE_BLACKWELL = 100, 109, 120
GENERATIONS = {
    VOLTA: "Volta", TURING: "Turing", AMPERE: "Ampere", ADA: "Ada", HOPPER: "Hopper", BLACKWELL: "Blackwell",
    GEFORCE_BLACKWELL: "Blackwell of workstations",
}  # fmt: skip
HUMMING = "humming-kernels"
FLASHINFER, DEEP_GEMM, QUARK = "flashinfer", "deep_gemm", "amd-quark"
ZENTORCH, AMX, AMX_FP8 = "AMD's Zen and zentorch", "AMX", "AMX-FP8"
CDNA3, CDNA4 = "CDNA3 (MI300) or later", "CDNA4 (MI350)"


@dataclass(frozen=True)
class EngineKernel:
    """A class of vLLM that computes linears, or routed experts, on a platform.

    Of NVIDIA's GPUs it takes those whose compute capability, times ten, lies from `lowest` to `highest`. `needs` is
    what must be there beside vLLM, or which of a platform's processors it takes. `how` says what it does otherwise
    than the scheme: it rounds no inputs, or in another way, or unpacks the weights each time.
    """

    name: str
    platform: Platform
    lowest: int = 0
    highest: int | None = None
    needs: str = ""
    how: str = ""


@dataclass(frozen=True)
class Processors:
    """A row: vLLM's class for a scheme, the least compute capability (times ten) that it asks for, and its kernels.

    The kernels of a platform stand in vLLM's order. `table` is where vLLM lists them. `older_class` is the class for
    GPUs below `lowest`, down to `older_lowest`: it leaves inputs as they are.
    """

    scheme_class: str
    lowest: int
    table: str
    kernels: tuple[EngineKernel, ...]
    older_class: str = ""
    older_lowest: int | None = None

    def on(self, platform: Platform) -> tuple[EngineKernel, ...]:
        """The kernels of a platform, in vLLM's order."""
        return tuple(kernel for kernel in self.kernels if kernel.platform == platform)

    def on_nvidia(self, capability: int) -> tuple[EngineKernel, ...]:
        """Those that may be taken by NVIDIA's GPUs of a compute capability (times ten), up to one that needs nothing.

        On Hopper vLLM puts Humming's kernel before Marlin's.
        """
        taking = [kernel for kernel in self.on("cuda") if self._takes(kernel, capability)]
        marlin = next((place for place, kernel in enumerate(taking) if "Marlin" in kernel.name), None)
        if capability == HOPPER and marlin is not None:
            humming = [kernel for kernel in taking[marlin:] if kernel.needs == HUMMING]
            rest = [kernel for kernel in taking[marlin:] if kernel.needs != HUMMING]
            taking[marlin:] = [*humming, *rest]
        return _reached(taking)

    @property
    def cpu_kernels(self) -> Sequence[str]:
        """Names of the classes that compute on CPUs."""
        return tuple(kernel.name for kernel in self.on("cpu"))

    @property
    def cpus(self) -> str:
        """Which CPUs, for a person."""
        return _whose("CPUs", self.on("cpu")) or "no CPU"

    @property
    def gpus(self) -> str:
        """Which GPUs, for a person."""
        makers = (self._nvidia(), _whose("AMD's", self.on("rocm")), _whose("Intel's", self.on("xpu")))
        return "; ".join(filter(None, makers)) or "none"

    @property
    def words(self) -> str:
        """Which GPUs and CPUs, for a person."""
        return f"{self.gpus}; {self.cpus}"

    def _nvidia(self) -> str:
        """Ranges of generations of which the same is said, the newest first."""
        ranges: list[tuple[list[int], str]] = []
        for generation in sorted(GENERATIONS, reverse=True):
            said = _said(self.on_nvidia(generation))
            if said is None:
                continue
            if ranges and ranges[-1][1] == said and _next(generation) == ranges[-1][0][-1]:
                ranges[-1][0].append(generation)
            else:
                ranges.append(([generation], said))
        words = [" ".join(filter(None, (_range(found, len(ranges) == 1), said))) for found, said in ranges]
        return f"NVIDIA's {', '.join(words)}" if words else ""

    def _takes(self, kernel: EngineKernel, capability: int) -> bool:
        older = self.older_lowest if kernel.how == UNROUNDED else None
        lowest = max(kernel.lowest, self.lowest if older is None else older)
        return lowest <= capability <= (kernel.highest or capability)


def _reached(kernels: Sequence[EngineKernel]) -> tuple[EngineKernel, ...]:
    """Up to the first that needs nothing."""
    plain = next((place for place, kernel in enumerate(kernels) if not kernel.needs), len(kernels))
    return tuple(kernels[: plain + 1])


def _said(kernels: Sequence[EngineKernel]) -> str | None:
    """What these, of which the last alone may need nothing, say of a processor; None where there is none."""
    if not kernels:
        return None
    last = kernels[-1]
    if not last.needs and all(kernel.how == last.how for kernel in kernels):
        return last.how
    parts = []
    for how in dict.fromkeys(kernel.how for kernel in kernels if kernel.needs):
        needs = dict.fromkeys(kernel.needs for kernel in kernels if kernel.needs and kernel.how == how)
        parts.append(" ".join(filter(None, (f"with {' or '.join(needs)}", how))))
    said = " or ".join(parts)
    return said if last.needs else f"{said} or else {last.how or AS_SAID}"


def _next(generation: int) -> int | None:
    newer = [one for one in sorted(GENERATIONS) if one > generation]
    return newer[0] if newer else None


def _range(generations: Sequence[int], only: bool) -> str:
    """Generations in words, of a descending list; `only`: there are no others."""
    newest, oldest = (f"{one / 10:.1f} ({GENERATIONS[one]})" for one in (generations[0], generations[-1]))
    if _next(generations[0]) is None:
        return f"from {oldest} on"
    if oldest == newest:
        return f"{oldest} alone" if only else oldest
    return f"from {oldest} to {newest}" if only else f"{oldest} to {newest}"


def _whose(maker: str, kernels: Sequence[EngineKernel]) -> str:
    """A platform's processors; empty where none is meant."""
    said = _said(_reached(kernels))
    return "" if said is None else " ".join(filter(None, (maker, said)))


def cuda(
    name: str, lowest: int = 0, highest: int | None = None, needs: str = "", how: str = ""
) -> EngineKernel:
    return EngineKernel(name, "cuda", lowest, highest, needs, how)


def rocm(name: str, needs: str = "", how: str = "") -> EngineKernel:
    return EngineKernel(name, "rocm", needs=needs, how=how)


def xpu(name: str, needs: str = "", how: str = "") -> EngineKernel:
    return EngineKernel(name, "xpu", needs=needs, how=how)


def cpu(name: str, needs: str = "", how: str = "") -> EngineKernel:
    return EngineKernel(name, "cpu", needs=needs, how=how)


def weights_alone(kernels: Iterable[EngineKernel]) -> tuple[EngineKernel, ...]:
    """For a scheme of weights alone: inputs as they are is then what it says."""
    return tuple(replace(kernel, how="") for kernel in kernels)
