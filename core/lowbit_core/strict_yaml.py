"""YAML in which a key may stand only once: what a person wrote twice, one of the two is a mistake.

Digits with colons between them (2:4) are text, as in YAML 1.2, and no number to the base of 60.
"""

import re
from typing import Any

import yaml


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


def _text_of_colons(loader: _StrictLoader, node: yaml.ScalarNode) -> Any:
    """A number, or the text of one that YAML 1.1 writes to the base of 60."""
    if SEXAGESIMAL.fullmatch(node.value):
        return loader.construct_yaml_str(node)
    integer = node.tag.endswith(":int")
    return loader.construct_yaml_int(node) if integer else loader.construct_yaml_float(node)


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _StrictLoader.add_constructor(_tag, _text_of_colons)


def strict_load(text: str) -> Any:
    """The document; raises yaml.YAMLError, whose text is one line with the place."""
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise yaml.YAMLError(f"{error.problem or error.context}{place}") from error
    except yaml.reader.ReaderError as error:
        raise yaml.YAMLError(f"it has the character {error.character!r}; save it as UTF-8 text") from error
    except (
        ValueError,
        OverflowError,
    ) as error:  # a date that no calendar has, a number of thousands of digits
        raise yaml.YAMLError(f"a value cannot be read; put it in quotes: {error}") from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
