"""A checkpoint as one GGUF file: the same numbers by transformers' own reader of both, or a line that says why not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from tests.quantize.small_runs import CPU, recipe_with
from tests.tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

from lowbit_core.cli import main
from lowbit_core.errors import CheckpointError, LowbitError, OutputError
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.export.exporter import export
from lowbit_quantize.export.gguf.blocks import block_type, blocks_of
from lowbit_quantize.export.gguf.target import Gguf
from lowbit_quantize.export.gguf.vocabulary import vocabulary_keys
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Quantized

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
WINDOWS = [*["sliding_attention"] * 5, "full_attention"]
WORDS = {"vocab_size": 576}  # transformers adds tokens of its own to Qwen 2's tokenizers
EVERYWHERE: dict[str, Any] = {"mlp_only_layers": [], "decoder_sparse_step": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with its own head": ("llama", {"tie_word_embeddings": False}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {**WORDS, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # transformers reads no size of heads from such a file
    "phi3": ("phi3", {}),
    "lfm2": ("lfm2", {}),
    "gemma3_text": (
        "gemma3_text",
        {"head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 6, "layer_types": WINDOWS},
    ),
    "qwen2_moe": ("qwen2_moe", {**WORDS, **EVERYWHERE}),
    "qwen3_moe": ("qwen3_moe", {**EVERYWHERE, "norm_topk_prob": True}),
}
FIVE = {"scheme": "W5A16", "group_size": 64}
FOUR, EIGHT = {"scheme": "W4A16", "group_size": 64}, {"scheme": "W8A16", "group_size": 32}


def checkpoint_of(place: Path, name: str, *rules: dict[str, Any], **sections: Any) -> Path:
    family, sizes = MODELS[name]
    base = write_tiny_model(place / "base", family, **sizes)
    recipe = recipe_with(*({"match": "*", **rule, "methods": ["rtn"]} for rule in rules), **sections)
    quantize(str(base), recipe, place / "checkpoint", CPU)
    return place / "checkpoint"


def exported(checkpoint: Path, rest: str = "f16") -> Path:
    file = checkpoint.with_name("model.gguf")
    export(checkpoint, Gguf(rest), file)
    return file


def assert_the_same_model(checkpoint: Path, file: Path) -> None:
    """Every parameter, after each has been made bfloat16 by its own reader, and what they say."""
    before, after = (load_model(find_model(str(place)), CPU).model for place in (checkpoint, file))
    ids = torch.arange(64).unsqueeze(0)
    with torch.inference_mode():
        logits = [model(ids).logits.float() for model in (before, after)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_very_model(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, name, FOUR)
    assert_the_same_model(checkpoint, exported(checkpoint, "bf16"))


@pytest.mark.parametrize("rules", [(FIVE,), (FIVE, {"match": "*.mlp.*", **FOUR})])
def test_five_bits_are_read_to_the_very_model(rules: Any, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", *rules)
    file = exported(checkpoint, "bf16")
    assert_the_same_model(checkpoint, file)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds & {"Q4_0", "Q5_0"} == ({"Q4_0", "Q5_0"} if len(rules) == 2 else {"Q5_0"})


@pytest.mark.parametrize(
    "rules", [(EIGHT,), (FOUR, {"match": "*.mlp.*", **EIGHT}), ({**FOUR, "match": "*.down_proj"},)]
)
def test_eight_bits_mixed_ones_and_layers_left_alone(rules: Any, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", *rules)
    file = exported(checkpoint)
    assert_the_same_model(checkpoint, file)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    quantized = {"Q4_0", "Q8_0"} & set(kinds.values())
    assert len(quantized) == (2 if len(rules) == 2 else 1)
    assert kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == "F16"


def test_what_is_not_quantized_has_eight_bits_if_asked(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama with its own head", FOUR)
    reader = gguf.GGUFReader(exported(checkpoint, "q8_0"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q8_0", "Q8_0")


def test_the_file_says_what_was_proven_and_how_the_tokenizer_works(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", FOUR)
    file = exported(checkpoint)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    proven = json.loads((checkpoint / "lowbit.json").read_text())["quality"]
    assert fields["lowbit.quality.mean_kld"] == pytest.approx(proven["mean_kld"], rel=1e-6)
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert fields["llama.block_count"] == 3
    before, after = (find_model(str(place)).tokenizer() for place in (checkpoint, file))
    for text in ("Hello, world 1234", "  two\n\nlines", "é e\u0301 你好 🙂"):
        assert before(text).input_ids == after(text).input_ids


def test_every_token_that_ends_a_turn_is_told(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0, 9]}))
    quantize(str(base), recipe_with({"match": "*", **FOUR, "methods": ["rtn"]}), tmp_path / "checkpoint", CPU)
    file = exported(tmp_path / "checkpoint")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    ends = {fields[f"tokenizer.ggml.{end}_token_id"] for end in ("eos", "eot", "eom")}
    assert ends >= {7, 9}


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{}"), ("tokenizer.json", "[1"), ("generation_config.json", "[]")]
)
def test_odd_files_beside_the_weights_end_in_a_line_or_in_the_file(
    name: str, text: str, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", FOUR)
    (checkpoint / name).write_text(text)
    config = SimpleNamespace(vocab_size=512)
    if name == "tokenizer.json":
        with pytest.raises(CheckpointError, match="cannot be opened"):
            vocabulary_keys(checkpoint, "llama", config)
    else:
        assert "tokenizer.ggml.eot_token_id" not in vocabulary_keys(checkpoint, "llama", config)


def test_a_full_disk_ends_it_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(tmp_path, "llama", FOUR)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=1 << 40, used=0, free=1000))
    with pytest.raises(OutputError, match="free"):
        exported(checkpoint)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_pruned_mixture(tmp_path: Path) -> None:
    passes = [{"prune_experts": {"keep_experts": 4}}, "quantize"]
    checkpoint = checkpoint_of(tmp_path, "qwen3_moe", FOUR, passes=passes)
    file = exported(checkpoint)
    assert gguf.GGUFReader(file).fields["qwen3moe.expert_count"].contents() == 4
    assert_the_same_model(checkpoint, file)


def test_mixtral_which_transformers_does_not_read_has_every_number_by_the_package_gguf(
    tmp_path: Path,
) -> None:
    base = write_tiny_model(tmp_path / "base", "mixtral", sliding_window=None)  # type: ignore[arg-type]
    quantize(str(base), recipe_with({"match": "*", **FOUR, "methods": ["rtn"]}), tmp_path / "checkpoint", CPU)
    reader = gguf.GGUFReader(exported(tmp_path / "checkpoint"))
    stack = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up_exps.weight")
    assert tuple(reversed(stack.shape)) == (8, 192, 128)
    numbers = torch.from_numpy(gguf.dequantize(stack.data, stack.tensor_type)).bfloat16()
    model = load_model(find_model(str(tmp_path / "checkpoint")), CPU).model
    assert torch.equal(numbers, model.model.layers[1].mlp.experts.gate_up_proj[:, 192:])


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_1"), (5, "Q5_1")])
def test_asymmetric_codes_fit_where_their_minima_are_halves(bits: int, kind: str) -> None:
    scheme, blocks_kind = Integer(bits, 32, False, "any"), gguf.GGMLQuantizationType[kind]
    assert block_type(scheme) == blocks_kind
    generator, above = torch.Generator().manual_seed(0), 1 << (bits - 1)
    codes = torch.randint(-above, above, (6, 96), generator=generator).to(torch.int8)
    zero = torch.randint(-above, above, (6, 3), generator=generator).float()
    scale = 2.0 ** torch.randint(-9, 0, (6, 3), generator=generator).float()
    found = Quantized(codes, {"scale": scale, "zero": zero}, scheme)
    blocks = blocks_of("a", found, blocks_kind)
    assert torch.equal(torch.from_numpy(gguf.dequantize(blocks, blocks_kind)), found.dequantize())
    wide = Quantized(codes, {"scale": scale * (2 - 2**-7), "zero": zero}, scheme)  # 8 bits by 4 are 12
    with pytest.raises(CheckpointError, match=r"of 18 minima of a are no float16.*symmetric"):
        blocks_of("a", wide, blocks_kind)


@pytest.mark.parametrize(
    ("family", "sizes", "says"),
    [
        ("olmo2", {}, "models of type olmo2 are not written as GGUF"),
        ("llama", {"hidden_act": "gelu"}, r"hidden_act = 'gelu', which a GGUF file of llama cannot say"),
        ("mistral", {"sliding_window": 32}, "sliding_window = 32"),
        ("qwen3_moe", {"norm_topk_prob": True}, "mlp_only_layers"),
        ("qwen3_moe", {**EVERYWHERE, "norm_topk_prob": False}, "norm_topk_prob = False"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma3_text", {"query_pre_attn_scalar": 32}, "windows in another order"),
        ("qwen3", {"rope_parameters": LLAMA3}, "stretched as 'llama3'"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "stretched as 'llama3'"),
    ],
)
def test_what_the_file_could_not_say_is_refused(
    family: str, sizes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    base = write_tiny_model(tmp_path / "base", family, **sizes)
    quantize(str(base), recipe_with({"match": "*", **FOUR, "methods": ["rtn"]}), tmp_path / "checkpoint", CPU)
    with pytest.raises(LowbitError, match=says):
        exported(tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "checkpoint"]


def test_schemes_without_blocks_are_refused(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [{"scheme": f"W{bits}A16", "group_size": 64} for bits in (2, 3, 6)]
    for number, scheme in enumerate([*others, {"scheme": "FP8_DYNAMIC"}, {"scheme": "W8A8"}]):
        checkpoint = checkpoint_of(tmp_path / str(number), "llama", scheme)
        with pytest.raises(CheckpointError, match=r"no blocks for|are no float16") as error:
            exported(checkpoint)
        assert "\n" not in str(error.value)


def test_the_command_writes_one_file_and_no_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, file = checkpoint_of(tmp_path, "llama", FOUR), tmp_path / "deep" / "a.gguf"
    flags = ["export", str(checkpoint), "--to", "gguf", "--out", str(file)]
    assert main(flags) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["to"], said["linear_bits_per_weight"]) == ("gguf", 4.5)
    assert main(flags) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*flags[:3], "autoawq", "--rest", "f16", "--out", str(tmp_path / "b")]) == 2
    assert "--rest goes with --to gguf" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name) is not None


def test_several_files_are_read_by_the_first(tmp_path: Path) -> None:
    checkpoint, out = checkpoint_of(tmp_path, "llama 3", FOUR), tmp_path / "split"
    export(checkpoint, Gguf("bf16", 0.0001), out)
    files = sorted(out.glob("*.gguf"))
    assert len(files) > 2
    assert [file.name for file in files][-1] == f"base-{len(files):05d}-of-{len(files):05d}.gguf"
    readers = [gguf.GGUFReader(file) for file in files]
    count = sum(len(reader.tensors) for reader in readers)
    for number, reader in enumerate(readers):
        said = [reader.fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")]
        assert said == [number, len(files), count]
    assert all(sum(tensor.n_bytes for tensor in reader.tensors) <= 140_000 for reader in readers)
    assert_the_same_model(checkpoint, out)


def test_a_size_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(tmp_path), "--to", "gguf", "--out", str(tmp_path / "x"), "--split-max-size"]
    for size in ("0", "-1", "nan", "inf"):
        assert main([*arguments, size]) == 2
        assert "give a number above 0" in capsys.readouterr().err
