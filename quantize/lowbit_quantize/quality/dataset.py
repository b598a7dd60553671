"""From texts to token sequences: what a model is calibrated on and what it is judged by.

A sequence holds one domain, so that quality can be told apart by domain; domains take turns, so that any
prefix is a mix. Conversations go through the model's own chat template. Held-out documents that share a run
of words with a calibration document are dropped: the two texts never overlap.
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from lowbit_core.errors import RecipeError
from lowbit_core.jsonl import read_jsonl
from lowbit_core.manifest import TextRecord
from lowbit_quantize.recipe import BUNDLED, Text

# A shared run of so many words makes two documents overlap (Brown et al. 2020, arXiv 2005.14165).
OVERLAP_WORDS = 13
OVERLAP_TOKENS = 64  # as OVERLAP_WORDS, for given token ids; longer than what chat templates repeat
HELDOUT_SHARE = 5  # where one source gives both texts, one document in five is held out
HUB_CHARACTERS_PER_TOKEN = 40  # how much to read of an endless data set: several times what is needed
DOCUMENT_CHARACTERS = 4000  # plain text is cut into documents of about this size, at blank lines


@dataclass(frozen=True)
class Document:
    """Plain text, or a conversation of {role, content} messages."""

    domain: str
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()

    @property
    def words(self) -> str:
        """All its words, for comparing."""
        return self.text or "\n\n".join(message["content"] for message in self.messages)

    def render(self, tokenizer: Any) -> str:
        """The text that the model reads."""
        if not self.messages:
            return self.text
        if tokenizer.chat_template:
            return str(tokenizer.apply_chat_template(list(self.messages), tokenize=False))
        return self.words


@dataclass(frozen=True)
class TokenText:
    """Token ids (sequences, tokens), the domain of each sequence, and a record of where they came from."""

    ids: Tensor
    domains: tuple[str, ...]
    record: TextRecord


def load_texts(
    calibration: Text, heldout: Text, tokenizer: Any, vocabulary: int
) -> tuple[TokenText, TokenText]:
    """The calibration and held-out sequences of a recipe; raises RecipeError where a source gives too little."""
    calibration_documents = _documents(calibration, "calibration", heldout)
    heldout_documents = _documents(heldout, "heldout", calibration)
    ours, used = _sequences(calibration, calibration_documents, tokenizer, vocabulary, "calibration")
    theirs, _ = _sequences(heldout, drop_overlap(heldout_documents, used), tokenizer, vocabulary, "quality")
    if (calibration.token_ids or heldout.token_ids) and not token_runs(ours.ids).isdisjoint(
        token_runs(theirs.ids)
    ):
        raise RecipeError(
            f"calibration and held-out tokens share a run of {OVERLAP_TOKENS} tokens: quality would be measured "
            "on what the model was calibrated with; give other token ids or text for one of them"
        )
    return ours, theirs


def token_runs(ids: Tensor) -> set[bytes]:
    """Every run of `OVERLAP_TOKENS` tokens within a row; the row where it is shorter."""
    size = min(OVERLAP_TOKENS, ids.shape[1])
    return {run.numpy().tobytes() for row in ids.int() for run in row.unfold(0, size, 1)}


def _sequences(
    text: Text, documents: list[Document], tokenizer: Any, vocabulary: int, section: str
) -> tuple[TokenText, list[Document]]:
    if text.token_ids:
        (ids, domains), used = _read_token_ids(Path(text.token_ids), vocabulary, section), documents
    else:
        ids, domains, used = _pack(text, documents, tokenizer, section)
    if int(ids.max()) >= vocabulary:
        raise RecipeError(
            f"{section}: token {int(ids.max())} is outside the model's vocabulary of {vocabulary}"
        )
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    record = TextRecord(
        dataset=text.token_ids or text.dataset,
        num_samples=ids.shape[0],
        max_seq_length=ids.shape[1],
        tokens=ids.numel(),
        seed=text.seed,
        sha256=digest,
    )
    return TokenText(ids, domains, record), used


def _read_token_ids(path: Path, vocabulary: int, section: str) -> tuple[Tensor, tuple[str, ...]]:
    """Rows of token ids from a file, and the domain of each row: "all" where the file names none."""
    wanted = (
        f'{section}.token_ids wants JSON {{"input_ids": [[int, …], …]}} with rows of equal length, '
        'and optionally "domains": ["…", …], one for each row'
    )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = data["input_ids"]
        domains = data.get("domains", ["all"] * len(rows))
        if any(type(token) is not int for row in rows for token in row):
            raise TypeError("not every id is an integer")
        ids = torch.tensor(rows, dtype=torch.int64)
        if type(domains) is not list or any(type(domain) is not str for domain in domains):
            raise TypeError("domains is not a list of strings")
        if len(domains) != len(rows):
            raise ValueError(f"{len(domains)} domains for {len(rows)} rows")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise RecipeError(f"{path}: {error}; {wanted}") from error
    if ids.dim() != 2 or len(ids) < (2 if section == "quality" else 1) or ids.shape[1] < 2:
        raise RecipeError(f"{path} holds ids of shape {tuple(ids.shape)}; {wanted}, two rows to judge by")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise RecipeError(
            f"{path} holds token ids outside 0…{vocabulary - 1}; they belong to another tokenizer"
        )
    return ids, tuple(domains)


def _pack(
    text: Text, documents: list[Document], tokenizer: Any, section: str
) -> tuple[Tensor, tuple[str, ...], list[Document]]:
    """Fill sequences from each domain's documents, the domains taking turns."""
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
    if len(rows) < text.num_samples:
        raise RecipeError(
            f"{section}: {text.dataset} gives {len(rows)} sequences of {text.max_seq_length} tokens, "
            f"the recipe wants {text.num_samples}; lower {section}.num_samples or give more text"
        )
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
        conversation = bool(document.messages and tokenizer.chat_template)
        try:
            rendered = document.render(tokenizer)
        except jinja2.TemplateError as error:
            raise RecipeError(
                f"the model's chat template refuses a conversation of the text: {error}"
            ) from error
        tokens = tokenizer(rendered, add_special_tokens=not conversation)["input_ids"]
        buffer += tokens
        if not conversation and tokenizer.eos_token_id is not None:
            buffer.append(tokenizer.eos_token_id)
        while len(buffer) >= size:
            yield buffer[:size]
            buffer = buffer[size:]


def _documents(text: Text, role: str, other: Text) -> list[Document]:
    if text.token_ids:
        return []
    if text.dataset == BUNDLED:
        return list(_read_lines(Path(str(files("lowbit_quantize.quality"))) / "texts" / f"{role}.jsonl.gz"))
    wanted = text.num_samples * text.max_seq_length * HUB_CHARACTERS_PER_TOKEN
    documents = _read_source(text.dataset, wanted * (HELDOUT_SHARE if text.dataset == other.dataset else 1))
    if text.dataset != other.dataset or other.token_ids:
        return documents
    return [document for document in documents if (_draw(document) == 0) == (role == "heldout")]


def _draw(document: Document) -> int:
    return int(hashlib.sha256(document.words.encode()).hexdigest(), 16) % HELDOUT_SHARE


def _read_source(source: str, characters: int) -> list[Document]:
    if source.startswith("hub:"):
        return list(_read_hub(source.removeprefix("hub:"), characters))
    path = Path(source)
    if not path.is_file() or path.suffix not in (".jsonl", ".gz", ".txt"):
        raise RecipeError(
            f"text source {source!r} is not an existing .jsonl or .txt file; allowed are such a file, "
            f"hub:DATASET[@REVISION], or {BUNDLED}"
        )
    return list(_read_txt(path) if path.suffix == ".txt" else _read_lines(path))


def _read_txt(path: Path) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    paragraphs: list[str] = []
    for paragraph in text.split("\n\n"):
        paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= DOCUMENT_CHARACTERS:
            yield Document("text", text="\n\n".join(paragraphs))
            paragraphs = []
    if "".join(paragraphs).strip():
        yield Document("text", text="\n\n".join(paragraphs))


def _read_lines(path: Path) -> Iterator[Document]:
    for number, row in read_jsonl(path, "text", RecipeError):
        try:
            yield _as_document(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f'{path}, line {number}: {error!r}; a line is {{"text": "…"}} or '
                '{"messages": [{"role": "user", "content": "…"}, …]}, with an optional "domain"'
            ) from error


def _read_hub(name: str, characters: int) -> Iterator[Document]:
    """Documents of a hub data set's train split, as many as give `characters`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise RecipeError(f"hub:{name} needs the package datasets; run `pip install datasets`") from None
    dataset, _, revision = name.partition("@")
    try:
        for row in load_dataset(dataset, split="train", revision=revision or None, streaming=True):
            document = _as_document(row)
            characters -= len(document.words)
            yield document
            if characters < 0:
                return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"hub:{name} could not be read as text or messages: {error}") from error


def _as_document(row: dict[str, Any]) -> Document:
    domain = str(row.get("domain", "text"))
    if "messages" in row:
        messages = tuple({"role": m["role"], "content": m["content"]} for m in row["messages"])
        strings = [part for message in messages for part in message.values()]
    else:
        messages, strings = (), [row["text"]]
    if not strings or not all(isinstance(part, str) for part in strings):
        raise TypeError("text, role and content must be strings")
    return Document(domain, messages=messages) if messages else Document(domain, text=row["text"])


def drop_overlap(documents: Iterable[Document], against: Iterable[Document]) -> list[Document]:
    """The documents that share no run of `OVERLAP_WORDS` words with any document of `against`."""
    seen = {run for document in against for run in word_runs(document.words)}
    return [document for document in documents if seen.isdisjoint(word_runs(document.words))]


def word_runs(text: str) -> set[str]:
    """Every run of `OVERLAP_WORDS` words of a text, lower-case; the whole text where it is shorter."""
    words = text.lower().split()
    last = max(1, len(words) - OVERLAP_WORDS + 1)
    return {" ".join(words[start : start + OVERLAP_WORDS]) for start in range(last)}
