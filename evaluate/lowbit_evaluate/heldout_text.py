"""Held-out text through models that were loaded whole: the figures that rode along with the walk, measured again.

Nothing of the walk takes part but the rules of `quality.py`: plain transformers runs each model from its files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import ConfigError
from lowbit_core.manifest import Manifest, QualityRecord
from lowbit_evaluate.loaded_model import WholeModel
from lowbit_quantize import quality
from lowbit_quantize.calibration import TokenText, load_texts
from lowbit_quantize.progress import track
from lowbit_quantize.recipe import BUNDLED, Recipe, Text, parse_recipe
from lowbit_quantize.stream import BATCH_TOKENS


@dataclass(frozen=True)
class TextPass:
    """What one model made of a text: hidden states before the head, (sequences, tokens, hidden), and the head."""

    hidden: Tensor
    head: Tensor


def heldout_text(source: str | None, manifest: Manifest | None, tokenizer: Any, vocabulary: int) -> TokenText:
    """The text of the manifest's recipe, bundled text without one, or `source` in as many sequences.

    A source that ends in .json is token ids. Documents that overlap with the calibration text are left out, as the
    walk does.
    """
    recipe = parse_recipe(manifest.recipe, "of the manifest") if manifest else Recipe()
    heldout: Text = recipe.quality
    if source is not None:
        ids = source.endswith(".json")
        heldout = heldout.model_copy(
            update={"token_ids": source if ids else None, "source": BUNDLED if ids else source}
        )
    return load_texts(recipe.calibration, heldout, tokenizer, vocabulary)[1]


def run_text(model: WholeModel, text: TokenText, what: str) -> TextPass:
    """Every sequence through the model, with progress."""
    hidden = torch.cat([*_hidden(model, text, what)])
    return TextPass(hidden, model.head.cpu().clone())


def _hidden(model: WholeModel, text: TokenText, what: str) -> Iterator[Tensor]:
    rows = text.ids.split(max(1, BATCH_TOKENS // text.ids.shape[1]))
    for batch in track(rows, len(rows), what):
        yield model.hidden(batch).cpu()


def compare_text(base: TextPass, ours: TextPass, text: TokenText, *, fp8_cache: bool) -> QualityRecord:
    """The quality section of a manifest, from whole models."""
    same, p, q = nn.Identity(), base.hidden, ours.hidden
    head = base.head
    if head.shape[0] != ours.head.shape[0]:
        raise ConfigError(
            f"MODEL's vocabulary has {ours.head.shape[0]} words, that of --base {head.shape[0]}: their "
            "distributions cannot be compared"
        )
    if head.shape != ours.head.shape or not torch.equal(
        head, ours.head
    ):  # one head that reads both, side by side
        head = torch.cat([base.head.float(), ours.head.float()], dim=1)
        p = torch.cat([p.float(), p.new_zeros(*p.shape[:2], ours.head.shape[1]).float()], dim=-1)
        q = torch.cat([q.new_zeros(*q.shape[:2], base.head.shape[1]).float(), q.float()], dim=-1)
    predictions = quality.compare(p, q, same, same, head, text.ids)
    return quality.summarize(predictions, text, kv_cache_included=fp8_cache)


def against_riding(measured: QualityRecord, manifest: Manifest | None) -> dict[str, Any] | None:
    """The manifest's mean KL beside this one, where both are of the same tokens; None elsewhere.

    They agree where they differ by less than the standard error.
    """
    if manifest is None or manifest.quality.heldout.sha256 != measured.heldout.sha256:
        return None
    riding = manifest.quality
    return {
        "mean_kld": riding.mean_kld,
        "kld_stderr": riding.kld_stderr,
        "difference": measured.mean_kld - riding.mean_kld,
        "agrees": abs(measured.mean_kld - riding.mean_kld) <= riding.kld_stderr,
        "top1_agreement": riding.top1_agreement,
        "perplexity_ratio": riding.perplexity_ratio,
    }
