"""A checkpoint directory that may be served: read and checked before anything expensive starts."""

from pathlib import Path

from lowbit_core.errors import CheckpointError
from lowbit_core.manifest import MANIFEST_NAME, Manifest, read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_core.model_shape import read_config, shape_from_config
from lowbit_core.served_checkpoint import ServedCheckpoint
from lowbit_server.config import ServeConfig

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class Checkpoint(ServedCheckpoint):
    """A directory that has passed the checks of `open_checkpoint`."""


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
