"""What every format is turned into: sessions of requests, with times, words or lengths as far as recorded."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_core.text_file import quote
from lowbit_loadtest.generate.request import Message

MOST_TOKENS = 100_000_000  # above it a length is a mistake: of the unit, or of the column
MOST_TIME = 1e13  # milliseconds since 1970 are 1.8e12
_WHOLE = re.compile(r"\d{1,18}(\.0*)?")


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """One request: its messages, or only their length. `blocks` are ids of `block_tokens` each, equal where prompts
    begin alike. None is what was not recorded."""

    messages: tuple[Message, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    answer: Message | None = None
    pause_s: float | None = None  # since the answer before it
    after_tool: bool = False  # what passed was a tool's time, not a person's
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RecordedSession:
    """Requests that wait for one another; most formats know only single ones. `at_s` is on the recording's clock."""

    turns: tuple[RecordedTurn, ...]
    at_s: float | None = None
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row of a file, and where it stands. A column's name is found in any case, as spreadsheets write it."""

    place: str  # trace FILE, line 5
    values: Mapping[str, Any]
    field: str = "key"  # or column

    def get(self, name: str) -> Any:
        """The value, None where there is none."""
        found = self.values.get(name)
        return self.values.get(name.casefold()) if found is None else found

    def error(self, name: str, words: str) -> ConfigError:
        """What is wrong with one value."""
        return ConfigError(f"{self.place}, {self.field} {name}: {words}")

    def tokens(self, name: str) -> int:
        """A length in tokens."""
        value = self.get(name)
        if isinstance(value, str) and len(value) < 9 and value.isascii() and value.isdecimal():
            return int(value)  # as nearly every one of millions of rows has it
        text = value.strip() if isinstance(value, str) else repr(value)
        if isinstance(value, bool) or not _WHOLE.fullmatch(text) or int(float(text)) > MOST_TOKENS:
            raise self.error(name, self._wrong(value, f"a whole number from 0 to {MOST_TOKENS}"))
        return int(float(text))

    def seconds(self, name: str) -> float:
        """A time, in whatever unit the format has."""
        value = self.get(name)
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= MOST_TIME:
            raise self.error(name, self._wrong(value, f"a number up to {MOST_TIME:.0e}"))
        return number

    @staticmethod
    def _wrong(value: Any, allowed: str) -> str:
        return f"{'nothing' if value in (None, '') else quote(str(value))} is given; allowed is {allowed}"

    def blocks(self, name: str) -> tuple[int, ...]:
        """Ids of blocks of a prompt; none where the key is not there."""
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(one) is int for one in value):
            raise self.error(name, self._wrong(value, "a list of whole numbers"))
        return tuple(one % 2**64 for one in value)  # seeds of words are not negative


@dataclass(frozen=True)
class Format:
    """A format: the keys or columns that it is known by, and how a row of it is read."""

    name: str
    keys: tuple[str, ...]
    session: Callable[[Row], RecordedSession]
