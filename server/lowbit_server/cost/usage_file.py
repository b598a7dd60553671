"""Tokens by API key and calendar month in one file that outlives the server, however it ends.

The file is SQLite's: a write is there whole or not at all, after a crash and a power cut too, and a server that writes
waits for one that does, so several on one machine may share a file. Their locks do not hold on network file systems.
While a server has it open, and after a kill, FILE-wal beside it holds the last writes: they belong together. Nothing
of a request is kept but four numbers.
"""

import contextlib
import re
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lowbit_core.errors import ConfigError

APPLICATION_ID = 0x6C62_7573  # "lbus", where SQLite's header has room for what a file is
FORMAT = 1
BUSY_S = 5.0  # how long a write waits for another server's
MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")
TABLE = """CREATE TABLE usage (
    month TEXT NOT NULL, key TEXT NOT NULL,
    requests INTEGER NOT NULL, prompt INTEGER NOT NULL, completion INTEGER NOT NULL, cached INTEGER NOT NULL,
    PRIMARY KEY (month, key)) WITHOUT ROWID"""
ADD = """INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (month, key) DO UPDATE SET
    requests = requests + excluded.requests, prompt = prompt + excluded.prompt,
    completion = completion + excluded.completion, cached = cached + excluded.cached"""


@dataclass(frozen=True)
class Counts:
    """Requests that the engine counted, and their tokens; `cached` are those of `prompt` found in the prefix cache."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.requests + other.requests,
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.cached + other.cached,
        )

    @property
    def tokens(self) -> int:
        """What a quota counts: all that was read and all that was written."""
        return self.prompt + self.completion


Rows = Mapping[tuple[str, str], Counts]  # by month and key


def month_of(now_s: float) -> str:
    """The calendar month in UTC of seconds since 1970, as `2026-11`."""
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m")


def next_month(now_s: float) -> datetime:
    """When the next calendar month begins, in UTC."""
    now = datetime.fromtimestamp(now_s, UTC)
    return datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)


class UsageFile:
    """The file, open. Calls block; sqlite3.Error where the disk or another server's lock forbids a write."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def add(self, rows: Rows, month: str) -> dict[str, Counts]:
        """Add counts, all or none of them, on the disk when this returns; what is then there of `month`, by key."""
        if not rows:
            return self._of(month)
        with _transaction(self._connection):
            values = (
                (month, key, one.requests, one.prompt, one.completion, one.cached)
                for (month, key), one in rows.items()
            )
            self._connection.executemany(ADD, values)
            return self._of(month)  # before the end: an error here must undo the addition

    def _of(self, month: str) -> dict[str, Counts]:
        return {key: counts for (_, key), counts in read_rows(self._connection, month).items()}

    def close(self) -> None:
        self._connection.close()


def open_usage_file(path: Path) -> UsageFile:
    """Open a usage file, or begin one; ConfigError where that is impossible or it is another kind of file."""
    try:
        connection = sqlite3.connect(path, BUSY_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = FULL")
        with _transaction(connection):
            if not _is_usage_file(connection, path):
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
                connection.execute(TABLE)
        connection.execute("PRAGMA journal_mode = WAL")  # a third of the CPU time for each write
    except sqlite3.Error as error:
        raise _unreadable(path, error) from None
    return UsageFile(connection)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A usage file to read, which a server may write meanwhile; ConfigError where there is none."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"usage file {path}: {error.strerror}; give the one of --usage-file") from None
    if not regular:
        raise ConfigError(f"usage file {path}: this is no file; give the one of --usage-file")
    try:
        # For writing where that is allowed: what a killed server began must be undone before anything can be read.
        connection = sqlite3.connect(path.absolute().as_uri() + "?mode=rw", BUSY_S, uri=True)
        with contextlib.closing(connection):
            if not _is_usage_file(connection, path):
                raise ConfigError(f"usage file {path}: it is empty; give the one of --usage-file")
            yield connection
    except sqlite3.Error as error:
        raise _unreadable(path, error) from None


def read_rows(connection: sqlite3.Connection, month: str | None = None) -> dict[tuple[str, str], Counts]:
    """The counts of one month or of all, by month and key, in their order."""
    query = "SELECT month, key, requests, prompt, completion, cached FROM usage"
    which, values = (" WHERE month = ?", (month,)) if month else ("", ())
    found = connection.execute(f"{query}{which} ORDER BY month, key", values)
    return {(row[0], row[1]): Counts(*row[2:]) for row in found}


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # some errors have ended it already
            connection.execute("ROLLBACK")
        raise


def _is_usage_file(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether it is one; False where nothing was written yet. ConfigError for anything else."""
    (application,), (version,), (objects,) = (
        connection.execute(query).fetchone()
        for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_schema")
    )
    if application == APPLICATION_ID and version == FORMAT:
        return True
    if application == APPLICATION_ID:
        raise ConfigError(
            f"usage file {path}: its format is {version}, this version reads {FORMAT}; update lowbit"
        )
    if objects or application:
        raise ConfigError(f"usage file {path}: this is another program's database; give another path")
    return False


def _unreadable(path: Path, error: sqlite3.Error) -> ConfigError:
    return ConfigError(
        f"usage file {path}: {error}; give a file of `lowbit serve --usage-file`, or a path in a directory that exists "
        "and may be written"
    )
