"""The book of the month: known at once, written every second, and never counted twice whatever the disk does."""

import asyncio
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.cost import usage_book
from lowbit_server.cost.usage_book import UsageBook
from lowbit_server.cost.usage_file import Counts, Rows, UsageFile, open_usage_file, read_rows, reading

NOVEMBER = datetime(2026, 11, 30, 23, 59, tzinfo=UTC).timestamp()
ONE = Counts(1, 10, 20, 4)


class Failing(UsageFile):
    """A usage file on a disk that fails when a test says so, before anything is written."""

    def __init__(self, path: Path) -> None:
        self._real, self.fails = open_usage_file(path), False

    def add(self, rows: Rows, month: str) -> dict[str, Counts]:
        if self.fails:
            raise sqlite3.OperationalError("disk I/O error")
        return self._real.add(rows, month)

    def close(self) -> None:
        self._real.close()


def rows_of(path: Path) -> dict[tuple[str, str], Counts]:
    with reading(path) as connection:
        return read_rows(connection)


async def test_what_is_counted_is_known_at_once_and_written_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "u"
    book = UsageBook(open_usage_file(path), lambda: NOVEMBER)
    async with book.kept():
        book.add("a", ONE)
        assert book.used("a") == ONE
        assert rows_of(path) == {}
        book.add("a", ONE)
    assert rows_of(path) == {("2026-11", "a"): ONE + ONE}
    again = UsageBook(open_usage_file(path), lambda: NOVEMBER)
    assert again.used("a") == ONE + ONE
    assert again.used("b") == Counts()


async def test_it_is_written_within_the_bound_that_is_stated(tmp_path: Path) -> None:
    path = tmp_path / "u"
    book = UsageBook(open_usage_file(path))
    async with book.kept():
        book.add("a", ONE)
        await asyncio.sleep(usage_book.WRITE_S + 0.5)
        assert list(rows_of(path).values()) == [ONE]


async def test_a_new_month_begins_at_zero_and_the_old_one_stays(tmp_path: Path) -> None:
    path, now = tmp_path / "u", [NOVEMBER]
    book = UsageBook(open_usage_file(path), lambda: now[0])
    book.add("a", ONE)
    await book.write()
    book.add("a", ONE)
    now[0] += 120
    assert (book.month, book.used("a")) == ("2026-12", Counts())
    book.add("a", ONE)
    assert book.used("a") == ONE
    await book.write()
    assert book.used("a") == ONE
    assert rows_of(path) == {("2026-11", "a"): ONE + ONE, ("2026-12", "a"): ONE}


async def test_another_servers_counts_are_seen_after_a_few_seconds(tmp_path: Path) -> None:
    path, now = tmp_path / "u", [NOVEMBER - 3600.0]
    one, two = (UsageBook(open_usage_file(path), lambda: now[0]) for _ in range(2))
    one.add("a", ONE)
    await one.write()
    assert two.used("a") == Counts()
    now[0] += usage_book.READ_S
    await two.write()
    assert two.used("a") == ONE


async def test_a_disk_that_fails_is_said_once_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "u"
    file = Failing(path)
    book = UsageBook(file, lambda: NOVEMBER)
    file.fails = True
    for _ in range(3):
        book.add("a", ONE)
        await book.write()
    assert (book.failures, book.used("a")) == (3, ONE + ONE + ONE)
    assert caplog.text.count("disk I/O error") == 1
    file.fails = False
    await book.write()
    assert rows_of(path) == {("2026-11", "a"): ONE + ONE + ONE}


STEPS = st.lists(
    st.sampled_from(["add a", "add b", "write", "fail", "mend", "month", "restart", "both"]), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_any_order_of_events_counts_each_request_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    """Against a plain dictionary: months that turn, a disk that fails, restarts, two writes at once."""
    path, now = tmp_path_factory.mktemp("book") / "u", [NOVEMBER]
    expected: dict[tuple[str, str], Counts] = {}

    async def run() -> None:
        file = Failing(path)
        book = UsageBook(file, lambda: now[0])
        for step in steps:
            name, _, key = step.partition(" ")
            if name == "add":
                book.add(key, ONE)
                expected[book.month, key] = expected.get((book.month, key), Counts()) + ONE
            elif name == "both":
                await asyncio.gather(book.write(), book.write())
            elif name == "month":
                now[0] += 31 * 86400
            elif name == "restart":
                file.fails = False
                await book.write()
                file.close()
                file = Failing(path)
                book = UsageBook(file, lambda: now[0])
            elif name == "write":
                await book.write()
            else:
                file.fails = name == "fail"
            for known in ("a", "b"):
                assert book.used(known) == expected.get((book.month, known), Counts())
        file.fails = False
        await book.write()
        assert rows_of(path) == expected

    asyncio.run(run())
