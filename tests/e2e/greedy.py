"""Greedy texts of many tiny checkpoints, from stock vLLM or from plain transformers, each in its own process.

`python -m tests.e2e.greedy engine DIR...`, `… drafted DIR...` (a token drafted by the checkpoint's own draft layer) and
`… reference DIR...` print one JSON object: a directory's texts. Two processes, because vLLM changes transformers'
layers in the process that imports it.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tests.tiny_models import CONTEXT, SENTENCES
from transformers import AutoConfig, DynamicCache

from lowbit_core.manifest import read_manifest
from lowbit_quantize.model.skeleton import model_class
from lowbit_quantize.schemes.kv_cache import FP8, FP8_MAX
from lowbit_server.engine.kv_scales import KVScale, read_checkpoint_scales

PROMPTS = SENTENCES[:, :CONTEXT]
NEW_TOKENS = SENTENCES.shape[1] - CONTEXT
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # each engine in this process, which then frees it
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # as `lowbit serve`: activations are not rounded
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class CutCache(DynamicCache):  # type: ignore[misc]  # transformers has no type information here
    """transformers' cache with the keys and values that stock vLLM's FP8 cache holds on CPUs: cut off toward zero.

    tests/contract/test_vllm_fp8_cache.py holds vLLM to that; `lowbit serve` rounds to the nearest.
    """

    def __init__(self, config: Any, scales: dict[int, KVScale]) -> None:
        super().__init__(config=config)
        self._scales = scales

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *rest: Any, **more: Any) -> Any:
        """Cut off what one layer adds, then keep it."""
        if (scale := self._scales.get(layer_idx)) is not None:
            key_states, value_states = held(key_states, scale.k_scale), held(value_states, scale.v_scale)
        return super().update(key_states, value_states, layer_idx, *rest, **more)


def held(values: torch.Tensor, scales: float | tuple[float, ...]) -> torch.Tensor:
    """What is read of (texts, heads, tokens, size), times one scale or each head's, whose codes were cut off."""
    scale = torch.tensor(scales).view(-1, 1, 1)
    return (cut_off(values.float() / scale) * scale).to(values.dtype)


def cut_off(values: torch.Tensor) -> torch.Tensor:
    """The nearest FP8 number that is not farther from zero, saturated, as float32."""
    values = values.float().clamp(-FP8_MAX, FP8_MAX)
    nearest = values.to(FP8)
    codes = nearest.view(torch.uint8)
    return torch.where(nearest.float().abs() > values.abs(), codes - 1, codes).view(FP8).float()


def reference(directory: Path, prompts: torch.Tensor = PROMPTS, tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """The texts, and how clear each choice was (gaps): logits between it and the next best."""
    config = AutoConfig.from_pretrained(directory)
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        quantized.pop(
            "kv_cache_scheme", None
        )  # transformers would round as well, with scales cut to bfloat16
    model = model_class(config).from_pretrained(directory, config=config, dtype=torch.bfloat16)
    stored, skipped = read_checkpoint_scales(directory), _skipped(directory)
    cache = CutCache(config, {layer: one for layer, one in stored.items() if layer not in skipped})
    with torch.inference_mode():
        done = model.generate(
            prompts,
            past_key_values=cache,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack(done.logits, 1).float()  # (prompts, tokens, vocabulary)
    best = logits.topk(2).values
    chosen = torch.log_softmax(logits, -1).amax(-1)
    texts = done.sequences[:, prompts.shape[1] :]
    return {
        "texts": texts.tolist(),
        "logprobs": chosen.tolist(),
        "gaps": (best[..., 0] - best[..., 1]).tolist(),
    }


def engine(
    directory: Path, prompts: torch.Tensor = PROMPTS, tokens: int = NEW_TOKENS, **flags: Any
) -> dict[str, Any]:
    """The texts of stock `vllm.LLM`, and what its cache holds.

    No flag concerns the checkpoint but `flags`, and the layers that its manifest keeps out of the FP8 cache.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # as the server's workers do; this engine runs in this process
    began = time.monotonic()
    longest = prompts.shape[1] + tokens + 1
    llm = LLM(
        str(directory),
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=len(prompts),
        kv_cache_dtype_skip_layers=[str(number) for number in _skipped(directory)],
        **flags,
    )
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts.tolist()]
    answers = [answer.outputs[0] for answer in llm.generate(asked, sampling, use_tqdm=False)]
    found = {
        "texts": [list(answer.token_ids) for answer in answers],
        "logprobs": [
            [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
            for answer in answers
        ],
        "kv_cache_dtype": llm.llm_engine.vllm_config.cache_config.cache_dtype,
    }
    if flags:
        found |= _drafts(llm)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found | {"seconds": time.monotonic() - began}


def _skipped(directory: Path) -> list[int]:
    """Layers that a checkpoint keeps out of the FP8 cache."""
    manifest = read_manifest(directory)
    return manifest.kv_cache.skip_layers if manifest and manifest.kv_cache else []


def drafted(directory: Path) -> dict[str, Any]:
    """The same with drafts of one token, and how many were made and accepted."""
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    return engine(directory, speculative_config=speculative, disable_log_stats=False)


def _drafts(llm: Any) -> dict[str, int]:
    counts = {one.name: one.value for one in llm.get_metrics() if hasattr(one, "value")}
    return {key: int(counts[f"vllm:spec_decode_num_{key}_tokens"]) for key in ("accepted", "draft")}


def main(arguments: list[str]) -> None:
    """Print `TEXTS {directory: …}` for the directories named."""
    os.environ.update(ENVIRONMENT)
    ask: Any = {"engine": engine, "drafted": drafted, "reference": reference}[arguments[0]]
    print("TEXTS", json.dumps({path: ask(Path(path)) for path in arguments[1:]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
