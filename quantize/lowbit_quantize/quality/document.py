"""A document: plain text, or a conversation, with the place where it was found."""

import json
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # role, content (a string), and where they are given name, tool_calls, tool_call_id


@dataclass(frozen=True)
class Document:
    """Plain text, or a conversation with the tools that its system may call."""

    domain: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    place: str = field(default="the text", compare=False)  # for errors: file and line

    @property
    def words(self) -> str:
        """All its words, for comparing."""
        return self.text or "\n\n".join(map(_words, self.messages))


def _words(message: Message) -> str:
    calls = message.get("tool_calls")
    content = str(message["content"])
    return f"{content}\n{json.dumps(calls, ensure_ascii=False)}" if calls else content
