"""What a model is taught with, and what it is judged by while it learns: token rows that share nothing.

Three texts: the held-out one of the checkpoint's manifest, by which the result is measured; rows that are set aside
from the training text, by which the best step is chosen; all the rest, which trains. A training document that shares a
run of words with either is dropped (`quality/overlap.py`). Text is read as calibration text is.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_core.errors import ConfigError
from lowbit_core.manifest import TextRecord
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.overlap import OVERLAP_TOKENS, OVERLAP_WORDS, drop_overlap, token_runs
from lowbit_quantize.quality.packing import shuffled
from lowbit_quantize.quality.sources import find_documents
from lowbit_quantize.quality.templates import encode
from lowbit_quantize.quality.token_ids import holds_token_ids, read_token_ids
from lowbit_quantize.recipe import Text
from lowbit_recover.distill.settings import Settings


@dataclass(frozen=True)
class Texts:
    """Rows that train, rows that judge while it trains, and how many documents were dropped."""

    training: TokenText
    set_aside: TokenText
    dropped: int


def load_training(
    sources: Sequence[str], settings: Settings, heldout: TokenText, documents: Sequence[Document],
    tokenizer: Any, vocabulary: int,
) -> Texts:  # fmt: skip
    """The texts of a distillation. `heldout` are the rows that the result is measured by, `documents` their words.

    Raises ConfigError where a source gives nothing, or nothing that is not held out.
    """
    ids_given = [source for source in sources if holds_token_ids(Path(source))]
    if ids_given and len(sources) > 1:
        raise ConfigError(
            f"--data {ids_given[0]} holds token ids and comes alone; give one such file, or texts"
        )
    if ids_given:
        return _of_ids(ids_given[0], settings, heldout, vocabulary)
    return _of_documents(sources, settings, heldout, documents, tokenizer, vocabulary)


def heldout_documents(heldout: Text, calibration: Text) -> list[Document]:
    """The documents that the held-out rows were taken from; none where they were given as ids."""
    return find_documents(heldout, "heldout", calibration)


def _of_documents(
    sources: Sequence[str], settings: Settings, heldout: TokenText, documents: Sequence[Document],
    tokenizer: Any, vocabulary: int,
) -> Texts:  # fmt: skip
    found = [one for source in sources for one in _documents(source, settings)]
    name = " ".join(sources)
    if not any(one.words.strip() for one in found):
        raise ConfigError(
            f"--data {name} holds no text; give a file or folder with documents (docs/texts.md)"
        )
    apart = drop_overlap(found, documents)
    if not apart:
        raise ConfigError(
            f"--data {name}: all of its {len(found)} documents share {OVERLAP_WORDS} words in a row with the held-out "
            "text that quality is measured by; give other text"
        )
    order = shuffled(apart, settings.seed)
    seen = token_runs(heldout.ids)  # of rows that were given as ids, which have no words to compare
    judged = _Rows(order, tokenizer, vocabulary, settings, seen)
    aside = judged.take(settings.set_aside)
    rest = drop_overlap(judged.unused(), judged.used)
    dropped = len(found) - len(rest) - len(judged.used)
    training = _Rows(rest, tokenizer, vocabulary, settings, seen)
    rows = training.take(-(-settings.tokens // settings.row_tokens))
    if len(aside) < settings.set_aside or len(rows) < settings.batch:
        raise ConfigError(
            f"--data {name} gives {len(aside)} rows of {settings.row_tokens} tokens to judge by and {len(rows)} to "
            f"train on, {dropped} documents are dropped, which share {OVERLAP_WORDS} words with held-out text; wanted "
            f"are --set-aside {settings.set_aside} and at least one --batch of {settings.batch}: give more text, or "
            "lower these or --row-tokens"
        )
    return Texts(_text(rows, name, settings), _text(aside, name, settings), dropped)


def _documents(source: str, settings: Settings) -> list[Document]:
    wanted = -(-settings.tokens // settings.row_tokens) + settings.set_aside
    text = Text(dataset=source, num_samples=wanted, max_seq_length=settings.row_tokens, seed=settings.seed)
    return find_documents(text, "calibration", Text())


def _of_ids(source: str, settings: Settings, heldout: TokenText, vocabulary: int) -> Texts:
    """Rows that were given; those that are set aside are drawn by the seed, of each domain alike."""
    ids, domains = read_token_ids(Path(source), vocabulary, "calibration")
    if ids.shape[1] != settings.row_tokens:
        raise ConfigError(
            f"--data {source} holds rows of {ids.shape[1]} tokens; give --row-tokens {ids.shape[1]}"
        )
    seen = token_runs(heldout.ids)
    free = [place for place, row in enumerate(ids) if token_runs(row[None]).isdisjoint(seen)]
    if not free:
        raise ConfigError(
            f"--data {source}: all of its {len(ids)} rows share {OVERLAP_TOKENS} tokens in a row with the held-out "
            "text that quality is measured by; give other text"
        )
    places = _dealt(free, domains, settings.seed)
    aside, rest = places[: settings.set_aside], places[settings.set_aside :]
    judged = token_runs(ids[aside]) if aside else set()
    rest = [place for place in rest if token_runs(ids[place][None]).isdisjoint(judged)]
    rest = rest[: -(-settings.tokens // settings.row_tokens)]
    if len(aside) < settings.set_aside or len(rest) < settings.batch:
        raise ConfigError(
            f"--data {source} gives {len(aside)} rows to judge by and {len(rest)} to train on that share no "
            f"{OVERLAP_TOKENS} tokens with held-out text; wanted are --set-aside {settings.set_aside} and one --batch "
            f"of {settings.batch}: give more rows, or lower these"
        )
    rows = [[(ids[place].tolist(), domains[place]) for place in part] for part in (rest, aside)]
    dropped = len(ids) - len(rest) - len(aside)
    return Texts(_text(rows[0], source, settings), _text(rows[1], source, settings), dropped)


def _dealt(places: Sequence[int], domains: Sequence[str], seed: int) -> list[int]:
    """The places in an order by the seed in which domains take turns."""
    waiting: dict[str, list[int]] = defaultdict(list)
    for place in random.Random(seed).sample(list(places), len(places)):
        waiting[domains[place]].append(place)
    found: list[int] = []
    while any(waiting.values()):
        found += [left.pop() for _, left in sorted(waiting.items()) if left]
    return found


class _Rows:
    """Rows of one domain each, packed from documents as they are asked for; domains take turns."""

    def __init__(
        self, documents: Sequence[Document], tokenizer: Any, vocabulary: int, settings: Settings, held: set[bytes],
    ) -> None:  # fmt: skip
        """`held` are runs of tokens that no row may have."""
        self._tokenizer, self._vocabulary, self._settings, self._held = tokenizer, vocabulary, settings, held
        self._waiting: dict[str, list[Document]] = defaultdict(list)
        for document in reversed(shuffled(documents, settings.seed)):
            self._waiting[document.domain].append(document)
        self.used: list[Document] = []

    def unused(self) -> list[Document]:
        """The documents that no row was asked of."""
        return [one for _, left in sorted(self._waiting.items()) for one in reversed(left)]

    def take(self, count: int) -> list[tuple[list[int], str]]:
        """Up to so many rows, with their domains."""
        streams = {domain: self._stream(left) for domain, left in sorted(self._waiting.items())}
        rows: list[tuple[list[int], str]] = []
        while streams and len(rows) < count:
            for domain in list(streams):
                row = next(streams[domain], None) if len(rows) < count else []
                if row is None:
                    del streams[domain]
                elif row:
                    rows.append((row, domain))
        return rows

    def _stream(self, waiting: list[Document]) -> Iterator[list[int]]:
        buffer: list[int] = []
        size = self._settings.row_tokens
        while waiting:
            document = waiting.pop()
            self.used.append(document)
            buffer += encode(document, self._tokenizer)
            if buffer and max(buffer) >= self._vocabulary:
                raise ConfigError(
                    f"--data: token {max(buffer)} is outside the model's vocabulary of {self._vocabulary}"
                )
            while len(buffer) >= size:
                if token_runs(torch.tensor([buffer[:size]])).isdisjoint(self._held):
                    yield buffer[:size]
                buffer = buffer[size:]


def _text(rows: Sequence[tuple[list[int], str]], source: str, settings: Settings) -> TokenText:
    ids = torch.tensor([row for row, _ in rows], dtype=torch.int64)
    record = TextRecord(
        dataset=source, num_samples=ids.shape[0], max_seq_length=ids.shape[1], tokens=ids.numel(),
        seed=settings.seed, sha256=_sha256(ids),
    )  # fmt: skip
    return TokenText(ids, tuple(domain for _, domain in rows), record)


def _sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
