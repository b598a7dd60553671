"""A scheme, a method, a pass and an exporter are one file each: four of them, in additions/, and what they do."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.runs.additions.dequantized import Dequantized
from tests.quantize.runs.additions.measure_layers import MeasureLayersKind
from tests.quantize.runs.additions.powers_of_two import PRESET, PowersOfTwo, nearest
from tests.quantize.runs.additions.random_rounding import RandomRounding
from tests.quantize.runs.additions.rescale_experts import RescaleExpertsKind
from tests.quantize.small_runs import CPU, recipe_with, reloaded_kld, stored_bytes, tensors_of

from lowbit_core.errors import CheckpointError, RecipeError
from lowbit_core.manifest import Manifest
from lowbit_quantize.catalog import CATALOG, Catalog
from lowbit_quantize.check.forecast import tensor_bytes
from lowbit_quantize.check.sharding import obstacles
from lowbit_quantize.export.exporter import Exporter, export
from lowbit_quantize.methods.method import Method
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.passes.kind import PassKind
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.schemes.scheme import Scheme

MORE = Catalog(
    presets=(*CATALOG.presets, PRESET),
    methods=(*CATALOG.methods, RandomRounding()),
    passes=(*CATALOG.passes, RescaleExpertsKind()),
)
POWERS = {"match": "*", "scheme": "POWERS_OF_TWO", "group_size": 32}
NEAREST = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
PRUNE: dict[str, Any] = {"prune_experts": {"prune_ratio": 0.5}}


def test_each_keeps_its_protocol() -> None:
    """For mypy: an assignment that does not hold is an error there."""
    scheme: Scheme = PowersOfTwo(64)
    method: Method = RandomRounding()
    kind: PassKind = RescaleExpertsKind()
    exporter: Exporter = Dequantized()
    assert [scheme.name, method.name, kind.name, exporter.name] == [
        "POWERS_OF_TWO", "random_rounding", "rescale_experts", "dequantized",
    ]  # fmt: skip


def run(model: Path, recipe: Recipe, out: Path, catalog: Catalog = MORE) -> Manifest:
    return quantize(str(model), recipe, out, CPU, catalog=catalog)


def test_codes_are_the_nearest_powers_of_two() -> None:
    values = torch.linspace(-70, 70, 5001)
    powers = torch.tensor([0.0, *(sign * 2.0**k for sign in (-1, 1) for k in range(7))])
    distance = (values.unsqueeze(1) - powers).abs()
    assert torch.equal((values - nearest(values)).abs(), distance.amin(1))


@pytest.mark.parametrize(
    ("family", "methods"), [("qwen2", ["awq", "gptq"]), ("qwen3_moe", ["random_rounding"]), ("phi3", ["awq"])]
)
def test_a_scheme_of_one_file_runs_through_every_method_and_reloads(
    tiny_model: Callable[[str], Path], family: str, methods: list[str], tmp_path: Path
) -> None:
    recipe, model = recipe_with({**POWERS, "methods": methods}), tiny_model(family)
    manifest = run(model, recipe, tmp_path / "out")
    plan = make_plan(find_model(str(model)), recipe, MORE)
    assert tensor_bytes(plan) == manifest.size.bytes == stored_bytes(tmp_path / "out")
    assert obstacles(plan, "gpu", 1) == []
    assert {(m.scheme, m.bits, m.group_size, tuple(m.methods)) for m in manifest.modules} == {
        ("POWERS_OF_TWO", 8, 32, tuple(methods))
    }
    assert reloaded_kld(model, tmp_path / "out", recipe) == pytest.approx(manifest.quality.mean_kld, abs=1e-3)
    assert manifest.quality.mean_kld > 1e-4


def test_it_stands_beside_other_schemes_in_one_model(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_with(NEAREST, {**POWERS, "match": "*.mlp.*", "methods": ["rtn"]})
    manifest = run(tiny_model("llama"), recipe, tmp_path / "out")
    assert {m.scheme for m in manifest.modules if ".mlp." in m.name} == {"POWERS_OF_TWO"}
    assert {m.scheme for m in manifest.modules if ".self_attn." in m.name} == {"W4A16"}
    assert reloaded_kld(tiny_model("llama"), tmp_path / "out", recipe) == pytest.approx(
        manifest.quality.mean_kld, abs=1e-3
    )


def test_who_does_not_know_it_says_so(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_with({**POWERS, "methods": ["rtn"]})
    with pytest.raises(RecipeError, match="'POWERS_OF_TWO' is unknown; allowed are W4A16, "):
        run(tiny_model("llama"), recipe, tmp_path / "out", CATALOG)
    assert not (tmp_path / "out").exists()
    run(tiny_model("llama"), recipe, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is stored as POWERS_OF_TWO, which this Lowbit does not know"):
        export(tmp_path / "out", Dequantized(), tmp_path / "plain")


def test_a_method_of_one_file_depends_on_its_seed_and_errs_more_than_the_nearest_code(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_with({**NEAREST, "methods": ["random_rounding"]})
    seeds = {
        seed: dataclasses.replace(MORE, methods=(*CATALOG.methods, RandomRounding(seed))) for seed in (0, 7)
    }
    model = tiny_model("llama")
    first, again, other = (
        run(model, recipe, tmp_path / name, seeds[seed]) for name, seed in (("a", 0), ("b", 0), ("c", 7))
    )
    assert first.files == again.files
    assert first.files != other.files
    nearest_code = run(model, recipe_with(NEAREST), tmp_path / "nearest", CATALOG)
    assert sum(m.error for m in first.modules) > sum(m.error for m in nearest_code.modules)


def test_random_rounding_is_right_in_the_mean() -> None:
    scheme = CATALOG.presets[0].make(32)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    drawn = [RandomRounding(seed).quantize(weight, torch.eye(64), scheme).dequantize() for seed in range(300)]
    step = scheme.search(weight, None)["scale"].repeat_interleave(32, dim=1)
    inside = weight.abs() < 6 * step  # beyond, codes are clipped
    off = (torch.stack(drawn).mean(0) - weight) / step
    assert off[inside].abs().mean() < 0.06
    assert ((RandomRounding().quantize(weight, torch.eye(64), scheme).dequantize() - weight) / step)[
        inside
    ].abs().mean() > 0.2


def test_a_pass_of_one_file_brings_layers_nearer_to_the_base(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every tensor but the last linears of the experts that stay is as without it; those are off by one factor each."""
    model, passes = tiny_model("qwen3_moe"), [PRUNE, {"rescale_experts": {"most": 4.0}}]
    pruned = run(model, recipe_with(passes=[PRUNE]), tmp_path / "pruned")
    rescaled = run(model, recipe_with(passes=passes), tmp_path / "rescaled")
    before, after = (tensors_of(tmp_path / name) for name in ("pruned", "rescaled"))
    first = "model.layers.1.mlp"  # the first that routes: both kept the same experts of it
    assert pruned.experts is not None
    assert rescaled.experts is not None
    assert pruned.experts.kept_by_layer[1] == rescaled.experts.kept_by_layer[1]
    factors = []
    for name in (name for name in before if name.startswith(f"{first}.")):
        if not name.endswith("down_proj.weight"):
            assert torch.equal(before[name], after[name])
            continue
        ratio = after[name].float() / before[name].float()
        factors.append(float(ratio[before[name] != 0].median()))
        torch.testing.assert_close(
            after[name].float(), before[name].float() * factors[-1], rtol=1e-2, atol=1e-4
        )
    assert factors == pytest.approx([factors[0]] * 4, rel=1e-2)
    assert factors[0] != pytest.approx(1, abs=1e-2)
    assert 0.25 <= factors[0] <= 4


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("methods", [["awq"], ["awq", "gptq"]])
def test_a_pass_after_quantize_sees_quantized_layers_and_changes_no_file(
    tiny_model: Callable[[str], Path], methods: list[str], family: str, tmp_path: Path
) -> None:
    rule, model = {**NEAREST, "methods": methods}, tiny_model(family)
    measuring = dataclasses.replace(MORE, passes=(*MORE.passes, MeasureLayersKind()))
    plain = run(model, recipe_with(rule), tmp_path / "plain")
    passes = ["quantize", "measure_layers"]
    measured = run(model, recipe_with(rule, passes=passes), tmp_path / "measured", measuring)
    assert measured.files == plain.files
    assert measured.quality == plain.quality
    assert list(measured.figures) == [0, 1, 2]
    assert all(1e-4 < layer["error"] < 0.5 for layer in measured.figures.values())


def test_its_options_and_its_place_are_checked_like_any_others(tiny_model: Callable[[str], Path]) -> None:
    reference = find_model(str(tiny_model("qwen3_moe")))

    def refusal(*passes: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            make_plan(reference, recipe_with(NEAREST, passes=passes), MORE)
        return str(caught.value)

    assert "passes.1.rescale_experts: most = 1.0" in refusal(
        PRUNE, {"rescale_experts": {"most": 1.0}}, "quantize"
    )
    assert "unknown key 'least'; allowed here: most" in refusal(PRUNE, {"rescale_experts": {"least": 1}})
    assert "rescale_experts needs prune_experts before it" in refusal("rescale_experts", "quantize")
    assert "rescale_experts stands after quantize; put it before" in refusal(
        PRUNE, "quantize", "rescale_experts"
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_an_exporter_of_one_file_writes_what_plain_transformers_reads(
    tiny_model: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """All four at once: pruned, rescaled, powers of two by random rounding, exported."""
    model, passes = tiny_model(family), ["quantize"]
    if family == "qwen3_moe":
        passes = [PRUNE, "rescale_experts", "quantize"]  # type: ignore[list-item]
    recipe = recipe_with({**POWERS, "methods": ["random_rounding"]}, passes=passes)
    manifest = run(model, recipe, tmp_path / "out")
    exported = export(tmp_path / "out", Dequantized(), tmp_path / "plain", MORE)
    assert exported.quality == manifest.quality
    assert reloaded_kld(model, tmp_path / "plain", recipe) == pytest.approx(
        manifest.quality.mean_kld, abs=1e-3
    )
    assert exported.size.linear_bits_per_weight == 16
    assert not [name for name in tensors_of(tmp_path / "plain") if "weight_" in name]
