"""SmoothQuant's scale is chosen for both roundings."""

import pytest
import torch
from torch import Tensor

from lowbit_quantize.methods.method import Site, SitePart
from lowbit_quantize.methods.smoothquant import SmoothQuant
from lowbit_quantize.schemes.eight_bits import PRESETS
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Scheme

SCHEMES = {preset.name: preset.make("channel") for preset in PRESETS}
W8A8 = SCHEMES["W8A8"]


def inputs_of(seed: int, outliers: int = 3, width: int = 64) -> Tensor:
    """Tokens with a few channels that are much larger than the rest, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(512, width, generator=generator)
    rows[:, :outliers] *= torch.tensor([30.0, 100.0, 60.0])[:outliers]
    return rows


def site_of(inputs: Tensor, scheme: Scheme, seed: int = 1) -> Site:
    weight = torch.randn(96, inputs.shape[1], generator=torch.Generator().manual_seed(seed))
    return Site([SitePart(weight, scheme, inputs.T @ inputs / len(inputs))], inputs=inputs)


def error_of(site: Site, scale: Tensor, inputs: Tensor) -> float:
    """The mean squared error of what the site gives, of inputs that the scale was not searched on."""
    weight, scheme = site.parts[0].weight, site.parts[0].scheme
    assert scheme.input_quantizer is not None
    params = scheme.search(weight * scale, None)
    served = scheme.dequantize(scheme.quantize(weight * scale, params), params)
    scaled = inputs / scale
    fixed = scheme.input_quantizer.calibrated(scaled.abs().amax(0), scaled)
    rounded = scheme.input_quantizer.round(scaled, fixed)
    return float((rounded @ served.T - inputs @ weight.T).square().mean())


def paper(site: Site, alpha: float) -> Tensor:
    """`max|x|^α / max|w|^(1−α)`."""
    assert site.inputs is not None
    weight = site.parts[0].weight
    scale: Tensor = site.inputs.abs().amax(0).pow(alpha) / weight.abs().amax(0).pow(1 - alpha)
    return scale


@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_on_other_tokens_it_errs_less_than_no_scale_and_as_little_as_the_papers_best_in_hindsight(
    outliers: int,
) -> None:
    site, other = site_of(inputs_of(2, outliers), W8A8), inputs_of(3, outliers)
    found = SmoothQuant().input_scale(site)
    assert found is not None
    error = error_of(site, found.scale, other)
    bound = 1.02 if outliers == 0 else 0.2
    assert error < bound * error_of(site, torch.ones(64), other)
    assert error < 1.06 * min(error_of(site, paper(site, alpha), other) for alpha in (0.3, 0.5, 0.7, 0.9))


def test_floats_need_no_scale() -> None:
    """FP8's relative error hardly depends on the size: nothing is gained, and nothing may be lost."""
    site, other = site_of(inputs_of(4), SCHEMES["FP8_DYNAMIC"]), inputs_of(5)
    found = SmoothQuant().input_scale(site)
    assert found is not None
    assert error_of(site, found.scale, other) < 1.05 * error_of(site, torch.ones(64), other)


def test_a_scale_is_tied_where_channels_must_share_it() -> None:
    def tie(channels: Tensor) -> Tensor:
        return channels.view(2, 32).log().mean(0).exp().repeat(2)

    site = site_of(inputs_of(6), W8A8)
    found = SmoothQuant().input_scale(Site(site.parts, tie, site.inputs))
    assert found is not None
    torch.testing.assert_close(found.scale[:32], found.scale[32:])
    assert error_of(site, found.scale, inputs_of(7)) < error_of(site, torch.ones(64), inputs_of(7))


def test_a_few_huge_tokens_do_not_decide_for_all() -> None:
    inputs = inputs_of(8)
    sinks = inputs.clone()
    sinks[::128] = 3000 * torch.randn(4, 64, generator=torch.Generator().manual_seed(9))
    alone, among = (SmoothQuant().input_scale(site_of(rows, W8A8)) for rows in (inputs, sinks))
    assert alone is not None
    assert among is not None
    other, site = inputs_of(10), site_of(inputs, W8A8)
    assert error_of(site, among.scale, other) < 2 * error_of(site, alone.scale, other)


def test_weights_alone_are_a_pair_too_and_nothing_to_see_is_nothing_to_scale() -> None:
    found = SmoothQuant().input_scale(site_of(inputs_of(11), Integer(4, 32, symmetric=True, name="W4A16")))
    assert found is not None
    assert torch.isfinite(found.scale).all()
    unseen = site_of(inputs_of(12), W8A8)
    assert SmoothQuant().input_scale(Site(unseen.parts)) is None
    assert SmoothQuant().input_scale(Site(unseen.parts, inputs=torch.zeros(0, 64))) is None
