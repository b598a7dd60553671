"""What a checkpoint itself asks of vLLM's engine, whoever starts it: `lowbit serve`, or Triton on an export.

It knows nothing of flags, memory and devices: those are the choice of who starts the engine.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_core.manifest import Manifest
from lowbit_core.model_shape import ModelShape

ENGINE_DTYPES = ("bfloat16", "float16")  # a float32 checkpoint is left to the engine, as stock vLLM does


@dataclass(frozen=True)
class ServedCheckpoint:
    """A directory that may be served: its config, its shape, and its manifest if it has one."""

    directory: Path
    config: dict[str, Any]
    shape: ModelShape
    manifest: Manifest | None

    @property
    def name(self) -> str:
        """The base model's name without its path, else the directory's name."""
        base = self.manifest.base.name if self.manifest else ""
        return Path(base).name or self.directory.resolve().name

    @property
    def quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json; empty for an unquantized model."""
        found = self.config.get("quantization_config", {})
        return found if isinstance(found, dict) else {}

    @property
    def declares_fp8_kv(self) -> bool:
        """Whether the engine will read an FP8 cache and its scales from the checkpoint by itself."""
        return bool(self.quantization.get("kv_cache_scheme"))

    @property
    def latent(self) -> bool:
        """Whether attention caches a latent, for which vLLM 0.32 reads no FP8 scheme and no scales."""
        return self.shape.latent_dim is not None

    @property
    def measured_with_fp8_kv(self) -> bool:
        """Whether the manifest says that the model's quality was measured with an FP8 cache."""
        kv_cache = self.manifest.kv_cache if self.manifest else None
        return kv_cache is not None and kv_cache.dtype.startswith(("fp8", "float8"))

    @property
    def layers_without_fp8_kv(self) -> list[int]:
        """Layers that keep keys and values in the model's type, where the others' are in FP8."""
        kv_cache = self.manifest.kv_cache if self.manifest else None
        return kv_cache.skip_layers if kv_cache else []

    def kv_dtype(self, asked: str = "auto") -> str:
        """The dtype of stored keys and values: fp8, or the model's own; `asked` is vLLM's `kv_cache_dtype`."""
        if asked != "auto":
            return asked
        if not self.latent and (self.declares_fp8_kv or self.measured_with_fp8_kv):
            return "fp8"
        return self.shape.dtype if self.shape.dtype in ENGINE_DTYPES else "bfloat16"

    def skipped_layers(self, asked: str = "auto") -> list[str]:
        """Layers whose keys and values stay in the model's type, as the checkpoint was measured."""
        return [str(number) for number in self.layers_without_fp8_kv] if self.kv_dtype(asked) == "fp8" else []

    def engine_arguments(self, asked: str = "auto") -> dict[str, Any]:
        """vLLM's engine arguments that follow from the checkpoint, all but `model`."""
        # AutoAWQ's and AutoGPTQ's formats cannot declare a KV scheme: ask for what the manifest says.
        undeclared = asked == "auto" and not self.declares_fp8_kv and self.kv_dtype() == "fp8"
        skipped = self.skipped_layers(asked)
        return {
            "dtype": self.shape.dtype if self.shape.dtype in ENGINE_DTYPES else "auto",
            "kv_cache_dtype": "fp8" if undeclared else asked,
            "load_format": "safetensors",  # never a pickle
            **({"kv_cache_dtype_skip_layers": skipped} if skipped else {}),
        }
