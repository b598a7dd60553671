"""What settles a claim, and who stays in a stage of the decision."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from lowbit_loadtest.frontier.decide.claims import Claim
from lowbit_loadtest.frontier.decide.decision import Stage, _stage
from lowbit_loadtest.frontier.decide.sequences import Confidence


def claim(low: float, value: float, high: float, **kinds: Any) -> Claim:
    found = Confidence(value, low, high, 20, 0.03, lambda n: 0.18 / n**0.5)
    return Claim("throughput", "round", "a", "b", found, **kinds)


@pytest.mark.parametrize(
    ("ends", "settled"),
    [
        ((-0.01, 0.0, 0.01), "equal"),
        ((0.001, 0.01, 0.019), "equal"),
        ((0.001, 0.02, 0.05), "better"),
        ((-0.05, -0.02, -0.001), "worse"),
        ((-0.01, 0.01, 0.04), "undecided"),
        ((-math.inf, 0.01, math.inf), "undecided"),
    ],
)
def test_a_comparison_is_settled_by_the_whole_interval(
    ends: tuple[float, float, float], settled: str
) -> None:
    assert claim(*ends, margin=0.03).settled == settled


@pytest.mark.parametrize(
    ("ends", "at_least", "settled"),
    [
        ((0.0, 0.1, 0.2), True, "met"),
        ((-0.2, -0.1, -0.01), True, "missed"),
        ((-0.1, 0.0, 0.1), True, "undecided"),
        ((-0.2, -0.1, 0.0), False, "met"),
        ((0.01, 0.1, 0.2), False, "missed"),
        ((-math.inf, 0.0, math.inf), False, "undecided"),
    ],
)
def test_a_constraint_is_settled_by_the_whole_interval(
    ends: tuple[float, float, float], at_least: bool, settled: str
) -> None:
    assert claim(*ends, limit=0.0, at_least=at_least).settled == settled


def stage(gaps: Mapping[str, tuple[float, float]]) -> Stage:
    """Of a, b and c: the value and the half interval of each pair's logarithm, as "ab"."""

    def compare(one: str, other: str) -> Claim:
        sign = 1 if one + other in gaps else -1
        value, half = gaps[one + other if sign > 0 else other + one]
        found = Confidence(sign * value, sign * value - half, sign * value + half, 20, 0.03)
        return Claim("throughput", "round", one, other, found, margin=0.03)

    return _stage(["a", "b", "c"], compare)


def test_what_is_open_against_one_is_behind_where_another_surely_beats_it() -> None:
    found = stage({"ab": (0.001, 0.01), "ac": (0.03, 0.04), "bc": (0.04, 0.01)})
    assert found.stay == ("a", "b")
    assert [(claim.one, claim.other) for claim in found.worse] == [("b", "c")]


def test_equals_do_not_chain_so_who_is_behind_any_is_behind() -> None:
    found = stage({"ab": (0.015, 0.005), "ac": (0.04, 0.005), "bc": (0.02, 0.005)})
    assert found.stay == ("a", "b")
    assert [(claim.one, claim.other) for claim in found.worse] == [("a", "c")]


def test_a_circle_of_claims_puts_nobody_out() -> None:
    found = stage({"ab": (0.05, 0.01), "bc": (0.05, 0.01), "ac": (-0.05, 0.01)})
    assert (found.stay, found.worse) == (("a", "b", "c"), ())


def test_of_two_in_the_set_both_sides_are_needed_and_of_one_only_that_it_is_no_worse() -> None:
    found = stage({"ab": (0.01, 0.03), "ac": (0.01, 0.03), "bc": (0.01, 0.03)})
    assert [(claim.other, claim.settled) for claim in found.needed(["a"])] == [
        ("b", "no worse"),
        ("c", "no worse"),
    ]
    (pair,) = [claim for claim in found.needed(["a", "b"]) if claim.other == "b"]
    assert pair.settled == "undecided"


@pytest.mark.parametrize(
    ("ends", "settled"),
    [
        ((-0.01, 0.02, 0.05), "no worse"),
        ((0.01, 0.03, 0.05), "better"),
        ((-0.01, 0.0, 0.01), "equal"),
        ((-0.04, 0.0, 0.04), "undecided"),
        ((-0.09, -0.05, -0.01), "worse"),
        ((-math.inf, 0.01, math.inf), "undecided"),
    ],
)
def test_no_worse_by_more_than_the_margin_is_settled_by_one_end(
    ends: tuple[float, float, float], settled: str
) -> None:
    assert claim(*ends, margin=0.03, one_sided=True).settled == settled


def test_to_be_no_worse_takes_a_faster_one_fewer_units_than_to_be_faster() -> None:
    ends = (-0.05, 0.01, 0.07)
    near, faster = claim(*ends, margin=0.03, one_sided=True), claim(*ends, margin=0.03)
    assert 3 * near.more_units() < faster.more_units()


def test_a_claim_takes_fewer_units_the_further_it_is_from_what_it_hangs_on() -> None:
    near, far = claim(-0.03, 0.014, 0.05, margin=0.03), claim(-0.03, 0.0, 0.05, margin=0.03)
    assert near.more_units() > far.more_units() > 1
    assert claim(-0.01, 0.0, 0.01, margin=0.03).more_units() == 0
