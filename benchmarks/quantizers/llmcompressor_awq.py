"""The peer's program: llm-compressor's AWQ on exactly the given token ids. Runs in its own environment.

    python llmcompressor_awq.py --model DIR --token-ids FILE --out DIR [--asymmetric]

Everything that is not given here is llm-compressor's default: mappings, 20 grid points, batch size 1, and
the model's own dtype. The last line of stdout is a JSON object.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer


def keep_unpinned(*_: object, **__: object) -> None:
    """Stands in for `IntermediatesCache.pin_memory`, which fails without an accelerator (0.14.0.1)."""


def recipe(bits: int, group_size: int, symmetric: bool) -> list[AWQModifier | QuantizationModifier]:
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return [AWQModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]


def token_dataset(path: Path) -> Dataset:
    """The rows of a JSON file {"input_ids": [[int, ...], ...]} as an already tokenized dataset."""
    rows = json.loads(path.read_text(encoding="utf-8"))["input_ids"]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def main() -> None:
    parser = argparse.ArgumentParser(description="llm-compressor's AWQ on given token ids.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--token-ids", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = keep_unpinned
    started_s = time.perf_counter()
    dataset = token_dataset(arguments.token_ids)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    loaded_s = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=recipe(arguments.bits, arguments.group_size, not arguments.asymmetric),
        num_calibration_samples=len(dataset),
        max_seq_length=max(map(len, dataset["input_ids"])),
        shuffle_calibration_samples=False,
    )
    quantized_s = time.perf_counter()
    model.save_pretrained(arguments.out, save_compressed=True)
    tokenizer.save_pretrained(arguments.out)
    report = {
        "rows": len(dataset),
        "tokens": sum(map(len, dataset["input_ids"])),
        "dtype": str(model.dtype),
        "load_s": round(loaded_s - started_s, 1),
        "quantize_s": round(quantized_s - loaded_s, 1),
        "save_s": round(time.perf_counter() - quantized_s, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
