"""Names that a person chooses from a list, and which of them a wrong one may have meant."""

import difflib
from collections.abc import Iterable

LIKENESS = 0.65  # difflib's ratio: one letter wrong in three passes, a word inside a longer one does not
LEAST_PREFIX = 3  # letters that a name and its beginning share at least


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The name that `given` most likely means: but for case and `-_. `, for a few letters, or for its ending."""
    names = {_folded(name): name for name in reversed(list(known))}  # of two that fold alike, the first
    folded = _folded(given)
    if folded in names:
        return names[folded]
    if close := difflib.get_close_matches(folded, list(names), n=1, cutoff=LIKENESS):
        return names[close[0]]
    beginnings = [name for name in names if _begins(name, folded)]
    return names[min(beginnings, key=lambda name: abs(len(name) - len(folded)))] if beginnings else None


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`did you mean NAME? `, or nothing where no name is near."""
    near = nearest(given, known)
    return f"did you mean {near}? " if near else ""


def _folded(name: str) -> str:
    return name.casefold().translate(dict.fromkeys(map(ord, "-_. ")))


def _begins(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return len(short) >= LEAST_PREFIX and long.startswith(short)
