"""llm-compressor's methods on exactly the given token ids. Runs in its own environment; options: peer.py.

Everything that is not given is llm-compressor's default: mappings, 20 grid points, static activation order,
batch size 1, the model's own dtype. `observer` in the settings is the weights' observer, other settings are
the modifier's.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer import Task, performed
from transformers import AutoModelForCausalLM, AutoTokenizer


def keep_unpinned(*_: object, **__: object) -> None:
    """Stands in for `IntermediatesCache.pin_memory`, which fails without an accelerator (0.14.0.1)."""


def of_preset(task: Task) -> list[Modifier]:
    """The recipes of its examples for a preset: what scales inputs, in order, and what rounds."""
    options = {"targets": "Linear", "scheme": task.scheme, "ignore": ["lm_head"]}
    before: list[Modifier] = []
    methods = task.method.split("+")
    if "smoothquant" in methods:
        before.append(SmoothQuantModifier(smoothing_strength=0.8))
    if "awq" in methods:
        before.append(AWQModifier())
    if "gptq" in methods:
        return [*before, GPTQModifier(**options, **task.settings)]
    return [*before, QuantizationModifier(**options)]


def recipe(task: Task) -> list[Modifier]:
    if task.method == "sparsegpt":
        pattern = {"sparsity": 0.5, "mask_structure": "2:4"}
        return [SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **pattern, **task.settings)]
    if task.scheme:
        return of_preset(task)
    settings = dict(task.settings)
    observer = {"observer": settings.pop("observer")} if "observer" in settings else {}
    weights = QuantizationArgs(
        num_bits=task.bits,
        type="int",
        symmetric=task.symmetric,
        strategy="group",
        group_size=task.group_size,
        **observer,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if task.method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"], **settings)]
    return [AWQModifier(**settings), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def quantize(task: Task) -> None:
    torch.set_num_threads(task.threads)
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = keep_unpinned
    masks = [[1] * len(row) for row in task.rows]
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": task.rows, "attention_mask": masks}),
        recipe=recipe(task),
        num_calibration_samples=len(task.rows),
        max_seq_length=max(map(len, task.rows)),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(task.out, save_compressed=True)
    tokenizer.save_pretrained(task.out)


if __name__ == "__main__":
    performed(quantize)
