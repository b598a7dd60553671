"""The committed results of benchmarks/scale say what benchmarks/README.md says, and hold what they claim."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "scale" / "results"


def test_the_readme_shows_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "benchmarks" / "scale" / "table.py"), run_name="__main__")
    text = (ROOT / "benchmarks" / "README.md").read_text()
    shown = text.split("<!-- scale/table.py -->")[1].split("<!-- end -->")[0]
    assert shown.strip() == capsys.readouterr().out.strip()


@pytest.mark.parametrize("method", ["rtn", "gptq"])  # GPTQ's covariances are the largest matrices of a run
def test_the_large_run_kept_its_bound_and_its_pace(method: str) -> None:
    runs = json.loads((RESULTS / f"{method}-44-layers.json").read_text())["runs"]
    assert max(run["base_bytes"] for run in runs) > 6e9
    for run in runs:
        assert run["method"].startswith(method)
        assert run["peak_rss_bytes"] < run["bound_bytes"]
        assert len(run["layer_cpu_s"]) == run["layers"]
    assert runs[-1]["growth"] < 1.15


def test_every_killed_run_ended_with_the_same_files() -> None:
    result = json.loads((RESULTS / "kills.json").read_text())
    assert len(result["runs"]) >= 20
    assert all(run["identical"] and run["went_on"] for run in result["runs"])
    assert {"unpack", "first layer", "between shard and record", "middle", "quality", "finish"} <= set(
        result["phases"]
    )
    assert (result["filled_disk"]["status"], result["filled_disk"]["identical"]) == (2, True)
