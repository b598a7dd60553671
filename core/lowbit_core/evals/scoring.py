"""From log-probabilities to answers: the rules of lm-evaluation-harness for accuracy, for each item by itself."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit_core.evals.items import Item, Key

Top = dict[str, float]  # token (its text or id) to log-probability


@dataclass(frozen=True)
class Scored:
    """What a model gives for one request. `top` has the likeliest tokens at each position, if asked for."""

    token_logprobs: tuple[float, ...]
    greedy: bool  # every token of the continuation is the likeliest
    top: tuple[Top, ...] = ()

    @property
    def logprob(self) -> float:
        return sum(self.token_logprobs)


@dataclass(frozen=True)
class Answer:
    """A model's answer to one item. `chosen` is the number of the request; None of an item that got no answer.

    `acc` and `acc_norm` say whether it is right, as in lm-eval: by log-probability, and by log-probability divided by
    the continuation's length. They are equal where lm-eval has only acc. A text has neither, only the log-probability
    of its `tokens`. `probability` is that of the right choice among the choices, or of a cloze's words: how often it
    would be right if it drew its choice (p(choices) of Schaeffer et al. 2024, arXiv 2406.04391). A change of the model
    moves it a little on every item, where `acc` flips on a few.
    """

    key: Key
    kind: str
    acc: bool | None
    acc_norm: bool | None
    chosen: int | None
    logprob: float | None  # of the right continuation, or of the text
    tokens: int
    top: tuple[Top, ...] = ()
    probability: float | None = None


def answer(item: Item, scored: Sequence[Scored] | None) -> Answer:
    """The answer to one item; without scores (the server gave none) a question is wrong and a text is empty."""
    if scored is None:
        lost = None if item.kind == "text" else False
        return Answer(item.key, item.kind, lost, lost, None, None, 0, (), None if lost is None else 0.0)
    if item.kind == "text":
        (one,) = scored
        return Answer(item.key, item.kind, None, None, None, one.logprob, len(one.token_logprobs), one.top)
    gold = item.gold or 0
    if item.kind == "cloze":
        (one,) = scored
        chosen = 0 if one.greedy else 1
        tokens, likely = len(one.token_logprobs), round(min(1.0, math.exp(one.logprob)), 6)
        return Answer(item.key, item.kind, one.greedy, one.greedy, chosen, one.logprob, tokens, (), likely)
    logprobs = [one.logprob for one in scored]
    lengths = [max(1, len(request.continuation.removeprefix(" "))) for request in item.requests]
    normalized = [value / length for value, length in zip(logprobs, lengths, strict=True)]
    likeliest = _argmax(logprobs)
    chosen = _argmax(normalized) if item.normalized else likeliest
    tokens = len(scored[gold].token_logprobs)
    right = (likeliest == gold, chosen == gold)
    return Answer(item.key, item.kind, *right, chosen, logprobs[gold], tokens, (), _share(logprobs, gold))


def _share(logprobs: Sequence[float], gold: int) -> float:
    """The right choice's part of the probability of all choices."""
    return round(1 / sum(math.exp(min(700.0, value - logprobs[gold])) for value in logprobs), 6)


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
