"""Experts that are quantized some at a time become what each becomes by itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.quantize.layers.test_decoder import decoder_of
from tests.quantize.layers.test_visit import LAYER, hidden_of

from lowbit_quantize.methods.awq import Awq
from lowbit_quantize.methods.gptq import Gptq
from lowbit_quantize.methods.method import Method
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.walk.layer import LayerContext, QuantizedLinear
from lowbit_quantize.walk.module_plan import ModulePlan
from lowbit_quantize.walk.stages import StagedLayer
from lowbit_quantize.walk.visit import Traveller, experts_of

SCHEME = Integer(4, 32, symmetric=True, name="W4A16")


def quantized(
    decoder: Decoder, methods: tuple[Method, ...], batches: Sequence[Sequence[int]]
) -> dict[str, QuantizedLinear]:
    """The experts of a layer, so many at a time."""
    layer, plan, hidden = decoder.load_frame(LAYER), ModulePlan(SCHEME, methods), hidden_of(decoder)
    groups = decoder.architecture.groups_of(layer)
    modules = {name: plan for group in groups for name in group.linears}
    base = hidden.clone() if plan.compensates else None
    context = LayerContext(decoder, LAYER, modules, hidden, base, fp8_cache=False, last=True)
    StagedLayer(layer, decoder.architecture, context).quantize()
    work, experts, found = context.expert_work, experts_of(layer), dict[str, QuantizedLinear]()
    assert work is not None
    calibration = Traveller(hidden, layer, halfway=context.halfway)
    calibration.record(decoder, LAYER)
    for numbers in batches:
        experts.hold(numbers)
        for linears in work(numbers, calibration.called).values():
            found.update(linears)
        experts.let_go()
    return found


@pytest.mark.parametrize("methods", [(Gptq(),), (Awq(),), (Awq(), Gptq())], ids=["gptq", "awq", "awq, gptq"])
def test_experts_become_what_each_becomes_by_itself(
    tiny_model: Callable[[str], Path], moe_family: str, methods: tuple[Method, ...]
) -> None:
    decoder = decoder_of(tiny_model(moe_family))
    alone = quantized(decoder, methods, [[number] for number in range(8)])
    together = quantized(decoder, methods, [range(3), [4, 3], range(5, 8)])
    assert together.keys() == alone.keys()
    assert len(alone) == 3 * 8
    for name, one in together.items():
        same = one.quantized.codes == alone[name].quantized.codes
        assert same.float().mean() > 0.99, name
        assert one.error == pytest.approx(alone[name].error, rel=1e-2)
        assert one.alpha == alone[name].alpha
        weight, other = one.quantized.dequantize()[same], alone[name].quantized.dequantize()[same]
        assert float((weight == other).float().mean()) > 0.9
        torch.testing.assert_close(weight, other, rtol=2e-2, atol=1e-4)
