"""Thoughts between tags, however they are cut: against what is seen when the whole text is known."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_loadtest.generate.answer import Answer
from lowbit_loadtest.generate.endpoints.piece import Piece

PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "hm", " ", "\n", "yes", "<", "think>", "/"]), max_size=8
)


def first_answer(text: str) -> int | None:
    """The place of the answer's first letter in the whole text: after the last thought, or at the beginning."""
    after = text.rfind("</think>")
    if after >= 0:
        rest = text[after + len("</think>") :]
        return after + len("</think>") + len(rest) - len(rest.lstrip()) if rest.strip() else None
    return None if text.lstrip().startswith("<think>") or not text else 0


@settings(max_examples=400, deadline=None)
@given(PARTS, st.integers(1, 30))
def test_the_answer_begins_where_the_last_thought_ends(parts: list[str], size: int) -> None:
    text, answer = "".join(parts), Answer()
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    for number, piece in enumerate(pieces):
        answer.add(Piece(text=piece), float(number))
    expected = first_answer(text)
    assert answer.first_answer_s == (None if expected is None else expected // size)
