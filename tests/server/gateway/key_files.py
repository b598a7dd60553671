"""Key files whose keys are `NAME-secret`, or `SECRET-secret` where an entry says so."""

from pathlib import Path
from typing import Any

import yaml

from lowbit_server.gateway.keys import digest


def key_file(path: Path, *entries: dict[str, Any]) -> Path:
    keys = [_entry(**entry) for entry in entries]
    path.write_text(yaml.safe_dump({"keys": keys}))
    return path


def _entry(name: str, secret: str = "", **limits: Any) -> dict[str, Any]:
    return {"name": name, "sha256": digest(f"{secret or name}-secret"), **limits}
