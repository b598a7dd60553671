"""One request's state, from its first byte to the last of its response."""

import time
import uuid
from dataclasses import dataclass, field

from lowbit_server.gateway.key_limits import KeyUsage


@dataclass
class RequestContext:
    """One request. Times are readings of the monotonic clock; `usage` is that of its key."""

    path: str
    client_id: str
    usage: KeyUsage
    id: str = field(default_factory=lambda: f"lb{uuid.uuid4().hex}")
    model: str = ""
    stream: bool = False
    reserved_tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    first_byte: float | None = None
    ended: float | None = None
    status: int = 0
    outcome: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    response_ended: bool = False
    tokens_counted: bool = False
