"""What test_limit_sequences.py may send, what that asks for, and the accounts that it keeps beside the code's own."""

from collections import defaultdict
from typing import Any

NAMES = ("a", "b", "c")
LIMITS: tuple[dict[str, int], ...] = (
    {},
    {"concurrent_requests": 1},
    {"concurrent_requests": 3, "requests_per_minute": 5},
    {"tokens_per_minute": 60},
    {"tokens_per_minute": 300, "concurrent_requests": 2},
    {"requests_per_minute": 2, "priority": 3},
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
    b'{"metadata": {"x": "\\udc00"}}', b"[" * 200, b"x" * 500,
)  # fmt: skip


class Account:
    """What the oracle knows of one key: the most that may have been let through, and what was."""

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}
        self.running = 0
        self.allowed: dict[str, float] = defaultdict(float)  # a full bucket, and what has flowed in since
        self.spent: dict[str, float] = defaultdict(float)
        self.changed = True  # its limits are not those from the start: no lower bound is known

    def change(self, limits: dict[str, int]) -> None:
        for unit in ("requests_per_minute", "tokens_per_minute"):
            old, new = self.limits.get(unit), limits.get(unit)
            if new is not None and old is None:
                self.allowed[unit], self.spent[unit] = float(new), 0.0
            elif new is not None and old is not None:
                self.allowed[unit] += max(0, new - old)
        self.limits = limits

    def flow(self, seconds: float) -> None:
        for unit in self.allowed:
            self.allowed[unit] += self.limits.get(unit, 0) * seconds / 60
