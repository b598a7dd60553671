"""A tiny embedding model as they are published: a decoder without a head, its last token's hidden state normalized.

The folder is sentence-transformers': `modules.json` says what follows the decoder, by which vLLM knows what it is.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tests.tiny_models import CONFIGS, seeded_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

FORMS = ("tied", "headless")
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def write_embedding_model(directory: Path, form: str) -> Path:
    """`tied`: as Qwen3-Embedding, whose class has a head that is its embedding; `headless`: one that has none."""
    config = type(CONFIGS["qwen3"])(**CONFIGS["qwen3"].to_dict() | {"tie_word_embeddings": form == "tied"})
    seeded_model(config).model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    path = directory / "config.json"
    written: dict[str, Any] = json.loads(path.read_text())
    assert written["architectures"] == ["Qwen3Model"]
    if form == "tied":
        path.write_text(json.dumps(written | {"architectures": ["Qwen3ForCausalLM"]}))
    (directory / "modules.json").write_text(json.dumps(MODULES))
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_lasttoken": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


def embeddings(directory: Path, texts: list[str]) -> Tensor:
    """What transformers makes of the texts, each of length 1: (texts, hidden)."""
    config, tokenizer = AutoConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        quantized.pop(
            "kv_cache_scheme", None
        )  # a cache that transformers rounds in another way than engines do
    # The whole model: of a checkpoint the quantized modules are named as it names them, and its call unpacks them.
    model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=torch.bfloat16)
    found = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            found.append(model(ids, output_hidden_states=True).hidden_states[-1][0, -1].float())
    return torch.nn.functional.normalize(torch.stack(found), dim=-1)
