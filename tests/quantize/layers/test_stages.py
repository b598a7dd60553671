"""Where a layer goes on from its middle and what its last linear reads was kept, nothing before that runs again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quantize.layers.test_decoder import decoder_of, token_ids
from torch import Tensor

from lowbit_quantize.methods.awq import Awq
from lowbit_quantize.methods.gptq import Gptq
from lowbit_quantize.methods.method import Method
from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.walk import stages
from lowbit_quantize.walk.layer import LayerContext
from lowbit_quantize.walk.module_plan import ModulePlan
from lowbit_quantize.walk.stages import StagedLayer

WITH_NORMS = ("gemma3_text", "olmo2")  # whose last linear is normed before it is added to the stream


def quantized(model: Path, methods: tuple[Method, ...]) -> tuple[Tensor, int, str]:
    """The stream behind the first dense layer, how often the network's first linear ran, and what closes the layer."""
    decoder = decoder_of(model)
    index = next(number for number, kind in enumerate(decoder.architecture.kinds) if not kind.experts)
    layer, plan, hidden = decoder.load_layer(index), ModulePlan(SCHEME, methods), decoder.embed(token_ids())
    modules = {name: plan for group in decoder.architecture.groups_of(layer) for name in group.linears}
    context = LayerContext(decoder, index, modules, hidden, hidden.clone(), fp8_cache=False, last=True)
    calls: list[int] = []
    first = kind_of(layer).groups[-2].linears[0]
    layer.get_submodule(first).register_forward_hook(lambda *_: calls.append(1))
    StagedLayer(layer, decoder.architecture, context).quantize()
    return hidden, len(calls), kind_of(layer).closing


SCHEME = Integer(4, 32, symmetric=True, name="W4A16")


@pytest.mark.parametrize("methods", [(Gptq(),), (Awq(),)], ids=["gptq", "awq"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "deepseek_v2", *WITH_NORMS])
def test_the_stream_is_the_same_whether_inputs_were_kept_or_not(
    tiny_model: Callable[[str], Path],
    family: str,
    methods: tuple[Method, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, calls, closing = quantized(tiny_model(family), methods)
    monkeypatch.setattr(stages, "KEPT_BYTES", 0)
    again, more_calls, _ = quantized(tiny_model(family), methods)
    assert torch.equal(kept, again)
    assert closing == ("" if family in WITH_NORMS else "mlp.down_proj")
    assert (calls < more_calls) == bool(closing)
