"""What `--model` takes, and what it says of the rest: one line with what it is and what to do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.quantize.tiny_gguf import write_tiny_gguf

from lowbit_core.errors import ModelError
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.sources.contents import obstacle
from lowbit_quantize.model.sources.hub_address import HubAddress, hub_id, page_address

REVISION = "0123456789abcdef0123456789abcdef01234567"


def refusal(model: Path | str) -> str:
    with pytest.raises(ModelError) as refused:
        find_model(str(model))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("https://huggingface.co/acme/tiny", HubAddress("acme/tiny")),
        ("https://huggingface.co/acme/tiny/", HubAddress("acme/tiny")),
        ("HTTPS://HuggingFace.co/acme/tiny?library=vllm#files", HubAddress("acme/tiny")),
        ("http://hf.co/acme/tiny.git", HubAddress("acme/tiny")),
        ("hf.co/acme/tiny-GGUF", HubAddress("acme/tiny-GGUF")),
        ("huggingface.co/acme/tiny/tree/main", HubAddress("acme/tiny", "main")),
        ("https://huggingface.co/acme/tiny/tree/refs%2Fpr%2F3/", HubAddress("acme/tiny", "refs/pr/3")),
        ("https://huggingface.co/acme/tiny/blob/v1.0/config.json", HubAddress("acme/tiny", "v1.0")),
        ("hf.co/acme/tiny/resolve/main/t-Q4_K_M.gguf?download=true", HubAddress("acme/tiny", "main", "t-Q4_K_M.gguf")),
        ("hf.co/acme/tiny/blob/v2/Q8/T-00001-of-00002.GGUF", HubAddress("acme/tiny", "v2", "Q8/T-00001-of-00002.GGUF")),
    ],
)  # fmt: skip
def test_a_page_of_the_hub_names_a_repository_a_revision_and_a_file(address: str, found: HubAddress) -> None:
    assert page_address(address) == found


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("https://example.com/acme/tiny", "is no page of the hub"),
        ("ftp://huggingface.co/acme/tiny", "is no page of the hub"),
        ("s3://bucket/model", "is no page of the hub"),
        ("https://huggingface.co/acme", "is no model's page"),
        ("https://huggingface.co/datasets/acme/text", "is no model's page"),
        ("https://huggingface.co/acme/tiny/discussions/4", "is no model's page"),
        ("https://huggingface.co/acme/tiny/tree/main/onnx", "is a folder of a repository"),
        ("https://huggingface.co/a b/tiny", "names no hub id"),
    ],
)
def test_an_address_of_no_model_is_refused_without_a_request(address: str, reason: str) -> None:
    assert reason in refusal(address)


def test_a_hub_id_may_have_a_revision_and_a_path_is_none() -> None:
    assert hub_id("acme/tiny@refs/pr/3") == HubAddress("acme/tiny", "refs/pr/3")
    assert hub_id("acme/tiny/") == HubAddress("acme/tiny")
    assert [hub_id(text) for text in ("./acme/tiny", "/acme/tiny", "../tiny", "tiny", "a/b/c", "")] == [
        None
    ] * 6


def test_a_file_of_a_model_stands_for_its_directory(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "mein Modell é 模型")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert find_model(str(directory / file)) == find_model(str(directory))
    (tmp_path / "link").symlink_to(directory)
    assert find_model(str(tmp_path / "link")).path == directory
    (directory / "notes.md").write_text("")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "write them as safetensors first" in refusal(directory / "pytorch_model.bin")
    assert f"give its directory {directory}" in refusal(directory / "notes.md")


def test_a_path_may_begin_at_a_home_directory(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "models" / "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/models/tiny").path == directory
    assert find_model("~/models/tiny/config.json").path == directory
    assert "cannot be looked for" in refusal("~nobody-of-this-name/model")
    assert "cannot be looked for: File name too long" in refusal("m" * 5000)


def test_a_gguf_file_is_one_in_any_case_and_a_directory_may_hold_one(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "whole").rename(tmp_path / "Tiny.GGUF")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(file, alone)
    (alone / "mmproj-Tiny-f16.gguf").write_bytes(b"a picture tower")
    (alone / "README.md").write_text("")
    for given in (file, alone, alone / "Tiny.GGUF"):
        reference = find_model(str(given))
        assert (reference.name, reference.kind, reference.model_type) == ("Tiny", "gguf", "llama")
        assert reference.config.num_hidden_layers == 3
    shutil.copy(file, alone / "Other.gguf")
    assert "holds 2 GGUF models, Other.gguf, Tiny.GGUF; give one of these files" in refusal(alone)


def test_any_part_of_a_split_gguf_model_stands_for_all(tmp_path: Path) -> None:
    first = write_tiny_gguf(tmp_path / "m", tensors_a_part=11, tie_word_embeddings=False)
    (tmp_path / "m" / "model.safetensors").unlink()
    parts = sorted((tmp_path / "m").glob("*.gguf"))
    assert [part.name for part in parts] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for given in (*parts, tmp_path / "m"):
        reference = find_model(str(given))
        assert (reference.name, reference.path) == ("tiny", first)
        assert list(reference.sha256) == [part.name for part in parts]
        assert reference.config.tie_word_embeddings is False  # whichever part holds the head
    kept = parts[1].rename(tmp_path / "kept")
    for given in (parts[0], parts[2], tmp_path / "m"):
        assert "is one of 3 parts, and tiny-00002-of-00003.gguf is not beside it" in refusal(given)
    kept.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"says that it is part 2 of 3; name the parts"):
        _ = find_model(str(tmp_path / "renamed.gguf")).model_type


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    first = write_tiny_gguf(tmp_path / "m", tensors_a_part=20)
    other = write_tiny_gguf(tmp_path / "o", tensors_a_part=20, left_out="blk.1.ffn_up.weight")
    second = first.with_name("tiny-00002-of-00002.gguf")
    shutil.copy(other.with_name(second.name), second)
    with pytest.raises(ModelError, match=r"says that its 2 parts hold 29 tensors; they hold 28"):
        _ = find_model(str(first)).model_type
    shutil.copy(first, second)
    with pytest.raises(ModelError, match=r"says that it is part 1 of 2"):
        _ = find_model(str(first)).model_type


def test_a_snapshot_in_the_hubs_cache_has_the_repositorys_name(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    snapshot = cached(tmp_path, "acme", "tiny--x", tiny_model("llama"))
    reference = find_model(str(snapshot))
    assert (reference.name, reference.kind, reference.revision) == ("acme/tiny--x", "directory", REVISION)
    assert find_model(str(snapshot / "config.json")) == reference
    assert "holds models in snapshots/" in refusal(snapshot.parent.parent)
    (tmp_path / "file").mkdir()
    write_tiny_gguf(tmp_path / "made").rename(tmp_path / "file" / "t-Q4.gguf")
    snapshot = cached(tmp_path, "acme", "other", tmp_path / "file")
    for given in (snapshot, snapshot / "t-Q4.gguf"):
        reference = find_model(str(given))
        assert (reference.name, reference.revision) == ("acme/other/t-Q4", REVISION)
        assert reference.model_type == "llama"


def cached(home: Path, owner: str, name: str, files: Path) -> Path:
    """A directory as the hub's cache keeps it: links with names, to files without."""
    repository = home / "hub" / f"models--{owner}--{name}"
    snapshot = repository / "snapshots" / REVISION
    for directory in (repository / "blobs", repository / "refs", snapshot):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(path for path in files.iterdir() if path.is_file()):
        shutil.copy(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_page_of_a_cached_repository_is_read_without_a_network(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    cached(tmp_path, "acme", "tiny", tiny_model("llama"))
    made = write_tiny_gguf(tmp_path / "made", tensors_a_part=20)
    shutil.rmtree(tmp_path / "made" / "keep", ignore_errors=True)
    for file in [path for path in made.parent.iterdir() if path.suffix != ".gguf"]:
        file.unlink()
    cached(tmp_path, "acme", "split", made.parent)
    program = (
        "import sys\n"
        "from lowbit_quantize.model.reference import fetch_weights, find_model\n"
        "for name in sys.argv[1:]:\n"
        "    one = find_model(name); fetch_weights(one)\n"
        "    print(one.name, one.kind, one.revision, one.model_type, len(one.sha256))\n"
    )
    pages = ["tiny", "tiny/tree/main/", "split", "split/blob/main/tiny-00002-of-00002.gguf"]
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "acme/tiny",
            *(f"https://huggingface.co/acme/{page}" for page in pages),
        ],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    whole, split = f"acme/tiny hub {REVISION} llama 2", f"acme/split/tiny gguf {REVISION} llama 2"
    assert ran.stdout.splitlines() == [whole] * 3 + [split] * 2


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("adapter_config.json adapter_model.safetensors", "is a LoRA adapter of acme/base, not a model; merge it into"),
        ("adapter_config.json adapter_model.bin", ".merge_and_unload().save_pretrained('merged')"),
        ("adapter_config.json config.json model.safetensors", "holds a model and an adapter"),
        ("model_index.json unet/config.json", "is a pipeline of diffusers"),
        ("config.json pytorch_model.bin training_args.bin", "has its weights as pytorch_model.bin, which can hold"),
        ("config.json pytorch_model-00001-of-00002.bin", "save_pretrained('converted')"),
        ("config.json consolidated.00.pth params.json", "their maker's own format"),
        ("config.json training_args.bin", "has no safetensors weights (model.safetensors or model.safe"),
        ("config.json weights.safetensors", "; weights.safetensors is no name that transformers looks for"),
        ("config.json onnx/model_q4.onnx", "is an export for ONNX; give the model that it was made of"),
        ("config.json openvino_model.xml openvino_model.bin", "is an export for OpenVINO"),
        ("config.json pytorch_model.bin tiny-Q4_K_M.gguf", "has its weights as pytorch_model.bin"),
        ("config.json tf_model.h5", "is an export for TensorFlow"),
        ("rank0.engine config.json", "is an export for TensorRT-LLM"),
        ("checkpoint-50/config.json checkpoint-9/config.json", "holds models in checkpoint-50, checkpoint-9; give one"),
        ("model.safetensors tokenizer.json", "has no config.json; give a Hugging Face model directory"),
        ("", "has no config.json"),
    ],
)  # fmt: skip
def test_what_is_no_base_model_is_told_by_what_it_is(names: str, reason: str, tmp_path: Path) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "llama"}' if name.endswith("config.json") else "")
    if "adapter" in names:
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/base"}')
    assert reason in refusal(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "library"),
    [
        ("quantization", {"group_size": 64, "bits": 4}, "MLX, 4 bits"),
        ("quantization_config", {"quant_method": "exl3", "bits": 3.5}, "exl3"),
    ],
)
def test_a_directory_of_another_library_is_told_by_its_configuration(
    key: str, value: object, library: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, key: value}))
    assert f"is already quantized ({library}); give the unquantized model" in refusal(directory)


def test_a_repository_whose_weights_are_not_listed_is_no_obstacle() -> None:
    assert obstacle({"config.json"}, {}, {}, "x", complete=False) is None
    assert obstacle({"config.json"}, {}, {}, "x") is not None


@pytest.mark.parametrize("kind", ["adapter", "mmproj"])
def test_a_gguf_file_of_no_model_is_told_by_its_type(kind: str, tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path, said={"general.type": kind})
    with pytest.raises(ModelError, match=f"is no model, it is of type '{kind}'"):
        _ = find_model(str(file)).model_type
