"""What lies beside the weights goes along, or is named as left out; keys that hold no more are gone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.quantize.edited_bases import QUICK, edited, quick_run
from tests.quantize.small_runs import CPU, PLAIN_CACHE, PLAIN_WEIGHTS, recipe_of
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit_core.errors import CheckpointError, ModelError
from lowbit_core.manifest import read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.run.companions import companions

TinyModel = Callable[[str], Path]
BESIDE = {
    "LICENSE": "of the base", "preprocessor_config.json": "{}", "1_Pooling/config.json": '{"pooling_mode": "mean"}',
    "modules.json": '[{"path": ""}, {"path": "2_Dense"}]', "2_Dense/model.safetensors": "a small weight",
    "chat_templates/tools.jinja": "{{ tools }}", "unknown.thing": "kept",
}  # fmt: skip
USELESS = {
    "pytorch_model.bin": "weights in another form", "original/consolidated.00.pth": "the model in another format",
    "optimizer.pt": "state of a training", "trainer_state.json": "state of a training",
    "model-Q4_K_M.gguf": "weights in another form", "onnx/model.onnx": "the model in another format",
}  # fmt: skip
CODE = "class Odd: pass\n"


@pytest.mark.parametrize("text", ["null", "[]", "{", '"x"', "\ufeff{}", ""])
def test_a_generation_configuration_that_keeps_models_from_opening_is_refused(
    tiny_model: TinyModel, tmp_path: Path, text: str
) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base", files={"generation_config.json": text})
    with pytest.raises(ModelError) as caught:
        find_model(str(base)).config  # noqa: B018 (reading it is what is tried)
    assert "generation_config.json of base cannot be read" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["auto", "fp16", "BF16", "torch.bfloat16", 5, {"": "bfloat16"}])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_type_that_is_none_is_named(tiny_model: TinyModel, tmp_path: Path, key: str, given: object) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base", config={key: given})
    with pytest.raises(
        ModelError, match=rf"config.json of base has {key} .* is no type of PyTorch's, .* set it to"
    ):
        find_model(str(base)).config  # noqa: B018 (reading it is what is tried)


def test_odd_values_of_a_generation_configuration_that_opens_are_kept(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    text = '{"do_sample": false, "temperature": 0.7, "my_own": [1]}'
    base = edited(tiny_model("llama"), tmp_path / "base", files={"generation_config.json": text})
    quick_run(base, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


def test_files_beside_the_weights_go_along_and_useless_ones_are_named(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    hidden = {".gitattributes": "*", ".cache/x": "y"}
    base = edited(tiny_model("llama"), tmp_path / "base", files=BESIDE | dict.fromkeys(USELESS, "x") | hidden)
    manifest = quick_run(base, tmp_path / "out")
    for name, text in BESIDE.items():
        assert (tmp_path / "out" / name).read_text() == text
        assert name in manifest.files
    assert manifest.base.left_out == USELESS
    assert not any((tmp_path / "out" / name).exists() for name in (*USELESS, *hidden))


def test_a_changed_file_in_a_folder_is_found_by_the_manifest(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base", files={"1_Pooling/config.json": "{}"})
    quick_run(base, tmp_path / "out")
    (tmp_path / "out" / "1_Pooling" / "config.json").write_text("[]")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json does not match"):
        verify_files(tmp_path / "out", manifest, hashes=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_names_what_is_not_below_it_is_refused(
    tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    manifest = quick_run(tiny_model("llama"), tmp_path / "out")
    wrong = manifest.model_copy(update={"files": {name: next(iter(manifest.files.values()))}})
    with pytest.raises(CheckpointError, match="not a file below it"):
        verify_files(tmp_path / "out", wrong, hashes=False)


def test_code_of_a_class_that_transformers_has_goes_with_the_key_that_names_it(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    automap = {"auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"}}
    base = edited(tiny_model("phi3"), tmp_path / "base", config=automap, files={"odd.py": CODE})
    manifest = quick_run(base, tmp_path / "out")
    assert manifest.base.left_out["odd.py"].startswith("code of a class")
    for trust in (False, True):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trust)


def test_code_that_a_processor_names_stays_with_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    files = {"odd.py": CODE, "processor_config.json": '{"auto_map": {"AutoProcessor": "odd.Odd"}}'}
    quick_run(edited(tiny_model("llama"), tmp_path / "base", files=files), tmp_path / "out")
    assert (tmp_path / "out" / "odd.py").read_text() == CODE


def test_runs_inside_of_the_model_directory_are_no_companions(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base", files={"notes/how.txt": "x"})
    quick_run(base, base / "first")
    manifest = quick_run(base, base / "second")
    assert not (base / "second" / "first").exists()
    assert "notes/how.txt" in manifest.files
    assert companions(base, ["model.safetensors"]).left_out == {}


def test_an_overwritten_run_leaves_nothing_of_the_base_before_it(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = edited(tiny_model("llama"), tmp_path / "first", files={"a.txt": "x", "deep/er/b.txt": "y"})
    quick_run(first, out)
    (out / "mine.txt").write_text("the user's")
    (out / "mine").mkdir()
    (out / "mine" / "too.txt").write_text("the user's")
    for family in (
        "qwen2",
        "mistral",
    ):  # twice: what stood there while a manifest was written is still the user's
        recipe = recipe_of("rtn-g64", *QUICK)
        manifest = quantize(str(tiny_model(family)), recipe, out, CPU, overwrite=True)
        assert not (out / "a.txt").exists()
        assert not (out / "deep").exists()
        assert (out / "mine.txt").read_text() == (out / "mine" / "too.txt").read_text() == "the user's"
        assert "mine/too.txt" not in manifest.files


def test_keys_of_the_configuration_that_nobody_knows_stay(tiny_model: TinyModel, tmp_path: Path) -> None:
    config = {"router_note": {"a": [1, 2]}, "torch_dtype": "bfloat16", "rope_theta": 500000.0}
    base = edited(tiny_model("llama"), tmp_path / "base", config=config)
    written = json.loads((base / "config.json").read_text())
    written.pop("rope_parameters")
    (base / "config.json").write_text(json.dumps(written))
    quick_run(base, tmp_path / "out")
    served = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {key for key in written if served.get(key) != written[key]}
    assert changed <= {"transformers_version", "dtype"}
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 500000.0


def test_links_are_copied_as_what_they_point_to(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base")
    (tmp_path / "blob").write_text("a licence")
    (base / "LICENSE").symlink_to(tmp_path / "blob")
    quick_run(base, tmp_path / "out")
    shutil.rmtree(base)
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
    assert (tmp_path / "out" / "LICENSE").read_text() == "a licence"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_the_number_of_experts_has_the_name_that_transformers_4_reads(
    tiny_model: TinyModel, tmp_path: Path, family: str
) -> None:
    names = {"mixtral": "num_local_experts"}  # of transformers 4; the others' is num_experts
    quick_run(tiny_model(family), tmp_path / "out", *PLAIN_WEIGHTS, PLAIN_CACHE)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written[names.get(family, "num_experts")] == 8
