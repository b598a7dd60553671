"""Several steps as one run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lowbit_core.errors import InputError, OutputError
from lowbit_core.manifest import read_manifest
from lowbit_recover.compose.compose import compose
from lowbit_recover.compose.steps_file import load_steps

CPU = torch.device("cpu")
QUALITY = {"num_samples": 4, "max_seq_length": 64, "isolate": False}
TEXTS = {"kv_cache": "none", "calibration": {"num_samples": 4, "max_seq_length": 64}, "quality": QUALITY}
TRAINED = {
    "data": "default", "tokens": 2048, "epochs": 2, "row_tokens": 64, "batch": 4, "set_aside": 4, "evaluate_every": 2,
    "top_k": 16, "precision": "float32",
}  # fmt: skip


def written(folder: Path, steps: object, quality: dict[str, object] | None = None) -> Path:
    """A file of steps, and beside it the recipes that it names."""
    prune = {**TEXTS, "passes": [{"prune_experts": {"prune_ratio": 0.5, "criterion": "reap"}}]}
    rule = {"match": "*", "scheme": "W4A16", "group_size": 32, "methods": ["rtn"]}
    (folder / "prune.yaml").write_text(yaml.safe_dump(prune))
    (folder / "round.yaml").write_text(
        yaml.safe_dump({**TEXTS, "modules": [rule], "quality": quality or QUALITY})
    )
    file = folder / "steps.yaml"
    file.write_text(yaml.safe_dump({"steps": steps}))
    return file


def test_prune_recover_quantize_recover_is_one_run_whose_manifest_has_every_step(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = str(tiny_model("qwen3_moe"))
    steps: list[dict[str, dict[str, Any]]] = [
        {"quantize": {"recipe": "prune.yaml"}},
        {"distill": {**TRAINED, "train": "weights", "learning_rate": 0.002}},
        {"quantize": {"recipe": "round.yaml"}},
        {"distill": {**TRAINED, "learning_rate": 0.005}},
    ]
    shorter = load_steps(written(tmp_path, steps[:3]))
    third, place = compose(base, shorter, tmp_path / "out", CPU)
    assert place == tmp_path / "out" / "3-quantize"
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    manifest, place = compose(base, load_steps(written(tmp_path, steps)), tmp_path / "out", CPU)
    assert all(
        path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()
    )  # goes on, begins nothing anew
    assert place == tmp_path / "out" / "4-distill"
    assert [one.step for one in manifest.steps] == ["quantize", "distill", "quantize", "distill"]
    assert manifest.steps[:3] == third.steps
    pruned, recovered, rounded, last = manifest.steps
    assert recovered.mean_kld < pruned.mean_kld
    assert rounded.bytes < recovered.bytes == pruned.bytes
    assert last.bytes == rounded.bytes
    assert last.mean_kld == manifest.quality.mean_kld < rounded.mean_kld
    first = read_manifest(tmp_path / "out" / "1-quantize")
    assert first is not None
    assert manifest.base.sha256 == first.base.sha256  # KL is to the model that was first
    assert manifest.size.base_bytes == first.size.base_bytes
    again, _ = compose(base, load_steps(written(tmp_path, steps)), tmp_path / "out", CPU)
    assert again == manifest
    steps[1]["distill"]["seed"] = 3
    with pytest.raises(OutputError, match="holds a composition of another model or of other steps"):
        compose(base, load_steps(written(tmp_path, steps)), tmp_path / "out", CPU)


def test_layers_width_recovery_4_bits_recovery_is_one_run_and_a_student_is_one_of_its_steps(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    passes = {
        "layers": {"drop_layers": {"count": 1, "criterion": "block-influence", "num_samples": 2}},
        "width": {"prune_width": {"mlp_channels": 128}},
    }
    for name, one in passes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**TEXTS, "passes": [one]}))
    steps = [
        {"quantize": {"recipe": "layers.yaml"}},
        {"quantize": {"recipe": "width.yaml"}},
        {"distill": {**TRAINED, "train": "weights", "learning_rate": 0.003}},
        {"quantize": {"recipe": "round.yaml"}},
        {"distill": {**TRAINED, "learning_rate": 0.005}},
    ]
    manifest, place = compose(
        str(tiny_model("llama")), load_steps(written(tmp_path, steps)), tmp_path / "out", CPU
    )
    kinds = [one.step for one in manifest.steps]
    assert kinds == ["quantize", "quantize", "distill", "quantize", "distill"]
    layers, width, student, rounded, last = manifest.steps
    assert layers.bytes > width.bytes == student.bytes > rounded.bytes == last.bytes
    assert student.mean_kld < width.mean_kld
    assert last.mean_kld <= rounded.mean_kld
    config = json.loads((place / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 128)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"distill": TRAINED}], "the first step is quantize"),
        ([{"quantize": {"recipe": "prune.yaml"}, "distill": TRAINED}], "a step is one of quantize, distill"),
        ([{"quantize": {"recipe": "nowhere"}}], "nowhere"),
        ([{"quantize": {"recipe": "prune.yaml"}}, {"distill": {**TRAINED, "epoch": 2}}], "epoch"),
        (
            [{"quantize": {"recipe": "prune.yaml"}}, {"distill": {**TRAINED, "tokens": "many"}}],
            "tokens: 'many'",
        ),
        (
            [{"quantize": {"recipe": "prune.yaml"}}, {"distill": {**TRAINED, "alpha": 3}}],
            "step 2, distill: --alpha 3",
        ),
        ([], "steps"),
    ],
)
def test_a_wrong_file_of_steps_is_refused_in_a_line_before_anything_runs(
    tmp_path: Path, steps: object, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        load_steps(written(tmp_path, steps))
    assert "\n" not in str(refused.value)


def test_steps_that_are_judged_on_different_texts_are_refused(tmp_path: Path) -> None:
    steps = [{"quantize": {"recipe": "prune.yaml"}}, {"quantize": {"recipe": "round.yaml"}}]
    with pytest.raises(InputError, match="step 2 is judged on another held-out text than step 1"):
        load_steps(written(tmp_path, steps, {**QUALITY, "seed": 5}))


def test_a_directory_with_something_else_is_left_alone(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.json").write_text(json.dumps(1))
    steps = load_steps(written(tmp_path, [{"quantize": {"recipe": "prune.yaml"}}]))
    with pytest.raises(OutputError, match="holds something else"):
        compose(str(tiny_model("qwen3_moe")), steps, tmp_path / "out", CPU)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["thesis.json"]
