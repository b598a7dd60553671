"""Tools compared row by row: a difference that no mean's own error shows."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.quantizers.by_scheme import lines as by_scheme
from benchmarks.quantizers.paired import difference, lines
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "quantizers"


def run(tool: str, rows: list[float], family: str = "NVFP4") -> dict[str, Any]:
    quality = {"mean_kl_nats": sum(rows) / len(rows), "mean_kl_standard_error": 0.1, "kl_by_row": rows}
    case = {"tool": tool, "family": family, "label": f"{tool} GPTQ"}
    return {"case": case, "quality": quality, "output_bytes": 120e6, "cpu_s": 150.0}


def test_the_error_is_that_of_the_differences() -> None:
    mean, error = difference(run("lowbit", [0.1, 0.5, 0.9]), run("peer", [0.2, 0.6, 1.1]))
    assert mean == pytest.approx(-0.4 / 3)
    assert error == pytest.approx(0.1 / 3)


def test_each_of_ours_is_compared_with_the_lowest_peer_of_its_preset() -> None:
    runs = [
        run("lowbit", [0.1, 0.5, 0.9]),
        run("peer", [0.3, 0.7, 1.1]),
        run("other", [0.2, 0.6, 1.1]),
        run("lowbit", [0.1, 0.2, 0.3], "MXFP4"),
    ]
    _, _, ours, other, peer, alone = lines(runs)
    assert "-0.1333 ± 0.0333 (-4.0 errors)" in ours
    assert "other GPTQ" in other
    assert "peer GPTQ" in peer
    assert "errors" not in alone


def test_either_text_judges() -> None:
    ours, theirs = run("lowbit", [0.1, 0.5, 0.9]), run("peer", [0.3, 0.7, 1.1])
    ours["unseen"], theirs["unseen"] = theirs["quality"], ours["quality"]
    assert difference(ours, theirs)[0] == pytest.approx(-0.2)
    assert difference(ours, theirs, "unseen")[0] == pytest.approx(0.2)


def test_rows_of_different_texts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        difference(run("lowbit", [0.1, 0.5, 0.9]), run("peer", [0.2, 0.6]))


def test_each_scheme_has_a_row_with_what_each_method_lost_on_both_texts() -> None:
    def of(method: str, scheme: str, bits: float, kl: float) -> dict[str, Any]:
        found = run("lowbit", [kl, kl], scheme) | {"unseen": {"mean_kl_nats": 2 * kl}, "bits_a_weight": bits}
        return found | {"case": found["case"] | {"scheme": scheme, "method": method}}

    runs = [of("gptq", "W3A16", 3.25, 0.2), of("rtn", "NVFP4", 4.5, 0.3), of("gptq", "NVFP4", 4.5, 0.25)]
    _, _, first, second = by_scheme(runs)
    assert first == "| NVFP4 | lowbit | 4.50 | 120.0 MB | 0.3000, 0.6000 | – | 0.2500, 0.5000 |"
    assert second == "| W3A16 | lowbit | 3.25 | 120.0 MB | – | – | 0.2000, 0.4000 |"


def test_bits_count_codes_and_scales_of_what_is_quantized_alone(tmp_path: Path) -> None:
    base, checkpoint = tmp_path / "base", tmp_path / "checkpoint"
    plain = {"a.weight": torch.zeros(8, 64), "b.weight": torch.zeros(4, 4), "norm.weight": torch.zeros(64)}
    packed = {"a.weight_packed": torch.zeros(8, 32, dtype=torch.uint8)}
    scales = {"a.weight_scale": torch.zeros(8, 4, dtype=torch.float8_e4m3fn)}
    for place, tensors in ((base, plain), (checkpoint, packed | scales | {"b.weight": plain["b.weight"]})):
        place.mkdir()
        save_file(tensors, place / "model.safetensors")
    bits_a_weight = runpy.run_path(str(FOLDER / "headers.py"))["bits_a_weight"]
    assert bits_a_weight(checkpoint, base) == 4 + 8 / 16
