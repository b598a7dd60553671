"""One request's state, from its first byte to the last of its response."""

import time
import uuid
from dataclasses import dataclass, field

from lowbit_server.gateway.lease import Lease
from lowbit_server.gateway.route_table import UNLISTED, Route


@dataclass
class RequestContext:
    """One request. Times are readings of the monotonic clock; `lease` is what it holds of its key's limits."""

    path: str
    client_id: str
    lease: Lease
    route: Route = UNLISTED
    id: str = field(default_factory=lambda: f"lb{uuid.uuid4().hex}")
    model: str = ""
    stream: bool = False
    began: float = field(default_factory=time.monotonic)
    first_byte: float | None = None
    ended: float | None = None
    status: int = 0
    outcome: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0  # of the prompt's, those found in the prefix cache
    overhead_s: float = 0.0  # spent in the gateway itself
    counted: bool = False  # its tokens stand in the counters
    finished: int = 0  # sequences that the engine has counted
    prompts: tuple[str, ...] = ()  # the engine's ids of those whose prompt is counted
    response_ended: bool = False

    @property
    def id_headers(self) -> dict[str, str]:
        """The headers that name the request; Anthropic's clients read theirs."""
        named = {"x-request-id": self.client_id}
        return named | ({"request-id": self.client_id} if self.route.errors == "anthropic" else {})
