"""What llm-compressor's files hold of a tiny model in each preset: names, types, shapes and configuration.

    python benchmarks/formats/peer_files.py --json benchmarks/formats/results/llmcompressor_files.json [--work DIR]

llm-compressor runs in an environment of its own (`quantizers/environments.py`), to the nearest, on a few random tokens.
`tests/quantize/runs/test_peer_files.py` holds ours against the committed listing.
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
from provenance import versions  # noqa: E402

PRESETS = ("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "W4AFP8", "W4A8")
PLAIN = {"W4AFP8": ["re:.*down_proj"], "W4A8": ["re:.*down_proj"]}  # groups of 128 do not fit it
PROGRAM = """
import json, sys
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM
IntermediatesCache.pin_memory = lambda *_, **__: None  # fails without an accelerator (0.14.0.1)
base, out, preset, plain = *sys.argv[1:4], json.loads(sys.argv[4])
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
rows = torch.randint(0, model.config.vocab_size, (4, 64)).tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64] * 4})
recipe = [QuantizationModifier(targets="Linear", scheme=preset, ignore=["lm_head", *plain])]
oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=4, max_seq_length=64)
model.save_pretrained(out, save_compressed=True)
"""


def listing(directory: Path) -> dict[str, Any]:
    """Types and shapes of a directory's tensors by name, from the headers, and its `quantization_config`."""
    tensors: dict[str, list[Any]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        tensors |= {name: [entry["dtype"], entry["shape"]] for name, entry in header.items()}
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
        base = write_tiny_model(Path(temporary) / "base", "llama")
        for preset in PRESETS:
            out = Path(temporary) / preset
            plain = json.dumps(PLAIN.get(preset, []))
            subprocess.run([python, "-c", PROGRAM, base, out, preset, plain], check=True)
            found[preset] = listing(out)
            print(preset, len(found[preset]["tensors"]), file=sys.stderr, flush=True)
    facts = {"model": "llama of tests/tiny_models.py", "versions": versions(python)}
    arguments.json.write_text(json.dumps({**facts, "presets": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
