"""Probes: greedy answers that are judged by their structure, without knowing what is right.

A probe fails when its stream does not end properly, its JSON does not parse or does not fit the schema, or its text
repeats itself. Small models repeat themselves idle too, so under load those failures count that are new.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.generate.request import Request

PROSE = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short letter that thanks a neighbour for looking after a cat.",
    "Describe how bread is made, step by step.",
    "What are three differences between a violin and a guitar?",
    "Tell a short story about a lighthouse keeper who finds a map.",
    "Summarise what a refrigerator does, for a child.",
    "Give advice to someone who learns to ride a bicycle.",
    "Why do leaves change their colour in autumn?",
)
JSON = (
    "Give the name, the year of birth and the field of a famous scientist as JSON.",
    "Give the name, the year of its founding and the country of a large city as JSON: field is the country.",
    "Describe a book as JSON: its name, its year and its field.",
    "Describe an invention as JSON: its name, its year and its field.",
)
FIELDS = {"name": "string", "year": "integer", "field": "string"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "field": {"type": "string", "maxLength": 40},
    },
    "required": list(FIELDS),
    "additionalProperties": False,
}
RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
}
JSON_TOKENS = 160  # enough for any object that fits SCHEMA, so that an answer cut short is the server's doing
LONGEST_BLOCK_WORDS = 12
REPEATS = 4


@dataclass(frozen=True)
class Probe:
    """One request and what its answer must be."""

    id: str
    request: Request
    is_json: bool


@dataclass(frozen=True)
class Reply:
    """`failure` is empty for a sound answer, otherwise: truncated, invalid_json or repetition."""

    id: str
    failure: str
    text: str


def make_probes(count: int, max_tokens: int, with_json: bool) -> list[Probe]:
    """`count` probes, every third of them JSON where the server can be asked for it."""
    probes = []
    for number in range(count):
        is_json = with_json and number % 3 == 2
        words = JSON if is_json else PROSE
        text = words[(number // 3 if is_json else number) % len(words)]
        request = Request(
            ({"role": "user", "content": text},),
            max(max_tokens, JSON_TOKENS) if is_json else max_tokens,
            temperature=0.0,
            seed=number,
            keep_text=True,
            index=number,
            response_format=RESPONSE_FORMAT if is_json else None,
        )
        probes.append(Probe(f"{'json' if is_json else 'prose'}-{number}", request, is_json))
    return probes


def judge(probe: Probe, record: RequestRecord) -> Reply:
    """How the answer failed, if it did. Prose that reaches max_tokens did not: it was told to stop there."""
    if record.outcome is not Outcome.COMPLETED:
        failure = "truncated"
    elif probe.is_json:
        failure = "" if fits(record.text) else "invalid_json"
    else:
        failure = "repetition" if repeats(record.text) else ""
    return Reply(probe.id, failure, record.text)


def fits(text: str) -> bool:
    """Whether the text is one JSON object with the fields of SCHEMA and no others."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    kinds = {"string": str, "integer": int}
    return (
        isinstance(found, dict)
        and found.keys() == FIELDS.keys()
        and all(isinstance(found[name], kinds[kind]) for name, kind in FIELDS.items())
    )


def repeats(text: str) -> bool:
    """Whether a block of up to 12 words comes 4 times in a row."""
    words = text.split()
    return any(_repeats_blocks(words, size) for size in range(1, LONGEST_BLOCK_WORDS + 1))


def _repeats_blocks(words: Sequence[str], size: int) -> bool:
    same = 0  # how many words in a row equal the word one block before
    for position in range(size, len(words)):
        same = same + 1 if words[position] == words[position - size] else 0
        if same >= size * (REPEATS - 1):
            return True
    return False
