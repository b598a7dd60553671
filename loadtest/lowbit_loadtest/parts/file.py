"""What a part of a plan leaves in its `--json` for `lowbit loadtest merge`: every request in full, and what planned it.

Times count from the start of each run and are rounded to a microsecond. A record's fields that are times end with `_s`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowbit_core.errors import ConfigError
from lowbit_loadtest.generate.part import Part
from lowbit_loadtest.generate.records import Outcome, RequestRecord
from lowbit_loadtest.measured import Measured, Sent

_FIELDS = {one.name: one for one in dataclasses.fields(RequestRecord) if one.name != "text"}
_TIMES = frozenset(name for name in _FIELDS if name.endswith("_s"))


def part_section(part: Part, measured: tuple[Measured, ...]) -> dict[str, Any]:
    """The section `part` of a result."""
    points = [
        {
            "setting": dict(one.setting),
            "offered_rps": one.offered_rps,
            "repetitions": [_sent(parts[0]) for parts in one.repetitions],
        }
        for one in measured
    ]
    return {"number": part.number, "of": part.of, "points": points}


def read_part(section: Mapping[str, Any], origin: str) -> tuple[Part, list[Measured]]:
    """The part and its points; raises ConfigError where the section is not one that this version wrote."""
    try:
        points = [
            Measured(
                point["setting"],
                point["offered_rps"],
                tuple((_read_sent(one),) for one in point["repetitions"]),
            )
            for point in section["points"]
        ]
        return Part(int(section["number"]), int(section["of"])), points
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{origin}: its section part is not this version's ({type(error).__name__}: {error}); "
            "write it with lowbit loadtest --part"
        ) from None


def _sent(sent: Sent) -> dict[str, Any]:
    plain = {name: getattr(sent, name) for name in _PLAIN}
    return {
        **plain,
        "heartbeat_lags_s": [round(lag_s, 6) for lag_s in sent.heartbeat_lags_s],
        "samples": list(sent.samples),
        "sample_times_s": [round(time_s - sent.start_s, 6) for time_s in sent.sample_times_s],
        "records": [
            {name: _written(name, getattr(one, name), sent.start_s) for name in _FIELDS}
            for one in sent.records
        ],
    }


_PLAIN = (
    "started_unix_s", "plan", "planned", "concurrency", "length_s", "lost_workers", "interrupted",
)  # fmt: skip


def _read_sent(data: Mapping[str, Any]) -> Sent:
    records = tuple(
        RequestRecord(**{name: _read(name, one[name]) for name in _FIELDS}) for one in data["records"]
    )
    plain = {name: data[name] for name in _PLAIN}
    lists: dict[str, Any] = {
        name: tuple(data[name]) for name in ("heartbeat_lags_s", "samples", "sample_times_s")
    }
    return Sent(records=records, start_s=0.0, **lists, **plain)


def _written(name: str, value: Any, start_s: float) -> Any:
    if name not in _TIMES or value is None:
        return value
    if isinstance(value, tuple):
        return [round(time_s - start_s, 6) for time_s in value]
    return round(value - start_s, 6)


def _read(name: str, value: Any) -> Any:
    if name == "outcome":
        return Outcome(value)
    return tuple(value) if isinstance(value, list) else value
