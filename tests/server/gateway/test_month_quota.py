"""A key's tokens of a month: what is left is reserved, refused and given back, on a calendar that tests turn."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.gateway.key_files import key_file

from lowbit_core.errors import ConfigError
from lowbit_server.cost.usage_book import UsageBook
from lowbit_server.cost.usage_file import Counts, open_usage_file
from lowbit_server.gateway.key_limits import KeyUsage
from lowbit_server.gateway.keys import Key, KeyStore
from lowbit_server.gateway.lease import Capacity, Demand, Lease
from lowbit_server.gateway.openai_errors import ApiError
from lowbit_server.gateway.request_context import RequestContext
from lowbit_server.gateway.request_tracker import RequestTracker

QUOTA = 1000
NOW = datetime(2026, 11, 30, 23, 0, tzinfo=UTC).timestamp()


class Bench:
    """One key with a quota and its book."""

    def __init__(self, path: Path, quota: int | None = QUOTA) -> None:
        self.now_s = NOW
        self.book = UsageBook(open_usage_file(path), lambda: self.now_s)
        self.key = Key(name="a", sha256="0" * 64, tokens_per_month=quota)
        self.usage = KeyUsage(self.key, lambda: 0.0, self.book)
        self.capacity = Capacity(100, 1000, lambda: 1)
        self.tracker = RequestTracker(write_log=False, usage=self.book)

    def begin(self, prompt: int, output: int, default: int = 0, of_month: bool = True) -> RequestContext:
        lease = Lease(self.capacity, self.usage)
        lease.enter()
        demand = Demand(
            1, 1, of_month=of_month, prompt_tokens=prompt, output_tokens=output, default_tokens=default
        )
        try:
            lease.charge(demand)
        except ApiError:
            lease.close()
            raise
        context = RequestContext("/v1/chat/completions", "", lease)
        self.tracker.open(context)
        return context

    def end(self, context: RequestContext, prompt: int, generated: int) -> None:
        self.tracker.engine_finished(f"chatcmpl-{context.id}", prompt, generated, prompt // 2)
        context.status, context.outcome = 200, "ok"
        context.lease.close()
        self.tracker.close(context)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "u")


def refused(begin: Callable[[], RequestContext]) -> ApiError:
    with pytest.raises(ApiError) as raised:
        begin()
    assert raised.value.status == 429
    return raised.value


async def test_a_request_beyond_the_quota_is_refused_until_the_month_ends(bench: Bench) -> None:
    bench.end(bench.begin(100, 500), 120, 500)
    assert bench.book.used("a") == Counts(1, 120, 500, 60)
    error = refused(lambda: bench.begin(100, 300))
    assert (error.code, error.reason, error.headers["x-should-retry"]) == (
        "insufficient_quota",
        "key_month",
        "false",
    )
    assert error.headers["retry-after"] == "3600"
    assert error.message == (
        "the key 'a' has used 620 of its 1000 tokens for 2026-11; this request asks for 400; the quota is renewed at "
        "2026-12-01T00:00:00Z"
    )
    assert json.loads(error.body())["error"]["type"] == "insufficient_quota"
    bench.end(bench.begin(80, 300), 80, 300)
    assert bench.book.used("a").tokens == QUOTA
    assert "asks for" not in refused(lambda: bench.begin(0, 0)).message  # nothing at all is left
    bench.begin(0, 0, of_month=False)  # what costs no tokens is not asked
    bench.now_s += 3600
    bench.end(bench.begin(100, 300), 100, 300)


async def test_running_requests_hold_what_they_may_use_and_give_back_the_rest(bench: Bench) -> None:
    running = bench.begin(100, 600)
    error = refused(lambda: bench.begin(100, 300))
    assert (error.code, error.headers["retry-after"]) == (None, "1")  # it may soon be free
    bench.end(running, 100, 10)
    bench.end(bench.begin(100, 300), 100, 300)


async def test_a_request_that_does_not_say_takes_what_is_left(bench: Bench) -> None:
    one = bench.begin(100, 0, default=5000)
    assert bench.usage.month_reserved == QUOTA
    refused(lambda: bench.begin(1, 0))
    bench.end(one, 100, 50)
    assert bench.usage.month_reserved == 0
    bench.begin(1, 0)


async def test_a_refused_request_holds_nothing(bench: Bench) -> None:
    refused(lambda: bench.begin(0, QUOTA + 1))
    assert (bench.usage.month_reserved, bench.usage.active, bench.capacity.places_taken) == (0, 0, 0)
    bench.begin(0, QUOTA)


async def test_a_key_without_a_quota_is_counted_and_never_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "u", quota=None)
    bench.end(bench.begin(10**9, 10**9), 10**9, 10**9)
    bench.end(bench.begin(10**9, 10**9), 10**9, 10**9)
    assert bench.book.used("a").requests == 2


def test_a_quota_needs_a_file_that_counts(tmp_path: Path) -> None:
    path = key_file(tmp_path / "k", {"name": "a", "tokens_per_month": 5})
    with pytest.raises(ConfigError, match=r"a has tokens_per_month, .* --usage-file"):
        KeyStore(path)
    store = KeyStore(path, counts_months=True)
    assert [key.name for key in store.with_quota] == ["a"]


def test_a_quota_that_comes_while_serving_without_a_file_leaves_the_old_keys(tmp_path: Path) -> None:
    now = [0.0]
    path = key_file(tmp_path / "k", {"name": "a"})
    store = KeyStore(path, lambda: now[0])
    key_file(path, {"name": "a", "tokens_per_month": 5}, {"name": "b"})
    now[0] = 10
    assert store.find("b-secret") is None
    assert store.find("a-secret") is not None


SIZES = st.tuples(st.integers(0, 400), st.integers(0, 700))


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(st.one_of(SIZES, st.integers(0, 9)), max_size=25))
def test_what_requests_state_never_adds_up_to_more_than_the_quota(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int] | int]
) -> None:
    """Requests begin and end in any order, each using at most what it stated: the month's sum stays within."""
    import asyncio

    async def run() -> None:
        bench = Bench(tmp_path_factory.mktemp("quota") / "u")
        running: list[tuple[RequestContext, int, int]] = []
        used = 0
        for step in steps:
            if isinstance(step, int):
                if running:
                    context, prompt, output = running.pop(step % len(running))
                    bench.end(context, prompt, output // (step + 1))
                    used += prompt + output // (step + 1)
                continue
            prompt, output = step
            held = sum(one[1] + one[2] for one in running)
            fits = used + held + max(1, prompt + output) <= QUOTA
            try:
                running.append((bench.begin(prompt, output), prompt, output))
                assert fits
            except ApiError:
                assert not fits
            assert bench.usage.month_reserved == sum(one[1] + one[2] for one in running)
        assert bench.book.used("a").tokens == used <= QUOTA

    asyncio.run(run())
