"""What finding an architecture costs at published sizes: seconds and peak memory, each model in its own process.

    python benchmarks/families/scale.py [--json benchmarks/families/results/scale.json]

Nothing is downloaded: a model is its published configuration, its twin is made as always, and the folds are held on the
first layer of each kind at real widths, with seeded weights that are made when they are read.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
LIMIT_S, LIMIT_GB = 60.0, 6.0
NUMBERS = 1_000_003
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {  # their config.json, as published
    "Llama-3.3-70B": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "rope_parameters": LLAMA3,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    },
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True,
        "rope_theta": 1000000.0, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3,
        "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "rope_parameters": YARN, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
MODELS["Kimi-K2"] = MODELS["DeepSeek-V3"] | {
    "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 163840, "n_routed_experts": 384,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
    "rope_parameters": YARN | {"factor": 32.0, "beta_fast": 1}, "max_position_embeddings": 131072,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measured(arguments.one)))
        return 0
    rows = {}
    for name in arguments.only:
        command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        rows[name] = row = json.loads(ended.stdout.strip().splitlines()[-1])
        within = row["seconds"] <= LIMIT_S and row["peak_gb"] <= LIMIT_GB
        print(
            f"{name}: {row} {'within' if within else 'above'} {LIMIT_S:.0f} s and {LIMIT_GB:.0f} GB",
            flush=True,
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**_facts(), "models": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def _facts() -> dict[str, Any]:
    from benchmarks.quantizers.provenance import hardware, versions

    return {"hardware": hardware(), "versions": versions(sys.executable)}


def _measured(name: str) -> dict[str, Any]:
    """Seconds of each step, without those of importing, and the process's peak memory."""
    import torch
    from transformers import AutoConfig

    from lowbit_quantize.model.decoder import Decoder
    from lowbit_quantize.model.discovery.found import find_architecture
    from lowbit_quantize.model.discovery.hold import drop_broken_folds
    from lowbit_quantize.model.skeleton import build_skeleton

    keys = dict(MODELS[name])
    config = AutoConfig.for_model(keys.pop("model_type"), **keys)
    clock = time.monotonic()
    skeleton = build_skeleton(config)
    built = time.monotonic()
    architecture = find_architecture(config, skeleton)
    found = time.monotonic()
    decoder = Decoder(config, architecture, Seeded(skeleton), torch.device("cpu"), skeleton)
    first = [architecture.kinds.index(kind) for kind in dict.fromkeys(architecture.kinds)]
    dropped = [line for index in first for line in drop_broken_folds(decoder, index)]
    ended = time.monotonic()
    groups = [group for index in first for group in architecture.kinds[index].groups]
    return {
        "kinds": len(first),
        "groups": len(groups),
        "folds": sum(group.fold is not None for group in groups),
        "dropped": dropped,
        "skeleton_s": round(built - clock, 1),
        "twin_s": round(found - built, 1),
        "hold_s": round(ended - found, 1),
        "seconds": round(ended - clock, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


@dataclass
class Seeded:
    """Weights of a skeleton's shapes, made when they are read: norms near one, matrices of unit gain.

    The same random numbers again and again, so that making them costs what reading a file costs.
    """

    skeleton: Any
    read_files: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        import torch

        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}
        generator = torch.Generator().manual_seed(2)
        self._numbers = torch.randn(NUMBERS, generator=generator, dtype=torch.bfloat16)

    def read(self, name: str) -> Any:
        import torch

        shape = self._shapes[name]
        count = torch.Size(shape).numel()
        made = self._numbers.repeat(-(-count // len(self._numbers)))[:count].view(shape)
        return 1 + 0.2 * made if len(shape) == 1 and name.endswith("weight") else made.mul_(shape[-1] ** -0.5)


if __name__ == "__main__":
    sys.exit(main())
