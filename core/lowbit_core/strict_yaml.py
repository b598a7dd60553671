"""YAML in which a key may stand only once: what a person wrote twice, one of the two is a mistake."""

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
