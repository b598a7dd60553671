"""The engine's kernels timed in a process of their own: every row is answered, in order, by vLLM's own layers."""

import json
import subprocess
import sys
from typing import Any

import pytest

WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "strategy": "group",
    "group_size": 64,
    "symmetric": True,
    "dynamic": False,
}
ROWS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}


def quantization(form: str, **group: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["linear"], "format": form, **group}},
        "ignore": [],
    }


W4A16 = quantization("pack-quantized", weights=WEIGHTS, input_activations=None)
W8A8 = quantization("int-quantized", weights=ROWS, input_activations=TOKENS)


def times(**request: list[dict[str, Any]]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "lowbit_server.engine.kernel_times"],
        input=json.dumps({"products": [], "attention": []} | request), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.engine
def test_every_row_is_answered_in_order() -> None:
    products = [
        {"inputs": inputs, "outputs": 512, "tokens": tokens, "quantization": scheme}
        for scheme in (None, W4A16, W8A8)
        for inputs in (512, 4096)
        for tokens in (1, 256)
    ]
    odd = {"inputs": 48, "outputs": 512, "tokens": 1, "quantization": W4A16}  # its groups are of 64
    attention = [
        {
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 64,
            "fp8": fp8,
            "streams": streams,
            "queries": 1,
            "context": context,
        }
        for fp8 in (False, True)
        for streams, context in ((1, 128), (4, 4096))
    ]
    answer = times(products=[*products, odd], attention=attention)
    *seconds, refused = answer["products"]
    assert refused is None
    assert all(one > 0 for one in (*seconds, *answer["attention"]))
    assert answer["bandwidth"] > 1e8
    assert answer["threads"] >= 1
    for few, many in zip(seconds[::2], seconds[1::2], strict=True):
        assert many > few
    for short, long in zip(answer["attention"][::2], answer["attention"][1::2], strict=True):
        assert long > short
