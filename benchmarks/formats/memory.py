"""How much memory `lowbit export` takes of a checkpoint of Llama-3.1-8B's shape (6 GB): the most that it holds.

    python benchmarks/formats/memory.py --work DIR [--to gguf mlx modelopt] [--layers 32] \
        [--json benchmarks/formats/results/memory.json]

The checkpoint is made here: random codes and scales, a file for each layer as the walk writes them, a manifest with the
names. Measured is the largest resident set of the process, files that are mapped included, and its seconds.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import LOWBIT, write_result  # noqa: E402
from tests.quantize.exports.checkpoints import FOUR, checkpoint_of  # noqa: E402

from lowbit_core.manifest import read_manifest, write_manifest  # noqa: E402
from lowbit_core.manifest_files import record_files  # noqa: E402
from lowbit_quantize.catalog import CATALOG  # noqa: E402
from lowbit_quantize.run.writer import CheckpointWriter  # noqa: E402

HIDDEN, MIDDLE, KEYS, VOCABULARY, GROUP = 4096, 14336, 1024, 128256, 128
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MIDDLE, HIDDEN), "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of exports.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", nargs="+", default=["gguf", "mlx", "modelopt"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    checkpoint = arguments.work / "checkpoint"
    if not checkpoint.exists():
        make(checkpoint, arguments.work / "small", arguments.layers)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    found = {}
    for to in arguments.to:
        out = arguments.work / ("model.gguf" if to == "gguf" else to)
        began = time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "child", str(checkpoint), to, str(out)]
        peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1])
        found[to] = {"peak_rss_bytes": peak, "seconds": round(time.monotonic() - began, 1)}
        print(f"{to}: {peak / 1e9:.2f} GB, {found[to]['seconds']} s", flush=True)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    if arguments.json:
        write_result(arguments.json, {"checkpoint_bytes": size, "layers": arguments.layers, "exports": found})


def child() -> None:
    """One export; prints the largest resident set of it, bytes."""
    _, _, checkpoint, to, out = sys.argv
    command = [str(LOWBIT), "export", checkpoint, "--to", to, "--out", out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


def make(checkpoint: Path, small: Path, layers: int) -> None:
    """A checkpoint of random numbers with the manifest of a tiny one, its names and files put in place."""
    tiny = checkpoint_of(small, "llama", FOUR)
    manifest = read_manifest(tiny)
    assert manifest is not None
    checkpoint.mkdir(parents=True)
    scheme = next(preset for preset in CATALOG.presets if preset.name == "W4A16").make(GROUP)
    writer = CheckpointWriter(checkpoint, layers + 1)
    weights = {name: _linear(scheme, shape) for name, shape in SHAPES.items()}
    for layer in range(layers):
        tensors = {
            f"model.layers.{layer}.{name}.{part}": one
            for name, parts in weights.items()
            for part, one in parts.items()
        }
        norms = ("input_layernorm", "post_attention_layernorm")
        writer.write_shard(tensors | {f"model.layers.{layer}.{norm}.weight": _ones() for norm in norms})
    table = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    writer.write_shard(
        {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "model.norm.weight": _ones()}
    )
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=VOCABULARY, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    said = json.loads((tiny / "config.json").read_text())["quantization_config"]
    writer.finish({**config.to_dict(), "quantization_config": said})
    for name in manifest.base.copied:
        shutil.copy(tiny / name, checkpoint / name)
    first = manifest.modules[0]
    modules = [
        first.model_copy(update={"name": f"model.layers.{layer}.{name}", "group_size": GROUP})
        for layer in range(layers)
        for name in SHAPES
    ]
    files: dict[str, Any] = record_files(checkpoint, manifest.base.copied)
    write_manifest(checkpoint, manifest.model_copy(update={"modules": modules, "files": files}))


def _ones() -> torch.Tensor:
    return torch.ones(HIDDEN, dtype=torch.bfloat16)


def _linear(scheme: Any, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    scale = (torch.rand(shape[0], shape[1] // GROUP) * 0.01 + 1e-3).bfloat16().float()
    found: dict[str, torch.Tensor] = scheme.tensors(codes, {"scale": scale, "zero": torch.zeros_like(scale)})
    return found


if __name__ == "__main__":
    child() if sys.argv[1:2] == ["child"] else main()
