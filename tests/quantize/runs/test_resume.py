"""A run that is stopped anywhere goes on and ends with the very files of one that was not; what changed is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantize.stoppable import Point, renaming, run
from tests.quantize.tiny_gguf import write_tiny_gguf
from tests.tiny_models import write_tiny_model

from lowbit_core.cli import main
from lowbit_core.errors import OutputError
from lowbit_core.manifest import MANIFEST_NAME, PROGRESS_NAME
from lowbit_core.manifest_files import file_sha256
from lowbit_quantize.run.directory import STATE, run_in
from lowbit_quantize.run.identity import WALK_VERSION, Identity

SMALL = (
    "calibration.num_samples=8",
    "calibration.max_seq_length=64",
    "quality.num_samples=4",
    "quality.max_seq_length=64",
)
RUN_FIGURES = ("created", "run")  # what differs between two runs of the same command
NOBODY = Identity(recipe={}, base={}, texts={})
IN_THE_MIDDLE = renaming("layer-00001.json")  # one layer is done; the second's shard is, its record is not


def command(model: Path, out: Path, *more: str, recipe: str = "gptq-g64") -> list[str]:
    sets = [part for override in SMALL for part in ("--set", override)]
    return ["quantize", "--model", str(model), "--recipe", recipe, "--out", str(out), *sets, *more]


def contents(out: Path) -> dict[str, Any]:
    """Everything in a finished checkpoint, the manifest without what each run has of its own."""
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    files = {path.name: file_sha256(path) for path in out.iterdir() if path.name != MANIFEST_NAME}
    return files | {"manifest": {key: value for key, value in manifest.items() if key not in RUN_FIGURES}}


def snapshot(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): file_sha256(path) for path in files}


def stopped(model: Path, out: Path, *more: str, at: Point = IN_THE_MIDDLE) -> list[str]:
    """A run that was killed; returns its command."""
    arguments = command(model, out, *more)
    assert run(arguments, out.parent / "log", kill_at=at)[0] == -9
    return arguments


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that is refused with status 2 and changes nothing in its output directory."""
    out = Path(arguments[arguments.index("--out") + 1])
    before = snapshot(out)
    capsys.readouterr()
    assert main(arguments) == 2
    assert snapshot(out) == before
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_a_run_killed_while_the_shard_of_a_layer_with_experts_is_written_part_by_part_goes_on(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out, log = tiny_model("qwen3_moe"), tmp_path / "out", tmp_path / "log"
    assert run(command(model, tmp_path / "straight"), log)[0] == 0
    for point in (
        Point("open", "scratch/model-00002"),
        renaming("model-00002"),
        renaming("layer-00001.json"),
    ):
        assert run(command(model, out), log, kill_at=point)[0] == -9, point
    assert run(command(model, out), log)[0] == 0
    assert contents(out) == contents(tmp_path / "straight")


def test_a_run_killed_in_every_phase_ends_with_the_files_of_one_that_was_not(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out, log = tiny_model("llama"), tmp_path / "out", tmp_path / "log"
    assert run(command(model, tmp_path / "straight"), log)[0] == 0
    (out).mkdir()
    points = [
        renaming(PROGRESS_NAME),
        Point("open", "model-00001-of-00004"),  # the first shard is being written
        renaming("layer-00000.json"),
        renaming("streams-00001"),
        renaming("layer-00001.json"),
        renaming("quality.json"),
        renaming("model-00004-of-00004"),
        renaming(MANIFEST_NAME),
        Point("os.remove", PROGRESS_NAME),
    ]
    for point in points:
        assert run(command(model, out), log, kill_at=point)[0] == -9, point
        assert (out / MANIFEST_NAME).exists() == (point == points[-1])
    status, said = run(command(model, out), log)
    assert status == 0
    assert "nothing to do" in said
    assert contents(out) == contents(tmp_path / "straight")


def test_an_unpacked_base_is_kept_when_it_is_whole(tmp_path: Path) -> None:
    model, out, log = write_tiny_gguf(tmp_path / "model"), tmp_path / "out", tmp_path / "log"
    assert run(command(model, tmp_path / "straight"), log)[0] == 0
    for point in (
        Point("open", "scratch/base/model.safetensors.index.json"),
        renaming(f"{STATE}/base"),
        IN_THE_MIDDLE,
    ):
        status, said = run(command(model, out), log, kill_at=point)
        assert status == -9
        assert "unpacking tiny.gguf" in said
    status, said = run(command(model, out), log)
    assert status == 0
    assert "unpacking" not in said
    assert contents(out) == contents(tmp_path / "straight")


def test_finished_layers_are_not_done_again(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Not even where the recipe has come to be described in other words."""
    out = tmp_path / "out"
    arguments = stopped(tiny_model("llama"), out)
    first = out / "model-00001-of-00004.safetensors"
    written = first.stat().st_mtime_ns
    status, said = run([*arguments, "--set", "description=in other words"], tmp_path / "log")
    assert status == 0
    assert "going on after 1 of 3 layers" in said
    assert first.stat().st_mtime_ns == written


@pytest.mark.parametrize("family", ["llama", "gemma3n_text"])
def test_streams_in_files_change_nothing(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    model, out, log = tiny_model(family), tmp_path / "out", tmp_path / "log"
    assert run(command(model, tmp_path / "straight"), log)[0] == 0
    spilled = command(model, out, "--stream-memory-gib", "0")
    assert run(spilled, log, kill_at=IN_THE_MIDDLE)[0] == -9
    assert {path.stem for path in (out / STATE).rglob("*.stream")} >= {
        "calibration",
        "heldout",
        "heldout_base",
    }
    assert run(spilled, log)[0] == 0
    assert contents(out) == contents(tmp_path / "straight")


def test_an_unfinished_run_of_anything_else_is_refused_by_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_tiny_model(tmp_path / "model"), tmp_path / "out"
    text = tmp_path / "mine.txt"
    text.write_text("one way to say it, " * 200)
    same = ("--set", f"calibration.dataset={text}", "--set", "calibration.num_samples=1")
    arguments = stopped(model, out, *same)
    assert "recipe (modules.0.group_size 64, now 32)" in refusal(
        [*arguments, "--set", "modules.0.group_size=32"], capsys
    )
    text.write_text("another way to say it, " * 200)
    assert "calibration text; undo that" in refusal(arguments, capsys)
    text.write_text("one way to say it, " * 200)
    tensors = load_file(model / "model.safetensors")
    save_file({k: v * 2 for k, v in tensors.items()}, model / "model.safetensors", metadata={"format": "pt"})
    line = refusal(arguments, capsys)
    assert "model (model.safetensors)" in line
    assert "--overwrite" in line


def test_another_version_is_refused_by_name(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = stopped(tiny_model("llama"), out)
    record = json.loads((out / PROGRESS_NAME).read_text())
    record["versions"] |= {"lowbit": "0.0.9", "torch": "2.1.0"}
    (out / PROGRESS_NAME).write_text(json.dumps(record))
    line = refusal(arguments, capsys)
    assert "version (lowbit 0.0.9, now " in line
    assert "version (torch 2.1.0, now " in line
    (out / PROGRESS_NAME).write_text('{"format": "of the future"}')
    assert "another version of Lowbit" in refusal(arguments, capsys)


@pytest.mark.parametrize("begun", [None, WALK_VERSION - 1, WALK_VERSION + 1])
def test_a_run_of_code_with_other_numbers_is_not_gone_on_with(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: int | None
) -> None:
    """None: a run of the code that did not count yet; its layers' records have what they have today."""
    out = tmp_path / "out"
    arguments = stopped(tiny_model("llama"), out)
    record = json.loads((out / PROGRESS_NAME).read_text())
    assert record.pop("walk_version") == WALK_VERSION
    (out / PROGRESS_NAME).write_text(json.dumps(record | ({} if begun is None else {"walk_version": begun})))
    line = refusal(arguments, capsys)
    assert f"(walk version {begun or 0}, now {WALK_VERSION})" in line
    assert "--overwrite" in line


def test_overwrite_starts_over_whatever_was_there_and_what_is_not_ours_stays(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    stopped(tiny_model("qwen3_moe"), out)
    (out / "thesis.tex").write_text("years of work")
    (out / "model-00007-of-00009.safetensors").write_text("of a deeper model")
    overwrite = command(tiny_model("llama"), out, "--overwrite")
    assert run(overwrite, log)[0] == 0
    (out / "thesis.tex").unlink()
    assert run(command(tiny_model("llama"), tmp_path / "straight"), log)[0] == 0
    ours, other = contents(out), contents(tmp_path / "straight")
    assert ours["manifest"]["files"].pop("thesis.tex")
    assert ours == other
    written = (out / MANIFEST_NAME).stat().st_mtime_ns
    assert (
        run([*overwrite, "--set", "modules.0.scheme=W8A16"], log)[0] == 0
    )  # a finished one of another recipe, too
    assert (out / MANIFEST_NAME).stat().st_mtime_ns > written


@pytest.mark.parametrize("damaged", ["model-00001-of-00004.safetensors", "streams-00000.safetensors"])
def test_state_that_was_changed_is_not_gone_on_with(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    out = tmp_path / "out"
    arguments = stopped(tiny_model("llama"), out, at=renaming("model-00002-of-00004"))
    path = next(out.rglob(damaged))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert main(arguments) == 2
    assert "was changed after it was written; give --overwrite" in capsys.readouterr().err


def test_a_disk_that_fills_stops_the_run_which_goes_on_once_there_is_room(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """No file may grow beyond 128 KiB: enough for the layers, too little for the embedding's shard."""
    few = (
        "--set",
        "calibration.num_samples=1",
        "--set",
        "calibration.set_aside=0",
        "--set",
        "quality.num_samples=2",
        "--set",
        "quality.isolate=false",
    )
    arguments, log = command(tiny_model("llama"), tmp_path / "out", *few), tmp_path / "log"
    status, said = run(arguments, log, file_bytes=128 << 10)
    assert status == 2
    assert "File too large; 3 finished layers are kept: remove the cause and run" in said
    assert run(arguments, log)[0] == 0
    assert run(command(tiny_model("llama"), tmp_path / "straight", *few), log)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def write_sharded(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], None] = lambda _: None
) -> Path:
    """The tiny llama with a file for each layer; `change` is done to the last layer."""
    write_tiny_model(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for part in ("layers.0.", "layers.1.", "layers.2.", ""):
        mine = {name: tensors.pop(name) for name in list(tensors) if part in name}
        if part == "layers.2.":
            change(mine)
        file = f"model-{part.strip('.') or 'rest'}.safetensors"
        weight_map.update(dict.fromkeys(mine, file))
        save_file(mine, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_a_weight_that_is_no_number_stops_the_run_which_goes_on_when_its_file_is_whole(
    tmp_path: Path,
) -> None:
    """Layers that are finished have not read that file: replacing it changes nothing of theirs."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.nan

    model, good, log = tmp_path / "model", write_sharded(tmp_path / "good"), tmp_path / "log"
    write_sharded(model, spoil)
    status, said = run(command(model, tmp_path / "out"), log)
    assert status == 1
    assert "the weight model.layers.2.mlp.up_proj.weight in " in said
    assert "model-layers.2.safetensors holds values that are not finite; 2 finished layers are kept" in said
    (good / "model-layers.2.safetensors").replace(model / "model-layers.2.safetensors")
    status, said = run(command(model, tmp_path / "out"), log)
    assert status == 0
    assert "going on after 2 of 3 layers" in said
    assert run(command(model, tmp_path / "straight"), log)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_shard_that_cannot_be_read_is_named_and_the_run_goes_on_when_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_sharded(tmp_path / "model"), tmp_path / "out"
    arguments = stopped(model, out)
    shard = model / "model-layers.2.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    line = refusal(arguments, capsys)
    assert f"{shard} cannot be read" in line
    shard.write_bytes(whole)
    status, said = run(arguments, tmp_path / "log")
    assert status == 0
    assert "going on after 1 of 3 layers" in said


def test_two_runs_cannot_write_to_one_directory(tmp_path: Path) -> None:
    second = run_in(tmp_path / "out", NOBODY)
    with run_in(tmp_path / "out", NOBODY), pytest.raises(OutputError, match="being written by another run"):
        second.__enter__()
