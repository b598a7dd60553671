"""Which tasks and domains broke though the mean did not."""

import random
from typing import Any

import pytest
from tests.core.test_checkpoint_page import changed
from tests.core.test_core import example

from lowbit_core.checkpoint_page.page import as_html
from lowbit_core.evals.broken import (
    Loss,
    broken_domains,
    broken_of,
    broken_tasks,
    said_of_domain,
    said_of_task,
)
from lowbit_core.evals.results import Answers, changes_by_task
from lowbit_core.evals.scoring import Answer
from lowbit_core.inspection import domain_table


def answers(task: str, right: int, of: int, seed: int = 0) -> Answers:
    """So many right answers, of other items by the seed."""
    order = list(range(of))
    random.Random(seed).shuffle(order)
    found = {}
    for place, number in enumerate(order):
        good = place < right
        found[(task, str(number))] = Answer(
            (task, str(number)), "choice", good, good, 0 if good else 1, -1.0, 1
        )
    return found


def lost(**after: int) -> list[str]:
    """Tasks of 300 items, of which the base has 240 right, that broke when so many are right after."""
    before = {key: one for task in after for key, one in answers(task, 240, 300).items()}
    then = {key: one for task, right in after.items() for key, one in answers(task, right, 300).items()}
    return [one.name for one in broken_tasks(changes_by_task(before, then))]


def test_a_task_that_lost_far_more_than_all_is_named() -> None:
    assert lost(a=238, b=239, c=237, d=195) == ["d"]
    assert lost(a=190, b=239, c=238, d=237, e=239, f=180) == ["f", "a"]


def test_tasks_that_lost_alike_or_within_their_error_are_not() -> None:
    assert lost(a=200, b=199, c=201, d=198) == []
    assert lost(a=240, b=240, c=240, d=238) == []
    assert lost(a=250, b=245, c=243) == []
    assert lost(a=150) == []


def test_few_items_break_nothing() -> None:
    before = {**answers("a", 8, 10), **answers("b", 8, 10), **answers("c", 8, 10)}
    after = {**answers("a", 8, 10), **answers("b", 8, 10), **answers("c", 6, 10)}
    assert broken_tasks(changes_by_task(before, after)) == []


def domain(mean: float, error: float | None = 0.002, **more: Any) -> dict[str, float]:
    row = {
        "sequences": 4.0,
        "mean_kld": mean,
        "top1_agreement": 0.9,
        "perplexity": 9.0,
        "perplexity_base": 8.0,
    }
    return row | ({} if error is None else {"kld_stderr": error}) | more


def test_a_domain_breaks_by_its_own_error_and_the_mean_of_all() -> None:
    even = {"news": domain(0.02), "chat": domain(0.03), "mathematics": domain(0.025)}
    assert broken_domains(even) == []
    assert [one.name for one in broken_domains(even | {"code": domain(0.2)})] == ["code"]
    assert broken_domains(even | {"code": domain(0.2, 0.09)}) == []
    assert broken_domains(even | {"code": domain(0.2, None)}) == []
    assert broken_domains(even | {"code": {"sequences": 1.0}}) == []
    assert broken_domains({}) == []


def test_the_worst_comes_first_and_says_how_far_it_is_above_the_mean() -> None:
    losses = [Loss(str(n), 0.0, -0.1) for n in range(6)] + [Loss("x", 0.4, 0.3), Loss("y", 0.9, 0.8)]
    found = broken_of(losses)
    assert [one.name for one in found] == ["y", "x"]
    assert found[0].mean == pytest.approx(1.3 / 8)
    words = "5.5 times the mean of 0.1625 over all domains"
    assert said_of_domain(found[0]) == f"y broke: mean KL 0.9000 nats (at least 0.8000), {words}"
    assert said_of_task(found[0]).startswith(
        "y broke: it lost 90.0 points of acc_norm (at least 80.0), 5.5 times"
    )
    (gained,) = broken_of([Loss("a", -0.5, -0.6), Loss("b", -0.4, -0.5), Loss("c", 0.1, 0.05)])
    assert "where the mean lost nothing" in gained.words


def test_page_and_inspection_mark_it() -> None:
    quality = example({}).model_dump()["quality"]
    domains = {"news": domain(0.02), "chat": domain(0.03), "mathematics": domain(0.025), "code": domain(0.3)}
    manifest = changed(quality=quality | {"domains": domains})
    page = as_html(manifest, "a checkpoint", verified=True)
    assert "code (broke)" in page
    assert "code broke: mean KL 0.3000 nats" in page
    table = domain_table(manifest)
    assert "code (broke)" in list(table.columns[0].cells)
    assert "code broke" in str(table.caption)
    even = changed(quality=quality | {"domains": {"news": domain(0.02), "chat": domain(0.03)}})
    assert "broke" not in as_html(even, "a checkpoint", verified=True).partition("<svg")[0]
    assert domain_table(even).caption is None
