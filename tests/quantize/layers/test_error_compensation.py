"""What weights aim at: a step towards the least-squares answer, and nothing where nothing has gone wrong before."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quantize.layers.test_decoder import decoder_of, token_ids

from lowbit_quantize.model.architecture import linear_of
from lowbit_quantize.model.decoder import END, BasePass
from lowbit_quantize.statistics import error_compensation, hessian
from lowbit_quantize.statistics.error_compensation import RIDGE, SHRINKAGE, STEP, Drift
from lowbit_quantize.statistics.hessian import Hessian
from lowbit_quantize.statistics.kv_absmax import KVAbsmax
from lowbit_quantize.statistics.layer import LayerStatistics

TOKENS, INPUTS, OUTPUTS = 400, 24, 16


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def least_squares(weight: torch.Tensor, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The obvious slow version: append the ridge to the data as rows, and solve for what is added to the weight."""
    ridge = (RIDGE * x.square().mean() + SHRINKAGE[0] * x.square().mean(0)).mul(len(x)).sqrt().diag()
    share = (1 - SHRINKAGE[0]) ** 0.5
    rows = torch.cat([share * x, ridge]).double()
    missing = torch.cat([(wanted - x @ weight.T) / share, torch.zeros(x.shape[1], len(weight))]).double()
    step: torch.Tensor = torch.linalg.lstsq(rows, missing).solution.T.float()
    return weight + step


@pytest.mark.parametrize(("outputs", "residual"), [(OUTPUTS, False), (OUTPUTS, True), (INPUTS // 2, False)])
def test_where_both_halves_say_the_same_it_is_a_step_towards_least_squares(
    outputs: int, residual: bool
) -> None:
    """Whether D is summed, as for the first, or W D + R, as for a residual stream and for few outputs."""
    part = torch.arange(TOKENS // 4).repeat(2)  # the second half of a batch repeats the first
    weight, base = drawn(outputs, INPUTS, seed=1), drawn(TOKENS // 4, INPUTS, seed=2)
    inputs = base + 0.3 * drawn(TOKENS // 4, INPUTS, seed=3)
    stream, base_stream = drawn(TOKENS // 4, outputs, seed=4), drawn(TOKENS // 4, outputs, seed=5)
    drift = Drift(weight.split(4), residual=residual)
    for _ in range(2):
        if residual:
            drift.expect_residual(base_stream[part])
            drift.see_residual(stream[part])
        drift.expect(base[part])
        drift.add(inputs[part])
    wanted = base @ weight.T + (base_stream - stream if residual else 0)
    expected = weight + STEP * (least_squares(weight, inputs, wanted) - weight)
    found = drift.target(weight, inputs.T @ inputs / len(inputs))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (wanted - inputs @ found.T).square().sum() < (wanted - inputs @ weight.T).square().sum()


def test_a_linear_that_lost_inputs_aims_at_what_the_whole_one_gave() -> None:
    """Its bias, which the whole one has not, is part of what it gives; the residual stream is off as well."""
    part = torch.arange(TOKENS // 4).repeat(2)
    whole = torch.nn.Linear(INPUTS + 8, OUTPUTS, bias=False).requires_grad_(False)
    weight, bias = whole.weight[:, :INPUTS].clone(), drawn(OUTPUTS, seed=1)
    base, stream = drawn(TOKENS // 4, INPUTS + 8, seed=2), drawn(TOKENS // 4, OUTPUTS, seed=3)
    base[:, INPUTS:] += base[:, :8]  # what went can be made up for in part
    inputs = base[:, :INPUTS] + 0.1 * drawn(TOKENS // 4, INPUTS, seed=4)
    drift = Drift([weight], residual=True, base=whole, bias=bias)
    for _ in range(2):
        drift.expect_residual(torch.zeros_like(stream)[part])
        drift.see_residual(stream[part])
        drift.expect(base[part])
        drift.add(inputs[part])
    wanted = whole(base) - bias - stream
    found = drift.target(weight, inputs.T @ inputs / len(inputs))
    expected = weight + STEP * (least_squares(weight, inputs, wanted) - weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("signal", [0.0, 1.0])
@pytest.mark.parametrize("together", [INPUTS, 7])
def test_what_the_halves_do_not_agree_on_is_left_out(
    signal: float, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is off by noise, and by something that four inputs predict: judged on tokens that were not seen."""
    monkeypatch.setattr(error_compensation, "COMPONENT_BLOCK", together)
    weight, truth = drawn(OUTPUTS, INPUTS, seed=1), torch.zeros(OUTPUTS, INPUTS)
    truth[:, ::6] = signal * drawn(OUTPUTS, 4, seed=2)
    inputs, noise = drawn(2 * TOKENS, INPUTS, seed=3), 4 * drawn(2 * TOKENS, OUTPUTS, seed=4)
    inputs[:, ::6] *= 3
    seen, unseen = slice(None, TOKENS), slice(TOKENS, None)
    off = inputs @ truth.T + noise
    drift = Drift([weight], residual=True)
    for part in torch.arange(TOKENS).split(100):
        drift.expect_residual(off[part])
        drift.see_residual(torch.zeros_like(off[part]))
        drift.expect(inputs[part])
        drift.add(inputs[part])
    found = drift.target(weight, inputs[seen].T @ inputs[seen] / TOKENS) - weight
    plain = STEP * (least_squares(weight, inputs[seen], inputs[seen] @ weight.T + off[seen]) - weight)

    def left(step: torch.Tensor) -> torch.Tensor:
        return (inputs[unseen] @ (STEP * truth - step).T).square().mean()

    assert left(found) < 0.8 * left(plain)
    assert found.norm() < plain.norm()
    if signal:
        assert left(found) < 0.6 * left(torch.zeros_like(found))
    else:
        assert found.norm() < 0.5 * plain.norm()


def test_what_one_domain_wants_is_taken_where_domains_lie_in_turns() -> None:
    """Every batch begins with texts of one kind, which read other inputs than those it ends with."""
    inputs, weight = drawn(TOKENS, INPUTS, seed=1), torch.zeros(OUTPUTS, INPUTS)
    truth, here = drawn(OUTPUTS, INPUTS, seed=2), torch.arange(INPUTS) % 2 == 0
    drift = Drift([weight], residual=True)
    for batch in inputs.split(100):
        batch[:50, ~here], batch[50:, here] = 0.0, 0.0
        drift.expect_residual(batch[:, here] @ truth[:, here].T)
        drift.see_residual(torch.zeros(100, OUTPUTS))
        drift.expect(batch)
        drift.add(batch)
    found = drift.target(weight, inputs.T @ inputs / TOKENS)
    assert (found - STEP * truth)[:, here].norm() < 0.2 * (STEP * truth)[:, here].norm()
    assert found[:, ~here].norm() < 0.1 * found.norm()


def test_rounded_products_of_few_tokens_are_factored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of inputs that are nearly one number each: rounded, what they have in common outweighs the rest."""
    monkeypatch.setattr(hessian, "rounds_products", lambda numbers: True)
    inputs = (drawn(2 * TOKENS, 1, seed=1) + 0.02 * drawn(2 * TOKENS, 512, seed=2)).bfloat16()
    seen, weight, base = (
        Hessian(512, torch.device("cpu")),
        drawn(OUTPUTS, 512, seed=3).bfloat16(),
        1.1 * inputs,
    )
    seen.add(inputs)
    assert float(torch.linalg.eigvalsh(seen.matrix())[0]) < 0
    drift = Drift([weight])
    drift.expect(base)
    drift.add(inputs)
    found = drift.target(weight.float(), seen.matrix())
    before, after = ((base @ weight.T - inputs @ one.T).float().norm() for one in (weight, found.bfloat16()))
    assert after < before


def test_products_of_bfloat16_are_rounded_and_others_are_not() -> None:
    """Float16 sums of large inputs would be infinite."""
    large = 300 * drawn(TOKENS, INPUTS, seed=12)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = drawn(OUTPUTS, INPUTS, seed=13)
        drift = Drift([weight.to(dtype)])
        drift.expect((1.1 * large).to(dtype))
        drift.add(large.to(dtype))
        found = drift.target(weight, large.T @ large / TOKENS)
        torch.testing.assert_close(found, (1 + 0.1 * STEP) * weight, rtol=0.02, atol=0.02)


def test_base_inputs_are_divided_by_what_was_folded() -> None:
    weight, base = drawn(OUTPUTS, INPUTS, seed=6), drawn(TOKENS, INPUTS, seed=7)
    scale = drawn(INPUTS, seed=8).exp()
    drift = Drift([weight], scale)
    drift.expect(base)
    drift.add(base / scale)
    folded = base / scale
    torch.testing.assert_close(drift.target(weight * scale, folded.T @ folded / TOKENS), weight * scale)


def test_attended_tokens_count_as_they_do_in_the_hessian() -> None:
    """A token that receives three times the mean attention counts twice."""
    weight, base = drawn(OUTPUTS, INPUTS, seed=9), drawn(TOKENS, INPUTS, seed=10)
    inputs = base + 0.3 * drawn(TOKENS, INPUTS, seed=11)
    weighed, repeated = (Drift([weight], attended=attended) for attended in (True, False))
    weighed.expect(base)
    weighed.add(inputs)
    assert weighed.waiting
    weighed.weigh(torch.tensor([3.0, 1.0]).repeat(TOKENS // 2))
    twice = torch.arange(TOKENS).repeat_interleave(torch.tensor([2, 1]).repeat(TOKENS // 2))
    repeated.expect(base[twice])
    repeated.add(inputs[twice])
    hessian = inputs[twice].T @ inputs[twice] / TOKENS
    ours = weighed.target(weight, hessian) - weight
    theirs = (repeated.target(weight, hessian) - weight) * len(twice) / TOKENS
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_layer_whose_inputs_are_the_base_models_keeps_its_weights_and_moves_the_base_on(
    tiny_model: Callable[[str], Path], any_family: str
) -> None:
    decoder = decoder_of(tiny_model(any_family))
    architecture, layer = decoder.architecture, decoder.load_layer(0)
    hidden, base = decoder.embed(token_ids()), decoder.embed(token_ids())
    groups = [g for g in architecture.groups_of(layer) if not (g.other_readers or architecture.is_expert(g))]
    paired = dict.fromkeys(group.linears[0] for group in groups)
    statistics = LayerStatistics(layer, architecture, decoder.device, paired=paired)
    side = BasePass(layer, base, statistics.base_observers, END)
    decoder.observe(layer, 0, hidden, statistics.observers, KVAbsmax(), stop=False, base=side)
    for group in groups:
        width = sum(linear_of(layer, name).out_features for name in group.linears)
        weight = drawn(width, linear_of(layer, group.linears[0]).in_features, seed=12)
        with torch.no_grad():
            assert torch.equal(statistics.target(group, weight, statistics.hessian(group)), weight)
    decoder.advance(layer, 0, hidden)
    assert torch.equal(base, hidden)


def test_stages_follow_the_order_in_which_a_layer_computes(
    tiny_model: Callable[[str], Path], any_family: str
) -> None:
    """A scale folds into a linear of a lower stage, so that it is chosen before that linear is rounded."""
    decoder = decoder_of(tiny_model(any_family))
    for index in range(decoder.depth):
        groups = decoder.architecture.groups_of(decoder.load_layer(index))
        stage_of = {name: group.stage for group in groups for name in group.linears}
        folded = [
            (group.fold.producer, group.stage) for group in groups if group.fold and not group.fold.norm
        ]
        assert folded
        assert all(stage_of[producer] < stage for producer, stage in folded)
        assert [group.stage for group in groups if group.attended] < [stage_of["self_attn.o_proj"]]
