"""A cache that only looks: layers compute with it what they compute without one."""

import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM

from lowbit_quantize.model.hooks import HookedCache

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_chunk_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("tokens", [2, 19])  # fewer than the convolution reads, and more than a chunk
def test_a_layer_with_a_mixer_beside_its_attention_computes_the_same(tokens: int) -> None:
    torch.manual_seed(0)
    model = FalconH1ForCausalLM(FalconH1Config(**SIZES)).eval()
    ids, seen = torch.randint(64, (2, tokens)), []

    def look(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(keys.shape)
        return keys, values

    with torch.no_grad():
        without = model(ids, use_cache=False).logits
        looked_at = model(ids, past_key_values=HookedCache(look), use_cache=True).logits
    torch.testing.assert_close(looked_at, without, rtol=0, atol=1e-6)
    assert seen == [(2, 2, tokens, 8)] * 2
