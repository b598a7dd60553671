"""From answers to results: accuracy and perplexity by task, and the changes between two models' answers."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_core.evals.arithmetic import (
    Estimate,
    exponential,
    kl_lower_bound,
    mcnemar,
    mean_with_interval,
    paired_change,
    wilson,
)
from lowbit_core.evals.items import Key
from lowbit_core.evals.scoring import Answer

Answers = Mapping[Key, Answer]


@dataclass(frozen=True)
class TaskResult:
    """One task. `acc` and `acc_norm` are lm-eval's; of a task that it does not normalize both are `acc`."""

    items: int
    unanswered: int
    acc: Estimate | None = None
    acc_norm: Estimate | None = None
    perplexity: Estimate | None = None  # of texts; of a cloze, of its continuation
    tokens: int = 0


def summarize(answers: Answers) -> dict[str, TaskResult]:
    """By task, and `all`: the questions of every task together, the texts of every task together."""
    by_task: defaultdict[str, list[Answer]] = defaultdict(list)
    for one in answers.values():
        by_task[one.key[0]].append(one)
    results = {task: _task(found) for task, found in sorted(by_task.items())}
    if answers:
        results["all"] = _task(list(answers.values()))
    return results


def _task(found: Sequence[Answer]) -> TaskResult:
    questions = [one for one in found if one.acc_norm is not None]
    texts = [one for one in found if one.kind == "text" and one.tokens]
    rated = texts or [one for one in found if one.kind == "cloze" and one.tokens]
    return TaskResult(
        items=len(found),
        unanswered=sum(one.logprob is None for one in found),
        acc=_share(one.acc for one in questions),
        acc_norm=_share(one.acc_norm for one in questions),
        perplexity=perplexity(rated) if rated else None,
        tokens=sum(one.tokens for one in rated),
    )


def _share(found: Iterable[bool | None]) -> Estimate | None:
    right = list(found)
    return wilson(sum(map(bool, right)), len(right)) if right else None


def perplexity(found: Iterable[Answer]) -> Estimate:
    """exp of the mean negative log-probability of a token; the interval is over texts."""
    rated = list(found)
    nats = mean_with_interval([-(one.logprob or 0.0) for one in rated], [float(one.tokens) for one in rated])
    return exponential(nats)


@dataclass(frozen=True)
class Changes:
    """Answers `b` compared with answers `a` to the same items."""

    items: int  # questions in both
    flips: int  # other choices than in a, right or wrong
    lost: int  # right in a, wrong in b, by acc_norm
    gained: int
    flip_share: Estimate | None
    acc_norm_change: Estimate | None  # a share of the items, paired
    mcnemar_p: float | None
    mean_logprob_shift: float | None  # mean |Δ log p| of a token of the right continuation or text
    perplexity_ratio: Estimate | None
    kl_lower_bound: Estimate | None  # KL(a‖b) in nats per token of text
    kl_tokens: int


def changes(a: Answers, b: Answers) -> Changes:
    """What differs in b; items that only one has are left out."""
    pairs = [(a[key], b[key]) for key in a if key in b]
    asked = [(one, other) for one, other in pairs if one.acc_norm is not None and other.acc_norm is not None]
    flips = sum(one.chosen != other.chosen for one, other in asked)
    lost = sum(bool(one.acc_norm) and not other.acc_norm for one, other in asked)
    gained = sum(not one.acc_norm and bool(other.acc_norm) for one, other in asked)
    texts = [
        (one, other)
        for one, other in pairs
        if one.kind == "text" and one.tokens == other.tokens and one.tokens
    ]
    divergences = [_divergences(one, other) for one, other in texts if one.top and other.top]
    return Changes(
        items=len(asked),
        flips=flips,
        lost=lost,
        gained=gained,
        flip_share=wilson(flips, len(asked)) if asked else None,
        acc_norm_change=paired_change(lost, gained, len(asked)) if asked else None,
        mcnemar_p=mcnemar(lost, gained) if asked else None,
        mean_logprob_shift=_shift(pairs),
        perplexity_ratio=_ratio(texts) if texts else None,
        kl_lower_bound=_per_token(divergences) if divergences else None,
        kl_tokens=sum(map(len, divergences)),
    )


def changes_by_task(a: Answers, b: Answers) -> dict[str, Changes]:
    """`changes` of each task, and of `all` together."""
    tasks = sorted({task for task, _ in a.keys() & b.keys()})
    found = {
        task: changes(*({key: one[key] for key in one if key[0] == task} for one in (a, b))) for task in tasks
    }
    if found:
        found["all"] = changes(a, b)
    return found


def _shift(pairs: Sequence[tuple[Answer, Answer]]) -> float | None:
    known = [
        (abs(one.logprob - other.logprob), one.tokens)
        for one, other in pairs
        if one.logprob is not None and other.logprob is not None and one.tokens
    ]
    tokens = sum(count for _, count in known)
    return sum(shift for shift, _ in known) / tokens if tokens else None


def _ratio(texts: Sequence[tuple[Answer, Answer]]) -> Estimate:
    nats = mean_with_interval(
        [(one.logprob or 0.0) - (other.logprob or 0.0) for one, other in texts],
        [float(one.tokens) for one, _ in texts],
    )
    return exponential(nats)


def _divergences(one: Answer, other: Answer) -> list[float]:
    return [kl_lower_bound(p, q) for p, q in zip(one.top, other.top, strict=False)]


def _per_token(divergences: Sequence[Sequence[float]]) -> Estimate:
    return mean_with_interval([sum(one) for one in divergences], [float(len(one)) for one in divergences])


def as_rows(answers: Answers) -> list[dict[str, Any]]:
    """Answers as JSON, for a later run to compare with; `from_rows` reads them."""
    return [
        {
            "task": one.key[0],
            "id": one.key[1],
            "kind": one.kind,
            "acc": one.acc,
            "acc_norm": one.acc_norm,
            "chosen": one.chosen,
            "logprob": None if one.logprob is None else round(one.logprob, 5),
            "tokens": one.tokens,
            **({} if one.probability is None else {"probability": one.probability}),
            **(
                {"top": [{token: round(p, 4) for token, p in top.items()} for top in one.top]}
                if one.top
                else {}
            ),
        }
        for one in answers.values()
    ]


def from_rows(rows: Iterable[Mapping[str, Any]]) -> dict[Key, Answer]:
    """The inverse of `as_rows`; raises KeyError or TypeError on other JSON, ConfigError on an older one."""
    found = {}
    for row in rows:
        if "right" in row:
            raise ConfigError(
                "answers have the keys 'right' and 'right_raw'; they are called 'acc_norm' and 'acc' now: "
                "make the file anew"
            )
        key = (str(row["task"]), str(row["id"]))
        top = tuple(dict(one) for one in row.get("top", ()))
        found[key] = Answer(
            key,
            row["kind"],
            row["acc"],
            row["acc_norm"],
            row["chosen"],
            row["logprob"],
            row["tokens"],
            top,
            row.get("probability"),
        )
    return found
