"""The integer program finds what trying everything finds, and says what is out of reach."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_core.errors import ConfigError
from lowbit_core.manifest import RunRecord, TextRecord
from lowbit_quantize.sensitivity.allocation import Limit, allocate
from lowbit_quantize.sensitivity.assignment import Assignment
from lowbit_quantize.sensitivity.correction import factors_of
from lowbit_quantize.sensitivity.report import (
    Candidate,
    Choice,
    DecisionRecord,
    ModelRecord,
    Sensitivity,
)

ROWS = st.lists(
    st.lists(
        st.tuples(st.floats(1e-6, 1.0), st.floats(0.5, 16.0), st.floats(0.0, 4.0)), min_size=1, max_size=4
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, share=st.floats(0.0, 1.0))
def test_nothing_loses_less_within_the_limits(
    rows: list[list[tuple[float, float, float]]], share: float
) -> None:
    losses, sizes, seconds = ([[one[column] for one in row] for row in rows] for column in range(3))
    least, largest = (sum(bound(row) for row in sizes) for bound in (min, max))
    limits = [
        Limit("--bytes", sizes, least + share * (largest - least)),
        Limit("--seconds", seconds, sum(max(row) for row in seconds)),
    ]
    picked = allocate(losses, limits)

    def total(table: list[list[float]], places: tuple[int, ...]) -> float:
        return sum(row[place] for row, place in zip(table, places, strict=True))

    within = [
        places
        for places in itertools.product(*(range(len(row)) for row in rows))
        if total(sizes, places) <= limits[0].most * (1 + 1e-9)
    ]
    assert total(sizes, tuple(picked)) <= limits[0].most * (1 + 1e-6)
    assert total(losses, tuple(picked)) <= min(total(losses, places) for places in within) * (1 + 1e-4)


def test_a_limit_that_nothing_meets_is_told_with_the_least_there_is() -> None:
    with pytest.raises(ConfigError, match=r"--bits: 3 is asked for and 4 is the least"):
        allocate([[1.0, 0.1]], [Limit("--bits", [[4.0, 8.0]], 3.0)])


def test_limits_that_only_together_are_out_of_reach_are_named() -> None:
    limits = [Limit("--bytes", [[1.0, 2.0]], 1.5), Limit("--seconds", [[2.0, 1.0]], 1.5)]
    with pytest.raises(ConfigError, match="--bytes and --seconds together"):
        allocate([[1.0, 0.1]], limits)


def assignment(**kl: float) -> Assignment:
    """One decision for each candidate, predicted to cost so much."""
    text = TextRecord(dataset="none", num_samples=1, max_seq_length=1, tokens=1, seed=0, sha256="")
    found = Sensitivity(
        base=ModelRecord(name="none", sha256={}, other_bytes=0),
        recipe={},
        candidates=tuple(Candidate(name=name, scheme=name) for name in ("low", "middle", "high")),
        calibration=text,
        scored=text,
        seed=0,
        decisions=tuple(
            DecisionRecord(
                name=name, layer=0, kind=name, modules=(name,), weights=1,
                choices={name: Choice(bytes=1, bits=1, kl=value, kl_stderr=0)},
            )
            for name, value in kl.items()
        ),
        run=RunRecord(device="cpu", seconds=0, cpu_seconds=0, peak_rss_bytes=0),
    )  # fmt: skip
    return Assignment(found, {name: name for name in kl})


def test_one_checkpoint_corrects_all_candidates_alike() -> None:
    factors = factors_of([(assignment(low=0.02, high=0.01), 0.06)])
    assert list(factors) == ["low", "middle", "high", "fp8"]
    assert all(one == pytest.approx(2.0) for one in factors.values())
    assert factors_of([]) == {}


def test_checkpoints_of_different_candidates_tell_them_apart() -> None:
    """And what is predicted of them again comes nearer to what was measured than by one factor."""
    measured = [(assignment(low=0.1), 0.1), (assignment(high=0.01), 0.02)]
    factors = factors_of(measured)
    common = 2**0.5
    assert 1 < factors["low"] < common < factors["high"] < 2
    assert factors["middle"] == pytest.approx(common)
    for one, kl in measured:
        after = Assignment(one.found, one.names, factors).kl
        assert abs(math.log(after / kl)) < 0.2 * abs(math.log(common))
