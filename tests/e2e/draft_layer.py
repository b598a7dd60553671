"""A draft layer (multi-token prediction, DeepSeek-AI 2024, arXiv 2412.19437) for a tiny GLM-4.5, taught to guess.

It reads the hidden state of one token and the next token, and guesses the one after that.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.tiny_models import SENTENCES, write_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

STEPS = 120


class DraftLayer(nn.Module):
    """A decoder layer of the model, fed with (hidden state, next token); names as published files have them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        decoder = model.model
        hidden = decoder.norm.weight.shape[0]
        self.enorm, self.hnorm = copy.deepcopy(decoder.norm), copy.deepcopy(decoder.norm)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.block = copy.deepcopy(decoder.layers[-1])
        self.last_norm = copy.deepcopy(decoder.norm)

    def forward(self, hidden: Tensor, embedded: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """States that the head reads, (rows, tokens, hidden)."""
        both = torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1)
        states: Tensor = self.last_norm(self.block(self.eh_proj(both), position_embeddings=positions))
        return states

    def published(self, layer: int) -> dict[str, Tensor]:
        """Its tensors as layer `layer` of the files."""
        places = {"last_norm.weight": "shared_head.norm.weight"}
        return {
            f"model.layers.{layer}.{places.get(name, name).removeprefix('block.')}": _stored(name, tensor)
            for name, tensor in self.state_dict().items()
        }


def write_drafting_model(directory: Path) -> Path:
    """A tiny GLM-4.5 that was taught sentences, with a draft layer that was taught to guess what it will say."""
    write_tiny_model(directory, "glm4_moe", sentences=SENTENCES)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    depth = model.config.num_hidden_layers
    draft = _taught(DraftLayer(model), model)
    path, config = directory / "model.safetensors", directory / "config.json"
    tensors = load_file(path) | _one_expert_each(draft.published(depth))
    tensors[f"model.layers.{depth}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"model.layers.{depth}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_nextn_predict_layers": 1}))
    return directory


def _stored(name: str, tensor: Tensor) -> Tensor:
    return tensor if "correction_bias" in name else tensor.to(torch.bfloat16)


def _taught(draft: DraftLayer, model: Any) -> DraftLayer:
    model.requires_grad_(False)
    decoder = model.model
    with torch.no_grad():
        hidden = decoder(SENTENCES).last_hidden_state[:, :-2]
        embedded = decoder.embed_tokens(SENTENCES[:, 1:-1])
        embedded[:, 0] = 0  # as vLLM does
    positions = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    targets = SENTENCES[:, 2:]
    optimizer = torch.optim.Adam(draft.parameters(), lr=2e-3)
    for _ in range(STEPS):
        logits = model.lm_head(draft(hidden, embedded, positions))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return draft


def _one_expert_each(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as files have them, one by one, instead of stacked."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            place, _, kind = name.rpartition(".")
            for number, expert in enumerate(tensor):
                parts = expert.chunk(2) if kind == "gate_up_proj" else (expert,)
                names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
                for part, one in zip(names, parts, strict=True):
                    found[f"{place}.{number}.{part}.weight"] = one.contiguous()
        else:
            found[name] = tensor
    return found
