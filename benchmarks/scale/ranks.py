"""Two ranks of one thread against one: the same bytes, how much faster, and after kill -9 of either.

    python benchmarks/scale/ranks.py --json benchmarks/scale/results/ranks/NAME.json

Two models of random bfloat16 weights, 2,048 channels wide: a dense one (Llama) and a mixture (32 experts of 768), few
layers each. Runs of one and of two ranks take turns; what is compared is the time that layers take, by the modification
times of their records, and that files are the same byte for byte. Then a run of two ranks is killed at random moments
(one rank by SIGKILL, either in turn), gone on with by two until it is killed again, and at last by one or by two; its
files are held against the others. Exits 1 where bytes differ.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "quantizers")]
from provenance import hardware, revision, versions  # noqa: E402
from tests.tiny_models import VOCABULARY, model_class, tiny_tokenizer  # noqa: E402

LOWBIT = Path(sys.executable).with_name("lowbit")
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
MANIFEST = "lowbit.json"
LAYERS, DEPTH = {"dense": 4, "mixture": 2}, 2048


def main() -> int:
    arguments = _arguments()
    result: dict[str, Any] = {
        "hardware": hardware(),
        "versions": versions(sys.executable),
        "revision": revision(ROOT),
        "models": {},
    }
    for name in arguments.models:
        model = arguments.work / name
        _write(name, model)
        result["models"][name] = _compared(name, model, arguments)
        print(name, json.dumps(result["models"][name]), flush=True)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(one["same_bytes"] for one in result["models"].values()) else 1


def _write(name: str, directory: Path) -> None:
    if (directory / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": DEPTH,
        "num_hidden_layers": LAYERS[name],
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
    }
    mixture = {"moe_intermediate_size": 768, "num_experts": 32, "num_experts_per_tok": 4}
    config = (
        LlamaConfig(**common, intermediate_size=5632)
        if name == "dense"
        else Qwen3MoeConfig(**common, **mixture, intermediate_size=5632)
    )
    model_class(config)._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def _compared(name: str, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    seconds: dict[int, list[float]] = {1: [], 2: []}
    contents = {}
    for _ in range(arguments.rounds):
        for ranks in seconds:
            out = arguments.work / f"{name}-of-{ranks}"
            shutil.rmtree(out, ignore_errors=True)
            seconds[ranks].append(_layers_s(_started(model, out, ranks, arguments), out))
            contents[ranks] = _contents(out)
            print(name, ranks, seconds[ranks][-1], flush=True)
    ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    killed, same_after = _killed(name, model, arguments, contents[1])
    return {
        "seconds_of_layers": seconds,
        "times_as_fast": [round(ratio, 3) for ratio in ratios],
        "mean": round(statistics.mean(ratios), 3),
        "kills": killed,
        "same_bytes": contents[1] == contents[2] and same_after,
    }


def _started(model: Path, out: Path, ranks: int, arguments: argparse.Namespace) -> "subprocess.Popen[bytes]":
    command = [
        str(LOWBIT), "quantize", "--model", str(model), "--recipe", "gptq-g64", "--out", str(out),
        "--ranks", str(ranks), "--set", "quality.isolate=false", "--set", f"calibration.num_samples={arguments.rows}",
        "--set", "calibration.max_seq_length=512", "--set", f"quality.num_samples={arguments.rows}",
        "--set", "quality.max_seq_length=512",
    ]  # fmt: skip
    with (arguments.work / "quantize.log").open("ab") as log:
        return subprocess.Popen(command, env=ONE_THREAD, stdout=log, stderr=log)


def _layers_s(process: "subprocess.Popen[bytes]", out: Path) -> float:
    """Seconds from the first layer's begin, when texts are embedded, to the last one's end."""
    walk, began, last = out / ".run" / "walk", 0.0, 0.0
    while process.poll() is None:
        time.sleep(0.02)
        if not began and walk.is_dir():
            began = time.monotonic()
        records = list(walk.glob("layer-*.json")) if walk.is_dir() else []
        if records:
            last = max(last, max(record.stat().st_mtime for record in records if record.exists()))
    if process.returncode:
        raise SystemExit(f"lowbit quantize ended with status {process.returncode}")
    return round(last - (time.time() - time.monotonic()) - began, 2)


def _killed(
    name: str, model: Path, arguments: argparse.Namespace, expected: dict[str, Any]
) -> tuple[list[dict[str, Any]], bool]:
    """Kills at random moments, of runs that go on; whether all ended with the expected files."""
    drawn, kills, same = random.Random(11), list[dict[str, Any]](), True
    out, number = arguments.work / f"{name}-killed", 0
    while len(kills) < arguments.kills:
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(LAYERS[name]):
            victim = len(kills) % 2
            process = _started(model, out, 2, arguments)
            layers = len(list((out / ".run" / "walk").glob("layer-*.json")))
            time.sleep(drawn.uniform(4.0, 4.0 + arguments.spread_s))
            ranks = [one for one in psutil.Process(process.pid).children() if process.poll() is None]
            if len(ranks) < 2:
                process.wait()
                break
            ranks[victim].send_signal(signal.SIGKILL)
            kills.append({"rank": victim, "began_with_layers": layers, "status": process.wait()})
            if len(kills) == arguments.kills:
                break
        number += 1
        last = _started(model, out, 1 + number % 2, arguments)
        same = last.wait() == 0 and _contents(out) == expected and same
    return kills, same


def _contents(out: Path) -> dict[str, Any]:
    """Everything in a finished checkpoint, the manifest without what each run has of its own."""
    manifest = json.loads((out / MANIFEST).read_text())
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if path.is_file() and path.name != MANIFEST
    }
    return files | {
        "manifest": {key: value for key, value in manifest.items() if key not in ("created", "run")}
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="sequences of 512 tokens that calibrate")
    parser.add_argument("--kills", type=int, default=10, help="of each model")
    parser.add_argument("--spread-s", type=float, default=40.0, help="that moments are drawn from")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "ranks")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
