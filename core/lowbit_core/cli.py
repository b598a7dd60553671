"""The program `lowbit`: subcommands are entry points in the group `lowbit.commands`.

Core knows no subcommand by name and imports only the one that was asked for, so `lowbit serve` does not
pay for quantize's imports. An expected error becomes one line on stderr and the exit status of its class.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lowbit_core import __version__
from lowbit_core.errors import ConfigError, LowbitError
from lowbit_core.log import configure_logging

COMMAND_GROUP = "lowbit.commands"


@dataclass(frozen=True)
class Command:
    """One subcommand. `run` gets the parsed arguments and returns the exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class RenamedFlag(argparse.Action):
    """A flag of an older version: `add_argument("--old", action=RenamedFlag, now="--new")` refuses it by name."""

    def __init__(self, option_strings: Sequence[str], dest: str, now: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self._now = now

    def __call__(self, *_: Any) -> None:
        raise ConfigError(f"{self.option_strings[0]} is called {self._now} now")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lowbit`; returns the exit status (0 done, 1 failed, 2 input refused, 3 quality rejected)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {entry.name: entry for entry in entry_points(group=COMMAND_GROUP)}
    try:
        return _dispatch(arguments, commands)
    except LowbitError as error:
        sys.stderr.write(f"lowbit: error: {' '.join(str(error).split())}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("lowbit: interrupted\n")
        return 130
    except BrokenPipeError:  # whoever read our output has left; leave nothing to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str], commands: dict[str, EntryPoint]) -> int:
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is None or arguments[0].startswith("-"):
        _overview(commands).parse_args(arguments or ["--help"])
        return 0
    if name not in commands:
        raise ConfigError(f"unknown command {name!r}; commands are: {', '.join(sorted(commands))}")
    command = load_command(commands[name])
    parser = argparse.ArgumentParser(prog=f"lowbit {name}", description=command.help)
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    command.add_arguments(parser)
    parsed = parser.parse_args(arguments[1:])
    configure_logging(parsed.log_level)
    return command.run(parsed)


def load_command(entry: EntryPoint) -> Command:
    """Import one subcommand."""
    command = entry.load()
    if not isinstance(command, Command):
        raise TypeError(f"entry point {entry.value} is not a lowbit_core.cli.Command")
    return command


def _overview(commands: dict[str, EntryPoint]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lowbit", description="Quantize, prove, serve and load-test language models."
    )
    parser.add_argument("--version", action="version", version=f"lowbit {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, entry in sorted(commands.items()):
        subparsers.add_parser(name, help=load_command(entry).help)
    return parser
