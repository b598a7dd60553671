"""What a distillation will take, from headers and settings alone: memory of its parts, and room on the disk."""

import math
from collections.abc import Mapping
from typing import Any

from lowbit_core.manifest import Manifest
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.model.skeleton import text_config
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.storage.packed_words import WORD_BITS
from lowbit_recover.distill.settings import Settings
from lowbit_recover.distill.teacher import cache_bytes
from lowbit_recover.distill.trainee import FLOATS, PACKED, SCALE, check_trainable
from lowbit_recover.distill.trainer import POSITIONS_AT_ONCE

FLOAT = 4  # bytes of a number in float32
MOMENTS = 2  # of AdamW, for each parameter
CACHE_SCALES = ("k_scale", "v_scale", "q_scale")
LOGIT_COPIES = 5  # of the positions at once: product, softmax, masked, and their gradients


def trained_parameters(reference: ModelReference, settings: Settings) -> int:
    """Numbers that train, by the files' headers."""
    files, schemes = WeightFiles(reference.path), check_trainable(reference, settings.train)
    found = 0
    for name in files:
        linear, _, part = name.rpartition(".")
        numbers = math.prod(files.shape(name))
        if linear in schemes:
            found += numbers if part == SCALE else 0
            if part == PACKED and settings.train == "weights":
                found += _codes(files, linear, schemes[linear])
        elif files.dtype(name) in FLOATS and part not in CACHE_SCALES:
            is_norm = len(files.shape(name)) == 1 and "norm" in linear.lower()
            found += numbers if settings.train == "weights" or is_norm else 0
    return found


def _codes(files: WeightFiles, linear: str, scheme: Integer) -> int:
    """Numbers of a weight, of which a header has the words and the scales."""
    outputs, words = files.shape(f"{linear}.{PACKED}")
    groups = files.shape(f"{linear}.{SCALE}")[1]
    return outputs * (groups * scheme.group_size if scheme.group_size else words * WORD_BITS // scheme.bits)


def memory_bytes(reference: ModelReference, manifest: Manifest, settings: Settings) -> dict[str, int]:
    """Bytes in memory while it trains, by what they hold."""
    trained, config = trained_parameters(reference, settings), text_config(reference.config)
    frozen = 0
    if settings.train == "scales":  # codes are a byte each, everything else float32
        codes = sum(one.weights or 0 for one in manifest.modules)
        frozen = codes + FLOAT * max(0, manifest.size.parameters - codes)
    tokens = settings.micro_batch * settings.row_tokens
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = max(int(getattr(config, "intermediate_size", 0) or 0), hidden)
    layer = manifest.size.parameters // max(1, layers)
    kept = layers * tokens * hidden if settings.checkpointing else layers * tokens * (6 * hidden + 4 * inner)
    working = tokens * (6 * hidden + 4 * inner) + 2 * layer
    return {
        "weights": frozen + FLOAT * trained,
        "gradients": FLOAT * trained,
        "optimizer": MOMENTS * FLOAT * trained,
        "activations": FLOAT * (kept + working),
        "logits": LOGIT_COPIES * FLOAT * min(POSITIONS_AT_ONCE, tokens) * int(config.vocab_size),
    }


def state_bytes(trained: int) -> int:
    """Of the last step and of the best one, with room for the copy that replaces one."""
    return FLOAT * trained * (2 * (1 + MOMENTS) + 1)


def disk_bytes(
    manifest: Manifest, reference: ModelReference, settings: Settings, teacher: Mapping[str, Any]
) -> int:
    """What the output directory will hold at most."""
    trained = trained_parameters(reference, settings)
    files = sum(one.bytes for one in manifest.files.values())
    return files + state_bytes(trained) + cache_bytes(teacher)
