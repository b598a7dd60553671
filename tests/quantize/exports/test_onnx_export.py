"""ONNX Runtime GenAI reads our codes, and computes what the checkpoint's own numbers make in float32."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from tests.quantize.exports.checkpoints import ASYMMETRIC, EIGHT, FOUR, checkpoint_of, float32_logits
from tests.quantize.small_runs import CPU, recipe_with
from tests.tiny_models import write_tiny_model

from lowbit_core.cli import main
from lowbit_core.errors import CheckpointError
from lowbit_core.manifest import read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_quantize.export import onnx
from lowbit_quantize.export.exporter import export
from lowbit_quantize.export.onnx import Activations, Onnx
from lowbit_quantize.pipeline import quantize

genai = pytest.importorskip("onnxruntime_genai")
IDS = [(37 * number) % 480 + 5 for number in range(96)]  # far enough for stretched positions to show
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def exported(checkpoint: Path, activations: Activations = "float32") -> Path:
    out = checkpoint.with_name("onnx")
    export(checkpoint, Onnx(activations), out)
    return out


def logits_of(directory: Path) -> Any:
    model = genai.Model(str(directory))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(IDS) + 1)
    generator = genai.Generator(model, params)
    generator.append_tokens(IDS)
    return np.asarray(generator.get_output("logits"))[0]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"mlp_bias": True, "head_dim": 64}),
        ("phi3", {"original_max_position_embeddings": 512, "partial_rotary_factor": 0.5}),
        ("phi3", {"original_max_position_embeddings": 512}),
    ],
)
def test_the_runtime_computes_with_the_checkpoints_numbers(
    family: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, family, FOUR, sizes=sizes)
    np.testing.assert_allclose(logits_of(exported(checkpoint)), float32_logits(checkpoint, IDS), atol=2e-3)


@pytest.mark.parametrize(
    "rules",
    [
        (EIGHT,),
        (ASYMMETRIC,),
        (FOUR, {"match": "*.mlp.*", **EIGHT}),
        ({**FOUR, "group_size": 32}, {"match": "*.o_proj", **ASYMMETRIC}),
    ],
)
def test_eight_bits_zero_points_and_mixes(rules: Any, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", *rules)
    np.testing.assert_allclose(logits_of(exported(checkpoint)), float32_logits(checkpoint, IDS), atol=2e-3)


def test_inputs_are_rounded_only_where_it_is_asked_for(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", FOUR, kv_cache={"dtype": "fp8"})
    out = exported(checkpoint, "int8")
    levels = {
        node.attributes["accuracy_level"].as_int()
        for node in onnx_ir.load(out / onnx.MODEL).graph
        if node.op_type == "MatMulNBits"
    }
    assert levels == {4}
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.export is not None
    assert manifest.export.left_out == ["scales of an FP8 KV cache"]
    verify_files(out, manifest, hashes=True)
    assert float(np.abs(logits_of(out) - float32_logits(checkpoint, IDS)).max()) < 1


@pytest.mark.parametrize("part", range(3))
def test_a_graph_with_other_numbers_is_refused(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one code, scale or zero point."""
    checkpoint = checkpoint_of(tmp_path, "llama", ASYMMETRIC)
    real = onnx._matmuls

    def changed(graph: Any) -> Any:
        found = real(graph)
        parts = [np.array(one) for one in found["0", "down_proj"]]
        parts[part].reshape(-1).view(np.uint8)[3] ^= 1
        return found | {("0", "down_proj"): parts}

    monkeypatch.setattr(onnx, "_matmuls", changed)
    with pytest.raises(CheckpointError, match="down_proj of layer 0 has other codes"):
        exported(checkpoint)
    assert not (tmp_path / "onnx").exists()


def test_what_ends_a_turn_is_in_its_configuration(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    quantize(str(base), recipe_with({"match": "*", **FOUR, "methods": ["rtn"]}), tmp_path / "checkpoint", CPU)
    model = json.loads((exported(tmp_path / "checkpoint") / "genai_config.json").read_text())["model"]
    assert model["eos_token_id"] == [0, 7]


@pytest.mark.parametrize(
    ("family", "rule", "said"),
    [
        ("llama", {"scheme": "W8A8"}, "MatMulNBits holds integers of 4 or 8 bits"),
        ("llama", {"scheme": "W4A16", "group_size": "channel"}, "in groups of 16, 32, 64, 128, 256, not"),
        ("qwen3_moe", FOUR, "not qwen3_moe"),
        ("olmo2", FOUR, "held against the checkpoint's own numbers for llama"),
        ("llama", {"match": "*.mlp.*", **FOUR}, "reads quantized linears only"),
        ("lfm2", FOUR, "not lfm2"),
    ],
)
def test_what_it_cannot_hold_is_one_line_and_nothing_is_written(
    family: str, rule: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = checkpoint_of(tmp_path, family, rule), tmp_path / "out"
    capsys.readouterr()
    assert main(["export", str(checkpoint), "--to", "onnx", "--out", str(out)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line
    assert not out.exists()


def test_the_builders_own_failure_is_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"builder of ONNX Runtime GenAI ended with status 1: .*Error"):
        onnx._build(tmp_path, tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mistral", {"sliding_window": 32}),
        ("phi3", {"original_max_position_embeddings": 512, "sliding_window": 32}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
    ],
)
def test_windows_on_which_its_graph_fails_are_refused(
    family: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, family, FOUR, sizes=sizes)
    with pytest.raises(CheckpointError, match="see a window of 32 tokens"):
        exported(checkpoint)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("positions", [LINEAR, LINEAR | {"rope_type": "yarn"}])
def test_positions_that_its_graph_would_have_wrong_are_refused(positions: Any, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", FOUR, sizes={"rope_parameters": positions})
    with pytest.raises(CheckpointError, match="not seen to compute positions right"):
        exported(checkpoint)
    assert not (tmp_path / "onnx").exists()
