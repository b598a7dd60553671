"""Reasoning that stands in the answer's text, between tags, where a server has no parser for it.

A chat template may itself write the opening tag into the prompt; then only the closing one is seen, and what came
before it was no answer after all.
"""

OPENS, CLOSES = "<think>", "</think>"


class ThoughtTags:
    """Text in, and out whether what has come so far is thought; tags may be cut anywhere."""

    def __init__(self) -> None:
        self._opening: str | None = ""  # the text's beginning, until it is known whether it is a tag
        self._tail = ""
        self._blank = False  # after a thought, up to the first letter of the answer
        self.inside = False
        self.closed = False  # whether the last text closed a thought

    def add(self, text: str) -> None:
        """Take the next text; `inside` and `closed` are of its end."""
        if self._opening is not None:
            self._opening = (self._opening + text).lstrip()
            self.inside = self._opening.startswith(OPENS)
            if self.inside or not OPENS.startswith(self._opening):
                self._opening = None
        seen = self._tail + text
        self.closed = CLOSES in seen
        if self.closed:
            self.inside, self._blank, text = False, True, seen.rpartition(CLOSES)[2]
            seen = text
        self._tail = seen[1 - len(CLOSES) :]
        if self._blank and text.strip():
            self._blank = False

    @property
    def answers(self) -> bool:
        """Whether the last text had a part of the answer."""
        return not self.inside and not self._blank
