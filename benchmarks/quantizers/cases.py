"""Who is compared: one entry for each tool, method and setting. Standard library only.

A peer appears with its defaults and, for GPTQ, also with the settings that its documentation recommends for
quality. Lowbit appears with its shipped recipe, which also calibrates an FP8 KV cache and measures quality on 16
held-out sequences, and bare: no FP8 cache, two held-out sequences (the least a recipe allows).
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BARE = ("kv_cache.dtype=none", "quality.num_samples=2", "quality.isolate=false")


LABELS = {
    "rtn": "round to nearest",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "awq+gptq": "AWQ, then GPTQ",
    "smoothquant+gptq": "SmoothQuant, then GPTQ",
    "magnitude": "magnitude, 2:4",
    "wanda": "Wanda, 2:4",
    "sparsegpt": "SparseGPT, 2:4",
    "sparsegpt+gptq": "SparseGPT, 2:4, then GPTQ",
}
PRUNERS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class Case:
    """One row of the table; `settings` are the tool's own, `once` marks peers too slow to repeat."""

    name: str
    tool: str
    label: str
    method: str
    symmetric: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    recipe_settings: tuple[str, ...] = ()
    once: bool = False
    scheme: str | None = None  # compressed-tensors' preset, in place of bits and groups
    recipe: str | None = None  # a recipe as it is, with its own amount of calibration text

    @property
    def family(self) -> str:
        """Cases of one family are compared with each other."""
        if any(method in PRUNERS for method in self.method.split("+")):
            return "2:4"
        if self.scheme:
            return self.scheme
        if "auto_scheme" in self.settings:
            return "mixed"
        family = "gptq" if "gptq" in self.method or self.method == "autoround" else self.method
        return family if self.symmetric else f"{family}-asymmetric"


def lowbit(method: str, symmetric: bool = True, bare: bool = False) -> Case:
    name = f"lowbit-{method}" + ("" if symmetric else "-asymmetric") + ("-bare" if bare else "")
    label = LABELS[method]
    if bare:
        label += ", bare"
    return Case(name, "lowbit", f"Lowbit {label}", method, symmetric, recipe_settings=BARE if bare else ())


# Every scheme that a width of 576 takes, those first that people ask for most; by round to nearest, AWQ and GPTQ.
FORMATS = (
    "NVFP4", "MXFP4", "W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16", "W3A16", "MXFP8", "FP8", "W8A16", "W4A8",
    "W6A16", "W5A16", "W2A16",
)  # fmt: skip
FORMAT_METHODS = ("gptq", "rtn", "awq")
IN_GROUPS = {"W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16", "W4A8"}  # of the scenario's size


def of_recipe(recipe: str, label: str) -> Case:
    """Lowbit's, by a bundled recipe that takes more calibration text than the scenario gives."""
    return Case(f"lowbit-{recipe}", "lowbit", f"Lowbit {label}", "gptq", once=True, recipe=recipe)


def mixed_by_autoround(name: str, bits: list[int]) -> Case:
    """AutoRound's light recipe, AutoScheme choosing among `bits` for each linear: 4.5 bits of a code in the mean."""
    chosen = {"bits": bits, "avg_bits": 4.5}
    settings = {"iters": 50, "lr": 5e-3, "auto_scheme": chosen}
    return Case(
        f"autoscheme-{name}", "autoround", "AutoRound AutoScheme", "autoround", settings=settings, once=True
    )


def of_preset(scheme: str, method: str) -> Case:
    """Lowbit's, in a preset of compressed-tensors."""
    name = f"lowbit-{scheme.lower().replace('_', '-')}-{method}"
    return Case(name, "lowbit", f"Lowbit {LABELS[method]}", method, recipe_settings=BARE, scheme=scheme)


def compressor_of_preset(scheme: str, method: str) -> Case:
    name = f"llmcompressor-{scheme.lower().replace('_', '-')}-{method}"
    return Case(name, "llmcompressor", f"llm-compressor {LABELS[method]}", method, scheme=scheme)


# Of every four inputs two are zero; `none`: what stays keeps its 16 bits.
SPARSE = (
    *(
        Case(
            f"lowbit-{method}",
            "lowbit",
            f"Lowbit {LABELS[method]}",
            method,
            recipe_settings=BARE,
            scheme="none",
        )
        for method in PRUNERS
    ),
    Case("llmcompressor-sparsegpt", "llmcompressor", "llm-compressor SparseGPT, 2:4", "sparsegpt"),
    lowbit("sparsegpt+gptq", bare=True),
)

CASES = (
    lowbit("gptq"),
    Case("gptqmodel-gptq", "gptqmodel", "GPTQModel GPTQ", "gptq"),
    Case("llmcompressor-gptq", "llmcompressor", "llm-compressor GPTQ", "gptq"),
    lowbit("gptq", bare=True),
    Case(
        "gptqmodel-gptq-best",
        "gptqmodel",
        "GPTQModel GPTQ",
        "gptq",
        settings={"desc_act": True, "act_group_aware": False, "mse": 2.4, "offload_to_disk": False},
    ),
    Case(
        "llmcompressor-gptq-best",
        "llmcompressor",
        "llm-compressor GPTQ",
        "gptq",
        settings={"observer": "imatrix_mse"},
    ),
    Case("autoround", "autoround", "AutoRound tuned rounding", "autoround", once=True),
    Case(
        "autoround-light",
        "autoround",
        "AutoRound light",
        "autoround",
        settings={"iters": 50, "lr": 5e-3},  # its `light` recipe: a quarter of the steps
        once=True,
    ),
    mixed_by_autoround("integers", [3, 4, 5, 6, 8]),
    mixed_by_autoround("served", [4, 8]),
    of_recipe("gptq-more-text-g64", "GPTQ on 88 rows"),
    of_recipe("gptq-best-g64", "GPTQ on 448 rows"),
    of_recipe("w4a16-w8a8-down", "AWQ and GPTQ, last linears of networks in W8A8"),
    # Of the padded model (`pad.py`).
    replace(of_recipe("gptq", "GPTQ in groups of 128, on 64 rows"), name="lowbit-gptq-g128"),
    lowbit("awq+gptq"),
    lowbit("awq"),
    lowbit("awq", bare=True),
    lowbit("awq", symmetric=False),
    lowbit("awq", symmetric=False, bare=True),
    lowbit("rtn"),
    lowbit("rtn", symmetric=False),
    Case("autoawq-awq", "autoawq", "AutoAWQ AWQ", "awq", symmetric=False, once=True),
    Case("llmcompressor-awq", "llmcompressor", "llm-compressor AWQ", "awq", once=True),
    Case("llmcompressor-awq-asymmetric", "llmcompressor", "llm-compressor AWQ", "awq", False, once=True),
    Case("gptqmodel-awq", "gptqmodel", "GPTQModel AWQ", "awq", False, once=True),
    compressor_of_preset("W8A8", "smoothquant+gptq"),
    of_preset("W8A8", "smoothquant+gptq"),
    compressor_of_preset("FP8_DYNAMIC", "rtn"),
    compressor_of_preset("FP8", "rtn"),
    *(
        case(scheme, method)
        for scheme in ("NVFP4", "MXFP4")
        for case in (of_preset, compressor_of_preset)
        for method in ("awq+gptq", "smoothquant+gptq")
    ),
    *(of_preset(scheme, "awq+gptq") for scheme in ("NVFP4A16", "MXFP4A16")),
    *(compressor_of_preset(scheme, method) for scheme in ("NVFP4", "MXFP4") for method in FORMAT_METHODS),
    *(of_preset(scheme, method) for method in FORMAT_METHODS for scheme in FORMATS),
    *SPARSE,
    *(  # of a model whose widths are multiples of 128 (`pad.py`)
        case("FP8_BLOCK", method) for case in (of_preset, compressor_of_preset) for method in ("gptq", "rtn")
    ),
    of_preset("FP8_BLOCK", "awq"),
)


@dataclass(frozen=True)
class Scenario:
    """What every tool is given."""

    model: Path
    token_ids: Path
    heldout: Path
    unseen: Path
    bits: int
    group_size: int
    threads: int


def command(case: Case, python: Path, scenario: Scenario, out: Path) -> list[str]:
    """The command line of one case."""
    if case.tool == "lowbit":
        return lowbit_command(case, python, scenario, out)
    words: list[str | Path | int] = [python, HERE / f"{case.tool}_program.py", "--method", case.method]
    words += ["--model", scenario.model, "--token-ids", scenario.token_ids, "--out", out]
    words += ["--bits", scenario.bits, "--group-size", scenario.group_size, "--threads", scenario.threads]
    words += ["--settings", json.dumps(case.settings), *([] if case.symmetric else ["--asymmetric"])]
    words += ["--scheme", case.scheme] if case.scheme else []
    return [str(word) for word in words]


def lowbit_command(case: Case, python: Path, scenario: Scenario, out: Path) -> list[str]:
    quantize = [str(python.parent / "lowbit"), "quantize", "--model", str(scenario.model), "--out", str(out)]
    if case.recipe:
        bare = [option for setting in BARE for option in ("--set", setting)]
        return [*quantize, "--recipe", case.recipe, *bare]
    recipe = "w8a8" if case.scheme else "awq-g64"
    scheme = case.scheme or f"W{scenario.bits}A16" + ("" if case.symmetric else "_ASYM")
    numbers = [f"modules.0.scheme={scheme}"]
    if not case.scheme or case.scheme in IN_GROUPS:
        numbers.append(f"modules.0.group_size={scenario.group_size}")
    settings = (
        *numbers,
        f"modules.0.methods=[{case.method.replace('+', ', ')}]",
        f"calibration.token_ids={scenario.token_ids}",
        *case.recipe_settings,
    )
    options = [option for setting in settings for option in ("--set", setting)]
    return [*quantize, "--recipe", recipe, *options]
