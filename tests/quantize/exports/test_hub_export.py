"""`--to hub` against a stand-in for the hub: what the manifest vouches for arrives, byte for byte, in one commit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.quantize.exports.stand_in_hub import TOKEN, StandInHub, stand_in_hub
from tests.quantize.small_runs import CPU, recipe_with
from tests.tiny_models import write_tiny_model

from lowbit_core.manifest import MANIFEST_NAME, read_manifest
from lowbit_quantize.export.autogptq import AutoGptq
from lowbit_quantize.export.exporter import export
from lowbit_quantize.pipeline import quantize

RULE: dict[str, Any] = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
LOWBIT = "import sys; from lowbit_core.cli import main; sys.exit(main())"


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with stand_in_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    base = write_tiny_model(place / "base", "llama")
    quantize(str(base), recipe_with(RULE), place / "checkpoint", CPU)
    (place / "checkpoint" / "notes.txt").write_text("not of the checkpoint")
    export(place / "checkpoint", AutoGptq(), place / "autogptq")
    return place / "checkpoint"


def lowbit(
    hub: StandInHub, directory: Path, *flags: str, token: str | None = TOKEN, endpoint: str | None = None
) -> tuple[int, dict[str, Any], str]:
    """Status, the JSON line, and the last line of stderr, of a process: the library reads its settings once."""
    environment = {
        "HF_ENDPOINT": endpoint or hub.endpoint,
        "HF_HOME": str(directory.parent / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
    }
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", LOWBIT, "export", str(directory), "--to", "hub", *flags],
        capture_output=True,
        text=True,
        env={**ours, **environment},
    )
    said = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    return done.returncode, said, (done.stderr.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize("which", ["checkpoint", "autogptq"])
def test_every_file_of_the_manifest_arrives_byte_for_byte_in_one_commit(
    hub: StandInHub, checkpoint: Path, which: str
) -> None:
    directory = checkpoint.with_name(which)
    status, said, error = lowbit(hub, directory, "--repo", "someone/tiny", "--private")
    assert (status, said.get("uploaded")) == (0, True), error
    manifest = read_manifest(directory)
    assert manifest is not None
    arrived = hub.files["someone/tiny"]
    assert set(arrived) == {*manifest.files, MANIFEST_NAME} == set(said["files"])
    assert {"README.md", "config.json", "tokenizer.json"} <= set(arrived)
    for name, content in arrived.items():
        assert content == (directory / name).read_bytes()
    assert said["bytes"] == sum(map(len, arrived.values()))
    assert hub.commits == ["someone/tiny"]
    assert hub.private["someone/tiny"]
    assert said["commit"].startswith(f"{hub.endpoint}/someone/tiny/commit/")


def test_without_a_token_it_says_what_would_be_sent(hub: StandInHub, checkpoint: Path) -> None:
    status, said, _ = lowbit(hub, checkpoint, "--repo", "someone/tiny", token=None)
    assert (status, said["uploaded"], said["commit"], said["repo"]) == (0, False, None, "someone/tiny")
    assert said["files"]["config.json"] == (checkpoint / "config.json").stat().st_size
    assert "notes.txt" not in said["files"]
    assert said["endpoint"] == hub.endpoint
    assert hub.asked == []


def test_a_second_upload_of_the_same_checkpoint_is_another_commit(hub: StandInHub, checkpoint: Path) -> None:
    hub.add("someone/tiny", {".gitattributes": b"", "README.md": b"old"})
    status, _, error = lowbit(hub, checkpoint, "--repo", "someone/tiny")
    assert status == 0, error
    assert hub.files["someone/tiny"]["README.md"] == (checkpoint / "README.md").read_bytes()
    assert ".gitattributes" in hub.files["someone/tiny"]


@pytest.mark.parametrize(
    ("flags", "options", "says"),
    [
        ((), {}, "give --repo OWNER/NAME"),
        (("--repo", "tiny"), {}, "is not OWNER/NAME"),
        (("--repo", "some one/tiny"), {}, "alphanumeric"),
        (("--repo", "someone/tiny", "--out", "x"), {}, "--to hub writes none; leave it out"),
        (("--repo", "someone/tiny", "--mount", "/x"), {}, "--mount goes with --to triton"),
        (("--repo", "someone/tiny"), {"token": "hf_wrong"}, "the hub refuses this token (401)"),
        (("--repo", "strangers/tiny"), {}, "the hub refuses this token (403)"),
        (
            ("--repo", "someone/tiny"),
            {"endpoint": "http://127.0.0.1:9"},
            "is the hub reachable (HF_ENDPOINT)?",
        ),
        (("--repo", "someone/full"), {}, "full"),
        (("--repo", "someone/public", "--private"), {}, "is there and public"),
        (("--repo", "someone/other"), {}, "holds model.safetensors, which is not of this checkpoint"),
    ],
)
def test_what_cannot_be_sent_ends_in_one_line_and_no_commit(
    hub: StandInHub, checkpoint: Path, flags: tuple[str, ...], options: dict[str, str], says: str
) -> None:
    hub.add("someone/public")
    hub.add("someone/other", {"model.safetensors": b"x"})
    hub.full = "someone/full" in flags
    status, said, error = lowbit(hub, checkpoint, *flags, **options)
    assert status == 2
    assert says in error
    assert error.startswith("lowbit: error:")
    assert (said, hub.commits) == ({}, [])


def test_a_file_that_was_changed_is_not_sent(hub: StandInHub, checkpoint: Path, tmp_path: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    for name in (*manifest.files, MANIFEST_NAME):
        (tmp_path / "changed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "changed" / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "changed" / "config.json").write_text("{}")
    status, _, error = lowbit(hub, tmp_path / "changed", "--repo", "someone/tiny")
    assert status == 2
    assert "config.json" in error
    assert hub.asked == []
