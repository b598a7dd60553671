"""One answer as it comes: times of its chunks, its text, its usage, and which tokens of that were to be seen."""

from dataclasses import dataclass, field

from lowbit_loadtest.generate.endpoints.piece import Piece, Usage
from lowbit_loadtest.generate.thoughts import ThoughtTags

HIDDEN_REASONING = "hidden reasoning tokens: time per output token is of the others"
MORE_TOKENS_THAN_BYTES = "usage has more tokens than the answer has bytes: some were not to be seen"
NOT_STREAMED = "not streamed: times to first token and between tokens are unknown"
BYTELESS_TOKENS = 32  # tokens of a template, of a call's frame and ends of text have no letters


@dataclass
class Answer:
    """What has arrived so far. More than `most_chunks` chunks are no answer that ends."""

    most_chunks: int | None = None
    keep_text: bool = False
    chunk_times_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    first_answer_s: float | None = None  # the first output that is not reasoning
    finished_s: float | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_apart: bool = False
    reasoning_bytes: int = 0
    other_bytes: int = 0
    events: int = 0
    unread: str = ""  # the last event that meant nothing to us
    streamed: bool = True  # or not meant to be
    done: bool = False
    texts: list[str] = field(default_factory=list)
    tags: ThoughtTags = field(default_factory=ThoughtTags)

    def add(self, piece: Piece, now_s: float | None) -> None:
        """Take a piece that came at `now_s`; None for a whole answer, whose parts have no times."""
        self.events += 1
        if piece.has_output:
            self._add_output(piece, now_s)
        if piece.finish_reason:
            self.finished_s, self.finish_reason = now_s, piece.finish_reason
        if piece.usage is not None:
            self._count(piece.usage, piece.has_output and now_s is not None)
        self.done = self.done or piece.done

    def _add_output(self, piece: Piece, now_s: float | None) -> None:
        if now_s is not None:
            self.chunk_times_s.append(now_s)
            self._find_answer(piece, now_s)
        if piece.reasoning:
            self.reasoning_bytes += _bytes(piece.reasoning)
        self.other_bytes += _bytes(piece.text) + _bytes(piece.other)
        if self.keep_text and piece.text:
            self.texts.append(piece.text)

    def _find_answer(self, piece: Piece, now_s: float) -> None:
        """The first output that is no reasoning, by its kind or by its tags."""
        if piece.text:
            self.tags.add(piece.text)
            if self.tags.inside or self.tags.closed:
                self.first_answer_s = None
        if self.first_answer_s is None and (piece.other or (piece.text and self.tags.answers)):
            self.first_answer_s = now_s

    def _count(self, usage: Usage, has_output: bool) -> None:
        """Later counts replace earlier ones; a count that is missing later leaves the earlier one."""
        if usage.output_tokens is not None:
            if has_output:  # a server that counts as it goes
                self.chunk_tokens.append(usage.output_tokens - (self.output_tokens or 0))
            self.output_tokens = usage.output_tokens
        if usage.prompt_tokens is not None:
            self.prompt_tokens = usage.prompt_tokens
        if usage.cached_tokens is not None:
            self.cached_tokens = usage.cached_tokens
        if usage.reasoning_tokens is not None:
            self.reasoning_tokens, self.reasoning_apart = usage.reasoning_tokens, usage.reasoning_apart

    @property
    def hides_reasoning(self) -> bool:
        """Whether the server thought, and did not send what: a token has a byte at least."""
        thought = self.reasoning_tokens or 0
        return thought > 0 and (not self.reasoning_bytes or thought > self.reasoning_bytes + BYTELESS_TOKENS)

    @property
    def visible_tokens(self) -> int | None:
        """The tokens that were sent as output; None without usage."""
        if self.output_tokens is None:
            return None
        thought = self.reasoning_tokens or 0
        if self.reasoning_apart:
            return self.output_tokens + (0 if self.hides_reasoning else thought)
        return max(0, self.output_tokens - thought) if self.hides_reasoning else self.output_tokens

    def notes(self) -> list[str]:
        """What a reader of the numbers must know."""
        found = [] if self.streamed else [NOT_STREAMED]
        if self.hides_reasoning:
            found.append(HIDDEN_REASONING)
        seen_bytes = self.reasoning_bytes + self.other_bytes
        if self.streamed and (self.visible_tokens or 0) > max(seen_bytes + BYTELESS_TOKENS, 2 * self.events):
            found.append(MORE_TOKENS_THAN_BYTES)
        return found


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", errors="replace"))
