"""What requests ask: made-up prompts of exact length, a user's file, conversations, shared prefixes, traces.

Lengths are counted by the server's own tokenizer (`tokens.py`). The words of request i depend on the scenario's seed
and on i only, so a second server is asked the same; each repetition and each rate has its own words, or the server's
prefix cache would answer for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowbit_core.documents import describe_error
from lowbit_core.errors import ConfigError
from lowbit_core.jsonl import read_jsonl
from lowbit_loadtest.generate.arrivals import Draw, draw_lengths, generator
from lowbit_loadtest.generate.request import Message
from lowbit_loadtest.generate.tokens import Counter, fit_to_tokens
from lowbit_loadtest.generate.traces import MOONCAKE_BLOCK_TOKENS, TraceRow
from lowbit_loadtest.scenario import Conversations, FilePrompts, SharedPrefix, Synthetic, Text

# Short and common, so that most tokenizers give each one token after a space.
_WORDS = """
the of and to in is was for that it with as on be at by this had not are but from or have an they which
one you were all her she there would their we him been has when who will no more if out so up said what
its about than into them can only other time new some could these two may first then do any like my now
over such our man me even most made after also well before must back through years where much way down
should because long each just state those people too good make still see work life day part world here
house both under never same last while might great old year off come since against go came right used
take three small found large light water hand night air body book car city door earth fire game head idea
king land money name order paper question road school table voice war white young art bank blue boy child
church class color cost dark death doctor field food
"""
WORDS = tuple(_WORDS.split())

Turns = tuple[tuple[Message, ...], ...]  # each turn: the messages that it adds to the conversation


class _ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str


class _PromptLine(BaseModel):
    """A line of a file: `{"prompt": "…"}`, `{"messages": [{"role": …, "content": …}]}` or `{"turns": ["…", "…"]}`."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | None = Field(default=None, min_length=1)
    messages: list[_ChatMessage] | None = Field(default=None, min_length=1)
    turns: list[str] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_of_three(self) -> "_PromptLine":
        if (self.prompt, self.messages, self.turns).count(None) != 2:
            raise ValueError("give either prompt or messages or turns")
        return self

    def as_turns(self) -> Turns:
        if self.messages is not None:
            return (tuple(message.model_dump() for message in self.messages),)
        return tuple(user_turn(text) for text in self.turns or [self.prompt or ""])


def user_turn(text: str) -> tuple[Message, ...]:
    """One user message."""
    return ({"role": "user", "content": text},)


def read_prompts(path: Path) -> tuple[Turns, ...]:
    """The file's lines; raises ConfigError with the line's number."""
    prompts = tuple(_parse_prompt(path, number, row) for number, row in read_jsonl(path, "prompts"))
    if not prompts:
        raise ConfigError(f'prompts {path} has no line; write one object a line: {{"prompt": "…"}}')
    return prompts


def _parse_prompt(path: Path, number: int, row: dict[str, Any]) -> Turns:
    try:
        return _PromptLine.model_validate(row).as_turns()
    except ValidationError as error:
        raise ConfigError(f"prompts {path}, line {number}: {describe_error(error, _PromptLine)}") from error


@dataclass(frozen=True)
class PromptMaker:
    """Makes the turns of request i; `salt` tells repetitions and rates apart."""

    counter: Counter
    seed: int
    salt: tuple[int, ...] = ()

    async def make(self, prompts: Text | FilePrompts | Synthetic | Conversations, count: int) -> list[Turns]:
        """The turns of `count` arrivals."""
        match prompts:
            case Text():
                return [(user_turn(prompts.text),)] * count
            case FilePrompts():
                lines = read_prompts(Path(prompts.path))
                return [lines[index % len(lines)] for index in range(count)]
            case Synthetic():
                lengths = draw_lengths(prompts.tokens, self._generator(Draw.PROMPT_LENGTHS), count)
                return await self._synthetic(lengths, prompts.shared_prefix)
            case Conversations():
                return await self._conversations(prompts, count)

    async def of_trace(self, rows: Sequence[TraceRow]) -> list[Turns]:
        """Prompts as long as the trace's, sharing whole blocks where the trace says so."""
        made = []
        for index, row in enumerate(rows):
            words = self._trace_words(index, row)
            made.append(await self._fit(words, row.prompt_tokens, ()))
        return made

    async def _synthetic(self, lengths: Sequence[int], prefix: SharedPrefix | None) -> list[Turns]:
        made = []
        for index, tokens in enumerate(lengths):
            system = self._system(prefix, index)
            made.append(await self._fit(self._words(tokens, index), tokens, system))
        return made

    async def _fit(self, words: Sequence[str], tokens: int, system: tuple[Message, ...]) -> Turns:
        return ((await fit_to_tokens(self.counter, words, tokens, system)),)

    async def _conversations(self, prompts: Conversations, count: int) -> list[Turns]:
        """Lengths of user turns are of their text: what the template adds to each is not among them."""
        made: list[Turns] = []
        rng = self._generator(Draw.PROMPT_LENGTHS)
        template = await self.counter.count(user_turn("the")) - 1
        for index, turns in enumerate(draw_lengths(prompts.turns, self._generator(Draw.TURNS), count)):
            texts = [
                await fit_to_tokens(self.counter, self._words(tokens, index, turn), template + tokens)
                for turn, tokens in enumerate(draw_lengths(prompts.user_tokens, rng, max(1, turns)))
            ]
            texts[0] = (*self._system(prompts.shared_prefix, index), *texts[0])
            made.append(tuple(texts))
        return made

    def _system(self, prefix: SharedPrefix | None, index: int) -> tuple[Message, ...]:
        if prefix is None:
            return ()
        group = index % prefix.groups
        words = generator(Draw.WORDS, self.seed, 1, group).choice(WORDS, prefix.tokens)
        return ({"role": "system", "content": " ".join(words)},)

    def _words(self, count: int, *parts: int) -> list[str]:
        words = generator(Draw.WORDS, self.seed, 0, *self.salt, *parts).choice(WORDS, max(1, count))
        return [str(word) for word in words]

    def _trace_words(self, index: int, row: TraceRow) -> list[str]:
        words: list[str] = []
        for block in row.blocks:
            rng = generator(Draw.WORDS, self.seed, 2, *self.salt, block)
            words += [str(word) for word in rng.choice(WORDS, MOONCAKE_BLOCK_TOKENS)]
        return words[: row.prompt_tokens] or self._words(row.prompt_tokens, index)

    def _generator(self, draw: Draw) -> Any:
        return generator(draw, self.seed, *self.salt)
