"""Text that is not Unicode: half of a surrogate pair, which JSON can write and no tokenizer can read.

A client that cuts text in the middle of an emoji sends one. Python's decoder lets it through, from an escape as from
bytes, and whatever encodes the string later fails, so it is refused here, with the name of its field.
"""

import json
import re
from typing import Any

from lowbit_server.gateway.openai_errors import ApiError

SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPES = ("\\ud", "\\uD")  # every escaped surrogate begins so, that of a whole pair too
FIELD_CHARACTERS = 200


def decoded(body: bytes) -> Any:
    """The JSON of a body, all of whose text is Unicode; raises ApiError 400."""
    encoding = json.detect_encoding(body)
    text, sound = _text(body, encoding)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request body is not JSON: {error}", "json", code="invalid_json") from None
    if not sound or any(escape in text for escape in ESCAPES):
        _refuse_broken(document)
    return document


def _text(body: bytes, encoding: str) -> tuple[str, bool]:
    """The body as text, and whether it is sound: bytes that are no character become surrogates, found by field."""
    try:
        return body.decode(encoding), True
    except UnicodeDecodeError:
        lenient = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
    try:
        return body.decode(encoding, lenient), False
    except UnicodeDecodeError as error:  # UTF-16 or UTF-32 cut in the middle of a character
        raise ApiError(400, f"the request body is not JSON: {error}", "json", code="invalid_json") from None


def _refuse_broken(document: Any) -> None:
    """Raise ApiError 400 for the first text that is not Unicode, by the name of its field."""
    stack: list[tuple[str, Any]] = [("", document)]
    while stack:
        field, value = stack.pop()
        if isinstance(value, str):
            if not value.isascii() and (found := SURROGATE.search(value)):
                raise _refusal(field, found)
        elif isinstance(value, dict):
            for key in value:
                if found := SURROGATE.search(key):
                    raise _refusal(f"a name in {field or 'the document'}", found)
            stack += reversed([(f"{field}.{key}".lstrip("."), one) for key, one in value.items()])
        elif isinstance(value, list):
            stack += reversed([(f"{field}.{i}".lstrip("."), one) for i, one in enumerate(value)])


def _refusal(field: str, found: re.Match[str]) -> ApiError:
    place = field[:FIELD_CHARACTERS]
    what = f"{found.group()!r} at character {found.start()}"
    message = f"{place} is not Unicode text: {what}; send whole characters (was an emoji cut in two?)"
    return ApiError(400, message, "unicode", code="invalid_unicode", param=place)
