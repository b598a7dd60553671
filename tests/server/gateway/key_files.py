"""Key files whose keys are `NAME-secret`."""

from pathlib import Path
from typing import Any

import yaml

from lowbit_server.gateway.keys import digest


def key_file(path: Path, *entries: dict[str, Any]) -> Path:
    keys = [{**entry, "sha256": digest(entry["name"] + "-secret")} for entry in entries]
    path.write_text(yaml.safe_dump({"keys": keys}))
    return path
