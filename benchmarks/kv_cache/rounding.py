"""What an FP8 cache costs by itself where keys and values are rounded to the nearest, and where they are cut off.

    python benchmarks/kv_cache/rounding.py --base DIR --scales CHECKPOINT --token-ids FILE.json --out FILE.json

GPUs round to the nearest, as quality is measured; vLLM 0.32's CPU engine cuts off toward zero
(`tests/contract/test_vllm_fp8_cache.py`). The base model in bfloat16 with the checkpoint's scales, by plain
transformers, against itself without them.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from lowbit_server.engine.kv_scales import KVScale, read_checkpoint_scales

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
Rounding = Callable[[Tensor], Tensor]


def nearest(values: Tensor) -> Tensor:
    return values.to(FP8).float()


def cut_off(values: Tensor) -> Tensor:
    """The nearest FP8 number that is not farther from zero."""
    found = values.to(FP8)
    codes = found.view(torch.uint8)
    return torch.where(found.float().abs() > values.abs(), codes - 1, codes).view(FP8).float()


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """A cache that holds what FP8 leaves of keys and values."""

    def __init__(self, config: Any, scales: dict[int, KVScale], rounding: Rounding | None) -> None:
        super().__init__(config=config)
        self._scales, self._rounding = scales, rounding

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **more: Any
    ) -> Any:
        if self._rounding is not None:
            scale = self._scales[layer_idx]
            key_states = self._rounded(key_states, scale.k_scale)
            value_states = self._rounded(value_states, scale.v_scale)
        return super().update(key_states, value_states, layer_idx, *rest, **more)

    def _rounded(self, values: Tensor, scale: Any) -> Tensor:
        assert self._rounding is not None
        return (self._rounding((values.float() / scale).clamp(-LARGEST, LARGEST)) * scale).to(values.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--scales", type=Path, required=True, help="a checkpoint with an FP8 cache")
    parser.add_argument("--token-ids", type=Path, required=True, help='{"input_ids": [[…], …]}')
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    ids = torch.tensor(json.loads(arguments.token_ids.read_text(encoding="utf-8"))["input_ids"])[
        : arguments.rows
    ]
    scales = read_checkpoint_scales(arguments.scales)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def told(rounding: Rounding | None) -> Tensor:
        """Log-probabilities, (rows, tokens − 1, vocabulary)."""
        rows = (
            model(
                row[None], past_key_values=RoundedCache(model.config, scales, rounding), use_cache=True
            ).logits
            for row in ids
        )
        return torch.cat([one[:, :-1].float().log_softmax(-1) for one in rows])

    base = told(None)
    result: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "base": arguments.base.name, "rows": len(ids), "predictions": base[..., 0].numel(), "mean_kl_nats": {},
    }  # fmt: skip
    for name, rounding in (("nearest", nearest), ("toward zero", cut_off)):
        kl = (base.exp() * (base - told(rounding))).sum(-1).mean(1)
        figures = {"mean": float(kl.mean()), "standard_error": float(kl.std() / len(kl) ** 0.5)}
        result["mean_kl_nats"][name] = figures
        print(f"{name}: {figures['mean']:.4f} ± {figures['standard_error']:.4f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
