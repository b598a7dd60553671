"""What is refused, is refused by the command with one clear line, status 2, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantize.tiny_gguf import write_tiny_gguf
from tests.tiny_models import write_tiny_model

from lowbit_core.cli import main
from lowbit_core.errors import OutputError
from lowbit_quantize.check.forecast import run_disk_bytes
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import load_recipe
from lowbit_quantize.run.directory import check_disk

SHORT = ("--set", "calibration.max_seq_length=64", "--set", "quality.max_seq_length=64")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `lowbit quantize`, expect status 2 and no output directory, and return the one line on stderr."""

    def run(model: Path | str, *arguments: str, recipe: str = "awq-g64") -> str:
        capsys.readouterr()  # what making the model printed
        out = tmp_path / "out"
        before = sorted(path for path in tmp_path.rglob("*"))
        status = main(["quantize", "--model", str(model), "--recipe", recipe, "--out", str(out), *arguments])
        captured = capsys.readouterr()
        assert status == 2
        assert captured.out == ""
        assert sorted(path for path in tmp_path.rglob("*")) == before
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1
        return lines[0].removeprefix("lowbit: error: ")

    return run


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere", "nowhere.gguf", "a b c"])
def test_a_missing_model(refused: Callable[..., str], model: str) -> None:
    assert model in refused(model)


def test_a_directory_without_weights(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert "no config.json" in refused(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    assert "no safetensors weights" in refused(tmp_path / "m")


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("gpt2", "has no linear layers in its decoder"),
        ("deepseek_v4", "does not run in torch.bfloat16 beside the tensors that it keeps in float32"),
        ("made_up", "made_up"),
        ("t5", "no model can be built"),
        ("bert", "its head reads something else"),
    ],
)
def test_an_architecture_that_cannot_be_walked(
    refused: Callable[..., str], tmp_path: Path, model_type: str, words: str
) -> None:
    directory = write_tiny_model(tmp_path / "m")
    config = {"model_type": model_type, "vocab_size": 512, "architectures": [], "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    assert words in refused(directory)


@pytest.mark.parametrize("text", [["mistral"], "mistral", {"model_type": "made_up"}])
def test_a_model_of_several_parts_whose_text_part_is_none(
    refused: Callable[..., str], tmp_path: Path, text: Any
) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": text}))
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
    refused(directory)


def test_a_file_that_is_not_gguf(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model at all" * 10)
    assert "is not a readable GGUF file" in refused(tmp_path / "m.gguf")


def test_a_gguf_file_that_was_cut_off_or_lacks_a_tensor(refused: Callable[..., str], tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "model")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "is not a readable GGUF file" in refused(file)
    assert whole.count(b"blk.1.ffn_up.weight") == 1
    file.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_up.weighs"))
    assert "has blk.1.ffn_up.weighs, which transformers does not read" in refused(file)
    file = write_tiny_gguf(tmp_path / "shallow", left_out="blk.1.ffn_up.weight")
    assert "lacks the tensor model.layers.1.mlp.up_proj.weight" in refused(file)
    assert "lacks the tensor" in refused(file, "--dry-run")


def test_a_gguf_file_with_stretched_positions(refused: Callable[..., str], tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "model", yarn_factor=4.0)
    assert "has llama.rope.scaling.type, which transformers does not read" in refused(file)


def test_a_group_size_that_does_not_divide_a_layers_input(
    refused: Callable[..., str], tiny_model: Callable[[str], Path]
) -> None:
    line = refused(tiny_model("llama"), recipe="awq")
    assert "modules: W4A16 does not fit the 192 inputs of model.layers.0.mlp.down_proj" in line
    assert "groups of 128 do not divide them; group sizes that fit all linears: 32, 64" in line


def test_an_unknown_recipe_key(refused: Callable[..., str], tiny_model: Callable[[str], Path]) -> None:
    assert "unknown key 'modules.0.bit'" in refused(tiny_model("llama"), "--set", "modules.0.bit=4")


@pytest.mark.parametrize(
    ("old", "now"),
    [
        (["--check"], "--dry-run"),
        (["--fresh"], "--overwrite"),
        (["--gpu-gib", "24"], "--gpu-memory-gib"),
        (["--set", "weights.bits=8"], "modules.*.scheme"),
        (["--set", "calibration.sequences=8"], "calibration.num_samples"),
    ],
)
def test_what_was_renamed_is_refused_with_its_new_name(
    refused: Callable[..., str], tiny_model: Callable[[str], Path], old: list[str], now: str
) -> None:
    line = refused(tiny_model("llama"), *old)
    assert old[-1].split("=")[0] in line or old[0] in line
    assert f"called {now} now" in line.replace("'", "")


def test_an_output_directory_that_holds_something_else(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    arguments = ["quantize", "--model", str(tiny_model("llama")), "--recipe", "awq-g64", "--out"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "thesis.tex")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_checkpoint_of_another_recipe_is_not_overwritten(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    small = (
        "calibration.num_samples=2",
        "calibration.max_seq_length=32",
        "quality.num_samples=2",
        "quality.max_seq_length=32",
    )
    quantize(str(tiny_model("llama")), load_recipe("rtn-g64", small), tmp_path / "out", torch.device("cpu"))
    with pytest.raises(OutputError, match="another model, recipe or text"):
        quantize(
            str(tiny_model("llama")), load_recipe("awq-g64", small), tmp_path / "out", torch.device("cpu")
        )


def test_too_little_disk(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    plan = make_plan(find_model(str(tiny_model("llama"))), load_recipe("awq-g64"))
    needed_bytes = run_disk_bytes(plan, streams=1 << 20, stream_memory_bytes=1 << 30)
    check_disk(tmp_path / "not" / "yet" / "there", needed_bytes)
    with pytest.raises(OutputError, match=r"needs \d+ MiB and its disk has 1 MiB free"):
        check_disk(tmp_path, needed_bytes, free_bytes=lambda _: 1 << 20)


def test_text_that_does_not_exist(refused: Callable[..., str], tiny_model: Callable[[str], Path]) -> None:
    assert "'nowhere.jsonl' is not an existing file or folder" in refused(
        tiny_model("llama"), "--calibration", "nowhere.jsonl"
    )


def test_a_device_that_is_not_there(refused: Callable[..., str], tiny_model: Callable[[str], Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "sees no CUDA device" in refused(tiny_model("llama"), "--device", "cuda")


def test_a_weight_that_is_not_finite_stops_the_run_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_tiny_model(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert (
        main(["quantize", "--model", str(directory), "--recipe", "awq-g64", "--out", str(tmp_path / "out")])
        == 1
    )
    assert "mlp.up_proj" in capsys.readouterr().err
    assert not (tmp_path / "out" / "lowbit.json").exists()


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_base_that_is_already_quantized(refused: Callable[..., str], tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "m")
    edit_weights(
        directory, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items() if "q_proj" in k})
    )
    assert "is stored as F8_E4M3, and its configuration does not say how that is read" in refused(directory)
    edit_config(directory, quantization_config={"quant_method": "awq"})
    assert "is already quantized (awq)" in refused(directory)


def test_weights_that_are_missing_or_of_another_shape(refused: Callable[..., str], tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "m")
    edit_config(directory, num_hidden_layers=4)
    assert "lacks the tensor model.layers.3" in refused(directory)
    edit_config(directory, num_hidden_layers=3, intermediate_size=256)
    assert "its configuration asks for (256, 128)" in refused(directory)
    edit_config(directory, intermediate_size=192, tie_word_embeddings=False)
    assert "lacks lm_head.weight and its embeddings are not tied" in refused(directory)


def test_a_tied_head_that_differs(refused: Callable[..., str], tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "m")
    edit_weights(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    assert "stores another lm_head.weight" in refused(directory)


@pytest.mark.parametrize("damage", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_weight_file_that_is_cut_off_or_a_pointer(
    refused: Callable[..., str], tmp_path: Path, damage: bytes
) -> None:
    directory = write_tiny_model(tmp_path / "m")
    (directory / "model.safetensors").write_bytes(damage)
    assert "cannot be read" in refused(directory)


@pytest.mark.parametrize(
    "index", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}']
)
def test_an_index_that_is_wrong(refused: Callable[..., str], tmp_path: Path, index: str) -> None:
    directory = write_tiny_model(tmp_path / "m")
    (directory / "model.safetensors.index.json").write_text(index)
    (directory / "model.safetensors").unlink()
    assert "fetch the model again" in refused(directory)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "abc"}, {"num_attention_heads": 0}, {"rope_parameters": {"rope_type": "nope"}}]
)
def test_a_configuration_that_builds_no_model(
    refused: Callable[..., str], tmp_path: Path, change: dict[str, Any]
) -> None:
    directory = write_tiny_model(tmp_path / "m")
    edit_config(directory, **change)
    assert "configuration" in refused(directory)


def test_a_model_without_tokenizer(refused: Callable[..., str], tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "m")
    for path in directory.glob("tokenizer*"):
        path.unlink()
    assert "m has no tokenizer (tokenizer.json, " in refused(directory)
    (directory / "tokenizer.json").write_text("{")
    assert "the tokenizer of m cannot be read: " in refused(directory)


def test_a_chat_template_that_refuses_the_text(refused: Callable[..., str], tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "m")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    assert "chat template refuses this conversation: TemplateError: 'no such role'" in refused(directory)


def test_sequences_longer_than_the_models_positions(
    refused: Callable[..., str], tiny_model: Callable[[str], Path]
) -> None:
    line = refused(tiny_model("llama"), "--set", "calibration.max_seq_length=513")
    assert "calibration.max_seq_length = 513: " in line
    assert "has 512 positions" in line


def test_the_same_token_ids_for_calibration_and_judgement(
    refused: Callable[..., str], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"input_ids": [[(7 * n + m) % 512 for n in range(100)] for m in range(4)]}))
    both = ("--set", f"calibration.token_ids={path}", "--set", f"quality.token_ids={path}")
    assert "share a run of 64 tokens" in refused(tiny_model("llama"), *both)
    path.write_text(json.dumps({"input_ids": [[1, 2, 3]]}))
    assert "two rows to judge by" in refused(tiny_model("llama"), *SHORT, *both[2:])


def test_a_recipe_with_a_key_twice(
    refused: Callable[..., str], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("kv_cache: {dtype: fp8}\nkv_cache: {dtype: none}\n")
    assert "the key 'kv_cache' stands twice" in refused(tiny_model("llama"), recipe=str(path))


@pytest.mark.parametrize(
    "line", ["[1, 2]", '"hello"', '{"text": null}', '{"messages": [{"role": "user", "content": [1]}]}']
)
def test_a_line_of_text_that_is_no_document(
    refused: Callable[..., str], tiny_model: Callable[[str], Path], tmp_path: Path, line: str
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(line + "\n")
    assert f"{path}, line 1" in refused(tiny_model("llama"), "--calibration", str(path), *SHORT)


def test_an_output_below_a_file(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert main(["quantize", "--model", str(tiny_model("llama")), "--recipe", "awq-g64", "--out", out]) == 2
    assert "is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3_moe", "keep_experts: 1", "keeps 1 of 8 experts, and each token uses 2; allowed counts: 2, 3,"),
        ("qwen3_moe", "keep_experts: 9", "keeps 9 of 8 experts; allowed counts: 2, 3, 4, 5, 6, 7, 8"),
        ("qwen3_moe", "prune_ratio: 0.9", "prune_ratio = 0.9 keeps 1 of 8 experts, and each token uses 2"),
        ("deepseek_v2", "keep_experts: 6", "4 routing groups do not divide; allowed counts: 4, 8"),
        ("mixtral", "keep_experts: 6, expert_parallel: 4", "expert_parallel = 4 does not divide; allowed counts: 4, 8"),
        ("qwen3_moe", "keep_experts: 4, criterion: magic", "criterion = 'magic'"),
        ("llama", "prune_ratio: 0.25", "has no experts"),
    ],
)  # fmt: skip
def test_experts_that_cannot_be_pruned_so(
    refused: Callable[..., str],
    tiny_model: Callable[[str], Path],
    family: str,
    options: str,
    message: str,
) -> None:
    passes = f"passes=[{{prune_experts: {{{options}}}}}, quantize]"
    assert message in refused(tiny_model(family), "--set", passes, *SHORT)
