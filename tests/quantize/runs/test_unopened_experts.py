"""Routed experts in int8, which plain transformers does not open: another reader does, before a manifest is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests.quantize.small_runs import CPU, recipe_with, stored_bytes, tensors_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit_core.inspection import describe
from lowbit_core.manifest import Manifest, read_manifest
from lowbit_quantize.check.preflight import dry_run, table
from lowbit_quantize.check.unopened import unpacking_problem
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.run.journal import UnopenedLinear
from lowbit_quantize.schemes.processors.experts import EXPERTS
from lowbit_quantize.schemes.scheme import SAMPLE_NUMBERS, sample_of

W8A8 = {"match": "*", "scheme": "W8A8", "methods": ["rtn"]}
ATTENTION = {"match": "*.self_attn.*", "scheme": "W4A16", "group_size": 32, "methods": ["rtn"]}
LINEAR = "model.layers.1.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("family", "rules", "passes"),
    [
        ("qwen3_moe", [W8A8], [{"prune_experts": {"prune_ratio": 0.5}}, "quantize"]),
        ("mixtral", [W8A8, ATTENTION], ["quantize"]),
        ("deepseek_v2", [W8A8 | {"match": "*.experts.*"}], ["quantize"]),
    ],
    ids=["half of them", "beside 4 bits", "nothing else"],
)
def test_the_manifest_and_the_dry_run_say_which_reader_opens_them(
    tiny_model: Callable[[str], Path],
    family: str,
    rules: list[dict[str, object]],
    passes: list[object],
    tmp_path: Path,
) -> None:
    base, recipe, out = tiny_model(family), recipe_with(*rules, passes=passes), tmp_path / "out"
    report = dry_run(str(base), recipe, 24.0, 1 << 30)
    manifest = quantize(str(base), recipe, out, CPU)
    experts = [module.name for module in manifest.modules if ".experts." in module.name]
    (said,) = manifest.unopened
    assert (said.scheme, said.linears, said.example) == ("W8A8", len(experts), experts[0])
    assert [said.model_dump()] == report["unopened"]
    assert report["tensor_bytes"] == manifest.size.bytes == stored_bytes(out)
    words = f"does not open {len(experts)} linears in W8A8 ({experts[0]}, …); compressed-tensors does"
    for shown in (table(report), describe(manifest, verified=False)):
        assert words in printed(shown)
    assert f"run on {EXPERTS['W8A8'].words}" in printed(table(report))
    with pytest.raises(RuntimeError, match="conversion"):  # once it opens them, it is the reader again
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)


def printed(table: object) -> str:
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_fp8_experts_are_opened_by_transformers_and_run_on_no_cpu(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_model("qwen3_moe")
    recipe = recipe_with({"match": "*", "scheme": "FP8_DYNAMIC", "methods": ["rtn"]})
    report = dry_run(str(base), recipe, 24.0, 1 << 30)
    manifest = quantize(str(base), recipe, tmp_path / "out", CPU)
    assert manifest.unopened == report["unopened"] == []
    one = report["tensor_parallel"][0]["obstacles"]
    assert one["gpu"] == []
    assert "no kernel for experts in FP8_DYNAMIC" in one["cpu"][0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)


def test_int8_experts_are_split_in_parts_that_the_cpus_kernel_takes(
    tiny_model: Callable[[str], Path],
) -> None:
    """64 middle channels: 32 on each of two ranks, 16 on each of four."""
    report = dry_run(str(tiny_model("qwen3_moe")), recipe_with(W8A8), 24.0, 1 << 30)
    _, two, four, _ = report["tensor_parallel"]
    assert two["obstacles"] == {"gpu": [], "cpu": []}
    assert four["obstacles"]["gpu"] == []
    assert "int8 experts need channels of 32s, not 16" in four["obstacles"]["cpu"][0]
    assert four["expert_parallel_obstacles"]["cpu"] == []


@pytest.fixture(scope="module")
def written(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, UnopenedLinear]]:
    """A checkpoint of int8 experts, and what they stand for, found the slow way."""
    out = tmp_path_factory.mktemp("unopened") / "out"
    quantize(str(tiny_model("qwen3_moe")), recipe_with(W8A8 | {"match": "*.experts.*"}), out, CPU)
    tensors = tensors_of(out)
    names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    weights = {name: tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"] for name in names}
    return out, {
        name: UnopenedLinear(shape=(len(weight), weight.shape[1]), sample=sample_of(weight))
        for name, weight in weights.items()
    }


Change = Callable[[dict[str, Tensor], Path], None]


def swap(tensors: dict[str, Tensor], _: Path) -> None:
    other = LINEAR.replace("up_proj", "gate_proj")
    for part in ("weight", "weight_scale"):
        one, two = f"{LINEAR}.{part}", f"{other}.{part}"
        tensors[one], tensors[two] = tensors[two], tensors[one]


def lose(tensors: dict[str, Tensor], _: Path) -> None:
    del tensors[f"{LINEAR}.weight_scale"]


def lose_whole(tensors: dict[str, Tensor], directory: Path) -> None:
    lose(tensors, directory)
    del tensors[f"{LINEAR}.weight"]


def widen(tensors: dict[str, Tensor], _: Path) -> None:
    tensors[f"{LINEAR}.weight"] = tensors[f"{LINEAR}.weight"].to(torch.int16)


def transpose(tensors: dict[str, Tensor], _: Path) -> None:
    tensors[f"{LINEAR}.weight"] = tensors[f"{LINEAR}.weight"].T.contiguous()
    tensors[f"{LINEAR}.weight_scale"] = torch.ones(tensors[f"{LINEAR}.weight"].shape[0], 1)


def shorten(tensors: dict[str, Tensor], _: Path) -> None:
    tensors[f"{LINEAR}.weight"] = tensors[f"{LINEAR}.weight"][:, :-1].contiguous()


def scale(tensors: dict[str, Tensor], _: Path) -> None:
    tensors[f"{LINEAR}.weight_scale"] = tensors[f"{LINEAR}.weight_scale"].to(torch.bfloat16)


def misname(_: dict[str, Tensor], directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace("layers[.]1[.]", "layers[.]9[.]"))


def say_four_bits(_: dict[str, Tensor], directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["type"] = "float"
    path.write_text(json.dumps(config))


def name_twice(_: dict[str, Tensor], directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap, "to other numbers than were measured"),
        (lose, "is stored as weight, not as weight, weight_scale"),
        (lose_whole, f"1 linears are missing, the first is {LINEAR}"),
        (widen, "is torch.int16, its group says torch.int8"),
        (transpose, "has the shape"),
        (shorten, "has the shape"),
        (scale, "to other numbers than were measured"),
        (misname, "no group of its quantization_config names"),
        (say_four_bits, "its group says torch.float8_e4m3fn"),
        (name_twice, "2 groups of its quantization_config name"),
    ],
)
def test_what_another_reader_would_read_otherwise_is_found(
    written: tuple[Path, dict[str, UnopenedLinear]], change: Change, words: str, tmp_path: Path
) -> None:
    source, expected = written
    assert unpacking_problem(source, expected) is None
    out = tmp_path / "out"
    shutil.copytree(source, out)
    file = next(path for path in sorted(out.glob("*.safetensors")) if f"{LINEAR}.weight" in load_file(path))
    tensors = load_file(file)
    change(tensors, out)
    save_file(tensors, file)
    assert words in str(unpacking_problem(out, expected))


def test_a_sample_is_spread_over_rows_and_columns() -> None:
    weight = torch.arange(64 * 128, dtype=torch.float32).view(64, 128)
    numbers = sample_of(weight)
    assert len(numbers) == SAMPLE_NUMBERS
    assert (
        len({int(number) // 128 for number in numbers})
        == len({int(number) % 128 for number in numbers})
        == 16
    )
    assert sample_of(torch.ones(2, 3)) == [1.0] * 6


def test_a_manifest_of_before_says_nothing_of_readers(
    written: tuple[Path, dict[str, UnopenedLinear]],
) -> None:
    manifest = read_manifest(written[0])
    assert manifest is not None
    older = json.loads(manifest.model_dump_json())
    del older["unopened"]
    assert "plain transformers" not in printed(describe(Manifest.model_validate(older), verified=False))
