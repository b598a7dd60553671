"""What test_limit_sequences.py may send, what that asks for, and the accounts that it keeps beside the code's own."""

from typing import Any

NAMES = ("a", "b", "c")
LIMITS: tuple[dict[str, int], ...] = (
    {},
    {"concurrent_requests": 1},
    {"concurrent_requests": 3, "requests_per_minute": 5},
    {"tokens_per_minute": 60},
    {"tokens_per_minute": 300, "concurrent_requests": 2},
    {"requests_per_minute": 2, "priority": 3},
    {"concurrent_requests": 4, "requests_per_minute": 20, "tokens_per_minute": 200},
)
# What stands in the document, and how many output tokens that certainly asks for; None: no such field.
OUTPUTS: tuple[tuple[Any, int], ...] = (
    (None, 0), (5, 5), (40, 40), ("8", 8), (9.0, 9), (-70, 0), (0, 0), (True, 1), ("many", 0), (10**400, 1 << 50),
    (1e300, 1 << 50),
)  # fmt: skip
CHOICES: tuple[tuple[Any, int], ...] = (
    (None, 1),
    (1, 1),
    (2, 2),
    (-3, 1),
    (0, 1),
    ("2", 2),
    (10**30, 1 << 50),
)
PROMPTS: tuple[tuple[Any, int], ...] = (
    ("hello", 1), ("x" * 120, 1), ([1, 2, 3], 1), (["a", "b"], 2), ([[1, 2], [3], [4]], 3), (["a"] * 9, 9), ([], 1),
    (["p"] * 40, 40),
)  # fmt: skip
BAD_BODIES = (
    b"", b"{", b"[]", b'{"model": "other"}', b'{"prompt": "\\ud83d", "user": "u"}', b'{"prompt": "\xff"}',
    b'{"metadata": {"x": "\\udc00"}}', b"[" * 200, b"x" * 500, b" " * 390,
)  # fmt: skip


UNITS = ("requests_per_minute", "tokens_per_minute")


class Account:
    """What the oracle knows of one key: its places in use, and the level of its buckets by the documentation."""

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self.places = self.running = 0
        self.levels: dict[str, float] = {}
        self.born: dict[
            str, int
        ] = {}  # how often a bucket was made anew: what another gave is not given back to it

    def change(self, limits: dict[str, int]) -> None:
        for unit in UNITS:
            old, new = self.limits.get(unit), limits.get(unit)
            if new is None:
                self.levels.pop(unit, None)
            elif old is None:
                self.levels[unit], self.born[unit] = float(new), self.born.get(unit, 0) + 1
            elif new != old:
                level = self.levels[unit]
                self.levels[unit] = max(min(level, 0.0), new - (old - level))
        self.limits = limits

    def flow(self, seconds: float) -> None:
        for unit, level in self.levels.items():
            self.levels[unit] = min(self.limits[unit], level + seconds * self.limits[unit] / 60)

    def take(self, unit: str, amount: float) -> tuple[str, float, int]:
        """Take what must be there; the receipt gives it back."""
        if unit in self.levels:
            assert self.levels[unit] >= amount - 1e-6, f"{amount} of {self.levels[unit]} {unit}"
            self.levels[unit] -= amount
        return unit, amount, self.born.get(unit, 0) if unit in self.levels else -1

    def use(self, used: float, receipt: tuple[str, float, int]) -> None:
        """What was used in place of what was taken."""
        unit, amount, born = receipt
        if unit in self.levels:
            back = amount if born == self.born[unit] else 0.0
            self.levels[unit] = min(self.limits[unit], self.levels[unit] - used + back)
