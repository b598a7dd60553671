"""What a value may be, in words: one table for every kind of error that a pydantic model of ours can raise.

pydantic's own words are about Python's types ("a valid tuple", "an instance of KVCache"), which no document has.
"""

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

MOST_SHOWN = 80  # characters of a value
TEXT, NUMBER, WHOLE, LIST = "text", "a number", "a whole number", "a list"
ALLOWED = {  # by pydantic's name of the error; the fields are those of its context
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": WHOLE,
    "int_parsing": WHOLE,
    "int_parsing_size": "a whole number of fewer digits",
    "int_from_float": WHOLE,
    "float_type": NUMBER,
    "float_parsing": NUMBER,
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "{le} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "string_type": TEXT,
    "string_unicode": "text of whole characters, without half of a surrogate pair",
    "string_too_short": "text of {min_length} characters or more",
    "string_too_long": "text of {max_length} characters or fewer",
    "string_pattern_mismatch": "text that matches {pattern}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "none_required": "null",
    "tuple_type": LIST,
    "list_type": LIST,
    "set_type": LIST,
    "frozen_set_type": LIST,
    "too_short": "{min_length} or more of them",
    "too_long": "{max_length} or fewer of them",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "union_tag_not_found": "a mapping with the key {discriminator}",
    "union_tag_invalid": "{discriminator}: {expected_tags}",
}
OWN = ("value_error", "assertion_error")  # raised by our validators, in our words
OTHER = "another value; see the documentation of this key"


def allowed(error: ErrorDetails, annotation: Any = Any) -> str:
    """What may stand where this error is; `annotation` is the type of the place, whose keys a mapping has."""
    context = error.get("ctx", {})
    words = ALLOWED.get(error["type"], OTHER).format(**{key: _plain(one) for key, one in context.items()})
    if error["type"] in ("model_type", "model_attributes_type") and (keys := _keys(annotation)):
        return f"{words} with the keys {', '.join(keys)}"
    return words


def shown(value: Any) -> str:
    """A value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"


def _plain(value: Any) -> str:
    return str(value).replace("'", "").replace(" or ", ", ")


def _keys(annotation: Any) -> list[str]:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return next((keys for one in get_args(annotation) if (keys := _keys(one))), [])
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return list(annotation.model_fields) if is_section else []
