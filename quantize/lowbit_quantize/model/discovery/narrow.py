"""A configuration made narrow: the same switches, pattern of layers and sizes of a head; few heads, experts, channels.

What is found on the twin is carried over to real widths (spread.py), so that whatever says how a head is laid out
keeps its size, and as many query heads share a key head as in the model. Names are those that configurations of
transformers use for sizes; a size that is not among them stays, which costs time and nothing else.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

from lowbit_quantize.model.experts.routing import COUNTS, USED
from lowbit_quantize.model.skeleton import given

HIDDEN, MIDDLE, WORDS, EXPERTS, TOP_K, LATENT = 192, 128, 128, 8, 2, 32
KEY_HEADS = 2  # two show what repeats; one stays one
LEAST_ROWS = 8
HEAD_SIZES = ("head_dim", "d_head", "d_state", "ssm_state_size")  # how names of sizes of heads end
SIZES = {
    "vocab_size": WORDS, "vocab_size_per_layer_input": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "q_lora_rank": LATENT, "kv_lora_rank": LATENT, "o_lora_rank": LATENT, "o_groups": 2,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8, "sliding_window": 16, "attention_chunk_size": 16,
    "n_groups": 1, "mamba_n_groups": 1, "mamba_num_heads": 4, "index_n_heads": 2, "zero_expert_num": 2,
}  # fmt: skip
MIDDLES = ("ffn_hidden_size", "block_ff_dim", "block_dim", "dim_feedforward")  # and all …intermediate_size
QUERIES = {
    "num_attention_heads": ("num_key_value_heads", "num_global_key_value_heads"),
    "swa_num_attention_heads": ("swa_num_key_value_heads",),
    "linear_num_value_heads": ("linear_num_key_heads",),
    "linear_num_heads": (),
}


def narrowed(config: Any, *, of_heads: bool = False) -> Any:
    """A copy of a configuration, its text part narrow; parts for pictures and sounds stay.

    `of_heads`: hidden states are as wide as all heads together, as some classes take them to be whatever is said.
    """
    twin = copy.deepcopy(config)
    text = twin.get_text_config()
    hidden = HIDDEN
    own_head_size = (given(text, "head_dim") or given(text, "qk_nope_head_dim")) and not of_heads
    real_heads, real_hidden = given(text, "num_attention_heads"), text.hidden_size
    values = dict(_head_counts(text))
    if not own_head_size and isinstance(real_heads, int) and "num_attention_heads" in values:
        hidden = real_hidden // real_heads * values["num_attention_heads"]
    values |= {"hidden_size": hidden} | _mamba_heads(text, hidden)
    values |= {
        name: size for name, size in SIZES.items() if given(text, name)
    }  # 0 is a part that is not there
    values |= {name: MIDDLE for name in _names(text) if name.endswith("intermediate_size") or name in MIDDLES}
    values |= _expert_counts(text)
    for name, value in values.items():
        before = given(text, name)
        setattr(
            text, name, type(before)(value for _ in before) if isinstance(before, list | tuple) else value
        )
    return twin


def block_rows(config: Any) -> int:
    """Rows of a projection that are surely of one part of one head: what all sizes of heads divide by."""
    text = config.get_text_config()
    sizes = [
        MIDDLE,
        *(size for name, size in vars(text).items() if name.endswith(HEAD_SIZES) and isinstance(size, int)),
    ]
    if not any(name.endswith("head_dim") for name in vars(text)):
        sizes.append(text.hidden_size // text.num_attention_heads)
    return max(LEAST_ROWS, math.gcd(*(size for size in sizes if size)))


def _names(text: Any) -> Iterator[str]:
    """Keys that have a value."""
    return (name for name, value in vars(text).items() if value is not None and not isinstance(value, bool))


def _head_counts(text: Any) -> Iterator[tuple[str, int]]:
    for queries, keys in QUERIES.items():
        count = given(text, queries)
        if not isinstance(count, int):
            continue
        shared = {name: count // keys_of for name in keys if (keys_of := given(text, name))}
        repeats = max(shared.values(), default=1)
        heads = repeats * min(KEY_HEADS, count // repeats)
        yield queries, heads
        for name, each in shared.items():
            yield name, max(1, heads // each)


def _mamba_heads(text: Any, hidden: int) -> dict[str, int]:
    """Heads of Mamba 2, where a configuration has them beside their size."""
    size = given(text, "mamba_d_head")
    if not size:
        return {}
    inner = int((given(text, "mamba_expand") or 2) * hidden)
    heads = max(1, inner // size)
    return {"mamba_n_heads": heads} | ({"mamba_d_ssm": heads * size} if given(text, "mamba_d_ssm") else {})


def _expert_counts(text: Any) -> dict[str, int]:
    found = {name: EXPERTS for name in COUNTS if given(text, name)}
    if not found:
        return {}
    found |= {name: TOP_K for name in USED if given(text, name)}
    groups = given(text, "n_group") or given(text, "num_expert_group") or 1
    for name in ("n_group", "num_expert_group"):
        found |= {name: min(2, groups)} if given(text, name) else {}
    return found | ({"topk_group": 1} if given(text, "topk_group") else {})
