"""Prompt and generated tokens per second over the last ten seconds, fed by every engine step.

vLLM counts tokens and leaves the rate to Prometheus; an autoscaler or a person with curl wants the rate now.
"""

import time
from collections.abc import Callable

from lowbit_server.sliding_window import WINDOW_S, SlidingWindow


class Throughput:
    """Prompt and generated tokens per second, fed once for each engine step."""

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.prompt = SlidingWindow(window_s, clock)
        self.generation = SlidingWindow(window_s, clock)
        # The engine's id of a request, and its tokens: of the prompt, generated, of the prompt found in the cache.
        self.on_finished: Callable[[str, int, int, int], None] = lambda *_: None
        self.on_step: Callable[[int, int], None] | None = None  # prompt tokens, generated tokens

    def record(self, *, prompt_tokens: int, generation_tokens: int) -> None:
        """Count the tokens of one step; cached prompt tokens count, as in `vllm:prompt_tokens_total`."""
        self.prompt.add(prompt_tokens)
        self.generation.add(generation_tokens)
        if self.on_step is not None:
            self.on_step(prompt_tokens, generation_tokens)
