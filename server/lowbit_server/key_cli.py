"""`lowbit key NAME`: a fresh API key, shown once, and the entry for the key file that holds only its hash."""

import argparse
import sys

import yaml
from pydantic import ValidationError

from lowbit_core.cli import Command
from lowbit_core.errors import ConfigError
from lowbit_server.gateway.keys import Key, digest, new_key, refuse_reserved


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the key in metrics and logs")


def _run(arguments: argparse.Namespace) -> int:
    refuse_reserved(arguments.name)
    key = new_key()
    try:
        entry = Key(name=arguments.name, sha256=digest(key))
    except ValidationError:
        raise ConfigError(
            f"the key name {arguments.name!r} may hold letters, digits, '.', '_' and '-', 63 at most"
        ) from None
    sys.stderr.write(
        "Give this key to its user; it is shown only now. Below it, the entry for the key file:\n"
    )
    shown = yaml.safe_dump({"keys": [entry.model_dump(include={"name", "sha256"})]}, sort_keys=False)
    sys.stdout.write(f"# {key}\n{shown}")
    return 0


command = Command(help="make an API key and its entry for --api-keys", add_arguments=_add_arguments, run=_run)
