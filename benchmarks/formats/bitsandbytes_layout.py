"""The export `bitsandbytes` held against bitsandbytes' own quantization, and loaded by transformers.

    PYTHONPATH=DIR python benchmarks/formats/bitsandbytes_layout.py [--json FILE]

DIR is where `pip install --target DIR --no-deps bitsandbytes==0.50.2` has put it: it runs on this environment's torch.
A tiny model's checkpoint is exported as NF4 and as INT8. Every linear's tensors are compared with those that
bitsandbytes makes of the base's weight, and transformers' logits on the export with those on the base that it quantizes
itself, which are to be the same. Exits 1 where a byte or a logit differs.
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "quantizers")]
from provenance import hardware, versions  # noqa: E402
from tests.quantize.small_runs import CPU, recipe_with  # noqa: E402
from tests.tiny_models import write_tiny_model  # noqa: E402

from lowbit_quantize.export.bitsandbytes import BitsAndBytes  # noqa: E402
from lowbit_quantize.export.exporter import export  # noqa: E402
from lowbit_quantize.pipeline import quantize  # noqa: E402

FOUR: dict[str, Any] = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
ALONE = {"match": "*.1.mlp.*", "scheme": "none"}
IDS = torch.arange(3, 33).unsqueeze(0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {
        f"{family}, {kind}": _case(family, kind) for family in ("llama", "qwen2") for kind in ("nf4", "int8")
    }
    for name, one in found.items():
        print(name, json.dumps(one))
    if arguments.json:
        facts = {
            "bitsandbytes": version("bitsandbytes"), "hardware": hardware(), "versions": versions(sys.executable)
        }  # fmt: skip
        arguments.json.write_text(json.dumps({**facts, "cases": found}, indent=1) + "\n")
    return 0 if all(one["different"] == 0 and one["logits_apart"] == 0 for one in found.values()) else 1


def _case(family: str, kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        base = write_tiny_model(place / "base", family)
        quantize(str(base), recipe_with(FOUR, ALONE), place / "checkpoint", CPU)
        export(place / "checkpoint", BitsAndBytes(kind, str(base)), place / "out")
        ours, weights = _tensors(place / "out"), _tensors(base)
        skipped = json.loads((place / "out" / "config.json").read_text())["quantization_config"]
        linears = [name.removesuffix(".weight") for name in ours if _is_packed(name, ours)]
        different = sum(_different(ours, name, weights[f"{name}.weight"], kind) for name in linears)
        theirs = BitsAndBytesConfig(
            load_in_4bit=kind == "nf4",
            load_in_8bit=kind == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skipped["llm_int8_skip_modules"],
        )
        logits = [_logits(place / "out", None), _logits(base, theirs)]
        return {
            "linears": len(linears),
            "weights": sum(weights[f"{name}.weight"].numel() for name in linears),
            "different": different,
            "logits_apart": float((logits[0] - logits[1]).abs().max()),
        }


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


def _is_packed(name: str, tensors: dict[str, torch.Tensor]) -> bool:
    return name.endswith(".weight") and tensors[name].dtype in (torch.uint8, torch.int8)


def _different(ours: dict[str, torch.Tensor], name: str, weight: torch.Tensor, kind: str) -> int:
    """Numbers of a linear's tensors that bitsandbytes would have written otherwise."""
    if kind == "nf4":
        packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        theirs = {"weight": packed} | {
            f"weight.{part}": one for part, one in state.as_dict(packed=True).items()
        }
    else:
        codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
        theirs = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    mine = {key.removeprefix(f"{name}."): one for key, one in ours.items() if key.startswith(f"{name}.")}
    mine.pop("bias", None)
    assert set(mine) == set(theirs), (sorted(mine), sorted(theirs))
    return sum(int((mine[part] != theirs[part]).sum()) for part in theirs)


def _logits(directory: Path, quantization: BitsAndBytesConfig | None) -> torch.Tensor:
    more = {} if quantization is None else {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="cpu", **more)
    with torch.inference_mode():
        logits: torch.Tensor = model(IDS).logits.float()
    return logits


if __name__ == "__main__":
    sys.exit(main())
