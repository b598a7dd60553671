"""Tuning a quantized layer: its gradients, what it may change, and that it stays where nothing is gained."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import CPU, recipe_with, reloaded_kld, tensors_of
from torch import Tensor, nn

from lowbit_core.errors import RecipeError
from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.passes.learned_linear import LearnedLinear
from lowbit_quantize.passes.tune import Tune, TuneKind, TuneOptions, judging_rows
from lowbit_quantize.passes.tune_layer import straight_through
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Quantized
from lowbit_quantize.walk.layer import LayerContext

W3 = {"match": "*", "scheme": "W3A16", "group_size": 64, "methods": ["gptq"]}
TUNED: list[Any] = ["quantize", {"tune": {"epochs": 20}}]
SCHEMES = (
    Integer(2, 32, True, "W2A16"),
    Integer(3, 32, True, "W3A16"),
    Integer(4, None, True, "W4A16"),
    Integer(4, 32, False, "W4A16_ASYM"),
)


class Stopped(Exception):
    """In place of a kill."""


class StoppingTune(Tune):
    """Ends the process' work in the second layer."""

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        if context.index == 1:
            raise Stopped
        super().run(layer, context)


class StoppingKind(TuneKind):
    def make(self, options: TuneOptions, config: Any, architecture: Architecture, model: str) -> Tune:
        return StoppingTune(architecture, options)


STOPPING = tuple(StoppingKind() if isinstance(kind, TuneKind) else kind for kind in CATALOG.passes)


def quantized_of(scheme: Integer, outputs: int = 6, inputs: int = 64) -> Quantized:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3))
    params = scheme.search(weight, None)
    return Quantized(scheme.quantize(weight, params), params, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name}-{scheme.group_size}")
def test_gradients_of_codes_and_scales_are_those_of_finite_differences(scheme: Integer) -> None:
    """Of a loss that is quadratic in the weight, so that central differences are exact but for rounding."""
    found = quantized_of(scheme)
    learned, inputs = LearnedLinear(found, torch.float32), torch.randn(9, 64, dtype=torch.float64)

    def loss(codes: Tensor, scale: Tensor) -> float:
        weight = scheme.dequantize(codes, found.params | {"scale": scale})  # type: ignore[operator]
        return float((inputs @ weight.double().T).square().sum())

    weight = learned.weight()
    with torch.enable_grad():
        total = (inputs @ weight.double().T).square().sum()
    by_codes, by_scale = learned.gradients(torch.autograd.grad(total, weight)[0])
    codes, scale, step = found.codes.double(), found.params["scale"].double(), 1e-2
    for row, column in ((0, 0), (2, 31), (5, 63)):
        nudge = torch.zeros_like(codes)
        nudge[row, column] = step
        slope = (loss(codes + nudge, scale) - loss(codes - nudge, scale)) / (2 * step)
        assert float(by_codes[row, column]) == pytest.approx(slope, rel=2e-3, abs=1e-2)
    for row, group in ((0, 0), (5, scale.shape[1] - 1)):
        nudge = torch.zeros_like(scale)
        nudge[row, group] = step
        slope = (loss(codes, scale + nudge) - loss(codes, scale - nudge)) / (2 * step)
        assert float(by_scale[row, group]) == pytest.approx(slope, rel=2e-3, abs=1e-2)


def test_a_code_moves_only_where_steps_agree_and_stays_in_its_range() -> None:
    scheme = SCHEMES[0]
    found = quantized_of(scheme)
    learned = LearnedLinear(found, torch.float32)
    up = -torch.ones(6, 64) * found.params["scale"].repeat_interleave(32, 1).sign()
    for sign in (1, -1, 1, -1):
        learned.move(sign * up, 0.3, 0.0)
    assert torch.equal(learned.quantized.codes, found.codes)
    for _ in range(40):
        learned.move(up, 0.3, 0.0)
    assert set(learned.quantized.codes.unique().tolist()) == {scheme.highest}


def test_gradients_pass_through_a_rounded_cache() -> None:
    keys, values = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(2))
    rounded = straight_through(lambda k, v: (k.round(), v.round()))(keys, values)
    assert torch.equal(rounded[0], keys.round())
    (given,) = torch.autograd.grad((rounded[0] * 3).sum() + rounded[1].sum(), keys)
    assert torch.equal(given, torch.full_like(keys, 3))


@pytest.mark.parametrize(("rows", "every"), [(32, 8), (64, 8), (16, 4), (72, 6)])
def test_all_of_four_domains_in_turns_judge(rows: int, every: int) -> None:
    found = judging_rows(rows, every)
    assert len(found) == rows // every
    assert {row % 4 for row in found} == {0, 1, 2, 3}


@pytest.mark.parametrize(("rows", "every"), [(2, 8), (3, 2), (9, 8), (17, 5)])
def test_some_rows_judge_and_some_teach(rows: int, every: int) -> None:
    found = judging_rows(rows, every)
    assert found == sorted(set(found))
    assert 0 < len(found) < rows
    assert all(0 <= row < rows for row in found)


@pytest.mark.parametrize("scheme", ["W2A16", "W4A16", "W4A16_ASYM"])
def test_tuning_lowers_each_layers_error_on_rows_set_aside_or_leaves_it(
    tiny_model: Callable[[str], Path], tmp_path: Path, scheme: str
) -> None:
    base, rule = tiny_model("llama"), W3 | {"scheme": scheme}
    plain = quantize(str(base), recipe_with(rule), tmp_path / "plain", CPU)
    recipe = recipe_with(rule, passes=TUNED)
    tuned = quantize(str(base), recipe, tmp_path / "tuned", CPU)
    assert len(tuned.figures) == 3
    before, after = (
        [one[f"tuning_error_{when}"] for one in tuned.figures.values()] for when in ("before", "after")
    )
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert sum(after) < sum(before)
    assert tuned.files != plain.files
    assert reloaded_kld(base, tmp_path / "tuned", recipe) == pytest.approx(tuned.quality.mean_kld, rel=0.05)


def test_a_model_in_half_precision_is_tuned_too(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_with(W3, passes=TUNED, base={"dtype": "float16"})
    tuned = quantize(str(tiny_model("llama")), recipe, tmp_path / "tuned", CPU)
    assert all(one["tuning_error_after"] < one["tuning_error_before"] for one in tuned.figures.values())


def test_one_calibration_row_is_too_few(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_with(W3, passes=TUNED, calibration={"num_samples": 1, "max_seq_length": 64})
    with pytest.raises(RecipeError, match="num_samples is 1"):
        quantize(str(tiny_model("llama")), recipe, tmp_path / "tuned", CPU)


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Killed by a pass that raises in the second layer, and taken up by the recipe's own."""
    base, recipe = str(tiny_model("llama")), recipe_with(W3, passes=TUNED)
    whole = quantize(base, recipe, tmp_path / "whole", CPU)
    with pytest.raises(Stopped):
        quantize(
            base, recipe, tmp_path / "killed", CPU, catalog=dataclasses.replace(CATALOG, passes=STOPPING)
        )
    again = quantize(base, recipe, tmp_path / "killed", CPU)
    assert again.files == whole.files


def test_without_rates_everything_stays_as_the_method_left_it(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = str(tiny_model("llama"))
    still = [*TUNED[:1], {"tune": {"epochs": 1, "code_travel": 0, "scale_rate": 0, "norm_rate": 0}}]
    quantize(base, recipe_with(W3), tmp_path / "plain", CPU)
    quantize(base, recipe_with(W3, passes=still), tmp_path / "still", CPU)
    plain, unmoved = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "still")
    assert plain.keys() == unmoved.keys()
    assert all(torch.equal(plain[name], unmoved[name]) for name in plain)


@pytest.mark.parametrize(
    ("family", "rule", "words"),
    [
        ("llama", W3 | {"scheme": "W8A16"}, "codes are learned of W2A16, W3A16, W4A16 and W4A16_ASYM"),
        ("llama", {"match": "*", "scheme": "FP8_DYNAMIC"}, "codes are learned of"),
        ("qwen3_moe", W3 | {"scheme": "W4A16"}, "routed experts"),
        ("gemma3n_text", W3 | {"group_size": 32}, "more than one stream"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_line(
    tiny_model: Callable[[str], Path], family: str, rule: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        make_plan(find_model(str(tiny_model(family))), recipe_with(rule, passes=TUNED))
    assert "\n" not in str(refused.value)


def test_tune_stands_after_quantize(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match="tune needs quantize before it"):
        make_plan(find_model(str(tiny_model("llama"))), recipe_with(W3, passes=[{"tune": {}}, "quantize"]))
