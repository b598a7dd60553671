"""Optimal brain surgeon on columns, against the slow way: every choice tried, every solution solved for by itself."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from lowbit_quantize.structure.criteria import choose
from lowbit_quantize.structure.moments import Aim, Moments, centred
from lowbit_quantize.structure.surgeon import RIDGE, columns_of, least_loss_units, made_up

CHANNELS, OUTPUTS, TOKENS = 8, 5, 400


def correlated(seed: int, tokens: int = TOKENS, channels: int = CHANNELS) -> Tensor:
    """Inputs that say much of each other, uneven and off zero."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, channels, generator=random) @ torch.randn(
        channels, channels, generator=random
    )
    return mixed * torch.rand(channels, generator=random).exp() + torch.randn(channels, generator=random)


def seen(inputs: Tensor) -> Moments:
    moments = Moments(inputs.shape[1], torch.device("cpu"))
    for batch in inputs.split(64):
        moments.add(batch)
    return moments


def weight_of(seed: int, channels: int = CHANNELS) -> Tensor:
    return torch.randn(OUTPUTS, channels, generator=torch.Generator().manual_seed(seed))


def least_error(weight: Tensor, hessian: Tensor, stays: Tensor) -> float:
    """The output error that the best weight on these columns leaves, by solving for it."""
    solution = torch.linalg.solve(hessian[stays][:, stays], hessian[stays] @ weight.T).T
    off = weight.clone()
    off[:, stays] -= solution
    return float(((off @ hessian) * off).sum())


def ridged(hessian: Tensor) -> Tensor:
    return hessian + RIDGE * hessian.diagonal().diag()


@pytest.mark.parametrize("units", [8, 4])
def test_a_single_unit_that_goes_is_the_one_that_costs_least_of_all(units: int) -> None:
    for seed in range(6):
        weight, hessian = weight_of(seed), ridged(seen(correlated(seed)).hessian)
        size = CHANNELS // units
        costs = {}
        for gone in range(units):
            stays = torch.tensor([unit for unit in range(units) if unit != gone])
            costs[gone] = least_error(weight, hessian, columns_of(stays, size))
        stays = least_loss_units(weight, seen(correlated(seed)).hessian, units, units - 1)
        assert set(range(units)) - set(stays.tolist()) == {min(costs, key=lambda gone: costs[gone])}


def test_several_units_that_go_one_by_one_cost_little_more_than_the_best_choice_of_all() -> None:
    for seed in range(6):
        weight, hessian = weight_of(seed), ridged(seen(correlated(seed)).hessian)
        every = [least_error(weight, hessian, torch.tensor(one)) for one in combinations(range(CHANNELS), 5)]
        found = least_error(
            weight, hessian, least_loss_units(weight, seen(correlated(seed)).hessian, CHANNELS, 5)
        )
        assert min(every) * (1 - 1e-4) <= found <= 1.5 * min(every)
        assert found < sorted(every)[len(every) // 4]


def test_the_weights_that_stay_are_those_of_least_squares_with_a_ridge_toward_the_original() -> None:
    moments, weight = seen(correlated(1)), weight_of(2)
    kept = torch.tensor([0, 2, 3, 6])
    found, bias, error = made_up(weight, moments, kept, biased=False)
    assert bias is None
    gone = torch.tensor([1, 4, 5, 7])
    hessian, matches = moments.hessian, []
    for ridge in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0):
        inside = hessian[kept][:, kept] + ridge * hessian.diagonal()[kept].diag()
        slow = weight[:, kept] + (torch.linalg.inv(inside) @ hessian[kept][:, gone] @ weight[:, gone].T).T
        matches.append(torch.allclose(found, slow, rtol=1e-3, atol=1e-4))
    assert any(matches)
    off = weight.clone()
    off[:, kept] -= found
    power = float(((weight @ hessian) * weight).sum())
    assert error == pytest.approx(float(((off @ hessian) * off).sum()) / power, rel=0.5)


def test_a_bias_takes_the_mean_of_what_goes() -> None:
    inputs, weight = correlated(3), weight_of(4)
    kept = torch.tensor([1, 2, 5])
    found, bias, error = made_up(weight, seen(inputs), kept, biased=True)
    assert bias is not None
    off = inputs @ weight.T - (inputs[:, kept] @ found.T + bias)
    assert torch.allclose(off.mean(0), torch.zeros(OUTPUTS), atol=1e-3)
    assert error < made_up(weight, seen(inputs), kept, biased=False)[2]


def test_few_tokens_make_for_a_stronger_ridge_that_errs_less_on_others() -> None:
    every = correlated(5, tokens=4000, channels=32)
    inputs, others = every[:40], every[40:]
    weight, kept = weight_of(6, channels=32), torch.arange(16)
    found, _, _ = made_up(weight, seen(inputs), kept, biased=False)
    plain = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T).solution.T

    def error(solution: Tensor) -> float:
        return float((others @ weight.T - others[:, kept] @ solution.T).square().mean())

    assert error(found) < error(plain)


def test_brain_surgeon_errs_less_than_every_control() -> None:
    inputs, weight = correlated(7, tokens=2000, channels=64), weight_of(8, channels=64)
    errors = {
        name: choose(weight, seen(inputs), 64, 48, name, biased=False, seed=1).error
        for name in ("brain-surgeon", "wanda-sp", "flap", "random")
    }
    assert min(errors, key=lambda name: errors[name]) == "brain-surgeon"
    assert errors["brain-surgeon"] < 0.5 * min(errors["wanda-sp"], errors["flap"]) < errors["random"]


def test_flap_keeps_what_fluctuates_and_lets_the_bias_have_what_is_constant() -> None:
    inputs = torch.randn(500, 4, generator=torch.Generator().manual_seed(9)) * torch.tensor(
        [3.0, 0.01, 2.0, 0.02]
    )
    inputs[:, 1] += 50.0
    chosen = choose(torch.ones(2, 4), seen(inputs), 4, 2, "flap", biased=True)
    assert chosen.units.tolist() == [0, 2]
    assert chosen.bias is not None
    assert torch.allclose(chosen.bias, torch.tensor(50.0).expand(2), atol=0.1)
    assert chosen.error < 1e-4
    unbiased = choose(torch.ones(2, 4), seen(inputs), 4, 2, "flap", biased=False)
    assert unbiased.bias is None
    assert unbiased.error > 0.9


def test_random_units_differ_by_seed_and_by_nothing_else() -> None:
    moments, weight = seen(correlated(10)), weight_of(11)
    first, again, other = (
        choose(weight, moments, 8, 4, "random", biased=False, seed=s).units for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_moments_are_those_of_all_tokens_and_of_two_halves() -> None:
    inputs = correlated(12)
    moments = seen(inputs)
    assert torch.allclose(moments.hessian, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-4)
    assert torch.allclose(moments.mean, inputs.mean(0), atol=1e-5)
    assert torch.allclose(
        centred(moments.hessian, moments.mean), inputs.T.cov(correction=0), rtol=1e-3, atol=1e-3
    )
    assert torch.allclose((moments.half(0)[1] + moments.half(1)[1]) / 2, moments.mean, atol=1e-5)


def test_channels_that_are_never_seen_go_first_and_break_nothing() -> None:
    inputs = correlated(13)
    inputs[:, [2, 6]] = 0.0
    chosen = choose(weight_of(14), seen(inputs), 8, 6, "brain-surgeon", biased=False)
    assert chosen.units.tolist() == [0, 1, 3, 4, 5, 7]
    assert torch.isfinite(chosen.weight).all()
    assert chosen.error < 1e-4


def test_what_outputs_are_off_the_base_is_made_up_for_as_by_least_squares() -> None:
    base, weight = correlated(15, tokens=3000), weight_of(16)
    inputs = base + 0.3 * base[:, [1, 2, 3, 4, 5, 6, 7, 0]]  # what the layers before have made of it
    residual = inputs @ torch.randn(CHANNELS, OUTPUTS, generator=torch.Generator().manual_seed(17))
    kept = torch.arange(6)
    aim = Aim(weight)
    for rows in torch.arange(len(inputs)).split(300):
        aim.expect_residual(residual[rows])
        aim.expect(base[rows])
        aim.see_residual(torch.zeros(len(rows), OUTPUTS))
        aim.add(inputs[rows])
    wanted = base @ weight.T + residual
    slow = torch.linalg.lstsq(inputs[:, kept], wanted).solution.T
    found, _, error = made_up(weight, aim, kept, biased=False)
    least, mine, blind = (
        float((wanted - inputs[:, kept] @ one.T).square().sum(1).mean())
        for one in (slow, found, made_up(weight, seen(inputs), kept, biased=False)[0])
    )
    assert least <= mine < 1.02 * least < 0.5 * blind
    power = float((inputs @ weight.T).square().sum(1).mean())
    assert error == pytest.approx(mine / power, rel=0.05)


def test_a_bias_takes_the_mean_of_what_outputs_are_off() -> None:
    base, weight = correlated(18, tokens=3000), weight_of(19)
    inputs, residual = base * 1.1, torch.full((3000, OUTPUTS), 2.0)
    aim, kept = Aim(weight), torch.arange(5)
    for rows in torch.arange(len(inputs)).split(300):
        aim.expect_residual(residual[rows])
        aim.expect(base[rows])
        aim.see_residual(torch.zeros(len(rows), OUTPUTS))
        aim.add(inputs[rows])
    found, bias, error = made_up(weight, aim, kept, biased=True)
    assert bias is not None
    off = base @ weight.T + residual - (inputs[:, kept] @ found.T + bias)
    assert torch.allclose(off.mean(0), torch.zeros(OUTPUTS), atol=0.02)
    power = float((inputs @ weight.T).square().sum(1).mean())
    assert error == pytest.approx(float(off.square().sum(1).mean()) / power, rel=0.05)


def test_what_is_off_by_chance_is_hardly_aimed_at() -> None:
    every, weight, kept = (
        correlated(20, tokens=4000, channels=32),
        weight_of(21, channels=32),
        torch.arange(24),
    )
    inputs, others = every[:200], every[200:]
    aim = Aim(weight)
    noise = 5 * torch.randn(200, OUTPUTS, generator=torch.Generator().manual_seed(22))
    for rows in torch.arange(200).split(50):
        aim.expect_residual(noise[rows])
        aim.expect(inputs[rows])
        aim.see_residual(torch.zeros(len(rows), OUTPUTS))
        aim.add(inputs[rows])
    plain, aimed = (made_up(weight, one, kept, biased=False)[0] for one in (seen(inputs), aim))

    def error(solution: Tensor) -> float:
        return float((others @ weight.T - others[:, kept] @ solution.T).square().sum(1).mean())

    assert error(aimed) - error(plain) < 0.1 * float(noise.square().sum(1).mean())
