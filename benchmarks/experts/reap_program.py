"""llm-compressor's REAPPruningModifier on exactly the given token ids. Runs in its own environment (reap_peer.py).

Everything that is not given is llm-compressor's default. Writes the pruned model and, beside it, `kept.json`: the
numbers of the experts that stay, by layer. The last line of stdout is a JSON object with its CPU seconds.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer


def keep_unpinned(*_: object, **__: object) -> None:
    """Stands in for `IntermediatesCache.pin_memory`, which fails without an accelerator (0.14.0.1)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--token-ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = keep_unpinned
    rows = json.loads(given.token_ids.read_text(encoding="utf-8"))["input_ids"]
    given.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(given.model),
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=[REAPPruningModifier(sparsity=given.sparsity, report_path=str(given.out / "kept.json"))],
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, rows)),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(given.out)
    print(json.dumps({"program_cpu_s": round(time.process_time(), 1)}))


if __name__ == "__main__":
    main()
