"""Results of `lowbit loadtest --json`."""

from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_core.evals.results import from_rows
from lowbit_loadtest.compare.side import (
    COMPLETED,
    FAILED,
    JOULES,
    OUTPUT_RATE,
    PRICE,
    REJECTED,
    At,
    Key,
    Load,
    Request,
    Side,
    counted,
)
from lowbit_loadtest.report.document import FORMAT_VERSION

TOOL = "lowbit loadtest"
KIND = "lowbit.loadtest"
UNCOMPARED = (
    "description",
    "model",
    "api_key_env",
    "generator",
    "timeout_s",
    "quality",
)  # keys that leave the load the same
LATENCY_COLUMNS = ("ttft_s", "ttfa_s", "tpot_s", "e2e_s")
SETTINGS = {"rate_rps": "requests/s", "concurrency": "streams"}
RATES = {OUTPUT_RATE: "output_tokens_per_s"}
COSTS = {JOULES: "joules_per_output_token", PRICE: "price_per_million_output_tokens"}

Document = dict[str, Any]


def reads(document: Any) -> bool:
    return isinstance(document, dict) and document.get("kind") == KIND


def read(document: Document, name: str, allow_invalid: bool = False) -> Side:
    """The result; ConfigError for another format, for stdout's short form and for a generator that fell behind."""
    if document.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{name} has format {document.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    if any("request_table" not in point for point in document["points"]):
        raise ConfigError(f"{name} has no requests; give the file that --json wrote, not stdout")
    if not document["valid"] and not allow_invalid:
        raise ConfigError(
            f"{name} is invalid ({'; '.join(document['invalid_because'])}); run it again on an idle machine, "
            "or give --allow-invalid"
        )
    interrupted = bool(document.get("interrupted"))
    return Side(
        tool=TOOL,
        loads=tuple(_load(point, document["scenario"], interrupted) for point in document["points"]),
        asked={key: value for key, value in document["scenario"].items() if key not in UNCOMPARED},
        answers=_answers(document, name),
        notes=("it was interrupted: its last requests are cut off",) if interrupted else (),
    )


def _load(point: Document, scenario: Document, interrupted: bool) -> Load:
    requests = _requests(point["request_table"])
    rates, costs = point.get("repetition_rates", []), (point.get("cost") or {}).get("repetitions", [])
    by_repetition = _known(rates, RATES) | _known(costs, COSTS)
    not_sent = 0 if interrupted else point.get("not_sent", 0)
    return Load(_at(point, scenario), counted(requests, not_sent), requests, per_repetition=by_repetition)


def _known(rows: list[Document], names: dict[str, str]) -> dict[str, tuple[float, ...]]:
    """One number a repetition, where each has it."""
    return {
        metric: tuple(row[name] for row in rows)
        for metric, name in names.items()
        if rows and all(row.get(name) is not None for row in rows)
    }


def _at(point: Document, scenario: Document) -> At:
    """What a sweep set, with the rate and the streams under the names that every tool's have here."""
    if setting := point.get("setting"):
        return tuple(
            (SETTINGS.get(name, name.replace("_", " ")), float(value)) for name, value in setting.items()
        )
    if point["offered_rps"] is not None:
        return (("requests/s", point["offered_rps"]),)
    streams = (scenario.get("arrivals") or {}).get("concurrency")
    return (("streams", float(streams)),) if streams is not None else ()


def _requests(table: Document) -> dict[Key, Request]:
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    return {
        (row["repetition"], row["index"], row["turn"]): Request.of(
            _outcome(row["outcome"]), **{name: row.get(name) for name in LATENCY_COLUMNS}
        )
        for row in rows
        if not row["warm_up"]
    }


def _outcome(name: str) -> str:
    """Cut off and timed out are failures too: no whole answer came."""
    return name if name in (COMPLETED, REJECTED) else FAILED


def _answers(document: Document, name: str) -> Any:
    try:
        return from_rows(((document.get("quality") or {}).get("answers") or {}).get("loaded", []))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name}: the answers in its quality section cannot be read: {error!r}") from error
