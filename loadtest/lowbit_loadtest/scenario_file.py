"""Reads scenarios: bundled name or YAML file, `--set` overrides, and errors that name the key."""

from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from lowbit_core.errors import ConfigError
from lowbit_core.strict_yaml import strict_load
from lowbit_loadtest.scenario import Scenario, Section


def bundled_scenarios() -> dict[str, Path]:
    """Scenarios that ship with Lowbit, by name."""
    package = Path(str(files("lowbit_loadtest")))
    folder = next(path for path in (package / "scenarios", package.parent / "scenarios") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def load_scenario(name_or_path: str, overrides: tuple[str, ...] = ()) -> Scenario:
    """Read a scenario and apply `key.path=value` overrides; paths in it are relative to its file."""
    bundled = bundled_scenarios()
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in bundled:
            raise ConfigError(
                f"scenario {name_or_path!r} is neither a .yaml file nor one of: {', '.join(bundled)}; "
                "write the file or pick one of these"
            )
        path = bundled[name_or_path]
    try:
        data = strict_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"scenario {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"scenario {path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"scenario {path} must be a mapping with the keys {', '.join(Scenario.model_fields)}"
        )
    _resolve_paths(data, path.parent)
    for override in overrides:
        _override(data, override)
    return parse_scenario(data, str(path))


def parse_scenario(data: dict[str, Any], origin: str) -> Scenario:
    """Validate scenario data; raises ConfigError naming the first wrong key and what is allowed."""
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        *parents, last = (str(part) for part in first["loc"] or ("",))
        if first["type"] == "extra_forbidden":
            path, section = _walk(tuple(parents))
            key, allowed = ".".join((*path, last)), ", ".join(section.model_fields)
            raise ConfigError(f"scenario {origin}: unknown key {key!r}; allowed here: {allowed}") from None
        key = ".".join(_walk((*parents, last))[0])
        given = f" = {first['input']!r}" if key and first["type"] != "missing" else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"scenario {origin}: {f'{key}{given}: ' if key else ''}{message}") from None


def _walk(location: tuple[str, ...]) -> tuple[list[str], type[BaseModel]]:
    """The location as the file writes it, without the tags of unions, and the section that it leads to."""
    path: list[str] = []
    section: type[BaseModel] = Scenario
    choices: list[type[BaseModel]] = []
    for part in location:
        tagged = [one for one in choices if part in _kinds(one)]
        if tagged and part not in section.model_fields:
            section = tagged[0]
            continue
        path.append(part)
        if part in section.model_fields:
            choices = _sections_in(section.model_fields[part].annotation)
            section = choices[0] if choices else section
    return path, section


def _kinds(section: type[BaseModel]) -> tuple[str, ...]:
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    for name in ("arrivals", "prompts"):
        section = data.get(name)
        if isinstance(section, dict) and isinstance(section.get("path"), str):
            section["path"] = str(folder / section["path"])  # an absolute path stays as it is
    resolve_quality_paths(data.get("quality"), folder)


def resolve_quality_paths(quality: Any, folder: Path) -> None:
    """Make the paths in a section `quality` relative to the file's folder."""
    for key in ("tasks_dir", "own", "text"):
        if isinstance(quality, dict) and isinstance(quality.get(key), str):
            quality[key] = str(folder / quality[key])


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not key=value; example: --set arrivals.rate_rps=4")
    *parents, leaf = key.split(".")
    section = data
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        section[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error
