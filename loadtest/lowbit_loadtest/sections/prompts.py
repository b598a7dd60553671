"""The section `prompts` of a scenario: what requests ask. `generate/prompts.py` makes the words."""

from typing import Annotated, Literal

from pydantic import Field

from lowbit_core.documents import DocumentPath, Section
from lowbit_loadtest.sections.distributions import LengthsOrNumber, Seconds, SecondsOrNumber, TraceFormat

DEFAULT_PROMPT = "Explain in a few paragraphs how a refrigerator moves heat from a cold place to a warm one."


class Text(Section):
    """The same user message for every request."""

    kind: Literal["text"]
    text: str = Field(default=DEFAULT_PROMPT, min_length=1)


class FilePrompts(Section):
    """A file of prompts, conversations or lengths, taken in turn; any format of `generate/traces/`.

    A recorded conversation is asked again turn by turn. `think_s` passes before a user's turn and `tool_s` before a
    tool's result where the file does not say how long it took.
    """

    kind: Literal["file"]
    path: DocumentPath
    format: TraceFormat | None = None
    think_s: SecondsOrNumber = Seconds(mean=0)
    tool_s: SecondsOrNumber = Seconds(mean=0)


class SharedPrefix(Section):
    """Requests are dealt over `groups`; those of one group begin with the same system message."""

    groups: int = Field(ge=1)
    tokens: int = Field(ge=1)


class Synthetic(Section):
    """Made-up words; `tokens` is the length of the whole prompt, chat template and shared prefix included."""

    kind: Literal["synthetic"]
    tokens: LengthsOrNumber
    shared_prefix: SharedPrefix | None = None


class Conversations(Section):
    """Each arrival starts a conversation; later turns carry the earlier ones with the server's own answers.

    A turn is due `think_s` after the answer before it has ended; its latency counts from then.
    """

    kind: Literal["conversations"]
    turns: LengthsOrNumber
    user_tokens: LengthsOrNumber
    think_s: SecondsOrNumber = Seconds(mean=1)
    shared_prefix: SharedPrefix | None = None


class Agentic(Section):
    """Each arrival starts a session of an agent: a task, then a tool's result after each answer but the last.

    A session has `steps` requests, of which each waits for the answer before it and then `tool_s` for the tool, and
    carries everything before it. With `tools` 0 results are user messages, which every server takes; with more, that
    many functions are offered, each answer carries a call, and results have the role `tool`.
    """

    kind: Literal["agentic"]
    steps: LengthsOrNumber
    task_tokens: LengthsOrNumber
    result_tokens: LengthsOrNumber
    tool_s: SecondsOrNumber = Seconds(mean=1)
    tools: int = Field(default=0, ge=0, le=128)
    shared_prefix: SharedPrefix | None = None


Prompts = Annotated[Text | FilePrompts | Synthetic | Conversations | Agentic, Field(discriminator="kind")]
