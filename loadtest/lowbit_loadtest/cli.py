"""`lowbit loadtest`: reads a scenario or flags, checks them, runs, reports.

The last line on stdout is one JSON object. Exit status 0: every request completed; 1: some did not, a scenario's
run is invalid, or quality fails under load; 2: wrong input, and nothing was sent; 130: interrupted, and what there was
is written.
"""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lowbit_core.cli import Command, file_path
from lowbit_core.errors import ConfigError
from lowbit_core.log import get_logger
from lowbit_loadtest.generate.part import WHOLE, parse_part
from lowbit_loadtest.generate.prompts import read_prompts
from lowbit_loadtest.generate.records import Outcome
from lowbit_loadtest.parts.file import part_section
from lowbit_loadtest.parts.merge import merge
from lowbit_loadtest.quality.run import Answers
from lowbit_loadtest.quality.verdict import base_answers
from lowbit_loadtest.report.csv_tables import write_csv
from lowbit_loadtest.report.document import as_document, record_lines
from lowbit_loadtest.report.page import as_html
from lowbit_loadtest.report.progress import progress
from lowbit_loadtest.report.result import Result
from lowbit_loadtest.report.text import lines
from lowbit_loadtest.runner import run_part
from lowbit_loadtest.scenario import Scenario, bundled_scenarios, load_scenario, parse_scenario
from lowbit_loadtest.sections.prompts import DEFAULT_PROMPT, FilePrompts
from lowbit_loadtest.target_flags import add_target_arguments, check_fits, target_of

log = get_logger("loadtest")

FLAGS: dict[str, Any] = {  # the default of each flag of the short form
    "concurrency": (4,), "requests": 32, "max_tokens": 128, "prompt": DEFAULT_PROMPT, "prompts": None,
    "temperature": 0.0, "timeout_s": 300.0,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A scenario, or the flags of a closed loop; flags that a scenario decides are None unless given."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="merge PART.json",
        help="join the --json of all parts of a plan (--part) into --out, as if one machine had sent it",
    )
    add_target_arguments(parser)
    parser.add_argument(
        "--scenario",
        metavar="NAME|FILE.yaml",
        help=f"bundled: {', '.join(bundled_scenarios())}; without it, the flags below make a closed loop",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a scenario's key"
    )
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--seed", type=_at_least(0), help="of arrivals, prompts and sampling")
    _add_parts(parser)
    _add_results(parser)
    _add_short_form(parser)
    parser.epilog = (
        "The API key is read from the environment variable LOWBIT_API_KEY, or the scenario's api_key_env."
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    """What is written, and what it is held against."""
    parser.add_argument(
        "--json",
        "--out",
        metavar="FILE",
        type=file_path,
        help="also write the result here, with its requests",
    )
    parser.add_argument(
        "--records", metavar="FILE.jsonl", type=file_path, help="write every request, chunk by chunk"
    )
    parser.add_argument("--html", metavar="FILE.html", type=file_path, help="write a page with charts")
    parser.add_argument(
        "--csv",
        metavar="FILE.csv",
        type=file_path,
        help="write a row for each rate, and a row for each request into FILE.requests.csv",
    )
    parser.add_argument(
        "--price-per-hour",
        metavar="PRICE",
        type=_positive,
        help="of the machine: gives the price of a million tokens",
    )
    parser.add_argument(
        "--quality-base",
        metavar="BASE.json",
        type=file_path,
        help="result of --json with quality, of the base model: count flips and estimate KL against it",
    )


def _add_parts(parser: argparse.ArgumentParser) -> None:
    """One plan sent from several machines."""
    parser.add_argument(
        "--part",
        metavar="I/N",
        type=parse_part,
        help="send the I-th of N parts of the plan, from 1/N to N/N; all with the same seed, and --json",
    )
    parser.add_argument(
        "--start-at", metavar="TIME", type=_moment, help="when to start, such as 2026-01-31T12:00:00Z"
    )


def _add_short_form(parser: argparse.ArgumentParser) -> None:
    """The flags of a closed loop; each is None unless given."""
    short = parser.add_argument_group("closed loop without a scenario")
    short.add_argument(
        "--concurrency",
        metavar="N[,N…]",
        type=_whole_numbers,
        help=f"streams in flight; several are measured one after the other ({FLAGS['concurrency'][0]})",
    )
    short.add_argument("--requests", type=_at_least(1), help=f"how many in all ({FLAGS['requests']})")
    short.add_argument(
        "--max-tokens", type=_at_least(1), help=f"output limit of each ({FLAGS['max_tokens']})"
    )
    prompts = short.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="one prompt for all requests")
    prompts.add_argument(
        "--prompts", metavar="FILE.jsonl", type=file_path, help="one prompt or messages object a line"
    )
    short.add_argument("--temperature", type=_non_negative, help="(0)")
    short.add_argument("--timeout-s", type=_positive, help="deadline of each request (300)")


def run(arguments: argparse.Namespace) -> int:
    """Run one load test, or join the parts of one; returns the exit status."""
    if arguments.words:
        return _merge(arguments)
    if arguments.target is None:
        raise ConfigError(
            "--target is missing; give the root URL of the server, such as http://127.0.0.1:8000"
        )
    scenario = _scenario(arguments)
    target = target_of(arguments, scenario.api_key_env)
    check_fits(scenario, target)
    if arguments.part is not None and arguments.json is None:
        raise ConfigError(
            f"--part {arguments.part} needs --json: the file is what lowbit loadtest merge joins"
        )
    _check_outputs(arguments)
    base = _quality_base(arguments.quality_base, scenario)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    log.info("%s: %s", target.shown, scenario.description or f"{scenario.arrivals.kind} arrivals")
    with progress() as on_run:
        ran = run_part(scenario, target, on_run, base, arguments.part or WHOLE, arguments.start_at)
    for line in lines(scenario, ran.result, arguments.price_per_hour):
        log.info(line)
    section = part_section(arguments.part, ran.measured) if arguments.part is not None else None
    _write(arguments, scenario, ran.result, started, section)
    return _exit_status(ran.result, arguments.scenario is not None)


def _merge(arguments: argparse.Namespace) -> int:
    """`lowbit loadtest merge PART.json …`"""
    word, *files = arguments.words
    if word != "merge":
        wanted = f"did you mean --target {word}?" if "://" in word else "the only one is merge PART.json …"
        raise ConfigError(f"lowbit loadtest: {word!r} is not understood; {wanted}")
    if given := [name for name in ("target", "scenario") if getattr(arguments, name) is not None]:
        raise ConfigError(f"merge sends nothing; leave out --{given[0]}")
    _check_outputs(arguments)
    if not files:
        raise ConfigError("merge: give the files of all parts, such as part-1.json part-2.json")
    scenario, result, started = merge([file_path(one) for one in files])
    for line in lines(scenario, result, arguments.price_per_hour):
        log.info(line)
    _write(arguments, scenario, result, started)
    return _exit_status(result, is_scenario=True)


def _write(
    arguments: argparse.Namespace,
    scenario: Scenario,
    result: Result,
    started: str,
    part: dict[str, Any] | None = None,
) -> None:
    price = arguments.price_per_hour
    whole = as_document(scenario, result, started, requests=True, price_per_hour=price)
    if arguments.json is not None:
        arguments.json.write_text(_dump({**whole, "part": part} if part else whole), encoding="utf-8")
    if arguments.html is not None:
        arguments.html.write_text(as_html(whole), encoding="utf-8")
    if arguments.csv is not None:
        write_csv(whole, arguments.csv)
    if arguments.records is not None:
        arguments.records.write_text("".join(line + "\n" for line in record_lines(result)), encoding="utf-8")
    sys.stdout.write(_dump(as_document(scenario, result, started, price_per_hour=price)))


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


def _exit_status(result: Result, is_scenario: bool) -> int:
    if result.interrupted:
        return 130
    whole = all(
        point.summary.outcomes[Outcome.COMPLETED] == point.summary.requests for point in result.points
    )
    believed = all(point.valid for point in result.points) or not is_scenario
    found = result.quality.right_answers if result.quality else None
    failed = found is not None and found.verdict == "fail"
    return 0 if whole and believed and not failed else 1


command = Command(
    help="Measure an OpenAI-compatible server: throughput, latency and how each request ended.",
    add_arguments=add_arguments,
    run=run,
)


def _scenario(arguments: argparse.Namespace) -> Scenario:
    """The scenario of a file, or the closed loop that the flags describe."""
    both = {"seed": arguments.seed, "model": arguments.model}
    overrides = [f"{name}={json.dumps(value)}" for name, value in both.items() if value is not None]
    if arguments.scenario is not None:
        given = [name for name in FLAGS if getattr(arguments, name) is not None]
        if given:
            flag = given[0].replace("_", "-")
            raise ConfigError(
                f"--{flag} and --scenario exclude each other; change the scenario's key with --set"
            )
        scenario = load_scenario(arguments.scenario, (*arguments.set, *overrides))
    else:
        if arguments.set:
            raise ConfigError("--set changes a key of a scenario; give --scenario too")
        scenario = _closed_loop(arguments)
    if isinstance(scenario.prompts, FilePrompts):
        read_prompts(scenario.prompts)  # refuse it before anything is sent
    return scenario


def _closed_loop(arguments: argparse.Namespace) -> Scenario:
    flags = {
        name: default if (given := getattr(arguments, name)) is None else given
        for name, default in FLAGS.items()
    }
    concurrency: tuple[int, ...] = flags["concurrency"]
    if flags["requests"] < max(concurrency):
        raise ConfigError(
            f"--requests {flags['requests']} is fewer than --concurrency {max(concurrency)}; "
            "give several requests for each stream"
        )
    text = {"kind": "text", "text": flags["prompt"]}
    data = {
        "arrivals": {"kind": "closed", "concurrency": concurrency[0]},
        "sweep": {"concurrency": concurrency} if len(concurrency) > 1 else None,
        "prompts": {"kind": "file", "path": str(flags["prompts"])} if flags["prompts"] else text,
        "output": {"tokens": flags["max_tokens"]},
        "requests": flags["requests"],
        "temperature": flags["temperature"],
        "timeout_s": flags["timeout_s"],
        "seed": arguments.seed or 0,
        "model": arguments.model,
    }
    return parse_scenario(data, "flags")


def _quality_base(path: Path | None, scenario: Scenario) -> Answers | None:
    if path is None:
        return None
    if scenario.quality is None:
        raise ConfigError("--quality-base needs a scenario with quality")
    try:
        return base_answers(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--quality-base {path} cannot be read: {error}") from error


def _check_outputs(arguments: argparse.Namespace) -> None:
    for name in ("json", "records", "html", "csv"):
        _check_writable(f"--{name}", getattr(arguments, name))


def _check_writable(flag: str, path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{flag} {path} cannot be written: give a file in a directory that exists")


def _at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return whole_number


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(_at_least(1)(one) for one in text.split(","))


def _moment(text: str) -> float:
    """Seconds since 1970; a time without a zone is UTC."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time such as 2026-01-31T12:00:00Z; a time without a zone is UTC"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


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
