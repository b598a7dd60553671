"""The checkpoints of run.py: a base, bf16 as it is, and each scheme rounded to nearest, which is as fast as any method.

    python benchmarks/schemes/make.py --base DIR --out DIR                  # of a model
    python benchmarks/schemes/make.py --random --tokenizer DIR --out DIR    # of one shaped as 1B, of random weights

Calibration is one short text: speeds do not depend on it, and nobody asks these files about quality.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import LOWBIT  # noqa: E402

SCHEMES = {"w4a16": {"scheme": "W4A16"}, "w8a8": {"scheme": "W8A8"}, "fp8-dynamic": {"scheme": "FP8_DYNAMIC"}}
SHAPE = {  # Llama 3.2 1B's, with the tokenizer's vocabulary
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
SHORT = {"dataset": "default", "num_samples": 2, "max_seq_length": 64, "seed": 0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--group-size", type=int, default=128, help="of W4A16")
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=["w4a16", "w8a8"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = arguments.base or arguments.out / "bf16"
    if arguments.random and not (base / "model.safetensors").exists():
        _write_random(base, arguments.tokenizer)
    for name in arguments.schemes:
        module = {"match": "*", **SCHEMES[name], "methods": ["rtn"]}
        if name == "w4a16":
            module["group_size"] = arguments.group_size
        recipe = arguments.out / f"{name}.yaml"
        recipe.write_text(
            json.dumps(
                {"modules": [module], "kv_cache": {"dtype": "none"}, "calibration": SHORT, "quality": SHORT}
            ),
            encoding="utf-8",
        )
        command = [str(LOWBIT), "quantize", "--model", str(base), "--recipe", str(recipe)]
        subprocess.run([*command, "--out", str(arguments.out / name)], check=True)


def _write_random(base: Path, tokenizer: Path) -> None:
    """Normal weights of a trained model's size, so that nothing overflows."""
    config = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    ids = {
        name: config[name]
        for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        if name in config
    }
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**SHAPE, **ids)).save_pretrained(base)
    for name in TOKENIZER:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, base / name)


if __name__ == "__main__":
    main()
