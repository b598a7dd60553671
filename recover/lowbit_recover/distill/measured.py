"""Checkpoints measured on held-out text as `lowbit evaluate` does: by plain transformers, from their finished files."""

import gc
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_core.errors import CheckpointError, ConfigError
from lowbit_core.manifest import MANIFEST_NAME, BaseModelRecord, Manifest, QualityRecord, read_manifest
from lowbit_evaluate.heldout_text import TextStates, compare_text, run_text
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.device.memory import keep_no_freed_memory
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.model.skeleton import text_config
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.quality.dataset import TokenText


@dataclass(frozen=True)
class Reference:
    """The base on the texts that judge: states on the held-out text and on the rows set aside, and its head."""

    heldout: TextStates
    set_aside: Tensor


def manifest_of(reference: ModelReference) -> Manifest:
    """The manifest of a checkpoint of ours; CheckpointError of any other model."""
    manifest = read_manifest(reference.path) if reference.kind == "directory" else None
    if manifest is None:
        raise CheckpointError(
            f"{reference.name} has no {MANIFEST_NAME}; give a checkpoint that `lowbit quantize` wrote (16 bits: "
            "a recipe with passes alone)"
        )
    if manifest.export is not None:
        raise CheckpointError(
            f"{reference.name} is an export for {manifest.export.to}; give the checkpoint that it was made of"
        )
    return manifest


def check_same_words(checkpoint: ModelReference, base: ModelReference) -> None:
    """ConfigError where the two do not read the same words."""
    sizes = [int(text_config(one.config).vocab_size) for one in (checkpoint, base)]
    words = [one.tokenizer().get_vocab() for one in (checkpoint, base)]
    if sizes[0] != sizes[1] or words[0] != words[1]:
        raise ConfigError(
            f"{checkpoint.name} and --base {base.name} have different vocabularies ({sizes[0]} and {sizes[1]} tokens): "
            "one cannot teach the other; give the model that the checkpoint was made of"
        )


def release() -> None:
    """Give the memory of a model back that nobody refers to any more."""
    gc.collect()
    keep_no_freed_memory()


def quality_of(
    reference: ModelReference, base: TextStates, heldout: TokenText, device: torch.device, what: str
) -> QualityRecord:
    """A checkpoint beside the base on the held-out text, its FP8 cache included."""
    model = load_model(reference, device)
    states, fp8_cache = run_text(model, heldout, f"{what}: held-out text"), bool(model.scales)
    del model
    release()
    return compare_text(base, states, heldout, fp8_cache=fp8_cache)


def base_record(manifest: Manifest, base: ModelReference) -> tuple[BaseModelRecord, int]:
    """The manifest's base and its bytes, or where the model that teaches is another, that one's."""
    if manifest.base.sha256 == base.sha256:
        return manifest.base, manifest.size.base_bytes
    config = base.config
    record = manifest.base.model_copy(
        update={
            "name": base.name,
            "kind": base.kind,
            "revision": base.revision,
            "model_type": base.model_type,
            "dtype": str(config.dtype).removeprefix("torch."),
            "sha256": base.sha256,
        }
    )
    if base.kind == "gguf":
        return record, base.path.stat().st_size
    files = WeightFiles(base.path)
    return record, sum(files.bytes(name) for name in files)
