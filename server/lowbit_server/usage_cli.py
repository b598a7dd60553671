"""`lowbit usage FILE`: what each API key has used, by month, from the file of `lowbit serve --usage-file`."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError
from lowbit_server.cost.usage_file import MONTH, Counts, read_rows, reading

COLUMNS = ("requests", "prompt", "completion", "cached")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", type=file_path, help="the file of `lowbit serve --usage-file`"
    )
    parser.add_argument("--month", metavar="YYYY-MM", help="one month only, in UTC (all)")
    parser.add_argument("--key", metavar="NAME", help="one key only (all)")
    parser.add_argument("--json", action="store_true", help="one JSON line for each month and key")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.month is not None and not MONTH.fullmatch(arguments.month):
        raise ConfigError(f"--month is {arguments.month!r}; give a month as 2026-11")
    with reading(arguments.file) as connection:
        rows = read_rows(connection, arguments.month)
    shown = {place: one for place, one in rows.items() if arguments.key in (None, place[1])}
    if arguments.json:
        for (month, key), one in shown.items():
            sys.stdout.write(json.dumps({"month": month, "key": key, **asdict(one)}) + "\n")
    else:
        Console().print(_table(shown))
    return 0


def _table(rows: Mapping[tuple[str, str], Counts]) -> Table:
    table = Table(title="Tokens by month (UTC) and key; cached ones are part of the prompt's")
    for name in ("month", "key"):
        table.add_column(name)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for place, one in rows.items():
        table.add_row(*place, *(f"{getattr(one, name):,}" for name in COLUMNS))
    return table


command = Command(
    help="show the tokens that each API key has used, by month", add_arguments=_add_arguments, run=_run
)
