"""The demo, run once as a user runs it, and its checkpoint, served once."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scripts.demo import ROOT, serving

from lowbit_core.server_process import free_port


@dataclass(frozen=True)
class Demo:
    """What `scripts/demo --json` reported and printed."""

    report: dict[str, Any]
    output: str

    @property
    def checkpoint(self) -> Path:
        return Path(self.report["checkpoint"])


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run `scripts/demo --json FILE`; it must end with status 0."""
    path = tmp_path_factory.mktemp("demo") / "out.json"
    command = [str(ROOT / "scripts" / "demo"), "--json", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Demo(json.loads(path.read_text()), done.stdout)


@pytest.fixture(scope="session")
def server(demo: Demo) -> Iterator[str]:
    """The URL of `lowbit serve` on the demo's checkpoint."""
    with serving(demo.checkpoint, free_port()) as url:
        yield url
