"""From texts to token sequences: what a model is calibrated on and what it is judged by.

A sequence holds one domain, so that quality can be told apart by domain; domains take turns, so that any
prefix is a mix. Conversations go through the model's own chat template. Held-out documents that share a run
of words with a calibration document are dropped: the two texts never overlap.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_core.errors import RecipeError
from lowbit_core.manifest import TextRecord
from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.overlap import OVERLAP_TOKENS, OVERLAP_WORDS, drop_overlap, token_runs
from lowbit_quantize.quality.packing import pack
from lowbit_quantize.quality.sources import HELDOUT_SHARE, find_documents, is_shared
from lowbit_quantize.quality.token_ids import read_token_ids
from lowbit_quantize.recipe import Calibration, Text


@dataclass(frozen=True)
class TokenText:
    """Token ids (sequences, tokens), the domain of each sequence, and a record of where they came from.

    `aside`, (fewer sequences, tokens), are of the same source, but of other documents: they only judge.
    """

    ids: Tensor
    domains: tuple[str, ...]
    record: TextRecord
    aside: Tensor | None = None


def load_texts(
    calibration: Text, heldout: Text, tokenizer: Any, vocabulary: int
) -> tuple[TokenText, TokenText]:
    """The calibration and held-out sequences of a recipe; raises RecipeError where a source gives too little.

    What is set aside of the calibration text has the length of held-out sequences, beside which it is judged.
    """
    to_use = find_documents(calibration, "calibration", heldout)
    held = find_documents(heldout, "heldout", calibration)
    split = _split_note(len(to_use), len(held)) if is_shared(calibration, heldout) else ""
    ours, used = _sequences(calibration, to_use, tokenizer, vocabulary, "calibration", split)
    apart = drop_overlap(held, used)
    note = f"{split}{_overlap_note(len(held) - len(apart))}"
    theirs, _ = _sequences(heldout, apart, tokenizer, vocabulary, "quality", note)
    if (calibration.token_ids or heldout.token_ids) and not token_runs(ours.ids).isdisjoint(
        token_runs(theirs.ids)
    ):
        raise RecipeError(
            f"calibration and held-out tokens share a run of {OVERLAP_TOKENS} tokens: quality would be measured "
            "on what the model was calibrated with; give other token ids or text for one of them"
        )
    aside = _set_aside(calibration, to_use, used, theirs, tokenizer)
    record = ours.record.model_copy(update={"set_aside_sha256": None if aside is None else _digest(aside)})
    return TokenText(ours.ids, ours.domains, record, aside), theirs


def judging_ids(calibration: TokenText, heldout: TokenText) -> Tensor:
    """All that judges, (sequences, tokens): the held-out text, then what is set aside of the calibration text."""
    return heldout.ids if calibration.aside is None else torch.cat([heldout.ids, calibration.aside])


def _set_aside(
    text: Text, documents: list[Document], used: list[Document], heldout: TokenText, tokenizer: Any
) -> Tensor | None:
    """Sequences of documents that were not used and that share no run of words with those that were."""
    if text.token_ids or not isinstance(text, Calibration) or not text.set_aside:
        return None
    taken = {id(document) for document in used}
    rest = drop_overlap([document for document in documents if id(document) not in taken], used)
    wanted = text.model_copy(update={"num_samples": text.set_aside, "max_seq_length": heldout.ids.shape[1]})
    rows = pack(wanted, rest, tokenizer)[0]
    return rows if len(rows) else None


def _split_note(used: int, held: int) -> str:
    return (
        f"; it is the source of both texts, so every {HELDOUT_SHARE}th document or so is held out: {held} of its "
        f"{used + held} documents (a .txt is cut into documents at blank lines); give another --heldout"
    )


def _overlap_note(dropped: int) -> str:
    words = f"{OVERLAP_WORDS} words in a row with the calibration text"
    return f"; {dropped} held-out documents are left out, which share {words}" if dropped else ""


def _sequences(
    text: Text, documents: list[Document], tokenizer: Any, vocabulary: int, section: str, note: str
) -> tuple[TokenText, list[Document]]:
    if text.token_ids:
        (ids, domains), used = read_token_ids(Path(text.token_ids), vocabulary, section), documents
    else:
        ids, domains, used = pack(text, documents, tokenizer)
        if len(ids) < text.num_samples:
            raise RecipeError(
                f"{section}: {text.dataset} gives {len(ids)} sequences of {text.max_seq_length} tokens from "
                f"{len(documents)} documents, the recipe wants {text.num_samples}; lower {section}.num_samples or "
                f"give more text{note}"
            )
    if int(ids.max()) >= vocabulary:
        raise RecipeError(
            f"{section}: token {int(ids.max())} is outside the model's vocabulary of {vocabulary}"
        )
    record = TextRecord(
        dataset=text.token_ids or text.dataset,
        num_samples=ids.shape[0],
        max_seq_length=ids.shape[1],
        tokens=ids.numel(),
        seed=text.seed,
        sha256=_digest(ids),
    )
    return TokenText(ids, domains, record), used


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
