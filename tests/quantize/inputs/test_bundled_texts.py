"""The bundled text: it parses, covers four domains, and nothing held out is also calibrated on."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import lowbit_quantize

TEXTS = Path(lowbit_quantize.__file__).parent / "quality" / "texts"
DOMAINS = {"prose", "dialogue", "code", "maths"}
FILES = ("calibration", "heldout")
SHARED_WORDS = 13
TEMPLATE_REMAINS = ("\nQuestion:", "\nAnswer:", "Here is the completed function", "<<", "####")


def documents(name: str) -> list[dict[str, Any]]:
    with gzip.open(TEXTS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def turns(document: dict[str, Any]) -> list[str]:
    if "text" in document:
        return [document["text"]]
    return [message["content"] for message in document["messages"]]


def chars_by_domain(parsed: list[dict[str, Any]]) -> Counter[str]:
    chars: Counter[str] = Counter()
    for document in parsed:
        chars[document["domain"]] += sum(map(len, turns(document)))
    return chars


def word_runs(document: dict[str, Any]) -> set[str]:
    """Every run of 13 words: lower case, split at whitespace, turns joined."""
    words = " ".join(turns(document)).lower().split()
    return {" ".join(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_prose_or_alternating_messages(name: str) -> None:
    for document in documents(name):
        body = "text" if document["domain"] == "prose" else "messages"
        assert set(document) == {"domain", "source", body}
        assert all(turn.strip() for turn in turns(document))
        if body == "messages":
            roles = [message["role"] for message in document["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)


@pytest.mark.parametrize(("name", "least_chars"), [("calibration", 1_200_000), ("heldout", 250_000)])
def test_four_balanced_domains_and_enough_text(name: str, least_chars: int) -> None:
    chars = chars_by_domain(documents(name))
    assert set(chars) == DOMAINS
    assert chars.total() >= least_chars
    assert all(0.2 <= chars[domain] / chars.total() <= 0.3 for domain in DOMAINS)


@pytest.mark.parametrize("name", FILES)
def test_the_first_hundred_documents_mix_the_domains(name: str) -> None:
    chars = chars_by_domain(documents(name)[:100])
    assert all(chars[domain] / chars.total() >= 0.1 for domain in DOMAINS)


def test_no_run_of_13_words_is_shared_between_the_files() -> None:
    calibration = set().union(*map(word_runs, documents("calibration")))
    shared = [
        document for document in documents("heldout") if not calibration.isdisjoint(word_runs(document))
    ]
    assert not shared


def test_no_document_occurs_twice() -> None:
    texts = Counter(" ".join(turns(document)).lower() for name in FILES for document in documents(name))
    assert [text for text, count in texts.items() if count > 1] == []


@pytest.mark.parametrize("name", FILES)
def test_no_evaluation_template_is_left(name: str) -> None:
    remains = [
        (part, document["source"])
        for document in documents(name)
        for part in TEMPLATE_REMAINS
        for turn in turns(document)
        if part in turn and document["domain"] != "code"  # `<<` and `####` may be code
    ]
    assert remains == []


def test_every_source_is_named_with_its_licence() -> None:
    described = (TEXTS / "SOURCES.md").read_text(encoding="utf-8").lower()
    sources = {document["source"] for name in FILES for document in documents(name)}
    assert all(source in described for source in sources)
