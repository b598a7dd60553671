"""Quality on held-out text, measured on models loaded whole: the figures of the manifest a second time.

Plain transformers runs each model from its files, independently of the walk; only the arithmetic of `quality/kl.py` is
shared with it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import ConfigError
from lowbit_core.manifest import Manifest, QualityRecord
from lowbit_core.progress import track
from lowbit_evaluate.loaded_model import LoadedModel
from lowbit_quantize.model.decoder import BATCH_TOKENS
from lowbit_quantize.model.logits import PLAIN, LogitsForm
from lowbit_quantize.quality import kl
from lowbit_quantize.quality.dataset import TokenText, load_texts
from lowbit_quantize.quality.token_ids import holds_token_ids
from lowbit_quantize.recipe import BUNDLED, Recipe, Text, parse_recipe


@dataclass(frozen=True)
class TextStates:
    """One model on a text: hidden states before the head, (sequences, tokens, hidden), the head and what follows."""

    hidden: Tensor
    head: Tensor
    logits: LogitsForm = PLAIN


def load_heldout(source: str | None, manifest: Manifest | None, tokenizer: Any, vocabulary: int) -> TokenText:
    """The text that the manifest's recipe names, or without a manifest the bundled one; `source` replaces either.

    A .json file with `input_ids` holds token ids. Documents that overlap with the calibration text are left out, as in
    a run of `lowbit quantize`.
    """
    recipe = parse_recipe(manifest.recipe, "of the manifest") if manifest else Recipe()
    heldout: Text = recipe.quality
    if source is not None:
        source = os.path.expanduser(source)
        ids = holds_token_ids(Path(source))
        heldout = heldout.model_copy(
            update={"token_ids": source if ids else None, "dataset": BUNDLED if ids else source}
        )
    return load_texts(recipe.calibration, heldout, tokenizer, vocabulary)[1]


def run_text(model: LoadedModel, text: TokenText, what: str) -> TextStates:
    """Run the model on every sequence, with progress."""
    hidden = torch.cat([*_hidden(model, text, what)])
    return TextStates(hidden, model.head.cpu().clone(), model.logits)


def _hidden(model: LoadedModel, text: TokenText, what: str) -> Iterator[Tensor]:
    rows = text.ids.split(max(1, BATCH_TOKENS // text.ids.shape[1]))
    for batch in track(rows, len(rows), what):
        yield model.hidden(batch).cpu()


def compare_text(base: TextStates, ours: TextStates, text: TokenText, *, fp8_cache: bool) -> QualityRecord:
    """The `quality` section of a manifest, from two models' hidden states."""
    same, head = nn.Identity(), base.head
    if head.shape[0] != ours.head.shape[0]:
        raise ConfigError(
            f"MODEL's vocabulary has {ours.head.shape[0]} tokens, that of --base {head.shape[0]}: their "
            "distributions cannot be compared"
        )
    own_head = None if torch.equal(head, ours.head) else ours.head
    predictions = kl.compare(base.hidden, ours.hidden, same, same, head, text.ids, own_head, base.logits)
    return kl.summarize(predictions, text, kv_cache_included=fp8_cache)


def beside_manifest(measured: QualityRecord, manifest: Manifest | None) -> dict[str, Any] | None:
    """The manifest's mean KL beside this one, where both are on the same tokens; otherwise None.

    They agree where they differ by no more than the standard error.
    """
    if manifest is None or manifest.quality.heldout.sha256 != measured.heldout.sha256:
        return None
    recorded = manifest.quality
    return {
        "mean_kld": recorded.mean_kld,
        "kld_stderr": recorded.kld_stderr,
        "difference": measured.mean_kld - recorded.mean_kld,
        "agrees": abs(measured.mean_kld - recorded.mean_kld) <= recorded.kld_stderr,
        "top1_agreement": recorded.top1_agreement,
        "perplexity_ratio": recorded.perplexity_ratio,
    }
