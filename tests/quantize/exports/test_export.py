"""AutoAWQ's and AutoGPTQ's formats: unpacked by their definition, they hold what the walk measured, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization.lifecycle.forward import dequantize
from tests.quantize.older_formats import UNPACK, Tensors, bits_of, random_linear
from tests.quantize.small_runs import CPU, PLAIN_CACHE, heldout_ids, mean_kld, recipe_of, tensors_of
from transformers import AutoModelForCausalLM

from lowbit_core.cli import main
from lowbit_core.errors import CheckpointError, OutputError
from lowbit_core.manifest import MANIFEST_NAME, Manifest, read_manifest
from lowbit_core.manifest_files import verify_files
from lowbit_quantize.export import autoawq, autogptq
from lowbit_quantize.export.exporter import Exporter, export
from lowbit_quantize.pipeline import quantize

EXPORTERS: dict[str, Exporter] = {"autoawq": autoawq.AutoAwq(), "autogptq": autogptq.AutoGptq()}
PACK = {"autoawq": autoawq.pack, "autogptq": autogptq.pack}
# The family, the target and the overrides of a checkpoint that is exported to it.
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "awq": ("llama", "autoawq", ()),
    "awq-asymmetric": ("qwen2", "autoawq", ("modules.0.scheme=W4A16_ASYM",)),
    "gptq": ("qwen2", "autogptq", ("modules.0.methods=[gptq]",)),
    "gptq-8": ("llama", "autogptq", ("modules.0.methods=[gptq]", "modules.0.scheme=W8A16")),
}
Pair = tuple[Path, Path, Manifest, Manifest]


def linear_of(tensors: Tensors, name: str) -> Tensors:
    return {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def dequantized_default(tensors: Tensors, name: str, bits: int) -> torch.Tensor:
    """(out, in) of a linear in compressed-tensors' format, by its own package."""
    linear = linear_of(tensors, name)
    shape = torch.Size(linear["weight_shape"].tolist())
    codes = unpack_from_int32(linear["weight_packed"], bits, shape)
    scale, zero = linear["weight_scale"].float(), linear.get("weight_zero_point")
    if zero is not None:
        zero = unpack_from_int32(zero, bits, torch.Size(scale.shape), packed_dim=0)
    weight: torch.Tensor = dequantize(codes, scale, zero)
    return weight


@pytest.fixture(scope="module")
def checkpoint(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`checkpoint(family, *overrides)` is a finished one, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(family: str, *overrides: str) -> Path:
        if (family, *overrides) not in made:
            out = tmp_path_factory.mktemp("checkpoint") / "out"
            quantize(str(tiny_model(family)), recipe_of("awq-g64", PLAIN_CACHE, *overrides), out, CPU)
            made[(family, *overrides)] = out
        return made[(family, *overrides)]

    return make


@pytest.fixture(params=list(CASES))
def pair(request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path: Path) -> Pair:
    """A checkpoint and its export, with their manifests."""
    family, to, overrides = CASES[request.param]
    before = checkpoint(family, *overrides)
    manifest = read_manifest(before)
    assert manifest is not None
    return before, tmp_path / "older", manifest, export(before, EXPORTERS[to], tmp_path / "older")


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize(
    ("name", "bits", "symmetric"),
    [("autoawq", 4, True), ("autoawq", 4, False), ("autogptq", 4, True), ("autogptq", 8, True)],
)
def test_packing_keeps_every_bit_of_every_weight(
    name: str, bits: int, symmetric: bool, group_size: int
) -> None:
    linear = random_linear(bits, group_size, symmetric=symmetric)
    packed = PACK[name](linear)
    assert torch.equal(bits_of(UNPACK[name](packed)), bits_of(linear.dequantize()))
    assert packed["scales"].dtype == torch.float16
    assert {packed[key].dtype for key in packed if key != "scales"} == {torch.int32}


def test_an_exported_checkpoint_holds_the_very_weights(pair: Pair) -> None:
    default, older = tensors_of(pair[0]), tensors_of(pair[1])
    before, after = pair[2:]
    assert after.export is not None
    for module in before.modules:
        ours = UNPACK[after.export.to](linear_of(older, module.name))
        assert torch.equal(
            bits_of(ours), bits_of(dequantized_default(default, module.name, int(module.bits)))
        )
    others = [key for key in default if not key.rpartition(".")[2].startswith("weight_")]
    assert all(torch.equal(default[key], older[key]) for key in others)
    assert any(key.endswith("q_proj.bias") for key in others) == (before.base.model_type == "qwen2")


def test_the_exports_manifest_repeats_what_was_measured_and_vouches_for_its_own_files(pair: Pair) -> None:
    before, after = pair[2:]
    assert read_manifest(pair[1]) == after
    verify_files(pair[1], after, hashes=True)
    assert after.quality == before.quality
    # What each linear takes is another format's; the sum is in `size`.
    assert after.modules == [module.model_copy(update={"bytes": None}) for module in before.modules]
    assert after.size.bytes == sum(tensor.nbytes for tensor in tensors_of(pair[1]).values())
    with pytest.raises(CheckpointError, match="was exported to auto"):
        export(pair[1], EXPORTERS["autoawq"], pair[1] / "again")


@pytest.mark.parametrize("case", ["awq-asymmetric"])
def test_what_is_unpacked_diverges_from_the_base_as_the_manifest_says(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    family, to, overrides = CASES[case]
    manifest = export(checkpoint(family, *overrides), EXPORTERS[to], tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    base, served = (
        AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.bfloat16) for _ in range(2)
    )
    state = {key: value for key, value in tensors.items() if key in served.state_dict()}
    for module in manifest.modules:
        weight = UNPACK[to](linear_of(tensors, module.name))
        state[f"{module.name}.weight"] = weight.to(torch.bfloat16)
    served.load_state_dict(state)
    ids = heldout_ids(tiny_model(family), recipe_of("awq-g64"))
    assert mean_kld(base, served, ids) == pytest.approx(manifest.quality.mean_kld, abs=1e-3)


def test_the_configuration_says_what_readers_ask_for(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    part = "modules=[{match: '*', scheme: W4A16, group_size: 64}, {match: 're:.*0.*o_proj', scheme: none}]"
    export(checkpoint("llama", part), EXPORTERS["autoawq"], tmp_path / "awq")
    export(checkpoint("llama"), EXPORTERS["autogptq"], tmp_path / "gptq")
    awq, gptq = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("awq", "gptq"))
    assert awq["dtype"] == gptq["dtype"] == "bfloat16"
    assert awq["quantization_config"] == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64, "zero_point": True,
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.o_proj"],
    }  # fmt: skip
    assert gptq["quantization_config"] == {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 64, "sym": True,
        "desc_act": False, "static_groups": True,
    }  # fmt: skip
    tool_file = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert tool_file == gptq["quantization_config"]
    assert not (tmp_path / "awq" / "quantize_config.json").exists()


@pytest.mark.parametrize("to", EXPORTERS)
def test_the_scales_of_an_fp8_cache_are_left_out_and_the_manifest_says_so(
    checkpoint: Callable[..., Path], tmp_path: Path, to: str
) -> None:
    source = checkpoint("llama", "kv_cache.dtype=fp8")
    assert any(key.endswith("k_scale") for key in tensors_of(source))
    manifest = export(source, EXPORTERS[to], tmp_path / "out")
    assert manifest.kv_cache is None
    assert manifest.export is not None
    assert manifest.export.left_out == ["scales of an FP8 KV cache"]
    assert not [key for key in tensors_of(tmp_path / "out") if key.endswith(("k_scale", "v_scale"))]


MIXED = "modules=[{match: '*', scheme: W4A16, group_size: 64}, {match: '*.o_proj', scheme: W4A16, group_size: 32}]"
FEW = "modules=[{match: '*.q_proj', scheme: none}, {match: '*.mlp.*', scheme: W4A16, group_size: 32}]"


@pytest.mark.parametrize(
    ("family", "to", "override", "message"),
    [
        ("llama", "autoawq", "modules.0.scheme=W8A16", "it holds integers of 4 bits, not W8A16"),
        ("llama", "autoawq", "modules.0.group_size=channel", "in groups of 32, 64, 128 only, not channels"),
        ("llama", "autoawq", MIXED, "one scheme for all linears, and this checkpoint has W4A16 in groups of"),
        ("llama", "autogptq", "modules.0.scheme=W4A16_ASYM", "vLLM refuses asymmetric linears in it"),
        ("llama", "autogptq", FEW, "cannot say that a linear stays as it is, and model.layers.0.self_attn.q_"),
        ("qwen3_moe", "autoawq", "modules.0.methods=[rtn]", "is for dense models and this one has experts"),
        ("qwen3_moe", "autogptq", "modules.0.methods=[rtn]", "is for dense models and this one has experts"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_in_one_line_and_nothing_is_written(
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    to: str,
    override: str,
    message: str,
) -> None:
    source = checkpoint(family, override)
    capsys.readouterr()
    assert main(["export", str(source), "--to", to, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_the_command_exports_and_its_last_line_is_json(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = checkpoint("llama"), tmp_path / "deeper" / "out"
    capsys.readouterr()
    assert main(["export", str(source), "--to", "autogptq", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (printed["to"], printed["left_out"]) == ("autogptq", [])
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    capsys.readouterr()
    assert main(["export", str(source), "--to", "autogptq", "--out", str(out)]) == 2
    assert "is not an empty directory" in capsys.readouterr().err


def test_a_directory_that_is_no_checkpoint_is_not_exported(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST_NAME}"):
        export(tiny_model("llama"), EXPORTERS["autoawq"], tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="is not an empty directory"):
        export(checkpoint("llama"), EXPORTERS["autoawq"], tmp_path / "out")
