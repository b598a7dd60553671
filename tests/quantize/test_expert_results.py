"""The committed picture of benchmarks/experts is that of its committed result."""

import runpy
import sys
from pathlib import Path

import pytest

EXPERTS = Path(__file__).resolve().parents[2] / "benchmarks" / "experts"


def test_the_picture_is_drawn_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "tiny-moe.json"
    result.write_text((EXPERTS / "results" / "tiny-moe.json").read_text())
    monkeypatch.setattr(sys, "argv", ["plot.py", str(result)])
    monkeypatch.syspath_prepend(EXPERTS)
    runpy.run_path(str(EXPERTS / "plot.py"), run_name="__main__")
    drawn = result.with_suffix(".svg").read_text()
    assert drawn == (EXPERTS / "results" / "tiny-moe.svg").read_text()
    assert drawn.count("<circle") == 8  # three widths of three shares, the base apart
