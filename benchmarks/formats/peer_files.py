"""What llm-compressor's files hold of a tiny model in each scheme: names, types, shapes and configuration.

    python benchmarks/formats/peer_files.py --json benchmarks/formats/results/llmcompressor_files.json [--work DIR]

llm-compressor runs in an environment of its own (`quantizers/environments.py`), to the nearest, on a few random tokens;
nothing of the numbers is kept. `tests/quantize/runs/test_peer_files.py` holds ours against the committed listing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "quantizers")]
from environments import environment  # noqa: E402
from headers import headers  # noqa: E402
from provenance import versions  # noqa: E402

# 128 divides what FP8_BLOCK and groups of 128 need it to divide, and no more.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
GROUP = 64  # of integers of weights alone, for most of which the library has no preset
INTEGERS = ("W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16")
PRESETS = ("FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "W4AFP8", "W4A8")
PROGRAM = """
import sys
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM
IntermediatesCache.pin_memory = lambda *_, **__: None  # fails without an accelerator (0.14.0.1)
base, out, scheme, group_size = *sys.argv[1:4], int(sys.argv[4])
how = {"targets": "Linear", "scheme": scheme}
if group_size:
    weights = QuantizationArgs(
        num_bits=int(scheme[1]), type="int", symmetric=True, strategy="group", group_size=group_size
    )
    how = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
rows = torch.randint(0, model.config.vocab_size, (4, 64)).tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64] * 4})
recipe = [QuantizationModifier(**how, ignore=["lm_head"])]
oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=4, max_seq_length=64)
model.save_pretrained(out, save_compressed=True)
"""


def listing(directory: Path) -> dict[str, Any]:
    """Types and shapes of a directory's tensors by name, from the headers, and its `quantization_config`."""
    tensors = {name: [entry["dtype"], entry["shape"]] for name, entry in headers(directory).items()}
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return {"tensors": dict(sorted(tensors.items())), "quantization_config": config["quantization_config"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="environments")
    arguments = parser.parse_args()
    from tests.tiny_models import write_tiny_model  # the peer's process does without

    python, found = environment("llmcompressor", arguments.work.resolve()), {}
    with tempfile.TemporaryDirectory() as temporary:
        base = write_tiny_model(Path(temporary) / "base", "llama", **SIZES)  # type: ignore[arg-type]
        for scheme in (*INTEGERS, *PRESETS):
            out, group_size = Path(temporary) / scheme, GROUP if scheme in INTEGERS else 0
            subprocess.run([python, "-c", PROGRAM, base, out, scheme, str(group_size)], check=True)
            found[scheme] = listing(out)
            print(scheme, len(found[scheme]["tensors"]), "tensors", file=sys.stderr, flush=True)
    facts = {"sizes": SIZES, "group_size": GROUP, "versions": versions(python)}
    arguments.json.write_text(json.dumps({**facts, "schemes": found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
