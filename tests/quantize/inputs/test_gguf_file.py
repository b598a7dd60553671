"""A GGUF file's tensors, held against transformers' own loading of the whole."""

from pathlib import Path

import gguf
import pytest
import torch
from tests.quantize.small_runs import CPU, recipe_of
from tests.quantize.tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from lowbit_core.errors import ModelError
from lowbit_quantize.check.weights import stored_weights
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
