"""One checkpoint in every runtime: tokens/s, time to the first token, memory, and KL through the runtime's own logits.

    python benchmarks/runtimes/run.py --base DIR --checkpoint DIR --work DIR --runtime vllm=DIR@PYTHON \
        --runtime openvino=DIR@PYTHON --runtime onnx=DIR@PYTHON --runtime llama.cpp=FILE.gguf@PYTHON \
        --out benchmarks/runtimes/results/NAME.json

Behind `=` stands the checkpoint or an export of it, behind `@` the Python of the runtime's own environment:

    pip install openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 numpy
    pip install onnxruntime-genai==0.18.0 numpy
    pip install llama-cpp-python==0.3.36 numpy   # builds llama.cpp from source, about ten minutes

A name may be followed by a word of its own, `onnx:int8=DIR@PYTHON`. Speeds: each round starts every runtime once, two
threads each, in an order that rotates; prompts of --prompt tokens, first for one token of output, then for --tokens
more. Memory is the largest resident set of the process and its children together. KL: --rows rows of 256 tokens of the
bundled held-out text, nats a token from the base and from the checkpoint, both computed by transformers in float32 from
their own numbers; once as the runtime runs by itself, and once with its own rounding switched off where it can be.
vLLM gives no logits of all tokens: its KL is `lowbit evaluate --endpoint`'s.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import write_result  # noqa: E402

from lowbit_evaluate.heldout_text import load_heldout  # noqa: E402

MEASURE = Path(__file__).with_name("measure.py")
QUESTION = "What is the capital of France?"
ROW = 256
PROMPTS = 4  # of a round: two for one token, two for more
MODES = {"by itself": (), "exact": ("--exact",)}
Report = dict[str, Any]
Setting = tuple[str, str, str]  # the name as given, the path, the Python


def main() -> None:
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    ids = load_heldout(None, None, tokenizer, len(tokenizer)).ids
    rows = ids[: arguments.rows, :ROW]
    np.save(arguments.work / "rows.npy", rows.numpy())
    models = {
        "base": lambda: AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32),
        "checkpoint": lambda: _unpacked(arguments.checkpoint),
    }
    references = {
        name: _reference(arguments.work / f"{name}.npy", make, rows) for name, make in models.items()
    }
    found: dict[str, Report] = {name: {} for name, _, _ in arguments.runtime}
    speeds = _speeds(arguments, tokenizer, ids)
    for setting in arguments.runtime:
        found[setting[0]] = _summary(speeds[setting[0]], tokenizer)
        kls = {mode: _kl_of(arguments.work, setting, mode, references) for mode in MODES}
        found[setting[0]]["kl"] = {mode: one for mode, one in kls.items() if one}
    said = {"prompt": arguments.prompt, "tokens": arguments.tokens, "rounds": arguments.rounds}
    rows_said = {
        "rows": len(rows),
        "row_tokens": ROW,
        "checkpoint_kl": kl(references["base"], references["checkpoint"]),
    }
    write_result(arguments.out, {**said, **rows_said, "runtimes": found})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure one checkpoint in every runtime.")
    parser.add_argument("--base", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument(
        "--runtime", action="append", required=True, type=_setting, metavar="NAME=PATH@PYTHON"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _setting(text: str) -> Setting:
    name, _, rest = text.partition("=")
    path, _, python = rest.rpartition("@")
    return name, path, python


def _unpacked(checkpoint: str) -> Any:
    """The checkpoint's own numbers in float32, without the FP8 cache that no other runtime has."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.quantization_config["kv_cache_scheme"] = None
    unpack = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, quantization_config=unpack, dtype=torch.float32
    )


def _reference(path: Path, make: Callable[[], Any], rows: torch.Tensor) -> Path:
    """A model's logits of all rows, on disk."""
    model, file = make().eval(), None
    with torch.inference_mode():
        for number, row in enumerate(rows):
            logits = model(row[None]).logits[0].float().numpy()
            if file is None:
                shape = (len(rows), *logits.shape)
                file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
            file[number] = logits
    return path


def kl(base: Path, other: Path) -> Report:
    """Mean KL in nats a token of `other` from `base`, its standard error over rows, and how often top tokens agree."""
    means, same = [], []
    for ours, theirs in zip(*(np.load(path, mmap_mode="r") for path in (base, other)), strict=True):
        p, q = (
            torch.from_numpy(np.array(one[:, : ours.shape[-1]])).double().log_softmax(-1)
            for one in (ours, theirs)
        )
        means.append(float((p.exp() * (p - q)).sum(-1).mean()))
        same.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    error = statistics.stdev(means) / len(means) ** 0.5
    return {
        "mean": round(statistics.mean(means), 6),
        "stderr": round(error, 6),
        "top1": round(statistics.mean(same), 4),
    }


def _kl_of(work: Path, setting: Setting, mode: str, references: dict[str, Path]) -> Report | None:
    """From the base and from the checkpoint; None where the runtime gives no logits."""
    logits = work / "logits.npy"
    task = {"rows": str(work / "rows.npy"), "logits": str(logits)}
    report, _ = _run(work, setting, task, MODES[mode])
    if not report["has_logits"]:
        return None
    found = {f"from_{name}": kl(reference, logits) for name, reference in references.items()}
    print(f"{setting[0]}, {mode}: KL {found}", flush=True)
    return found


def _speeds(arguments: argparse.Namespace, tokenizer: Any, ids: torch.Tensor) -> dict[str, list[Report]]:
    """Reports of each runtime's rounds; each round has prompts of its own."""
    chat = [{"role": "user", "content": QUESTION}]
    question = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    reports: dict[str, list[Report]] = {name: [] for name, _, _ in arguments.runtime}
    for number in range(arguments.rounds):
        own = ids.roll(-number * PROMPTS, 0)[:PROMPTS, : arguments.prompt].tolist()
        task = {
            "prompts": own,
            "question": question,
            "answer_tokens": 12,
            "tokens": arguments.tokens,
        }
        turn = number % len(arguments.runtime)
        for setting in arguments.runtime[turn:] + arguments.runtime[:turn]:
            report, memory = _run(arguments.work, setting, task, ())
            reports[setting[0]].append({**report, "memory_bytes": memory})
            print(f"round {number + 1}, {setting[0]}: {report['tokens_per_s']} tokens/s", flush=True)
    return reports


def _run(work: Path, setting: Setting, task: Report, flags: tuple[str, ...]) -> tuple[Report, int]:
    """The last line that the measuring program printed, and the most memory that it had."""
    name, path, python = setting
    file = work / "task.json"
    file.write_text(json.dumps(task))
    runtime = name.partition(":")[0]
    command = [python, str(MEASURE), runtime, path, "--task", str(file), *flags]
    log = work / f"{name.replace(':', '-')}.log"
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        memory = max(_memory(process))
        output = process.stdout.read().decode() if process.stdout else ""
    if process.wait() != 0:
        raise SystemExit(f"{name} ended with status {process.returncode}; see {log}")
    report: Report = json.loads(output.strip().splitlines()[-1])
    return report, memory


def _memory(process: "subprocess.Popen[bytes]") -> Iterator[int]:
    yield 0
    while process.poll() is None:
        total = 0
        try:
            own = psutil.Process(process.pid)
            for one in (own, *own.children(recursive=True)):
                total += one.memory_info().rss
        except psutil.Error:
            continue
        yield total
        time.sleep(0.25)


def _summary(reports: list[Report], tokenizer: Any) -> Report:
    rates = [rate for report in reports for rate in report["tokens_per_s"]]
    first = [seconds for report in reports for seconds in report["first_s"]]
    return {
        "version": reports[0]["version"],
        "answer": tokenizer.decode(reports[0]["answer"], skip_special_tokens=True),
        "load_s": round(statistics.median(report["load_s"] for report in reports), 2),
        "tokens_per_s": _spread(rates),
        "first_s": _spread(first),
        "memory_bytes": max(report["memory_bytes"] for report in reports),
    }


def _spread(values: list[float]) -> Report:
    low, high = min(values), max(values)
    return {"median": round(statistics.median(values), 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    main()
