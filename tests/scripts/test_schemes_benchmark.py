"""benchmarks/schemes takes turns, ends in time, and writes numbers that JSON has."""

import json

import pytest
from benchmarks.schemes.run import WARMING, Speeds, ratios, take_turns

NAMES = ("bf16", "w4a16", "w8a8")


class Turns:
    """Turns that take a time, on a clock of their own."""

    def __init__(self, seconds: float, limit_s: float) -> None:
        self.seconds, self.left = seconds, limit_s
        self.taken: list[tuple[str, int]] = []

    def __call__(self, name: str, number: int) -> Speeds:
        self.taken.append((name, number))
        self.left -= 0.1 * self.seconds if number == WARMING else self.seconds
        return {"prompt": 2.0 if name == "w8a8" else 1.0}

    def left_s(self) -> float:
        return self.left


@pytest.mark.parametrize(
    ("limit_s", "rounds"),
    [(1e9, 3), (float("inf"), 3), (95.0, 3), (70.0, 2), (60.0, 1), (1.0, 1), (-5.0, 1)],
)
def test_no_round_begins_that_would_not_end_in_time_but_the_first(limit_s: float, rounds: int) -> None:
    turns = Turns(10.0, limit_s)
    found = take_turns(NAMES, turns, 3, turns.left_s)
    assert [len(found[name]) for name in NAMES] == [rounds] * 3
    assert rounds == 1 or turns.left >= 0


def test_everyone_is_warmed_first_and_each_round_begins_with_another() -> None:
    turns = Turns(1.0, 1e9)
    take_turns(NAMES, turns, 3, turns.left_s)
    assert turns.taken[:3] == [(name, WARMING) for name in NAMES]
    assert [name for name, _ in turns.taken[3::3]] == list(NAMES)
    assert [number for _, number in turns.taken] == sorted(number for number in range(4) for _ in NAMES)


def test_one_round_has_no_error_and_is_json() -> None:
    one = {name: [{"prompt": 2.0 if name == "w8a8" else 1.0}] for name in NAMES}
    assert ratios(one)["w8a8"] == {"prompt": {"ratio": 2.0, "error": None}}
    assert "NaN" not in json.dumps(ratios(one))
    two = {name: [*found, {"prompt": 1.0}] for name, found in one.items()}
    assert ratios(two)["w8a8"]["prompt"] == {"ratio": 1.5, "error": 0.5}
