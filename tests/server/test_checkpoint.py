"""Checkpoint directories that may be served, and those that are refused before the engine starts."""

import json
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_core.errors import CheckpointError
from lowbit_core.manifest import FORMAT_VERSION, MANIFEST_NAME, PROGRESS_NAME
from lowbit_server.checkpoint import open_checkpoint
from lowbit_server.config import ServeConfig

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint


def test_rejected_checkpoint_is_refused_with_the_gates_reason(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint(accepted=False)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(ServeConfig(directory))
    assert str(raised.value) == (
        f"{directory} was rejected by its quality gate (mean KLD 0.0835 is above 0.05); "
        "quantize it again with a milder recipe, or give --allow-rejected (lowbit.json: gate)"
    )
    assert open_checkpoint(ServeConfig(directory, allow_rejected=True)).manifest is not None


def test_missing_file_is_refused(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: model\.safetensors is missing"):
        open_checkpoint(ServeConfig(directory))


def test_one_flipped_bit_is_refused_unless_hashes_are_skipped(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    path = directory / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        open_checkpoint(ServeConfig(directory))
    open_checkpoint(ServeConfig(directory, skip_hash_check=True))


def test_weight_file_that_the_manifest_does_not_list_is_refused(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    (directory / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(ServeConfig(directory))
    assert str(raised.value) == (
        f"{directory} holds extra.safetensors, which lowbit.json does not list: remove what was added"
    )


def test_unfinished_run_is_refused(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint()
    (directory / MANIFEST_NAME).rename(directory / PROGRESS_NAME)
    with pytest.raises(CheckpointError, match="unfinished run"):
        open_checkpoint(ServeConfig(directory))


def test_directory_without_manifest_opens_with_unknown_quality(make_checkpoint: "MakeCheckpoint") -> None:
    directory = make_checkpoint(manifest=False)
    checkpoint = open_checkpoint(ServeConfig(directory))
    assert checkpoint.manifest is None
    assert checkpoint.name == "tiny-w4a16"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": None}, "config.json: num_hidden_layers = None: allowed is a whole number"),
        ({"hidden_size": 0}, "config.json: hidden_size = 0: allowed is a number above 0"),
    ],
)
def test_config_without_a_shape_names_the_field(
    make_checkpoint: "MakeCheckpoint", config: dict[str, Any], message: str
) -> None:
    directory = make_checkpoint(config=config)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(ServeConfig(directory))
    assert str(raised.value) == message


def test_a_manifest_of_a_newer_major_version_is_refused_in_one_line(
    make_checkpoint: "MakeCheckpoint",
) -> None:
    directory = make_checkpoint()
    path = directory / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(CheckpointError, match="version") as raised:
        open_checkpoint(ServeConfig(directory))
    assert "\n" not in str(raised.value)
