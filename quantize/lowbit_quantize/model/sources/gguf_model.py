"""A GGUF model, of one part or several: its configuration, architecture and tokenizer."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lowbit_quantize.model.sources.directory import hash_of, unreadable
from lowbit_quantize.model.sources.gguf_header import GgufHeader, open_part, read_header
from lowbit_quantize.model.sources.gguf_parts import parts_of
from lowbit_quantize.model.sources.gguf_positions import ROPE_FREQS, llama3_parameters
from lowbit_quantize.model.sources.gguf_tokenizer import Vocabulary, read_vocabulary
from lowbit_quantize.model.sources.tokenizer_files import open_tokenizer, write_tokenizer

DEFAULT_THETA = 10000.0  # of llama.cpp, where a file does not say
ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message
MODEL_TYPES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}  # where transformers has another name
# Keys about experts: those that transformers reads, and the sizes, which it leaves at its classes' defaults.
EXPERT_COUNTS = ("expert_count", "expert_used_count")
EXPERT_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


@dataclass(frozen=True)
class GgufModel:
    """`path` is any part of it."""

    path: Path

    @cached_property
    def parts(self) -> tuple[Path, ...]:
        """Its files, the first one first."""
        return parts_of(self.path)

    @cached_property
    def header(self) -> GgufHeader:
        return read_header(self.parts)

    @property
    def model_type(self) -> str:
        """The architecture, as transformers calls it."""
        return MODEL_TYPES.get(self.architecture, self.architecture)

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return self.header.architecture

    @property
    def written_config(self) -> None:
        """There is no `config.json`."""
        return None

    @cached_property
    def config(self) -> Any:
        """The transformers configuration; what transformers infers from the tensors of one part is put right."""
        first = self.parts[0]
        try:
            config = AutoConfig.from_pretrained(first.parent, gguf_file=first.name, trust_remote_code=False)
        except Exception as error:  # whatever a wrong file makes of transformers' code
            open_part(first)  # says what is wrong with one that is cut off
            raise unreadable("configuration", str(first), error) from error
        if len(self.parts) > 1:
            config.tie_word_embeddings = "output.weight" not in self.header.tensors
        if self.stretching is not None:
            config.rope_parameters = self.stretching
        for key, name in EXPERT_SIZES.items():
            if (size := self.header.metadata.get(f"{self.architecture}.{key}")) is not None:
                setattr(config, name, int(size))
        return config

    @cached_property
    def stretching(self) -> dict[str, Any] | None:
        """How the file stretches positions by `rope_freqs`, in transformers' words; None where there are none."""
        if self.architecture != "llama" or ROPE_FREQS not in self.header.tensors:
            return None
        tensors = (tensor for part in self.parts for tensor in open_part(part).tensors)
        factors = next(torch.tensor(tensor.data) for tensor in tensors if tensor.name == ROPE_FREQS)
        theta = float(self.header.metadata.get("llama.rope.freq_base", DEFAULT_THETA))
        return llama3_parameters(factors.float().flatten(), theta)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Hash of every part."""
        return {path.name: hash_of(path) for path in self.parts}

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end a text or a turn."""
        said = (self.header.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ENDS)
        return list(dict.fromkeys(int(number) for number in said if number is not None))

    def tokenizer(self) -> Any:
        """The tokenizer as transformers will open it; raises ModelError where it would not be the file's."""
        return open_tokenizer(self._vocabulary(), str(self.config.model_type))

    def write_tokenizer(self, directory: Path) -> None:
        """Write the files of the tokenizer."""
        write_tokenizer(self._vocabulary(), directory)

    def _vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.parts[0], self.architecture)
