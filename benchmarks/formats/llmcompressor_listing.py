"""What llm-compressor's files hold: names, shapes and types of all tensors, and `quantization_config`, by scheme.

    python benchmarks/formats/llmcompressor_listing.py --work DIR [--json benchmarks/formats/results/llmcompressor.json]

A tiny seeded model is written here and quantized there by round to nearest, in the environment of
benchmarks/quantizers/environments.py; nothing of the numbers is kept. tests/quantize/runs/test_same_as_llmcompressor.py
quantizes the same model and holds our files against the list.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "quantizers")]
from environments import PACKAGES, environment  # noqa: E402
from tests.tiny_models import write_tiny_model  # noqa: E402

# 128 divides what FP8_BLOCK needs it to divide, and no more.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
GROUP = 64
INTEGERS = ("W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16")
SCHEMES = (*INTEGERS, "FP8_BLOCK")
PROGRAM = """
import json, sys
from pathlib import Path
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from transformers import AutoModelForCausalLM

base, out, scheme, group_size = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
how = {"targets": "Linear", "scheme": scheme}
if group_size:
    weights = QuantizationArgs(
        num_bits=int(scheme[1]), type="int", symmetric=True, strategy="group", group_size=group_size
    )
    how = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
oneshot(model=model, recipe=[QuantizationModifier(**how, ignore=["lm_head"])])
model.save_pretrained(out, save_compressed=True)
tensors = {}
for path in sorted(out.glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            view = file.get_slice(name)
            tensors[name] = [view.get_dtype(), view.get_shape()]
config = json.loads((out / "config.json").read_text())["quantization_config"]
(out / "listing.json").write_text(json.dumps({"tensors": tensors, "quantization_config": config}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    python = environment("llmcompressor", arguments.work)
    base = write_tiny_model(arguments.work / "tiny", "llama", **SIZES)  # type: ignore[arg-type]
    found = {
        scheme: _listing(python, base, arguments.work / "listings" / scheme, scheme) for scheme in SCHEMES
    }
    for scheme, one in found.items():
        print(scheme, len(one["tensors"]), "tensors")
    if arguments.json:
        facts = {"packages": PACKAGES["llmcompressor"], "sizes": SIZES, "group_size": GROUP}
        arguments.json.write_text(json.dumps({**facts, "schemes": found}) + "\n", encoding="utf-8")


def _listing(python: Path, base: Path, out: Path, scheme: str) -> dict[str, dict[str, object]]:
    out.mkdir(parents=True, exist_ok=True)
    group_size = str(GROUP if scheme in INTEGERS else 0)
    subprocess.run([python, "-c", PROGRAM, base, out, scheme, group_size], check=True)
    listing: dict[str, dict[str, object]] = json.loads((out / "listing.json").read_text(encoding="utf-8"))
    return listing


if __name__ == "__main__":
    main()
