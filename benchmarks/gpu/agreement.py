"""Tiny models through the whole run on the CPU and on the device: the same names, nearly the same codes, the same KL.

Sums in another order move a few codes by one and, in a mixture, a token to another expert; the KL divergence to the
base model does not move by that.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.gpu import seams
from benchmarks.gpu.place import Place
from benchmarks.gpu.report import Found
from safetensors import safe_open
from torch import Tensor

KLD_SHARE = 0.1  # of the CPU's mean KL that the device's may differ by
CODES = "weight_packed"


@dataclass(frozen=True)
class Case:
    """One tiny model by one bundled recipe."""

    family: str
    recipe: str
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.family} by {self.recipe}"


CASES = (
    Case("llama", "gptq-g64"),
    Case("qwen3_moe", "gptq-g64"),
    Case("deepseek_v2", "gptq-g64"),
    Case("llama", "awq-g64"),
    Case("qwen3_moe", "reap25-awq-g64"),
    Case("deepseek_v2", "awq-g64"),
    Case("gemma3_text", "awq-gptq-g64"),
    Case("phi3", "rtn-g64"),
)
SAME_TWICE = CASES[1:2]


def agreement(case: Case) -> Callable[[Place], Found]:
    """The section of a case."""

    def run(place: Place) -> Found:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = seams.write_tiny_model(folder / "model", case.family)
            settings = (*seams.SMALL, *case.settings)
            klds, tensors = [], []
            for number, device in enumerate((torch.device("cpu"), place.device)):
                out = folder / str(number)
                manifest = seams.quantize(model, case.recipe, out, device, settings)
                klds.append(float(manifest.quality.mean_kld))
                tensors.append(_tensors(out))
        return _compared(klds, tensors, place)

    return run


def _compared(klds: list[float], tensors: list[dict[str, Tensor]], place: Place) -> Found:
    on_cpu, on_device = tensors
    wrong = []
    if on_cpu.keys() != on_device.keys():
        wrong.append(f"other names: {sorted(on_cpu.keys() ^ on_device.keys())[:4]}")
    if not abs(klds[1] - klds[0]) <= KLD_SHARE * klds[0]:
        wrong.append(f"a mean KL of {klds[1]:.5g} where the CPU has {klds[0]:.5g}")
    alike = _codes_alike(on_cpu, on_device)
    if not place.cuda and alike < 1:
        wrong.append("two runs on the CPU gave different codes")
    return Found({"kld_on_cpu": klds[0], "kld_on_device": klds[1], "codes_alike": alike}, tuple(wrong))


def _codes_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The share of 4-bit codes that are the same, over all packed weights that both have."""
    same = count = 0
    for name in sorted(one.keys() & other.keys()):
        if name.endswith(CODES) and one[name].shape == other[name].shape:
            equal = _codes(one[name]) == _codes(other[name])
            same, count = same + int(equal.sum()), count + equal.numel()
    return same / max(1, count)


def _codes(packed: Tensor) -> Tensor:
    """Eight codes of each int32: (…) to (8, …)."""
    return torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)])


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found
