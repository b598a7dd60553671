"""The steps of a checkpoint, as lines and as waterfalls."""

from pathlib import Path
from typing import Any

import pytest
from tests.core.test_checkpoint_page import EVIL, changed
from tests.page_checks import check_page

from lowbit_core.checkpoint_page.page import as_html
from lowbit_core.checkpoint_page.steps import ADDED, KEPT, TAKEN, waterfall
from lowbit_core.cli import main
from lowbit_core.manifest import read_manifest, write_manifest


def step(name: str, kld: float, mib: float, **fields: Any) -> dict[str, Any]:
    return {
        "step": name, "what": "W4A16", "mean_kld": kld, "kld_stderr": kld / 10, "bytes": int(mib * 2**20),
        "seconds": 12.4, "cpu_seconds": 20.0, **fields,
    }  # fmt: skip


STEPS = [
    step("quantize", 0.05, 200),
    step(
        "distill",
        0.02,
        200,
        kld_before=0.05,
        changed_bytes=12345,
        trained_parameters=9,
        curve=[(0, 0.05, None), (8, 0.02, 0.1)],
    ),
    step("quantize", 0.09, 60, kld_before=0.02),
    step("distill", 0.06, 60, kld_before=0.09, trained_parameters=7),
    step("quantize", 0.061, 50, kld_before=0.06),
]


def test_a_waterfall_adds_up_to_each_value() -> None:
    chart = waterfall("KL", ["a", "b", "c"], [0.05, 0.02, 0.09], 0.0, "nats")
    assert chart.spec is not None
    rows = chart.table.rows
    assert chart.table.columns[1:4] == [KEPT, ADDED, TAKEN]
    assert [[float(cell) for cell in row[1:4]] for row in rows] == [
        [0, 0.05, 0],
        [0.02, 0, 0.03],
        [0.02, 0.07, 0],
    ]


def test_the_page_and_the_lines_have_every_step_and_a_checkpoint_of_one_run_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = as_html(changed(steps=STEPS), "somewhere")
    check_page(page)
    assert "mean KL after each step" in page
    assert "bytes after each step" in page
    assert "won back 33% of the KL that it found" in page
    assert "12,345" in page
    assert "after each step" not in as_html(changed(), "somewhere")
    manifest = changed(steps=STEPS)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out
    for number in (1, 2, 3, 4, 5):
        assert f"{number}. " in lines
    assert "█" in lines


def test_no_name_of_a_step_is_markup() -> None:
    page = as_html(changed(steps=[step(EVIL, 0.1, 3, what=EVIL)]), "somewhere")
    check_page(page)
    assert "<script>alert(1)" not in page
