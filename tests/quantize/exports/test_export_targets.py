"""The table of `lowbit export`: each row's class is there, and flags go with the targets that have them."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.quantize.exports.checkpoints import FOUR, checkpoint_of

from lowbit_core.cli import main
from lowbit_quantize.export.cli import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_a_row_names_a_class_of_its_name_that_takes_the_rows_flags(name: str) -> None:
    target = TARGETS[name]
    exporter = target.load()
    assert exporter.name == name
    takes = inspect.signature(exporter).parameters
    assert {flag[2:].replace("-", "_") for flag in target.flags} == set(takes)


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].flags])
def test_a_flag_of_another_target_is_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, settings in TARGETS[name].flags.items():
        value = () if settings.get("action") == "store_true" else (settings.get("choices", ("1",))[0],)
        out = tmp_path / "out"
        assert main(["export", "x", "--to", "modelopt", "--out", str(out), flag, *value]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{flag} goes with --to {name}" in line
        assert not out.exists()


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("four"), "llama", FOUR)


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"hub", "triton"}))  # one sends, one links
def test_a_full_disk_is_noticed_before_anything_is_written(
    name: str,
    four_bits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=1 << 40, used=0, free=1000))
    base = ("--base", str(four_bits.with_name("base"))) if "--base" in TARGETS[name].flags else ()
    assert main(["export", str(four_bits), "--to", name, "--out", str(tmp_path / "out"), *base]) == 2
    assert "its disk has 0 MiB free" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())
