"""From documents to sequences of one length, of one domain each, the domains taking turns."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.templates import encode
from lowbit_quantize.recipe import Text


def pack(
    text: Text, documents: list[Document], tokenizer: Any
) -> tuple[Tensor, tuple[str, ...], list[Document]]:
    """Fill sequences from each domain's documents, fewer of little text; also their domains and the used documents."""
    by_domain: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_domain[document.domain].append(document)
    used: list[Document] = []
    streams = {
        domain: _chunks(shuffled(found, text.seed), text.max_seq_length, tokenizer, used)
        for domain, found in sorted(by_domain.items())
    }
    rows: list[list[int]] = []
    domains: list[str] = []
    while streams and len(rows) < text.num_samples:
        for domain in list(streams):
            chunk = next(streams[domain], None)
            if chunk is None:
                del streams[domain]
            elif len(rows) < text.num_samples:
                rows.append(chunk)
                domains.append(domain)
    return torch.tensor(rows, dtype=torch.int64), tuple(domains), used


def shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """The documents in the order that `seed` gives."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    return order


def _chunks(
    documents: list[Document], size: int, tokenizer: Any, used: list[Document]
) -> Iterator[list[int]]:
    buffer: list[int] = []
    for document in documents:
        used.append(document)
        buffer += encode(document, tokenizer)
        while len(buffer) >= size:
            yield buffer[:size]
            buffer = buffer[size:]
