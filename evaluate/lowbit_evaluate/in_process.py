"""Evaluates models in process. Each is loaded whole; only one is in memory at a time."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item, Key
from lowbit_core.evals.scoring import Answer
from lowbit_core.log import get_logger
from lowbit_evaluate.heldout_text import TextStates, beside_manifest, compare_text, load_heldout, run_text
from lowbit_evaluate.loaded_model import check_loadable, checkpoint_manifest, load_model
from lowbit_evaluate.loglikelihood import encode, score_items
from lowbit_evaluate.settings import Settings
from lowbit_quantize.device.memory import keep_no_freed_memory
from lowbit_quantize.model.reference import ModelReference, find_model
from lowbit_quantize.model.skeleton import text_config
from lowbit_quantize.quality.dataset import TokenText

log = get_logger("evaluate")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelResult:
    """What one model gave."""

    answers: dict[Key, Answer] = field(default_factory=dict)
    text: TextStates | None = None
    fp8_cache: bool = False


def find(name: str, settings: Settings) -> ModelReference:
    """A model that can be loaded in process; ModelError where there is none."""
    reference = find_model(name, trust_remote_code=settings.trust_remote_code)
    check_loadable(reference)
    checkpoint_manifest(reference)
    return reference


def check_device(settings: Settings) -> torch.device:
    """The device that models run on; ConfigError where it is not there."""
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("--device cuda: torch sees no CUDA device here; allowed: auto, cpu")
    return torch.device("cuda" if settings.device != "cpu" and available else "cpu")


def run_model(
    reference: ModelReference, items: Sequence[Item], text: TokenText | None, settings: Settings, role: str
) -> ModelResult:
    """Put all items and the text through one model; its memory is free again afterwards.

    `role` is what progress calls it: "base" or "model".
    """
    encoded = encode(reference, items)
    model = load_model(
        reference, check_device(settings), DTYPES.get(settings.dtype), fp8_cache=settings.fp8_cache
    )
    cache = f", FP8 cache in {len(model.scales)} layers" if model.scales else ""
    log.info("%s: %s in %s%s", role, reference.name, str(model.dtype).removeprefix("torch."), cache)
    result = ModelResult(
        score_items(model, items, encoded, f"{role}: requests") if items else {},
        run_text(model, text, f"{role}: held-out text") if text else None,
        bool(model.scales),
    )
    del model
    gc.collect()
    keep_no_freed_memory()
    return result


def text_of(source: str | None, reference: ModelReference) -> TokenText:
    """The held-out text for MODEL."""
    return load_heldout(
        source,
        checkpoint_manifest(reference),
        reference.tokenizer(),
        int(text_config(reference.config).vocab_size),
    )


def text_document(
    base: ModelResult | None, ours: ModelResult, text: TokenText, reference: ModelReference
) -> dict[str, Any]:
    """The `quality` section of a manifest from models loaded whole, and the manifest's own figures beside it.

    Without a base there is only the perplexity.
    """
    assert ours.text is not None
    other = base.text if base and base.text else ours.text
    measured = compare_text(other, ours.text, text, fp8_cache=ours.fp8_cache)
    found = measured.model_dump(mode="json")
    if not base:
        keep = ("heldout", "predictions", "perplexity", "kv_cache_included")
        return {name: found[name] for name in keep}
    return {**found, "manifest": beside_manifest(measured, checkpoint_manifest(reference))}


def check_same_tokens(model: ModelReference, base: ModelReference) -> None:
    """ConfigError where the two read different token ids."""
    sizes = [int(text_config(one.config).vocab_size) for one in (model, base)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{model.name} has {sizes[0]} tokens in its vocabulary and --base {base.name} {sizes[1]}: distributions "
            "over different vocabularies cannot be compared; leave out --text"
        )
