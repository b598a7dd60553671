"""The usage file: what is added is there, whoever adds it, and what is no such file is told apart."""

import json
import sqlite3
import subprocess
import sys
from argparse import ArgumentParser
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lowbit_core.errors import ConfigError
from lowbit_server.cost.usage_file import (
    Counts,
    UsageFile,
    month_of,
    next_month,
    open_usage_file,
    read_rows,
    reading,
)
from lowbit_server.usage_cli import command

WRITERS, TIMES = 4, 25
WRITER = """
import sys
from pathlib import Path
from lowbit_server.cost.usage_file import Counts, open_usage_file
file = open_usage_file(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    file.add({("2026-11", key): Counts(1, number, 2, 1) for key in ("a", sys.argv[3])}, "2026-11")
"""


def rows_of(path: Path) -> dict[tuple[str, str], Counts]:
    with reading(path) as connection:
        return read_rows(connection)


def test_servers_that_write_one_file_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    started = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(TIMES), f"only-{number}"])
        for number in range(WRITERS)
    ]
    assert [one.wait(60) for one in started] == [0] * WRITERS
    each = Counts(TIMES, sum(range(TIMES)), 2 * TIMES, TIMES)
    expected = {("2026-11", f"only-{number}"): each for number in range(WRITERS)}
    expected["2026-11", "a"] = sum([each] * WRITERS, Counts())
    assert rows_of(path) == expected


def test_an_addition_that_fails_half_way_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    file = open_usage_file(path)
    file.add({("2026-11", "a"): Counts(1, 10, 20, 5)}, "2026-11")
    too_large = Counts(1, 1 << 70, 0, 0)  # SQLite has no such integer
    with pytest.raises(OverflowError):
        file.add({("2026-11", "a"): Counts(1, 1, 1, 1), ("2026-11", "b"): too_large}, "2026-11")
    assert rows_of(path) == {("2026-11", "a"): Counts(1, 10, 20, 5)}
    assert file.add({("2026-12", "a"): Counts(1, 1, 1, 0)}, "2026-11") == {"a": Counts(1, 10, 20, 5)}


KILLED = """
import os, signal, sqlite3, sys
from lowbit_server.cost.usage_file import ADD
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # pages are written before the transaction ends
connection.execute(ADD, ("2026-11", "b", 1, 1, 1, 1))
connection.execute("BEGIN IMMEDIATE")
connection.executemany(ADD, (("2026-11", f"key-{number}", 1, 1, 1, 1) for number in range(5000)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_had_begun_to_write_is_not_there_for_a_reader_either(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    file = open_usage_file(path)
    file.add({("2026-11", "a"): Counts(1, 10, 20, 5)}, "2026-11")
    file.close()
    assert [one.name for one in tmp_path.iterdir()] == ["usage.db"]
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -9
    assert (tmp_path / "usage.db-wal").stat().st_size > 100_000  # half of it is there
    expected = {"a": Counts(1, 10, 20, 5), "b": Counts(1, 1, 1, 1)}
    assert rows_of(path) == {("2026-11", key): counts for key, counts in expected.items()}
    assert open_usage_file(path).add({}, "2026-11") == expected


def another_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (n INTEGER)")


def a_newer_one(path: Path) -> None:
    open_usage_file(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("keys:\n" * 100), "file is not a database"),
        (lambda path: path.mkdir(), "unable to open database file"),
        (another_database, "another program's database"),
        (a_newer_one, "its format is 99, this version reads 1"),
        (lambda path: path.symlink_to("nowhere/file"), "unable to open database file"),
    ],
)
def test_what_is_no_usage_file_is_refused_and_left_as_it_was(
    tmp_path: Path, make: object, words: str
) -> None:
    path = tmp_path / "u"
    assert callable(make)
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ConfigError, match=r"usage file .*/u: ") as raised:
        open_usage_file(path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize(
    ("now", "month", "renewed"),
    [
        ("2026-11-29T23:59:59", "2026-11", "2026-12-01T00:00:00"),
        ("2026-12-31T23:59:59", "2026-12", "2027-01-01T00:00:00"),
        ("2028-02-29T00:00:00", "2028-02", "2028-03-01T00:00:00"),
        ("2027-01-01T00:00:00", "2027-01", "2027-02-01T00:00:00"),
    ],
)
def test_months_are_calendar_months_in_utc(now: str, month: str, renewed: str) -> None:
    now_s = datetime.fromisoformat(now).replace(tzinfo=UTC).timestamp()
    assert month_of(now_s) == month
    assert next_month(now_s) == datetime.fromisoformat(renewed).replace(tzinfo=UTC)


def usage(*arguments: object) -> int:
    """`lowbit usage …`."""
    parser = ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(one) for one in arguments]))


def filled(path: Path) -> UsageFile:
    file = open_usage_file(path)
    rows = {("2026-10", "a"): Counts(3, 30, 300, 7), ("2026-11", "a"): Counts(1, 1000000, 2, 0)}
    file.add(rows | {("2026-11", "b"): Counts(2, 5, 6, 5)}, "2026-11")
    return file


def test_the_file_is_shown_by_month_and_key_while_a_server_has_it_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd name#?%20.db"
    filled(path)
    assert usage(path, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["month"], one["key"]) for one in lines] == [
        ("2026-10", "a"),
        ("2026-11", "a"),
        ("2026-11", "b"),
    ]
    assert lines[0] == {
        "month": "2026-10",
        "key": "a",
        "requests": 3,
        "prompt": 30,
        "completion": 300,
        "cached": 7,
    }
    assert usage(path, "--month", "2026-11", "--key", "a", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert Counter(json.loads(line))["prompt"] == 1000000
    assert usage(path, "--month", "2026-11") == 0
    shown = capsys.readouterr().out
    assert "1,000,000" in shown
    assert "2026-10" not in shown


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("none.db", [], "No such file or directory; give the one of --usage-file"),
        (".", [], "this is no file"),
        ("empty", [], "it is empty"),
        ("usage.db", ["--month", "November"], "--month is 'November'; give a month as 2026-11"),
    ],
)
def test_a_wrong_question_is_answered_in_one_line_and_makes_no_file(
    tmp_path: Path, name: str, flags: list[str], words: str
) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError) as raised:
        usage(tmp_path / name, *flags)
    assert words in str(raised.value)
    assert [one.name for one in tmp_path.iterdir()] == ["empty"]
