"""Tools compared row by row: a difference that no mean's own error shows."""

from typing import Any

import pytest
from benchmarks.quantizers.paired import difference, lines


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
