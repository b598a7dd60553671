"""What two texts share: quality is never measured on what a model was calibrated with."""

from collections.abc import Iterable

from torch import Tensor

from lowbit_quantize.quality.document import Document

# A shared run of so many words makes two documents overlap (Brown et al. 2020, arXiv 2005.14165).
OVERLAP_WORDS = 13
OVERLAP_TOKENS = 64  # as OVERLAP_WORDS, for given token ids; longer than what chat templates repeat


def drop_overlap(documents: Iterable[Document], against: Iterable[Document]) -> list[Document]:
    """The documents that share no run of `OVERLAP_WORDS` words with any document of `against`."""
    seen = {run for document in against for run in word_runs(document.words)}
    return [document for document in documents if seen.isdisjoint(word_runs(document.words))]


def word_runs(text: str) -> set[str]:
    """Every run of `OVERLAP_WORDS` words of a text, lower-case; the whole text where it is shorter."""
    words = text.lower().split()
    last = max(1, len(words) - OVERLAP_WORDS + 1)
    return {" ".join(words[start : start + OVERLAP_WORDS]) for start in range(last)}


def token_runs(ids: Tensor) -> set[bytes]:
    """Every run of `OVERLAP_TOKENS` tokens within a row; the row where it is shorter."""
    size = min(OVERLAP_TOKENS, ids.shape[1])
    return {run.numpy().tobytes() for row in ids.int() for run in row.unfold(0, size, 1)}
