"""What a million tokens cost, for a price per hour of everything that serves: the price over the tokens of a window.

    cost = price per hour · hours of the window / tokens of the window · 10⁶

The window is the last `WINDOW_S` seconds, or the time since the server was ready where that is less. Idle time is paid
for too, so the figure falls as the server is used; without a token in the window there is none.
"""

import time
from collections.abc import Callable

from lowbit_server.sliding_window import SlidingWindow

WINDOW_S = 600.0
HOUR_S = 3600.0


class Cost:
    """The price and the window; told of tokens as the engine counts them. The currency is that of the price."""

    def __init__(self, price_per_hour: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.price_per_hour, self._clock = price_per_hour, clock
        self.begin()

    def begin(self) -> None:
        """The server is ready: what it cost to start is not counted."""
        self._since = self._clock()
        self._windows = {kind: SlidingWindow(WINDOW_S, self._clock) for kind in ("prompt", "generated")}

    def add(self, prompt_tokens: int, generated_tokens: int) -> None:
        """Count tokens now."""
        self._windows["prompt"].add(prompt_tokens)
        self._windows["generated"].add(generated_tokens)

    def per_million(self) -> dict[str, float]:
        """The cost of 10⁶ tokens by what is counted: `generated` ones alone, or `all`, prompts too."""
        seconds = min(WINDOW_S, max(0.0, self._clock() - self._since))
        generated, prompt = (self._windows[kind].per_second() * WINDOW_S for kind in ("generated", "prompt"))
        counts = {"generated": generated, "all": generated + prompt}
        paid = self.price_per_hour * seconds / HOUR_S
        return {kind: paid / count * 1e6 for kind, count in counts.items() if count > 0}
