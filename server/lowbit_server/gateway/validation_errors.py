"""The engine's list of validation errors as one line that names fields as the client wrote them.

A message may be one of several kinds, and the engine lists what is wrong with it as each of them: of a user's message
without content, nineteen errors. Kinds that the document's own `role` or `type` rules out are left out here.
"""

import ast
import re
from typing import Any

HEAD = re.compile(r"\d+ validation errors?(?::| for \w+)")
PYDANTIC = re.compile(
    r"^(\S+)\n  (.*?) \[type=(\w+)", re.MULTILINE
)  # its own words, where the engine passes them on
KIND = re.compile(
    r"[A-Z]\w*"
)  # a segment that names a class: no field of the API begins with a capital letter
TELLS_KIND = ("role", "type")
MOST_FIELDS = 3
RAISED = "Value error, "  # before the words of a check of the engine's own


def readable(message: str, param: str | None) -> tuple[str, str | None]:
    """Message and parameter of an error; what is no such list stays as it is."""
    head, *lines = message.split("\n")
    if not HEAD.fullmatch(head):
        return message, param
    found = [one for one in map(_error, lines) if one is not None]
    found += [dict(zip(("loc", "msg", "type"), one, strict=True)) for one in PYDANTIC.findall(message)]
    if not found:
        return message, param
    others = {_kind(one["loc"]) for one in found if _rules_out(one)}
    meant = [one for one in found if _kind(one["loc"]) not in others] or found
    fields: dict[str, list[str]] = {}
    for one in meant:
        said = fields.setdefault(_field(one["loc"]), [])
        if one["msg"] not in said:
            said.append(one["msg"])
    shown = list(fields)[:MOST_FIELDS]
    whole = shown[0] if found[0]["loc"].startswith("body.") else param  # pydantic's begin within a field
    return "; ".join(f"{field}: {', or '.join(fields[field])}" for field in shown), whole


def _error(line: str) -> dict[str, str] | None:
    """The texts in a dict as `repr` writes it; beside them it may hold exceptions, which are no literals."""
    try:
        found = ast.parse(line.strip(), mode="eval").body
    except (ValueError, SyntaxError):  # `...and 9 more errors`, or one that was cut
        return None
    if not isinstance(found, ast.Dict):
        return None
    texts = {
        str(key.value): value.value
        for key, value in zip(found.keys, found.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str)
    }
    return texts | {"msg": texts["msg"].removeprefix(RAISED)} if {"loc", "msg"} <= texts.keys() else None


def _kind(place: str) -> str:
    """The path up to the last class in it; empty where there is none."""
    parts = place.split(".")
    last = max((i for i, part in enumerate(parts) if KIND.fullmatch(part)), default=-1)
    return ".".join(parts[: last + 1])


def _rules_out(error: dict[str, Any]) -> bool:
    kind, _, name = error["loc"].rpartition(".")
    return error.get("type") == "literal_error" and name in TELLS_KIND and bool(kind) and _kind(kind) == kind


def _field(place: str) -> str:
    parts = [part for part in place.split(".") if not KIND.fullmatch(part)]
    return ".".join(parts).removeprefix("body.")
