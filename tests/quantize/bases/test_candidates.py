"""Two candidates for one fact are told apart as engines would, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantize.edited_bases import Tensors, edited, quick_run

from lowbit_core.errors import ModelError
from lowbit_quantize.model.weights import INDEX_NAME, WeightFiles

TinyModel = Callable[[str], Path]


def sharded(base: Path, directory: Path, change: Callable[[Tensors, Tensors], None] | None = None) -> Path:
    """`base` in two shards with an index that names every tensor where it was before `change`."""
    shutil.copytree(base, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in half} for half in (names[::2], names[1::2])]
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    if change is not None:
        change(parts[0], parts[1])
    for part, file in zip(parts, files, strict=True):
        save_file(part, directory / file)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def test_an_index_beside_the_single_file_that_it_does_not_name_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = sharded(tiny_model("llama"), tmp_path / "base")
    shutil.copy(tiny_model("llama") / "model.safetensors", base)
    with pytest.raises(ModelError, match="transformers reads the one, vLLM the other; remove the one"):
        quick_run(base, tmp_path / "out")


def test_an_index_of_the_single_file_is_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = edited(tiny_model("llama"), tmp_path / "base")
    names = load_file(base / "model.safetensors")
    (base / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert set(WeightFiles(base)) == set(names)


def test_different_tensors_of_one_name_in_two_shards_are_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    def twice(first: Tensors, second: Tensors) -> None:
        name = next(iter(first))
        second[name] = first[name] + 1

    with pytest.raises(ModelError, match=r"model-00001.* and model-00002.* hold different tensors"):
        quick_run(sharded(tiny_model("llama"), tmp_path / "base", twice), tmp_path / "out")


def test_the_same_tensor_in_two_shards_is_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    def twice(first: Tensors, second: Tensors) -> None:
        name = next(iter(first))
        second[name] = first[name].clone()

    plain = quick_run(tiny_model("llama"), tmp_path / "plain")
    found = quick_run(sharded(tiny_model("llama"), tmp_path / "base", twice), tmp_path / "out")
    assert found.quality.mean_kld == plain.quality.mean_kld


def test_an_index_that_names_what_its_files_lack_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    def gone(first: Tensors, _: Tensors) -> None:
        first.pop(next(iter(first)))

    with pytest.raises(ModelError, match=r"names the tensor .*, which model-0000.* lacks"):
        quick_run(sharded(tiny_model("llama"), tmp_path / "base", gone), tmp_path / "out")


def test_a_tensor_under_two_names_that_mean_one_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    def again(tensors: Tensors) -> Tensors:
        return tensors | {"_orig_mod.model.norm.weight": torch.ones(128).bfloat16()}

    with pytest.raises(ModelError, match=r"two candidates for one tensor"):
        quick_run(edited(tiny_model("qwen2"), tmp_path / "base", again), tmp_path / "out")


def test_two_models_in_one_file_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    def both(tensors: Tensors) -> Tensors:
        return {f"{who}.{name}": one * 1 for who in ("teacher", "student") for name, one in tensors.items()}

    base = edited(tiny_model("llama"), tmp_path / "base", both)
    with pytest.raises(
        ModelError, match=r"holds 2 models, whose tensors begin with student\., teacher\.; keep one"
    ):
        quick_run(base, tmp_path / "out")


def test_two_chat_templates_stay_as_they_are_and_the_readers_choice_is_kept(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """transformers, and so vLLM, read the file where there is one; the reload holds both tokenizers to one answer."""
    base = edited(
        tiny_model("llama"), tmp_path / "base", files={"chat_template.jinja": "{{ 'from the file' }}"}
    )
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ 'from the key' }}"}))
    quick_run(base, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'from the file' }}"
    assert "from the key" in (tmp_path / "out" / "tokenizer_config.json").read_text()
