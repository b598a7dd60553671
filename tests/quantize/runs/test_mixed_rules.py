"""Different bits, groups and methods in one model, end to end."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quantize.small_runs import CPU, PLAIN_EXPERTS, recipe_with, reloaded_kld, stored_bytes, tensors_of
from tests.tiny_models import write_tiny_model

from lowbit_core.manifest import Manifest
from lowbit_core.module_groups import module_groups, weights_summary
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import Recipe

UNTOUCHED = (0, 3)
DENSE = recipe_with(
    {"match": "*.self_attn.*", "scheme": "W4A16", "group_size": 32, "methods": ["rtn"]},
    {"match": "*.mlp.*", "scheme": "W4A16", "group_size": 64},
    {"match": "re:.*[.][2-4][.].*down_proj", "scheme": "W4A16_ASYM", "group_size": 32, "methods": ["awq", "gptq"]},
    {"match": [f"model.layers.{layer}.*" for layer in UNTOUCHED], "scheme": "none"},
)  # fmt: skip
ROUTED = recipe_with(
    {"match": "*.experts.*", "scheme": "W4A16", "group_size": 64},
    {"match": "*.self_attn.*", "scheme": "W8A16", "methods": ["gptq"]},
    {"match": "*.shared_expert.*", "scheme": "W4A16_ASYM", "group_size": 32},
)
Run = tuple[Path, Path, Recipe, Manifest]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("mixed")
    model = write_tiny_model(directory / "model", "llama", intermediate_size=256, num_hidden_layers=5)
    return model, directory / "out", DENSE, quantize(str(model), DENSE, directory / "out", CPU)


@pytest.fixture(scope="module")
def routed(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    out, model = tmp_path_factory.mktemp("mixed") / "out", tiny_model("qwen2_moe")
    return model, out, ROUTED, quantize(str(model), ROUTED, out, CPU)


@pytest.fixture(params=["dense", "routed"])
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue(request.param)
    return found


def test_a_mix_reloads_as_it_was_measured(run: Run) -> None:
    base, out, recipe, manifest = run
    assert reloaded_kld(base, out, recipe) == pytest.approx(manifest.quality.mean_kld, abs=1e-3)
    assert manifest.quality.mean_kld > 1e-4


def test_the_forecast_of_a_mix_is_its_files_to_the_byte(run: Run) -> None:
    base, out, recipe, manifest = run
    report = dry_run(str(base), recipe, 24.0, 1 << 30)
    assert report["tensor_bytes"] == manifest.size.bytes == stored_bytes(out)


def test_the_manifest_names_what_each_linear_is(dense: Run) -> None:
    manifest = dense[3]
    kinds = Counter((m.scheme, m.bits, m.group_size, m.symmetric, tuple(m.methods)) for m in manifest.modules)
    assert kinds == {
        ("W4A16", 4, 32, True, ("rtn",)): 3 * 4,
        ("W4A16", 4, 64, True, ("awq",)): 3 * 3 - 2,
        ("W4A16_ASYM", 4, 32, False, ("awq", "gptq")): 2,
    }
    assert {name.split(".")[2] for name in manifest.unquantized} == set(map(str, UNTOUCHED))
    assert len(manifest.unquantized) == len(UNTOUCHED) * 7
    assert weights_summary(manifest) == {
        "scheme": "W4A16+W4A16_ASYM", "bits": "4", "group_size": "32+64", "methods": "rtn+awq+gptq",
    }  # fmt: skip
    assert sum(group.linears for group in module_groups(manifest)) == len(manifest.modules)


def test_groups_of_the_configuration_name_every_linear_once(run: Run) -> None:
    """By full names, and by one anchored pattern for the experts of a layer; nothing hangs on the order of groups.

    Beside them stand joint matrices that vLLM builds of some linears and lists nowhere.
    """
    _, out, _, manifest = run
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"]
    named = [
        target for group in groups.values() for target in group["targets"] if not target.startswith("re:")
    ]
    assert len(named) == len(set(named))
    plain = {module.name: module for module in manifest.modules if ".experts." not in module.name}
    joint = {
        name.replace("gate_proj", "gate_up_proj"): module
        for name, module in plain.items()
        if ".shared_" in name
    }
    plain |= {name: module for name, module in joint.items() if name.endswith("gate_up_proj")}
    assert set(named) == set(plain)
    for group in groups.values():
        weights = group["weights"]
        for target in group["targets"]:
            if target.startswith("re:"):
                assert target.startswith("re:^model[.]layers[.]")
                continue
            module = plain[target]
            assert (weights["num_bits"], weights["group_size"]) == (module.bits, module.group_size)
            assert weights["symmetric"] == module.symmetric
    assert set(config["ignore"]) >= {"lm_head", *manifest.unquantized}


def test_untouched_layers_are_the_bases_to_the_last_bit(dense: Run) -> None:
    base, mixed = tensors_of(dense[0]), tensors_of(dense[1])
    for name, tensor in base.items():
        if any(f".layers.{layer}." in name for layer in UNTOUCHED):
            assert torch.equal(mixed[name], tensor), name
        elif name.endswith("_proj.weight"):
            assert name not in mixed


def test_gptq_runs_only_where_a_rule_says_so(dense: Run, tmp_path: Path) -> None:
    """A layer before the first such linear is to the last bit what it is where GPTQ is nowhere."""
    model, out, _, _ = dense
    without = DENSE.model_copy(update={"modules": (*DENSE.modules[:2], DENSE.modules[3])})
    quantize(str(model), without, tmp_path / "without", CPU)
    mixed, plain = tensors_of(out), tensors_of(tmp_path / "without")
    for name in mixed:
        if name.startswith("model.layers.1."):
            assert torch.equal(mixed[name], plain[name]), name
    zeros = [name for name in sorted(mixed) if name.endswith("weight_zero_point")]
    assert zeros == [f"model.layers.{layer}.mlp.down_proj.weight_zero_point" for layer in (2, 4)]


@pytest.mark.parametrize(("family", "method"), [("olmoe", "rtn"), ("qwen2_moe", "awq")])
def test_plain_experts_beside_quantized_linears_reload(
    tiny_model: Callable[[str], Path], family: str, method: str, tmp_path: Path
) -> None:
    """They are the base's, or, where their norm takes a scale, that by powers of two."""
    recipe = recipe_with(
        {"match": "*", "scheme": "W4A16", "group_size": 32, "methods": method}, PLAIN_EXPERTS
    )
    base = tiny_model(family)
    manifest = quantize(str(base), recipe, tmp_path / "out", CPU)
    assert reloaded_kld(base, tmp_path / "out", recipe) == pytest.approx(manifest.quality.mean_kld, abs=1e-3)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name in (name for name in before if ".experts." in name):
        factor = (after[name].float() / before[name].float())[before[name] != 0]
        assert torch.equal(factor.log2(), factor.log2().round()), name
        assert (factor == 1).all() or method == "awq"
