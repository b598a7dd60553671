"""GPTQ's memory on a wide layer, where Hessians are the largest matrices of a run."""

import json
from pathlib import Path

from tests.quantize.stoppable import run
from tests.tiny_models import write_tiny_model

WIDE, NARROW = 4096, 192  # inputs of the last linear
HESSIAN_BYTES = 4 * WIDE**2
# 4.6 to 5.5 were seen over a narrow layer's run: the mean, two steps of its factor, one batch in float32, and what the
# library packs. Factors held as they were made took 9.3.
HESSIANS = 6
SMALL = ("calibration.num_samples=4", "quality.num_samples=2", "quality.isolate=false")


def peak_rss_bytes(directory: Path, width: int) -> int:
    """Of a whole run on a model of one layer."""
    model = write_tiny_model(directory / "model", intermediate_size=width, num_hidden_layers=1)
    command = ["quantize", "--model", str(model), "--recipe", "gptq-g64", "--out", str(directory / "out")]
    command += [part for setting in SMALL for part in ("--set", setting)]
    status, said = run(command, directory / "log")
    assert status == 0, said
    peak: int = json.loads(said.splitlines()[-1])["peak_rss_bytes"]
    return peak


def test_quantizing_a_wide_linear_takes_the_memory_of_few_hessians(tmp_path: Path) -> None:
    peaks = []
    for width in (NARROW, WIDE):
        (tmp_path / str(width)).mkdir()
        peaks.append(peak_rss_bytes(tmp_path / str(width), width))
    assert peaks[1] - peaks[0] < HESSIANS * HESSIAN_BYTES
