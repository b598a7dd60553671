"""OpenVINO's own graph of our codes, and what it computes beside the checkpoint's own numbers in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.quantize.exports.checkpoints import ASYMMETRIC, EIGHT, FOUR, checkpoint_of, float32_logits

from lowbit_core.cli import main
from lowbit_core.errors import CheckpointError
from lowbit_core.manifest import read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_quantize.export import openvino as target
from lowbit_quantize.export.exporter import export
from lowbit_quantize.export.openvino import OpenVino

openvino = pytest.importorskip("openvino")
pytest.importorskip("openvino_genai")
IDS = [(37 * number) % 480 + 5 for number in range(96)]  # far enough for stretched positions to show
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PLAIN = {
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "INFERENCE_PRECISION_HINT": "f32",
}


def exported(checkpoint: Path) -> Path:
    out = checkpoint.with_name("openvino")
    export(checkpoint, OpenVino(), out)
    return out


def logits_of(directory: Path) -> Any:
    compiled = openvino.Core().compile_model(directory / target.GRAPH, "CPU", PLAIN)
    length = len(IDS)
    given = {
        "input_ids": np.array([IDS], np.int64),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    return next(iter(compiled.create_infer_request().infer(given).values()))[0]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen2", {"vocab_size": 576, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 128}),
    ],
)
def test_the_graph_computes_with_the_checkpoints_numbers(
    family: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, family, FOUR, sizes=sizes)
    out = exported(checkpoint)
    np.testing.assert_allclose(logits_of(out), float32_logits(checkpoint, IDS), atol=2e-2)
    manifest = read_manifest(out)
    assert manifest is not None
    verify_files(out, manifest, hashes=True)
    assert "quantization_config" not in (out / "config.json").read_text()


@pytest.mark.parametrize("rules", [(EIGHT,), (FOUR, {"match": "*.mlp.*", **EIGHT})])
def test_eight_bits_and_mixes(rules: Any, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", *rules)
    np.testing.assert_allclose(logits_of(exported(checkpoint)), float32_logits(checkpoint, IDS), atol=2e-2)


def test_a_graph_with_another_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, real = checkpoint_of(tmp_path, "llama", FOUR), target._unpacked

    def changed(constant: Any) -> Any:
        found = real(constant)
        found[0] ^= 1
        return found

    monkeypatch.setattr(target, "_unpacked", changed)
    with pytest.raises(CheckpointError, match=r"does not have the codes of model\.layers\.0"):
        exported(checkpoint)
    assert not (tmp_path / "openvino").exists()


@pytest.mark.parametrize(
    ("family", "rule", "said"),
    [
        ("gemma3_text", FOUR, "reads llama, mistral, qwen2, qwen3 from GGUF, not gemma3_text"),
        ("llama", ASYMMETRIC, "takes symmetric integers of 4 or 8 bits"),
        ("llama", {"scheme": "W8A8"}, "takes symmetric integers of 4 or 8 bits"),
    ],
)
def test_what_it_cannot_hold_is_one_line_and_nothing_is_written(
    family: str, rule: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = checkpoint_of(tmp_path, family, rule), tmp_path / "out"
    capsys.readouterr()
    assert main(["export", str(checkpoint), "--to", "openvino", "--out", str(out)]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("positions", [LINEAR, LLAMA3])
def test_positions_that_its_graph_would_have_wrong_are_refused(positions: Any, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", FOUR, sizes={"rope_parameters": positions})
    with pytest.raises(CheckpointError, match="as if they were not"):
        exported(checkpoint)
    assert not (tmp_path / "openvino").exists()
