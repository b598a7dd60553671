"""Tiny seeded models of each family, with a real tokenizer trained on the bundled text."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from transformers import LlamaConfig, MistralConfig  # isort: skip

from lowbit_quantize.calibration import _documents
from lowbit_quantize.recipe import Text

VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=32),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES),
}


def write_tiny_model(directory: Path, family: str = "llama", seed: int = 0) -> Path:
    """Save a seeded model of `family` with uneven activations and weights, and its tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.exp(0.5 * torch.randn_like(parameter)))
            elif parameter.dim() == 2:
                parameter.mul_(4 * torch.exp(0.3 * torch.randn(1, parameter.shape[1])).to(parameter.dtype))
            else:  # biases
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens."""
    fast = PreTrainedTokenizerFast(tokenizer_object=_trained(), eos_token="<|eos|>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


@cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    sample = [document.words for document in _documents(Text(), "heldout", Text())[:40]]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer
