"""The program `lowbit`: subcommands are entry points in the group `lowbit.commands`.

Core knows no subcommand by name and imports only the one that was asked for, so `lowbit serve` does not
pay for quantize's imports. An expected error becomes one line on stderr and the exit status of its class.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NoReturn

from lowbit_core import __version__
from lowbit_core.errors import ConfigError, LowbitError
from lowbit_core.log import configure_logging
from lowbit_core.names import did_you_mean, nearest

COMMAND_GROUP = "lowbit.commands"
OVERVIEW = {"version": "--version", "help": "--help"}  # what is asked without a command


@dataclass(frozen=True)
class Command:
    """One subcommand. `run` gets the parsed arguments and returns the exit status."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def file_path(text: str) -> Path:
    """The `type=` of every flag that is a path: a shell leaves `~` alone after `=`, and so does it in YAML."""
    return Path(os.path.expanduser(text))  # as a shell, it leaves ~nobody alone


class RenamedFlag(argparse.Action):
    """A flag of an older version: `add_argument("--old", action=RenamedFlag, now="--new")` refuses it by name."""

    def __init__(self, option_strings: Sequence[str], dest: str, now: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self._now = now

    def __call__(self, *_: Any) -> None:
        raise ConfigError(f"{self.option_strings[0]} is called {self._now} now")


class Parser(argparse.ArgumentParser):
    """Says in one line what it did not understand, before what is missing."""

    def error(self, message: str) -> NoReturn:
        """Argparse's own message, without the usage and without names of our functions."""
        message = re.sub(r"invalid (\w+) value", lambda name: f"invalid {_words(name[1])} value", message)
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` lists the flags")

    def read(self, args: Sequence[str]) -> argparse.Namespace:
        """As argparse does, but an unknown flag or word is named although a required one is missing too."""
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        parsed, unknown = self.parse_known_args(args)
        for action in required:
            action.required = True
        if unknown:
            missing = [action for action in required if getattr(parsed, action.dest, None) is None]
            raise ConfigError(
                f"{self.prog}: {unknown[0]!r} is not understood; {self._hint(unknown, missing)}"
            )
        return self.parse_args(args)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), names)
            raise argparse.ArgumentError(
                action, f"{value!r} is unknown; {hint}allowed are {', '.join(names)}"
            )

    def _hint(self, unknown: Sequence[str], missing: Sequence[argparse.Action]) -> str:
        """What to write instead of the first of `unknown`."""
        flag, _, value = unknown[0].partition("=")
        values = [value] if value else [one for one in unknown[1:2] if not one.startswith("-")]
        shown = "".join(f" {one}" for one in values)
        flags = [name for action in self._actions for name in action.option_strings]
        wanted = [action.option_strings[-1] for action in missing if action.option_strings]
        places = [str(action.metavar or action.dest) for action in self._actions if not action.option_strings]
        if not flag.startswith("-"):
            return f"did you mean {wanted[0]} {flag}?" if wanted else f"`{self.prog} --help` says what is"
        letter = flag.lstrip("-")[:1] if len(flag) == 2 else ""
        if near := next((one for one in [*wanted, *flags] if letter and one.startswith(f"--{letter}")), None):
            return f"did you mean {near}{shown}?"
        if near := nearest(flag, flags):
            return f"did you mean {near}{shown}?"
        place = f"{places[0]} is given without a flag: {self.prog} {places[0]}; " if places else ""
        return f"{place}`{self.prog} --help` lists the flags"


def _words(name: str) -> str:
    return name.strip("_").replace("_", " ")


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
    if not arguments or arguments[0].startswith("-"):
        if late := next((one for one in arguments if one in commands), None):
            raise ConfigError(
                f"{arguments[0]} stands before the command; write: lowbit {late} {arguments[0]} …"
            )
        _overview(commands).read(arguments or ["--help"])
        return 0
    name = arguments[0]
    if name not in commands:
        raise ConfigError(_unknown_command(name, arguments[1:], commands))
    command = load_command(commands[name])
    parser = Parser(prog=f"lowbit {name}", description=command.help)
    parser.add_argument("--log-level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    command.add_arguments(parser)
    parsed = parser.read(arguments[1:])
    configure_logging(parsed.log_level)
    return command.run(parsed)


def _unknown_command(name: str, rest: Sequence[str], commands: dict[str, EntryPoint]) -> str:
    hint = did_you_mean(name, commands)
    if name in OVERVIEW:
        subject = next((f"{one} " for one in rest if one in commands), "")
        hint = f"did you mean lowbit {subject}{OVERVIEW[name]}? "
    return f"unknown command {name!r}; {hint}commands are: {', '.join(sorted(commands))}"


def load_command(entry: EntryPoint) -> Command:
    """Import one subcommand."""
    command = entry.load()
    if not isinstance(command, Command):
        raise TypeError(f"entry point {entry.value} is not a lowbit_core.cli.Command")
    return command


def _overview(commands: dict[str, EntryPoint]) -> Parser:
    parser = Parser(prog="lowbit", description="Quantize, prove, serve and load-test language models.")
    parser.add_argument("--version", action="version", version=f"lowbit {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, entry in sorted(commands.items()):
        subparsers.add_parser(name, help=load_command(entry).help)
    return parser
