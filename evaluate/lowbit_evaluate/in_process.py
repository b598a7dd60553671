"""An evaluation in process: the base model is judged, then the compressed one; only one of them is in memory."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item, Key
from lowbit_core.evals.scoring import Answer
from lowbit_core.log import get_logger
from lowbit_evaluate.heldout_text import TextPass, against_riding, compare_text, heldout_text, run_text
from lowbit_evaluate.loaded_model import check_whole, manifest_of, open_whole
from lowbit_evaluate.loglikelihood import encode, score_items
from lowbit_quantize.calibration import TokenText
from lowbit_quantize.memory import keep_no_freed_memory
from lowbit_quantize.source import ModelReference, find_model

log = get_logger("evaluate")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """How models are run. `dtype` is the served one where it is "auto"; without `fp8_cache` no cache is rounded."""

    device: torch.device
    dtype: str = "auto"
    fp8_cache: bool = True


@dataclass(frozen=True)
class Judged:
    """What came of one model."""

    answers: dict[Key, Answer] = field(default_factory=dict)
    text: TextPass | None = None
    fp8_cache: bool = False


def find(name: str) -> ModelReference:
    """A model that can be judged in process; ModelError where there is none."""
    reference = find_model(name)
    check_whole(reference)
    manifest_of(reference)
    return reference


def judge(
    reference: ModelReference, items: Sequence[Item], text: TokenText | None, settings: Settings, what: str
) -> Judged:
    """Ask one model everything; its memory is free again afterwards."""
    encoded = encode(reference, items)
    model = open_whole(reference, settings.device, DTYPES.get(settings.dtype), fp8_cache=settings.fp8_cache)
    rounded = f", FP8 cache in {len(model.scales)} layers" if model.scales else ""
    log.info("%s: %s in %s%s", what, reference.name, str(model.dtype).removeprefix("torch."), rounded)
    judged = Judged(
        score_items(model, items, encoded, f"{what}: requests") if items else {},
        run_text(model, text, f"{what}: held-out text") if text else None,
        bool(model.scales),
    )
    del model
    gc.collect()
    keep_no_freed_memory()
    return judged


def text_of(source: str | None, reference: ModelReference) -> TokenText:
    """The held-out text that MODEL is judged by."""
    return heldout_text(
        source, manifest_of(reference), reference.tokenizer(), int(reference.config.vocab_size)
    )


def text_document(
    base: Judged | None, ours: Judged, text: TokenText, reference: ModelReference
) -> dict[str, Any]:
    """The manifest's quality section from whole models, and how it compares with the one that rode along.

    Without a base there is nothing but the perplexity.
    """
    assert ours.text is not None
    other = base.text if base and base.text else ours.text
    measured = compare_text(other, ours.text, text, fp8_cache=ours.fp8_cache)
    found = measured.model_dump(mode="json")
    if not base:
        keep = ("heldout", "predictions", "perplexity", "kv_cache_included")
        return {name: found[name] for name in keep}
    return {**found, "riding": against_riding(measured, manifest_of(reference))}


def check_same_tokens(model: ModelReference, base: ModelReference) -> None:
    """Whether both read the same token ids; ConfigError elsewhere."""
    sizes = [int(one.config.vocab_size) for one in (model, base)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{model.name} has {sizes[0]} words and --base {base.name} {sizes[1]}: distributions over different "
            "vocabularies cannot be compared; leave out --text"
        )
