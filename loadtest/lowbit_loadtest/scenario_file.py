"""Scenarios by bundled name, from YAML files, or from data."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowbit_core.documents import load_document, parse_document
from lowbit_loadtest.scenario import Scenario


def bundled_scenarios() -> dict[str, Path]:
    """Scenarios that ship with Lowbit, by name."""
    package = Path(str(files("lowbit_loadtest")))
    folder = next(path for path in (package / "scenarios", package.parent / "scenarios") if path.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def load_scenario(name_or_path: str, overrides: tuple[str, ...] = ()) -> Scenario:
    """Read a scenario by bundled name or path and apply `key.path=value` overrides; raises ConfigError."""
    return load_document("scenario", name_or_path, Scenario, bundled=bundled_scenarios(), overrides=overrides)


def parse_scenario(data: Mapping[str, Any], origin: str) -> Scenario:
    """Validate scenario data; paths in it are relative to the working directory. Raises ConfigError."""
    return parse_document("scenario", data, origin, Scenario)
