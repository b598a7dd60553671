"""How llama.cpp encodes, by the obvious slow way, over a vocabulary and what a GGUF file says of it.

It shares nothing with the tokenizers that are tested but the vocabulary: words are cut by Python's `regex`, and pairs
are merged one at a time.
"""

import itertools
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import regex

SPACE = "▁"


def byte_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + n) for n, byte in enumerate(unseen)}


ALPHABET = byte_alphabet()


@dataclass(frozen=True)
class PlainBytePairs:
    """A byte-level vocabulary."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    patterns: tuple[str, ...]
    whole: tuple[str, ...] = ()
    ignore_merges: bool = False
    composed: bool = False

    def encode(self, text: str) -> list[int]:
        found = []
        for part, is_whole in split_whole(text, self.whole):
            found += [self.ids[part]] if is_whole else self._encode_part(part)
        return found

    def _encode_part(self, text: str) -> list[int]:
        pieces = [unicodedata.normalize("NFC", text) if self.composed else text]
        for pattern in self.patterns:
            pieces = [cut for piece in pieces for cut in isolated(pattern, piece)]
        words = ["".join(ALPHABET[byte] for byte in piece.encode()) for piece in pieces]
        return [number for word in words for number in self._merge(word)]

    def _merge(self, word: str) -> list[int]:
        if self.ignore_merges and word in self.ids:
            return [self.ids[word]]
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        symbols = list(word)
        while True:
            pairs = [(ranks.get(pair, len(ranks)), at) for at, pair in enumerate(itertools.pairwise(symbols))]
            rank, at = min(pairs, default=(len(ranks), 0))
            if rank == len(ranks):
                return [self.ids[symbol] for symbol in symbols if symbol in self.ids]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@dataclass(frozen=True)
class PlainPieces:
    """A sentencepiece vocabulary with bytes for what it lacks."""

    ids: dict[str, int]
    scores: list[float]
    whole: tuple[str, ...] = ()
    space_first: bool = True

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        for part, is_whole in split_whole(text, self.whole):
            if is_whole:
                found.append(self.ids[part])
            else:
                found += self._merge(((" " if self.space_first else "") + part).replace(" ", SPACE))
        return found

    def _merge(self, text: str) -> list[int]:
        symbols = list(text)
        while True:
            pairs = [
                (-self.scores[self.ids[pair]], at)
                for at, pair in enumerate(a + b for a, b in itertools.pairwise(symbols))
                if pair in self.ids
            ]
            if not pairs:
                return [number for symbol in symbols for number in self._id(symbol)]
            _, at = min(pairs)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]

    def _id(self, symbol: str) -> list[int]:
        if symbol in self.ids:
            return [self.ids[symbol]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def isolated(pattern: str, text: str) -> Iterator[str]:
    """Matches, and what lies between them."""
    end = 0
    for match in regex.finditer(pattern, text, regex.MULTILINE):
        if match.start() > end:
            yield text[end : match.start()]
        if match.group():
            yield match.group()
        end = max(end, match.end())
    if end < len(text):
        yield text[end:]


def split_whole(text: str, whole: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """The text around the tokens that are found in it as they are; the leftmost first, of several there the longest."""
    by_length = sorted(whole, key=len, reverse=True)
    if not by_length:
        if text:
            yield text, False
        return
    end = 0
    for match in regex.finditer("|".join(map(regex.escape, by_length)), text):
        if match.start() > end:
            yield text[end : match.start()], False
        yield match.group(), True
        end = match.end()
    if end < len(text):
        yield text[end:], False
