"""The few numbers of a `config.json` that decide how much memory a token takes in the KV cache.

It reads no weights and knows no architecture by name: it takes the field names that Hugging Face configs
share, nested `text_config` included, and the latent cache of multi-head latent attention (DeepSeek-AI, 2024,
arXiv:2405.04434). Layers with a sliding window are counted as if they kept every token: an upper bound. Layers that
are said to be recurrent, convolutions or networks alone keep none.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from lowbit_core.documents import describe_error
from lowbit_core.errors import CheckpointError

WITHOUT_CACHE = ("linear", "mamba", "conv", "recurrent", "mlp", "moe")  # how kinds of layers begin
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


class _Config(BaseModel):
    """The fields of `config.json` that matter here; all others are the engine's business."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: str = "unknown"
    num_hidden_layers: int = Field(gt=0, validation_alias=AliasChoices("num_hidden_layers", "n_layer"))
    num_attention_heads: int = Field(gt=0, validation_alias=AliasChoices("num_attention_heads", "n_head"))
    num_key_value_heads: int | None = None
    hidden_size: int = Field(gt=0, validation_alias=AliasChoices("hidden_size", "n_embd"))
    head_dim: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int = 0
    max_position_embeddings: int | None = Field(
        default=None, validation_alias=AliasChoices("max_position_embeddings", "n_positions")
    )
    dtype: str | None = None
    torch_dtype: str | None = None
    layer_types: list[str] | None = Field(
        default=None, validation_alias=AliasChoices("layer_types", "layers_block_type")
    )

    @property
    def caching_layers(self) -> int:
        """Layers that keep keys and values."""
        kinds = self.layer_types or []
        if len(kinds) != self.num_hidden_layers:
            return self.num_hidden_layers
        return sum(not kind.startswith(WITHOUT_CACHE) for kind in kinds)


class ModelShape(BaseModel):
    """What the KV cache of a model is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    layers: int  # that keep keys and values
    kv_heads: int
    head_dim: int
    latent_dim: int | None
    max_positions: int | None
    dtype: str | None

    @property
    def kv_values_per_token(self) -> int:
        """Numbers cached for one token, all layers together."""
        per_layer = self.latent_dim if self.latent_dim else 2 * self.kv_heads * self.head_dim
        return self.layers * per_layer

    def kv_bytes_per_token(self, kv_dtype: str) -> int:
        """Bytes cached for one token when keys and values are stored as `kv_dtype`."""
        return self.kv_values_per_token * BYTES_PER_VALUE[kv_dtype]


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` as it stands; raises CheckpointError where there is none or it is not JSON."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """The shape that a `config.json` describes; raises CheckpointError naming the field that is missing."""
    try:
        fields = _Config.model_validate({**config, **(config.get("text_config") or {})})
    except ValidationError as error:
        raise CheckpointError(f"config.json: {describe_error(error, _Config)}") from error
    return ModelShape(
        model_type=str(config.get("model_type", fields.model_type)),
        layers=fields.caching_layers,
        kv_heads=fields.num_key_value_heads or fields.num_attention_heads,
        head_dim=fields.head_dim or fields.hidden_size // fields.num_attention_heads,
        latent_dim=fields.kv_lora_rank + fields.qk_rope_head_dim if fields.kv_lora_rank else None,
        max_positions=fields.max_position_embeddings,
        dtype=fields.dtype or fields.torch_dtype,
    )
