"""A GGUF file's tensors, held against transformers' own loading of the whole."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tests.quantize.small_runs import CPU, recipe_of
from tests.quantize.tiny_gguf import write_tiny_gguf
from tests.tiny_models import CHAT_TEMPLATE
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from lowbit_core.errors import ModelError
from lowbit_quantize.check.weights import checked_base, stored_weights
from lowbit_quantize.model import gguf_file
from lowbit_quantize.model.gguf_file import GgufFile
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import load_recipe

Kind = gguf.GGMLQuantizationType


def opened(file: Path) -> GgufFile:
    stored = stored_weights(make_plan(find_model(str(file)), load_recipe("rtn-g64")))
    assert isinstance(stored, GgufFile)
    return stored


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", kind) for kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1)),
        ("qwen2", Kind.F32),
        ("qwen3", Kind.Q8_0),
        ("phi3", Kind.Q4_1),
    ],
)
def test_every_tensor_is_what_transformers_makes_of_the_whole_file(
    family: str, kind: gguf.GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "BLOCK_ROWS", 100)  # 512 rows: the last block is a shorter one
    file = write_tiny_gguf(tmp_path / "model", family, kind)
    stored = opened(file)
    stored.unpack(tmp_path / "base")
    weights = WeightFiles(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
    )
    state = whole.state_dict()
    if whole.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert GenerationConfig.from_pretrained(tmp_path / "base") == whole.generation_config
    words = AutoTokenizer.from_pretrained(tmp_path / "base")("two words").input_ids
    assert words == AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)("two words").input_ids
    outside = sum(".layers." not in name for name in state)
    assert len(weights.files) == whole.config.num_hidden_layers + outside
    for name, tensor in state.items():
        assert torch.equal(weights.read(name), tensor), name
        assert stored.shape(name) == tensor.shape


def test_parts_are_unpacked_as_the_whole_file(tmp_path: Path) -> None:
    for name, size in (("whole", 0), ("parts", 7)):
        opened(write_tiny_gguf(tmp_path / name, tensors_a_part=size)).unpack(tmp_path / name / "base")
    whole, parts = (tmp_path / name / "base" for name in ("whole", "parts"))
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in parts.iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name


def test_a_split_model_is_quantized_as_the_whole_one_and_the_manifest_names_its_parts(tmp_path: Path) -> None:
    manifests = []
    for name, size in (("whole", 0), ("parts", 20)):
        model = write_tiny_gguf(tmp_path / name, tensors_a_part=size)
        manifests.append(quantize(str(model), recipe_of("rtn-g64"), tmp_path / name / "out", CPU))
    whole, parts = manifests
    shards = [name for name in whole.files if name.endswith(".safetensors")]
    assert [whole.files[name] for name in shards] == [parts.files[name] for name in shards]
    assert list(parts.base.sha256) == ["tiny-00001-of-00002.gguf", "tiny-00002-of-00002.gguf"]
    assert (parts.base.name, parts.base.kind) == ("tiny", "gguf")


def test_numbers_that_cannot_be_read_are_refused_before_the_walk(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path)
    stored = file.read_bytes()
    name = b"output_norm.weight"
    kind = stored.index(name) + len(name) + 4 + 8  # behind the number of its dimensions and the one dimension
    file.write_bytes(stored[:kind] + bytes([Kind.I32.value]) + stored[kind + 1 :])
    with pytest.raises(ModelError, match=r"output_norm.weight is stored as I32, which cannot be read"):
        opened(file)


def test_generation_ends_where_the_file_says_a_turn_ends(tmp_path: Path) -> None:
    said = {"eos_token_id": 3, "eot_token_id": 2, "eom_token_id": 3}
    opened(write_tiny_gguf(tmp_path / "model", said=said)).unpack(tmp_path / "base")
    settings = GenerationConfig.from_pretrained(tmp_path / "base")
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, [3, 2], 0)


@pytest.mark.parametrize(("family", "parts"), [("qwen2_moe", 0), ("qwen3_moe", 20)])
def test_stacked_experts_are_quantized_as_the_same_model_in_a_directory(
    family: str, parts: int, tmp_path: Path
) -> None:
    """A directory stores each expert; of qwen2_moe there is a shared one, whose gate llama.cpp stores as a vector."""
    said = {"chat_template": CHAT_TEMPLATE}
    sizes: dict[str, Any] = {"mlp_only_layers": []}
    file = write_tiny_gguf(tmp_path / "base", family, tensors_a_part=parts, said=said, **sizes)
    found = [
        quantize(str(model), recipe_of("rtn-g64"), tmp_path / f"{number}", CPU)
        for number, model in enumerate((file, tmp_path / "base"))
    ]
    of_file, of_directory = (
        {name: sha for name, sha in manifest.files.items() if "safetensors" in name} for manifest in found
    )
    assert of_file == of_directory
    assert found[0].quality == found[1].quality
    assert found[0].base.model_type == family


def test_an_expert_is_its_part_of_a_stack_in_blocks_of_few_bits(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path, "qwen3_moe", Kind.Q4_1, mlp_only_layers=[])
    stored = opened(file)
    stack = next(one for one in gguf.GGUFReader(file).tensors if one.name == "blk.2.ffn_down_exps.weight")
    values = torch.from_numpy(gguf.dequantize(stack.data, stack.tensor_type)).to(torch.bfloat16)
    for expert in range(8):
        name = f"model.layers.2.mlp.experts.{expert}.down_proj.weight"
        assert torch.equal(stored.read(name), values[expert])
        assert stored.shape(name) == values[expert].shape


@pytest.mark.parametrize(
    ("changed", "said", "message"),
    [
        ({}, {"qwen3moe.expert_weights_scale": 2}, "qwen3moe.expert_weights_scale, which transformers does not read"),
        ({"mlp_only_layers": [1]}, {}, "blk.1.ffn_(gate|up|down).weight, which"),
        ({}, {"qwen3moe.expert_feed_forward_length": 128}, "shape .64, 128., its configuration asks for .128, 128."),
        ({}, {"qwen3moe.expert_count": 6}, "mlp.gate.weight has shape .8, 128., its configuration asks for .6, 128."),
    ],
)  # fmt: skip
def test_experts_of_a_file_that_are_not_understood_are_refused(
    changed: dict[str, Any], said: dict[str, int], message: str, tmp_path: Path
) -> None:
    file = write_tiny_gguf(tmp_path, "qwen3_moe", said=said, **{"mlp_only_layers": [], **changed})
    plan = make_plan(find_model(str(file)), load_recipe("rtn-g64"))
    with pytest.raises(ModelError, match=message):
        checked_base(plan, stored_weights(plan))
