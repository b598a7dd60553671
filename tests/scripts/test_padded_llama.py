"""A llama that is padded to multiples of 128 (benchmarks/quantizers/pad.py) computes what it did."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.tiny_models import write_tiny_model

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "quantizers"
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture
def pad(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))  # its neighbours, as when it is run
    return runpy.run_path(str(FOLDER / "pad.py"))


def test_predictions_stay_and_every_width_is_a_multiple(pad: dict[str, Any], tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama", **SIZES)  # type: ignore[arg-type]
    out = tmp_path / "out"
    pad["write"](base, out)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if "layers." in name]  # noqa: SIM118 (not a dict)
        widths = {width for name in names for width in file.get_slice(name).get_shape()}
    assert all(width % 128 == 0 for width in widths)
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 4 * SIZES["hidden_size"]
    found = pad["compared"](base, out, [[5, 9, 2, 7, 11, 3] * 8, [1, 30, 4, 6, 8, 20] * 8])
    assert found["mean_kl_nats"] < 1e-6  # a norm is multiplied by a half, which rounds nothing
    assert found["top1_agreement"] == 1


def test_queries_keep_their_keys(pad: dict[str, Any]) -> None:
    new = pad["padded"](pad["Widths"](576, 1536, 9, 3, 64))
    assert (new.hidden, new.middle, new.heads, new.key_heads) == (768, 1536, 12, 4)
    assert pad["padded"](new) == new


def test_what_is_no_llama_is_refused(pad: dict[str, Any], tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "qwen2")
    with pytest.raises(SystemExit, match="only llamas without biases are padded"):
        pad["write"](base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
