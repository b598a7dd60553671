"""What requests ask: made-up prompts of exact length, files, conversations, agents, shared prefixes, recordings.

Lengths are counted by the server's own tokenizer (`tokens.py`). The words of request i depend on the scenario's seed
and on i only, so a second server is asked the same; each repetition and each rate has its own words, or the server's
prefix cache would answer for it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.arrivals import Draw, draw_lengths, draw_seconds, generator
from lowbit_loadtest.generate.replay import describe
from lowbit_loadtest.generate.request import Message
from lowbit_loadtest.generate.schedule import Recording
from lowbit_loadtest.generate.tokens import Counter, fit_to_tokens, text_of
from lowbit_loadtest.generate.traces.read import read_recording
from lowbit_loadtest.generate.traces.recorded import RecordedSession, RecordedTurn
from lowbit_loadtest.generate.words import draw_words
from lowbit_loadtest.sections.distributions import LengthsOrNumber, Seconds
from lowbit_loadtest.sections.prompts import (
    Agentic,
    Conversations,
    FilePrompts,
    SharedPrefix,
    Synthetic,
    Text,
)

OF_REQUEST, OF_GROUP, OF_BLOCK, OF_TOOL = range(4)  # what words are drawn for


@dataclass(frozen=True)
class PlannedTurn:
    """One request before its limit is drawn; `output_tokens` is the recording's, if there is one."""

    messages: tuple[Message, ...]
    pause_s: float = 0.0
    answer: Message | None = None
    output_tokens: int | None = None


@dataclass(frozen=True)
class PlannedSession:
    """What one arrival asks."""

    turns: tuple[PlannedTurn, ...]
    tools: tuple[Message, ...] = ()


def user_turn(text: str) -> tuple[Message, ...]:
    """One user message."""
    return ({"role": "user", "content": text},)


def read_prompts(prompts: FilePrompts) -> tuple[str, list[RecordedSession]]:
    """The format's name and the sessions that have a request; raises ConfigError with the line's number."""
    name, recorded = read_recording(Path(prompts.path), "prompts", prompts.format)
    asked = [session for session in recorded if session.turns]
    if not asked:
        raise ConfigError(f"prompts {prompts.path} ({name}) has nothing that was asked")
    return name, asked


@dataclass(frozen=True)
class PromptMaker:
    """Makes the turns of request i; `salt` tells repetitions and rates apart."""

    counter: Counter
    seed: int
    salt: tuple[int, ...] = ()

    async def make(
        self, prompts: Text | FilePrompts | Synthetic | Conversations | Agentic, count: int
    ) -> tuple[list[PlannedSession], Recording | None]:
        """The sessions of `count` arrivals, and what was taken from a recording."""
        match prompts:
            case Text():
                return [PlannedSession((PlannedTurn(user_turn(prompts.text)),))] * count, None
            case FilePrompts():
                name, recorded = read_prompts(prompts)
                played = [recorded[index % len(recorded)] for index in range(count)]
                made = await self.of_recording(played, prompts.think_s, prompts.tool_s)
                return made, describe(name, recorded, played)
            case Synthetic():
                return await self._synthetic(prompts, count), None
            case Conversations():
                return await self._conversations(prompts, count), None
            case Agentic():
                return await self._agentic(prompts, count), None

    async def of_recording(
        self, sessions: Sequence[RecordedSession], think_s: Seconds, tool_s: Seconds
    ) -> list[PlannedSession]:
        """The recorded messages, or made-up ones of the recorded lengths that share what the recording says."""
        template = await self._template_tokens()
        people, tools = self._seconds(think_s), self._seconds(tool_s)
        made = []
        for index, session in enumerate(sessions):
            turns = [await self._recorded(index, turn, template) for turn in session.turns]
            for position, turn in enumerate(session.turns[1:], 1):
                if turn.pause_s is None:
                    pause_s = (tools if turn.after_tool else people).draw()
                    turns[position] = replace(turns[position], pause_s=pause_s)
            made.append(PlannedSession(tuple(turns), session.tools))
        return made

    async def _recorded(self, index: int, turn: RecordedTurn, template: int) -> PlannedTurn:
        answer, output_tokens = turn.answer, turn.output_tokens
        if answer is not None and output_tokens is None:
            output_tokens = await self.counter.count(user_turn(text_of(answer) or "the")) - template
        carried = None
        if answer is not None and answer.get("tool_calls"):
            carried = {"content": answer.get("content"), "tool_calls": answer["tool_calls"]}
        messages = turn.messages
        if not messages:
            words = self._recorded_words(index, turn)
            messages = await fit_to_tokens(self.counter, words, turn.prompt_tokens or 0)
        return PlannedTurn(messages, turn.pause_s or 0.0, carried, output_tokens)

    def _recorded_words(self, index: int, turn: RecordedTurn) -> list[str]:
        """Words of the blocks, one a token; the words of equal blocks are equal."""
        wanted = turn.prompt_tokens or 0
        words: list[str] = []
        for block in turn.blocks[: -(-wanted // turn.block_tokens) if turn.block_tokens else 0]:
            words += draw_words(turn.block_tokens, self.seed, OF_BLOCK, *self.salt, block)
        if len(words) < max(1, wanted):
            words += self._words(wanted - len(words), index)
        return words[: max(1, wanted)]

    async def _synthetic(self, prompts: Synthetic, count: int) -> list[PlannedSession]:
        made = []
        for index, tokens in enumerate(self._lengths(Draw.PROMPT_LENGTHS, prompts.tokens, count)):
            system = self._system(prompts.shared_prefix, index)
            messages = await fit_to_tokens(self.counter, self._words(tokens, index), tokens, system)
            made.append(PlannedSession((PlannedTurn(messages),)))
        return made

    async def _conversations(self, prompts: Conversations, count: int) -> list[PlannedSession]:
        """Lengths of user turns are of their text: what the template adds to each is not among them."""
        rng, pauses = self._generator(Draw.PROMPT_LENGTHS), self._seconds(prompts.think_s)
        template, made = await self._template_tokens(), []
        for index, turns in enumerate(self._lengths(Draw.TURNS, prompts.turns, count)):
            lengths = draw_lengths(prompts.user_tokens, rng, max(1, turns))
            texts = [await self._text(tokens, template, index, turn) for turn, tokens in enumerate(lengths)]
            planned = [
                PlannedTurn(user_turn(text), pauses.draw() if turn else 0.0)
                for turn, text in enumerate(texts)
            ]
            made.append(PlannedSession(self._after_system(prompts.shared_prefix, index, planned)))
        return made

    async def _agentic(self, prompts: Agentic, count: int) -> list[PlannedSession]:
        """A task, then a tool's result after each answer; texts have their lengths without the template."""
        results, pauses = self._generator(Draw.TOOL_RESULTS), self._seconds(prompts.tool_s)
        tasks = self._lengths(Draw.PROMPT_LENGTHS, prompts.task_tokens, count)
        offered = tuple(
            _function(index, draw_words(16, self.seed, OF_TOOL, index)) for index in range(prompts.tools)
        )
        template, made = await self._template_tokens(), []
        for index, steps in enumerate(self._lengths(Draw.TURNS, prompts.steps, count)):
            lengths = [tasks[index], *draw_lengths(prompts.result_tokens, results, max(1, steps) - 1)]
            turns = []
            for step, tokens in enumerate(lengths):
                text = await self._text(tokens, template, index, step)
                turns.append(
                    _step(step, text, pauses.draw() if step else 0.0, step + 1 == len(lengths), offered)
                )
            made.append(PlannedSession(self._after_system(prompts.shared_prefix, index, turns), offered))
        return made

    async def _text(self, tokens: int, template: int, *parts: int) -> str:
        (message,) = await fit_to_tokens(self.counter, self._words(tokens, *parts), template + tokens)
        return str(message["content"])

    async def _template_tokens(self) -> int:
        """What the template adds to one user message."""
        return await self.counter.count(user_turn("the")) - 1

    def _after_system(
        self, prefix: SharedPrefix | None, index: int, turns: Sequence[PlannedTurn]
    ) -> tuple[PlannedTurn, ...]:
        first = replace(turns[0], messages=(*self._system(prefix, index), *turns[0].messages))
        return (first, *turns[1:])

    def _system(self, prefix: SharedPrefix | None, index: int) -> tuple[Message, ...]:
        if prefix is None:
            return ()
        words = draw_words(prefix.tokens, self.seed, OF_GROUP, index % prefix.groups)
        return ({"role": "system", "content": " ".join(words)},)

    def _words(self, count: int, *parts: int) -> list[str]:
        return draw_words(count, self.seed, OF_REQUEST, *self.salt, *parts)

    def _lengths(self, draw: Draw, lengths: LengthsOrNumber, count: int) -> list[int]:
        return draw_lengths(lengths, self._generator(draw), count)

    def _seconds(self, seconds: Seconds) -> "_Pauses":
        return _Pauses(seconds, self._generator(Draw.PAUSES))

    def _generator(self, draw: Draw) -> Any:
        return generator(draw, self.seed, *self.salt)


@dataclass(frozen=True)
class _Pauses:
    """Times of one kind, drawn one by one."""

    seconds: Seconds
    rng: Any

    def draw(self) -> float:
        return draw_seconds(self.seconds, self.rng, 1)[0]


def _step(step: int, text: str, pause_s: float, is_last: bool, offered: Sequence[Message]) -> PlannedTurn:
    """A request of an agent; with functions offered, its answer calls one, and its result has the role `tool`."""
    if not offered:
        return PlannedTurn(user_turn(text), pause_s)
    called = offered[step % len(offered)]["function"]["name"]
    call = {
        "id": f"call-{step}",
        "type": "function",
        "function": {"name": called, "arguments": json.dumps({})},
    }
    result = {"role": "tool", "tool_call_id": f"call-{step - 1}", "content": text}
    return PlannedTurn(
        (result,) if step else user_turn(text), pause_s, None if is_last else {"tool_calls": [call]}
    )


def _function(index: int, words: Sequence[str]) -> Message:
    about = {
        "name": f"tool_{index}",
        "description": " ".join(words),
        "parameters": {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": about}
