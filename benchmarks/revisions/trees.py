"""Two source trees of Lowbit side by side: each runs its own `lowbit`, whatever is installed in the environment."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
MAIN = "import sys; from lowbit_core.cli import main; sys.exit(main())"
# Runs one command line after another, each a JSON list in a line of stdin; answers with its status and last words.
MANY = """
import contextlib, io, json, sys
from lowbit_core.cli import main
for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = main(json.loads(line))
        except SystemExit as error:
            status = error.code
        except Exception as error:
            status = f"{type(error).__name__}: {error}"
    print(json.dumps([status, (said.getvalue().splitlines() or [""])[-1]]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: 0, or a status or an exception's text; and the last line that it said."""

    status: int | str
    said: str


@dataclass(frozen=True)
class Setting:
    """One `--set` under its old and its new name; recipes that hold the key `since` take the new one."""

    old: str
    new: str
    since: str = "modules"


SMALL = (
    Setting("weights.group_size=32", "modules.0.group_size=32"),
    Setting("calibration.sequences=8", "calibration.num_samples=8", "calibration.num_samples"),
    Setting(
        "calibration.sequence_tokens=128", "calibration.max_seq_length=128", "calibration.max_seq_length"
    ),
    Setting("quality.sequences=4", "quality.num_samples=4", "quality.num_samples"),
    Setting("quality.sequence_tokens=128", "quality.max_seq_length=128", "quality.max_seq_length"),
)


@dataclass(frozen=True)
class Tree:
    """A checkout, and the folder in which what `pip install` would register of it lies."""

    name: str
    root: Path
    revision: str
    metadata: Path

    @property
    def environment(self) -> dict[str, str]:
        """So that its packages and its commands come before those of any other installation."""
        folders = [
            self.root / folder for folder in _project(self.root)["tool"]["hatch"]["build"]["dev-mode-dirs"]
        ]
        path = os.pathsep.join(map(str, (self.metadata, *folders, self.root)))
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
        return {**os.environ, **quiet, "PYTHONPATH": path, "OMP_NUM_THREADS": str(os.cpu_count())}

    @property
    def recipes(self) -> list[str]:
        """Names of the recipes that it ships."""
        return sorted(path.stem for path in (self.root / "quantize" / "recipes").glob("*.yaml"))

    def spelled(self, settings: Sequence[Setting]) -> list[str]:
        """`--set KEY=VALUE` for each setting, under the names that its own recipes use."""
        return [word for setting in settings for word in ("--set", self._spelling(setting))]

    def _spelling(self, setting: Setting) -> str:
        section: Any = yaml.safe_load((self.root / "quantize" / "recipes" / "gptq-g64.yaml").read_text())
        for key in setting.since.split("."):
            if not isinstance(section, dict) or key not in section:
                return setting.old
            section = section[key]
        return setting.new

    def run(self, commands: Sequence[Sequence[str]]) -> list[Ended]:
        """Run `lowbit` with each command line, all in one process."""
        lines = "".join(json.dumps(list(command)) + "\n" for command in commands)
        done = subprocess.run(
            [sys.executable, "-c", MANY],
            input=lines,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.root,
            check=True,
        )
        return [Ended(*json.loads(line)) for line in done.stdout.splitlines()]

    def python(self, program: str, *arguments: str) -> None:
        """Run a Python program on this tree's packages."""
        command = [sys.executable, "-c", program, *arguments]
        subprocess.run(command, env=self.environment, cwd=self.root, check=True)

    def command(self, *arguments: str) -> list[str]:
        """The command line of `lowbit` in a process of its own, to be run with `environment`."""
        return [sys.executable, "-c", MAIN, *arguments]


def two_trees(old: str, work: Path) -> tuple[Tree, Tree]:
    """The tree of a revision, unpacked under `work`, and the working tree."""
    git = ["git", "-C", str(REPOSITORY)]
    commit = _said([*git, "rev-parse", f"{old}^{{commit}}"])
    changed = "+changes" if _said([*git, "status", "--porcelain"]) else ""
    unpacked = work / "old"
    unpacked.mkdir()
    archive = subprocess.Popen([*git, "archive", commit], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(unpacked)], stdin=archive.stdout, check=True)
    head = _said([*git, "rev-parse", "HEAD"])
    return (
        Tree("old", unpacked, commit, _registered(unpacked, work / "old-metadata")),
        Tree("new", REPOSITORY, f"{head}{changed}", _registered(REPOSITORY, work / "new-metadata")),
    )


def _registered(root: Path, folder: Path) -> Path:
    """What pip would write of a tree: its version and its entry points."""
    project = _project(root)["project"]
    information = folder / f"{project['name']}-{project['version']}.dist-info"
    information.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (information / "METADATA").write_text(head)
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{k} = {v}" for k, v in entries.items()))
    ]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def _project(root: Path) -> Mapping[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"same_bytes: {done.stderr.strip()}")
    return done.stdout.strip()
