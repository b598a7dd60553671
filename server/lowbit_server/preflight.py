"""What this machine cannot run, said in one line before the engine spends a minute to find out.

vLLM's own message for 4-bit experts on an unfit CPU is `No WNA16 MoE backend supports the deployment
configuration`, at the end of a worker's traceback.
"""

from importlib.util import find_spec
from pathlib import Path

from lowbit_core.errors import CheckpointError
from lowbit_server.config import Checkpoint, Device

CPUINFO = Path("/proc/cpuinfo")
# vLLM's Zen path uses zentorch only when all three import, and falls back without a word when one is missing.
ZENTORCH_MODULES = ("zentorch", "deprecated", "wrapt")


def refuse_unfit_machine(checkpoint: Checkpoint, device: Device, cpuinfo: Path = CPUINFO) -> None:
    """Raise CheckpointError when the checkpoint needs what this machine has not."""
    if device == "cpu" and has_low_bit_experts(checkpoint) and not _cpu_runs_int4_experts(cpuinfo):
        raise CheckpointError(
            f"{checkpoint.directory} has 4-bit experts, and this CPU has neither AMX nor AMD's zentorch "
            f"({', '.join(ZENTORCH_MODULES)}); serve it on a GPU, or quantize with the experts in bfloat16"
        )


def has_low_bit_experts(checkpoint: Checkpoint) -> bool:
    """Whether the manifest lists quantized experts; without a manifest the engine has to say it."""
    modules = checkpoint.manifest.modules if checkpoint.manifest else []
    return any(".experts." in module.name and module.bits < 8 for module in modules)


def _cpu_runs_int4_experts(cpuinfo: Path) -> bool:
    flags = cpuinfo.read_text(encoding="ascii", errors="replace") if cpuinfo.exists() else ""
    if "amx_tile" in flags or "flags" not in flags:  # not x86: its kernels are the engine's to judge
        return True
    return "AuthenticAMD" in flags and all(find_spec(name) for name in ZENTORCH_MODULES)
