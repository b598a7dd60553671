"""Patterns of zeros, the masks of three methods, and the best numbers on a mask, against obvious slow versions."""

from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.methods.awq import Awq
from lowbit_quantize.methods.gptq import Gptq
from lowbit_quantize.methods.magnitude import Magnitude
from lowbit_quantize.methods.method import Method
from lowbit_quantize.methods.pruner import Pruner
from lowbit_quantize.methods.rtn import RoundToNearest
from lowbit_quantize.methods.smoothquant import SmoothQuant
from lowbit_quantize.methods.sparsegpt import SparseGpt, obs_mask
from lowbit_quantize.methods.sparsity import (
    RIDGE,
    NofM,
    Ratio,
    Sparsity,
    ridged,
    solve_on_mask,
    sparsity_of,
)
from lowbit_quantize.methods.wanda import Wanda
from lowbit_quantize.schemes.dense import Dense
from lowbit_quantize.schemes.scheme import Scheme
from lowbit_quantize.statistics.hessian import output_error
from lowbit_quantize.walk.module_plan import ModulePlan

PATTERNS: tuple[Sparsity, ...] = (NofM(2, 4), NofM(4, 8), Ratio(0.5), Ratio(0.3), Ratio(0.9))
PRUNERS = (Magnitude, Wanda, SparseGpt)
SCHEMES = [
    preset.make(64 if preset.name == "W4A16" else preset.group_size)
    for preset in CATALOG.presets
    if preset.name
    in ("W4A16", "W4A16_ASYM", "W2A16", "W3A16", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "NVFP4", "MXFP4", "MXFP8")
]  # fmt: skip


def problem(features: int = 128, rows: int = 40, several: int = 1, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Weights (n, rows, features), and the Hessians of inputs that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + 0.4 * torch.eye(features)
    inputs = torch.randn(several, 700, features, generator=generator) @ mix
    inputs = inputs * torch.rand(features, generator=generator).square() + 0.1
    return torch.randn(several, rows, features, generator=generator), inputs.mT @ inputs / 700


@pytest.mark.parametrize("kind", PRUNERS)
@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
@pytest.mark.parametrize("features", [64, 136, 264])
def test_the_pattern_is_exact(kind: type[Pruner], sparsity: Sparsity, features: int) -> None:
    weight, hessian = problem(features)
    found = kind(sparsity).prune(weight[0], hessian[0])
    assert torch.equal(found.weight != 0, found.mask)
    if isinstance(sparsity, NofM):
        assert (found.mask.unflatten(1, (-1, sparsity.of)).sum(-1) == sparsity.kept).all()
    else:
        assert (found.mask.sum(1) == features - round(sparsity.zeros * features)).all()
    assert sparsity.holds(found.weight)
    more = found.weight.clone()
    more[5, int(torch.nonzero(~found.mask[5])[0])] = 0.1
    assert not sparsity.holds(more)


@pytest.mark.parametrize("sparsity", [NofM(2, 4), NofM(4, 8), Ratio(0.5)], ids=str)
def test_sparsegpt_errs_less_than_wanda_and_wanda_less_than_magnitude(sparsity: Sparsity) -> None:
    for seed in range(3):
        weight, hessian = (one[0] for one in problem(seed=seed))
        errors = [
            float(output_error(kind(sparsity).prune(weight, hessian).weight - weight, hessian))
            for kind in (SparseGpt, Wanda, Magnitude)
        ]
        assert errors[0] < 0.6 * errors[1]
        assert errors[1] < errors[2]


def test_each_of_several_weights_becomes_what_it_would_by_itself() -> None:
    weight, hessian = problem(several=3)
    for kind in PRUNERS:
        together = kind().prune(weight, hessian)
        for place in range(3):
            alone = kind().prune(weight[place], hessian[place])
            assert torch.equal(together.mask[place], alone.mask)
            assert torch.allclose(together.weight[place], alone.weight, atol=1e-5)


@pytest.mark.parametrize("features", [12, 40])
def test_the_final_solve_is_the_least_squares_of_each_row(features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, features, generator=generator) @ torch.randn(
        features, features, generator=generator
    )
    target = torch.randn(1, 9, features, generator=generator)
    mask = torch.rand(1, 9, features, generator=generator) < 0.5
    hessian = (inputs.T @ inputs / len(inputs)).unsqueeze(0)
    found = solve_on_mask(target, ridged(hessian), mask, steps=400)
    pull = (RIDGE * hessian[0].diagonal().mean()).sqrt() * torch.eye(features)
    seen = torch.cat([inputs / len(inputs) ** 0.5, pull]).double()
    for row, kept, wanted in zip(found[0], mask[0], target[0].double(), strict=True):
        best = torch.linalg.lstsq(seen[:, kept], (seen @ wanted).unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(row[kept].double(), best, rtol=2e-3, atol=2e-3)
        assert (row[~kept] == 0).all()


def test_no_step_of_the_solve_raises_a_rows_error_and_rows_do_not_meet() -> None:
    weight, hessian = problem()
    mask, hessian = NofM(2, 4).mask(weight.abs()), ridged(hessian)
    before = torch.full((weight.shape[1],), float("inf"))
    for steps in (0, 1, 2, 4, 8, 16, 32):
        off = solve_on_mask(weight, hessian, mask, weight, steps) - weight
        errors = ((off @ hessian) * off).sum(-1)[0]
        assert (errors <= before * (1 + 1e-5)).all()
        before = errors
    whole = solve_on_mask(weight, hessian, mask)
    some = solve_on_mask(weight[:, 7:20], hessian, mask[:, 7:20])
    assert torch.allclose(whole[:, 7:20], some, atol=1e-5)


def slow_pass(weight: Tensor, lower: Tensor, of: int, kept: int) -> tuple[Tensor, Tensor]:
    """One row. From the last inputs on, the mask with the least error once all inputs before are free to move."""
    hessian, found = (lower @ lower.T).double(), weight.double().clone()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(len(weight) - of, -1, -of):
        done = torch.arange(start + of, len(weight))
        tried = []
        for places in combinations(range(of), kept):
            stays = torch.tensor([start + place for place in places])
            free = torch.cat([torch.arange(start), stays])
            fixed = torch.zeros_like(found)
            fixed[done] = found[done]
            off = weight.double() - fixed
            solved = torch.linalg.solve(hessian[free][:, free], hessian[free] @ off)
            off[free] -= solved
            tried.append((float(off @ hessian @ off), stays, solved[start:]))
        _, stays, numbers = min(tried, key=lambda one: one[0])
        mask[stays] = True
        found[start : start + of] = 0
        found[stays] = numbers
    return mask, found.float()


@pytest.mark.parametrize(("of", "kept"), [(4, 2), (8, 4)])
def test_the_pass_is_the_one_that_tries_every_mask_with_all_earlier_inputs_free(of: int, kept: int) -> None:
    weight, hessian = (one[0] for one in problem(features=24, rows=6))
    lower = torch.linalg.cholesky(hessian + 0.05 * hessian.diagonal().mean() * torch.eye(24))
    mask, numbers = obs_mask(weight.unsqueeze(0), lower.unsqueeze(0), NofM(kept, of))
    for row in range(6):
        wanted_mask, wanted = slow_pass(weight[row], lower, of, kept)
        assert torch.equal(mask[0, row], wanted_mask)
        assert torch.allclose(numbers[0, row], wanted, atol=2e-3)


def names(methods: list[Method]) -> str:
    return "+".join(one.name for one in methods) or "alone"


@pytest.mark.parametrize("methods", [[Gptq()], [RoundToNearest()], [Awq()], [SmoothQuant()], []], ids=names)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda one: one.name)
@pytest.mark.parametrize("sparsity", [NofM(2, 4), Ratio(0.6)], ids=str)
def test_what_is_zero_stays_exactly_zero_in_every_scheme(
    scheme: Scheme, methods: Sequence[Method], sparsity: Sparsity
) -> None:
    weight, hessian = (one[0] for one in problem())
    pruner = SparseGpt(sparsity)
    found = ModulePlan(scheme, (pruner, *methods)).quantized(weight, hessian)
    pruned = pruner.prune(weight, hessian)
    assert (found.dequantize()[~pruned.mask] == 0).all()
    read = scheme.read(found.tensors())
    if "weight_shape" not in found.tensors():
        assert (read.dequantize()[~pruned.mask] == 0).all()
    assert found.dequantize().abs().sum() > 0


def test_gptq_on_a_mask_errs_less_than_the_nearest_codes_and_than_gptq_that_is_masked_after() -> None:
    weight, hessian = (one[0] for one in problem(rows=100))
    (scheme,) = (one for one in SCHEMES if one.name == "W4A16")
    pruned = SparseGpt().prune(weight, hessian)

    def error(served: Tensor) -> float:
        return float(output_error(served - weight, hessian))

    kept = Gptq().quantize(pruned.weight, hessian, scheme, pruned.mask).dequantize()
    nearest = RoundToNearest().quantize(pruned.weight, hessian, scheme).dequantize()
    after = Gptq().quantize(pruned.weight, hessian, scheme).dequantize() * pruned.mask
    assert error(pruned.weight) < error(kept) < min(error(nearest), error(after))


def test_dense_numbers_are_those_of_the_method_rounded_to_their_type() -> None:
    weight, hessian = (one[0] for one in problem())
    for dtype in (torch.bfloat16, torch.float16):
        entry = ModulePlan(Dense(dtype), (SparseGpt(),))
        found = entry.quantized(weight, hessian)
        assert torch.equal(found.tensors()["weight"], SparseGpt().prune(weight, hessian).weight.to(dtype))
        assert torch.equal(entry.scheme.read(found.tensors()).dequantize(), found.dequantize())
        assert not entry.compressed


@pytest.mark.parametrize("given", ["2:4", "4:8", 0.5, "0.25", ".125", 1e-3])
def test_a_pattern_is_read_back_as_it_was_written(given: object) -> None:
    found = sparsity_of(given)
    assert sparsity_of(str(found)) == found


@pytest.mark.parametrize(
    "given", ["2:3", "1:4", "3:4", 0, 1, 1.5, -0.5, "half", None, True, [2, 4], "nan", ""]
)
def test_what_is_no_pattern_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="allowed are 2:4, 4:8"):
        sparsity_of(given)
