"""`lowbit loadtest`: reads the flags, checks them, runs, reports.

The last line on stdout is one JSON object. Exit status 0: every request completed; 1: some did not;
2: wrong input, and nothing was sent.
"""

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowbit_core.cli import Command
from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_loadtest.client import Message
from lowbit_loadtest.report import as_json, lines, progress
from lowbit_loadtest.runner import Options, run_load_test

log = get_logger("loadtest")

API_KEY_VARIABLE = "LOWBIT_API_KEY"
DEFAULT_PROMPT = "Explain in a few paragraphs how a refrigerator moves heat from a cold place to a warm one."


class _ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str


class _PromptLine(BaseModel):
    """One line of a --prompts file: `{"prompt": "…"}` or `{"messages": [{"role": …, "content": …}]}`."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | None = Field(default=None, min_length=1)
    messages: list[_ChatMessage] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> "_PromptLine":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def chat(self) -> tuple[Message, ...]:
        if self.prompt is not None:
            return _user_turn(self.prompt)
        return tuple(message.model_dump() for message in self.messages or [])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; their defaults are those of `Options`."""
    parser.add_argument("--target", required=True, metavar="URL", type=_url, help="root URL of the server")
    parser.add_argument("--model", default=Options.model, help="default: the first that the server lists")
    parser.add_argument(
        "--concurrency", type=_at_least(1), default=Options.concurrency, help="streams in flight"
    )
    parser.add_argument(
        "--requests", type=_at_least(1), default=Options.requests, help="how many to send in all"
    )
    parser.add_argument(
        "--max-tokens", type=_at_least(1), default=Options.max_tokens, help="output limit of each"
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", metavar="TEXT", default=DEFAULT_PROMPT, help="one prompt for all requests"
    )
    prompts.add_argument(
        "--prompts", metavar="FILE.jsonl", type=Path, help="one prompt or messages object a line"
    )
    parser.add_argument("--temperature", type=_non_negative, default=Options.temperature)
    parser.add_argument(
        "--seed", type=_at_least(0), default=Options.seed, help="of the first request, then one more"
    )
    parser.add_argument(
        "--timeout-s", type=_positive, default=Options.timeout_s, help="deadline of each request"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the result here")
    parser.epilog = f"The API key is read from {API_KEY_VARIABLE}."


def run(arguments: argparse.Namespace) -> int:
    """Run one load test; returns the exit status."""
    options = _options(arguments)
    _check_writable(arguments.json)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    log.info("%d requests to %s, %d at a time", options.requests, options.target, options.concurrency)
    with progress(options.requests) as on_record:
        result = asyncio.run(run_load_test(options, on_record))
    for line in lines(result.summary):
        log.info(line)
    text = as_json(options, result, started) + "\n"
    if arguments.json is not None:
        arguments.json.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0 if result.summary.outcomes["completed"] == options.requests else 1


command = Command(
    help="Measure an OpenAI-compatible server: throughput, latency and how each request ended.",
    add_arguments=add_arguments,
    run=run,
)


def _options(arguments: argparse.Namespace) -> Options:
    if arguments.requests < arguments.concurrency:
        raise ConfigError(
            f"--requests {arguments.requests} is fewer than --concurrency {arguments.concurrency}; "
            "give several requests for each stream"
        )
    return Options(
        target=arguments.target,
        prompts=_read_prompts(arguments.prompts) if arguments.prompts else (_user_turn(arguments.prompt),),
        model=arguments.model,
        concurrency=arguments.concurrency,
        requests=arguments.requests,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        timeout_s=arguments.timeout_s,
        api_key=os.environ.get(API_KEY_VARIABLE),
    )


def _user_turn(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _read_prompts(path: Path) -> tuple[tuple[Message, ...], ...]:
    try:
        rows = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error}") from error
    prompts = tuple(_parse_prompt(path, number, row) for number, row in enumerate(rows, 1) if row.strip())
    if not prompts:
        raise ConfigError(f'--prompts {path} has no line; write one object a line: {{"prompt": "…"}}')
    return prompts


def _parse_prompt(path: Path, number: int, row: str) -> tuple[Message, ...]:
    try:
        return _PromptLine.model_validate_json(row).chat()
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "line"
        raise ConfigError(f"--prompts {path}, line {number}: {where}: {first['msg']}") from error


def _check_writable(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"--json {path} cannot be written: give a file in a directory that exists")


def _url(text: str) -> str:
    parts = urlsplit(text)
    with contextlib.suppress(ValueError):  # `port` raises on one that is no number
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query:
            return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a server's root URL such as http://127.0.0.1:8000")


def _at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return whole_number


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _non_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value
