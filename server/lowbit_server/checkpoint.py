"""A checkpoint directory that may be served: read and checked before anything expensive starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_core.errors import CheckpointError
from lowbit_core.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_files
from lowbit_core.model_shape import ModelShape, read_config, shape_from_config
from lowbit_server.config import ServeConfig

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Checkpoint:
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


def served_names(config: ServeConfig, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The model's names in the API, the one that answers and metrics show first."""
    return config.served_model_name or (checkpoint.name,)


def open_checkpoint(config: ServeConfig) -> Checkpoint:
    """Read and check a checkpoint before anything expensive starts.

    Raises CheckpointError for a directory that is incomplete, changed, or rejected by its gate.
    """
    manifest = read_manifest(config.directory)
    if manifest is not None:
        _refuse_rejected(config, manifest)
        verify_files(config.directory, manifest, hashes=not config.skip_hash_check)
        _refuse_unlisted_weights(config.directory, manifest)
    elif not any(config.directory.glob("*.safetensors")):
        raise CheckpointError(f"{config.directory} is incomplete: it has no *.safetensors file")
    model_config = read_config(config.directory)
    return Checkpoint(config.directory, model_config, shape_from_config(model_config), manifest)


def _refuse_rejected(config: ServeConfig, manifest: Manifest) -> None:
    if not manifest.gate.accepted and not config.allow_rejected:
        raise CheckpointError(
            f"{config.directory} was rejected by its quality gate ({'; '.join(manifest.gate.reasons)}); "
            f"quantize it again with a milder recipe, or give --allow-rejected ({MANIFEST_NAME}: gate)"
        )


def _refuse_unlisted_weights(directory: Path, manifest: Manifest) -> None:
    """The engine loads every weight file that it finds; one that the manifest does not list was added later."""
    found = (path.name for path in sorted(directory.iterdir()) if path.suffix in WEIGHT_SUFFIXES)
    if unlisted := [name for name in found if name not in manifest.files]:
        raise CheckpointError(
            f"{directory} holds {', '.join(unlisted)}, which {MANIFEST_NAME} does not list: "
            "remove what was added"
        )
