"""Reads what a person writes: recipes, scenarios and plans, in strict YAML with `--set` overrides.

Every document is checked by a pydantic model whose sections refuse unknown keys. An error is one line that names the
first wrong key with its path and says what is allowed. Knows nothing of what a document means.
"""

import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails

from lowbit_core.errors import ConfigError, LowbitError
from lowbit_core.names import did_you_mean
from lowbit_core.strict_yaml import strict_load
from lowbit_core.wrong_values import OWN, allowed, shown

SUFFIXES = (".yaml", ".yml")

Location = Sequence[int | str]


class Section(BaseModel):
    """A part of a document: unknown keys are refused, and nothing changes after it is read.

    Where a list is meant, one value stands for a list of one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        lists = {name for name, field in cls.model_fields.items() if _is_list(field.annotation)}
        return {
            key: [value] if key in lists and isinstance(value, str | int | float | dict) else value
            for key, value in data.items()
        }


M = TypeVar("M", bound=BaseModel)


class _Given(str):
    """A text from the command line, which paths tell from one in the file. Validated fields hold plain `str`."""


def document_path(is_path: Callable[[str, Path], bool] = lambda text, path: True) -> BeforeValidator:
    """Makes a relative path in a file relative to the file's folder; one from `--set` or a flag stays as it is.

    `is_path` gets the text and the path that it would become, where a key takes names too (`default`, `hub:…`).
    """

    def resolve(value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        folder = Path() if isinstance(value, _Given) else (info.context or {}).get("folder", Path())
        path = folder / os.path.expanduser(value)  # an absolute path stays as it is
        return str(path) if is_path(value, path) else str(value)

    return BeforeValidator(resolve)


DocumentPath = Annotated[str, document_path()]


def load_document(
    kind: str,
    name_or_path: str | Path,
    model: type[M],
    *,
    bundled: Mapping[str, Path],
    overrides: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
    error: type[LowbitError] = ConfigError,
) -> M:
    """Read a document by bundled name or `.yaml` path and apply `key.path=value` overrides.

    `kind` is what errors call it. `renamed` maps an old key (`weights.bits`; list items as `modules.*.bits`) to its
    new name. Raises `error`.
    """
    path = _find(kind, str(name_or_path), bundled, error)
    try:
        data = strict_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as failure:
        raise error(f"{kind} {path} cannot be read: {failure}") from failure
    except yaml.YAMLError as failure:
        raise error(f"{kind} {path} is not YAML: {failure}") from failure
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise error(f"{kind} {path} must be a mapping with the keys {', '.join(model.model_fields)}")
    for override in overrides:
        _override(data, override, error)
    return parse_document(
        kind, data, str(path), model, folder=path.parent, overrides=overrides, renamed=renamed, error=error
    )


def parse_document(
    kind: str,
    data: Mapping[str, Any],
    origin: str,
    model: type[M],
    *,
    folder: Path | None = None,
    overrides: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
    error: type[LowbitError] = ConfigError,
) -> M:
    """Validate a document's data; relative paths in it are relative to `folder`, or to the working directory.

    An error below a key that one of `overrides` gave is said of that override.
    """
    for key, pattern in _keys(data):
        if new := (renamed or {}).get(pattern):
            place = _origin(kind, origin, key, overrides)
            raise error(f"{place}: unknown key {key!r}; it is called '{new}' now")
    try:
        return model.model_validate(data, context={"folder": folder or Path()})
    except ValidationError as failure:
        key, words = _describe(failure, model)
        raise error(f"{_origin(kind, origin, key, overrides)}: {words}") from None


def describe_error(failure: ValidationError, model: type[BaseModel]) -> str:
    """The first unknown key, or else the first wrong value, with its path as the document writes it."""
    return _describe(failure, model)[1]


def _describe(failure: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """The path of the key, and the words."""
    errors = failure.errors()
    first: ErrorDetails = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    path, section, annotation = _locate(model, first["loc"])
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(path[-1], section.model_fields)
        return key, f"unknown key {key!r}; {hint}allowed here: {', '.join(section.model_fields)}"
    if first["type"] == "missing":
        return key, f"{key} is missing; give it"
    given = f"{key} = {shown(first['input'])}: " if key else ""
    if first["type"] in OWN:
        return key, f"{given}{first['msg'].partition(', ')[2]}"
    choices = [  # of a union: what each of its members allows
        allowed(one, place)
        for one in errors
        if (found := _locate(model, one["loc"]))[0] == path and (place := found[2]) is not None
    ]
    words = f"allowed is {' or '.join(dict.fromkeys(choices or [allowed(first, annotation)]))}"
    return key, f"{given or 'not a mapping: '}{words}"


def _origin(kind: str, origin: str, key: str, overrides: Sequence[str]) -> str:
    """What an error at `key` is said of: the last override of it or around it, or the document."""
    for override in reversed(overrides):
        changed = override.partition("=")[0]
        if f"{key}.".startswith(f"{changed}.") or f"{changed}.".startswith(f"{key}."):
            return f"--set {override!r}"
    return f"{kind} {origin}"


def _find(kind: str, name_or_path: str, bundled: Mapping[str, Path], error: type[LowbitError]) -> Path:
    path = Path(os.path.expanduser(name_or_path))
    names = ", ".join(bundled)
    if path.suffix not in SUFFIXES:
        if name_or_path in bundled:
            return bundled[name_or_path]
        hint = did_you_mean(name_or_path, bundled)
        choices = f"neither a .yaml file nor one of: {names}; {hint}write the file or pick one of these"
        raise error(f"{kind} {name_or_path!r} is {choices if bundled else 'not a .yaml file'}")
    if not path.is_file():
        hint = f"; bundled {kind}s are: {names}" if bundled else ""
        raise error(f"{kind} file {path} does not exist{hint}")
    return path


def _override(data: dict[str, Any], override: str, error: type[LowbitError]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise error(f"--set {override!r} is not key=value; example: --set section.key=4")
    try:
        value = _given(strict_load(text))
    except yaml.YAMLError as failure:
        raise error(f"--set {override!r}: the value is not YAML: {failure}") from failure
    place: Any = data
    *parents, leaf = parts = key.split(".")
    for depth, part in enumerate(parents, 1):
        if isinstance(place, dict) and part not in place:
            if parts[depth].isdecimal():
                raise error(f"--set {override!r}: the document has no list {part}; write its items there")
            place[part] = {}
        place = place[_item(place, part, override, error)]
        if not isinstance(place, dict | list):
            raise error(f"--set {override!r}: {part} is a value, not a section")
    place[_item(place, leaf, override, error)] = value


def _item(place: Any, part: str, override: str, error: type[LowbitError]) -> Any:
    """The key of a mapping, or the number of an existing item of a list."""
    if isinstance(place, dict):
        return part
    if not part.isdecimal() or int(part) >= len(place):
        raise error(f"--set {override!r}: {part!r} is none of the items 0 to {len(place) - 1} of the list")
    return int(part)


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_given(item) for item in value]
    return _Given(value) if isinstance(value, str) else value


def _keys(data: Any, key: str = "", pattern: str = "") -> Iterator[tuple[str, str]]:
    """Every key below `data` with its path, and that path with `*` for the numbers of items; inner keys first."""
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    for part, value in items:
        inner = (
            f"{key}.{part}".lstrip("."),
            f"{pattern}.{'*' if isinstance(data, list) else part}".lstrip("."),
        )
        yield from _keys(value, *inner)
        yield inner


def _locate(model: type[BaseModel], location: Location) -> tuple[list[str], type[BaseModel], Any]:
    """pydantic's location of an error as the document writes it, without what pydantic adds to it for unions; the
    innermost section on the way; and the type of the place."""
    path: list[str] = []
    section, rest = model, list(location)
    annotation: Any = model
    while rest:
        annotation, labelled = _choose(annotation, rest[0])
        if labelled:
            rest.pop(0)
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section, part = annotation, str(rest.pop(0))
            path.append(part)
            field = section.model_fields.get(part)
            annotation = field.annotation if field else Any
        else:  # an item of a list, a tuple or a mapping; or a label below something that holds no sections
            path.append(str(rest.pop(0)))
            annotation = next((one for one in reversed(get_args(annotation)) if one is not Ellipsis), Any)
    return path, section, annotation


def _is_list(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        members = [one for one in get_args(annotation) if one is not types.NoneType]
        return len(members) == 1 and _is_list(members[0])
    return get_origin(annotation) in (tuple, list)


def _choose(annotation: Any, label: int | str) -> tuple[Any, bool]:
    """The type that a location goes on in, and whether `label` named it as one member of a union."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    members = [one for one in get_args(annotation) if one is not types.NoneType]
    if len(members) == 1:
        return _choose(members[0], label)
    return next((one for one in members if _is_labelled(one, str(label))), Any), True


def _is_labelled(member: Any, label: str) -> bool:
    """Whether pydantic calls this member of a union so: by a tag, or by a class name such as `function-after[…]`."""
    metadata: tuple[Any, ...] = ()
    while get_origin(member) is Annotated:
        member, *more = get_args(member)
        metadata += tuple(more)
    if any(getattr(one, "tag", None) == label for one in metadata):
        return True
    if not (isinstance(member, type) and issubclass(member, BaseModel)):
        return False
    literals = [get_args(field.annotation) for field in member.model_fields.values()]
    return any(label in values for values in literals) or bool(re.search(rf"\b{member.__name__}\b", label))
