"""Peak memory of quantizing one routed layer, by how many experts it has: it should not depend on that.

    python benchmarks/scale/experts.py --experts 32 64 128 [--json benchmarks/scale/results/experts/NAME.json]

The layer has DeepSeek-V3's widths (latent attention, experts of 2,048 behind 7,168 channels, eight used by a token) and
random bfloat16 weights; narrower with --hidden and --middle. `lowbit quantize` runs as a process of its own, and the
kernel says its peak (`ru_maxrss`, by wait4). Exits 1 when peaks differ by more than 5 % or pass the limit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "quantizers")]
from provenance import hardware, revision, versions  # noqa: E402
from tests.tiny_models import VOCABULARY, tiny_tokenizer  # noqa: E402

STD, SHARD_EXPERTS = 0.02, 16
SPREAD, LIMIT_BYTES = 1.05, 12e9


def main() -> int:
    arguments = _arguments()
    rows = []
    for count in arguments.experts:
        model = arguments.work / f"model-{count}"
        write_mixture(model, count, arguments.hidden, arguments.middle)
        rows.append({"experts": count, **_run(model, arguments)})
        print(rows[-1], flush=True)
        shutil.rmtree(model)
    if arguments.json:
        facts = {"hardware": hardware(), "versions": versions(sys.executable), "revision": revision(ROOT)}
        widths = {"hidden": arguments.hidden, "middle": arguments.middle, "recipe": arguments.recipe}
        arguments.json.write_text(json.dumps({**facts, **widths, "runs": rows}, indent=1) + "\n")
    peaks = [row["peak_rss_bytes"] for row in rows]
    return 0 if max(peaks) <= SPREAD * min(peaks) and max(peaks) < LIMIT_BYTES else 1


def write_mixture(directory: Path, experts: int, hidden: int, middle: int) -> None:
    """One routed layer in files of `SHARD_EXPERTS` experts, of which one is in memory."""
    from lowbit_quantize.model.files.published_names import PublishedNames
    from lowbit_quantize.model.skeleton import build_skeleton

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = _config(experts, hidden, middle)
    config.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    skeleton = build_skeleton(config)
    names = PublishedNames(skeleton)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in skeleton.state_dict().items():
        number = name.partition(".experts.")[2].partition(".")[0]
        shard = f"experts-{int(number) // SHARD_EXPERTS:03d}" if number else "rest"
        shards.setdefault(f"{shard}.safetensors", {})[names.published(name)] = tuple(tensor.shape)
    for place, (file, shapes) in enumerate(shards.items()):
        generator = torch.Generator().manual_seed(place)
        tensors = {name: _made(name, shape, generator) for name, shape in shapes.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(experts: int, hidden: int, middle: int) -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=middle,
        num_hidden_layers=1,
        num_attention_heads=max(2, hidden // 56),
        num_key_value_heads=max(2, hidden // 56),
        n_routed_experts=experts,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=0,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
        architectures=["DeepseekV3ForCausalLM"],
    )


def _made(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    if "correction_bias" in name:
        return torch.zeros(shape)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=STD, generator=generator)


def _run(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    out = arguments.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        str(Path(sys.executable).with_name("lowbit")), "quantize", "--model", str(model), "--recipe", arguments.recipe,
        "--out", str(out), "--set", "quality.isolate=false", "--set", f"calibration.num_samples={arguments.rows}",
        "--set", "calibration.max_seq_length=512", "--set", "quality.num_samples=2",
        "--set", "quality.max_seq_length=512",
    ]  # fmt: skip
    began = time.monotonic()
    with (arguments.work / "quantize.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"lowbit quantize ended with status {status}; see {arguments.work / 'quantize.log'}")
    return {
        "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "peak_rss_bytes": used.ru_maxrss * 1024,
        "wall_s": round(time.monotonic() - began, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--middle", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8, help="sequences of 512 tokens that calibrate")
    parser.add_argument("--recipe", default="gptq-g64")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "experts")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
