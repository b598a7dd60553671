"""What a request asks, whatever API it is sent to."""

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What is sent, apart from the model's name."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float
    seed: int
    exact: bool = False  # ask vLLM for exactly max_tokens
    keep_text: bool = False  # the next turn of a conversation needs it
    index: int = 0
    turn: int = 0
    response_format: Message | None = None
    tools: tuple[Message, ...] = ()

    def body(self, model: str) -> dict[str, Any]:
        extra: Message = {"ignore_eos": True} if self.exact else {}
        if self.response_format is not None:
            extra["response_format"] = self.response_format
        if self.tools:
            extra["tools"] = list(self.tools)
        return {
            "model": model,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **extra,
        }
