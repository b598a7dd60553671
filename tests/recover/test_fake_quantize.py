"""Fake quantizers: what they compute is what is stored, and their gradients are finite differences."""

import pytest
import torch
from torch import Tensor

from lowbit_quantize.schemes.integer import PRESETS, Integer
from lowbit_quantize.schemes.scheme import Quantized
from lowbit_recover.distill.fake_quantize import IntegerLinear, learned_steps, rounded

NAMES = [preset.name for preset in PRESETS]
STEP = 1e-6


def scheme_of(name: str, group_size: int = 32) -> Integer:
    found = next(preset for preset in PRESETS if preset.name == name).make(group_size)
    assert isinstance(found, Integer)
    return found


def weight_of(seed: int, outputs: int = 4, inputs: int = 64) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def parts(name: str, clip: float = 0.6) -> tuple[Integer, Tensor, Tensor, Tensor]:
    """A scheme, a weight, and scales so small that some of its codes are clamped; float64."""
    scheme, weight = scheme_of(name), weight_of(3)
    params = scheme.search(weight, None)
    return scheme, weight.double(), clip * params["scale"].double(), params["zero"].double()


def held(scheme: Integer, weight: Tensor, scale: Tensor, zero: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """What LSQ takes the gradient of: codes move with the weight, what rounding adds is held as it is at a point."""

    def clamped(values: Tensor, steps: Tensor) -> Tensor:
        exact = scheme.split(values) / steps.unsqueeze(-1) + zero.unsqueeze(-1)
        return exact.clamp(scheme.lowest, scheme.highest)

    added = clamped(*at).round() - clamped(*at)
    return ((clamped(weight, scale) + added - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_learned_steps_are_finite_differences_of_codes_whose_rounding_is_held(name: str) -> None:
    scheme, weight, scale, zero = parts(name)
    weight, scale = weight.requires_grad_(), scale.requires_grad_()
    direction = weight_of(5).double()
    found = learned_steps(weight, scale, zero, scheme)
    (found * direction).sum().backward()
    at = weight.detach(), scale.detach()
    torch.testing.assert_close(held(scheme, *at, zero, at), found.detach())
    assert weight.grad is not None
    assert scale.grad is not None
    for values, gradient in ((0, weight.grad), (1, scale.grad)):
        for place in range(0, at[values].numel(), 7):
            moved = []
            for sign in (1, -1):
                inputs = [at[0].clone(), at[1].clone()]
                inputs[values].view(-1)[place] += sign * STEP
                moved.append(float((held(scheme, inputs[0], inputs[1], zero, at) * direction).sum()))
            difference = (moved[0] - moved[1]) / (2 * STEP)
            assert float(gradient.view(-1)[place]) == pytest.approx(difference, rel=1e-4, abs=1e-6)


def test_some_codes_of_that_test_are_clamped_and_others_are_not() -> None:
    scheme, weight, scale, zero = parts("W4A16")
    weight.requires_grad_()
    learned_steps(weight, scale, zero, scheme).sum().backward()
    assert weight.grad is not None
    assert 0 < int((weight.grad == 0).sum()) < weight.numel() // 2


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_scales_of_codes_that_stay_is_a_finite_difference(name: str) -> None:
    scheme, weight = scheme_of(name), weight_of(6)
    params = scheme.search(weight, None)
    codes, zero = scheme.quantize(weight, params), params["zero"].double()
    scale = params["scale"].double().requires_grad_()

    def dequantized(values: Tensor) -> Tensor:
        return (scheme.split(codes).double() - zero.unsqueeze(-1)) * values.unsqueeze(-1)

    assert torch.autograd.gradcheck(dequantized, (scale,))
    linear = IntegerLinear(scheme_quantized(scheme, weight), None, codes_move=False)
    direction = weight_of(8)
    (linear.weight * direction).sum().backward()
    (dequantized(scale).flatten(-2) * direction).sum().backward()
    assert linear.scale.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(linear.scale.grad, scale.grad.float(), rtol=1e-4, atol=1e-4)


def scheme_quantized(scheme: Integer, weight: Tensor) -> Quantized:
    params = scheme.search(weight, None)
    return Quantized(scheme.quantize(weight, params), params, scheme)


@pytest.mark.parametrize("codes_move", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_training_computes_with_is_what_is_stored(name: str, codes_move: bool) -> None:
    scheme = scheme_of(name)
    quantized = scheme_quantized(scheme, weight_of(7))
    linear = IntegerLinear(quantized, None, codes_move=codes_move)
    assert torch.equal(linear.weight, quantized.dequantize())
    with torch.no_grad():  # as if something had been learned
        linear.scale.mul_(1.003)
        if codes_move:
            linear.latent.mul_(1.2)
    again = scheme.read(linear.quantized().tensors())
    torch.testing.assert_close(again.dequantize(), linear.weight.detach(), rtol=0, atol=0)


def test_rounding_to_the_stored_type_passes_the_gradient_on() -> None:
    values = torch.tensor([1.001, -0.3333], requires_grad=True)
    found = rounded(values, torch.bfloat16)
    assert torch.equal(found.detach(), values.detach().bfloat16().float())
    (3 * found).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3, 3]
