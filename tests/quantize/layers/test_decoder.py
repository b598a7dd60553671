"""The walk is the model: layer by layer gives what the whole model gives."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tests.tiny_models import CONFIGS, TOLD
from transformers import AutoModelForCausalLM, DynamicCache

from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.discovery.found import find_architecture
from lowbit_quantize.model.files.base_weights import BaseWeights, wanted_of
from lowbit_quantize.model.hooks import inputs_of, without_attention
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.skeleton import build_skeleton
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.schemes.kv_cache import FP8_MAX, KVScales, scale_of
from lowbit_quantize.statistics.hessian import Hessian
from lowbit_quantize.statistics.kv_absmax import KVAbsmax


def decoder_of(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    reference = find_model(str(directory))
    skeleton = build_skeleton(reference.config)
    architecture = find_architecture(reference.config, skeleton, dtype)
    weights = BaseWeights(WeightFiles(reference.path), wanted_of(skeleton, architecture), None)
    return Decoder(reference.config, architecture, weights, torch.device("cpu"), skeleton, dtype)


def computed_in(family: str) -> torch.dtype:
    """bfloat16, but for a family whose code does not run in it."""
    return torch.float32 if family == "deepseek_v4" else torch.bfloat16


def token_ids(sequences: int = 6, tokens: int = 96) -> torch.Tensor:
    return torch.randint(0, 512, (sequences, tokens), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("family", [*CONFIGS, *TOLD])
def test_walking_layer_by_layer_equals_the_whole_model(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    dtype = computed_in(family)
    decoder, ids = decoder_of(tiny_model(family), dtype), token_ids()
    hidden = decoder.embed(ids)
    for index in range(decoder.depth):
        decoder.advance(decoder.load_layer(index), index, hidden)
    norm, head = decoder.head()
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=dtype)
    with torch.no_grad():
        expected = model(ids).logits
    logits = decoder.architecture.logits(norm(decoder.finished(hidden)) @ head.T)
    if not decoder.architecture.moe_block:
        assert torch.equal(logits, expected)
    # transformers multiplies its stacked experts at once; on some processors that moves last bits of bfloat16.
    torch.testing.assert_close(logits, expected, atol=0.07, rtol=0.02)


def test_a_layer_in_two_halves_is_the_layer(tiny_model: Callable[[str], Path], any_family: str) -> None:
    decoder = decoder_of(tiny_model(any_family))
    whole, halves = decoder.embed(token_ids()), decoder.embed(token_ids())
    for index in range(decoder.depth):
        layer = decoder.load_layer(index)
        kind = kind_of(layer)
        attention = (kind.attention, kind.attention_end, kind.attention_outputs)
        decoder.advance(layer, index, whole)
        if index == 0:  # and once with what attention's last linear reads, as an observer saw it
            read: list[torch.Tensor] = []
            decoder.observe(layer, 0, halves, {kind.attention_end: read.append}, None, stop=True)
            given = without_attention(layer, *attention, read)
        with given if index == 0 else nullcontext():
            decoder.advance_to(kind.middle, layer, index, halves)
        with without_attention(layer, *attention):
            decoder.advance(layer, index, halves)
        assert torch.equal(halves, whole)
        again = halves.clone()
        decoder.advance(layer, index, again)  # attention is back
        assert not torch.equal(again, halves)


def test_keys_and_values_are_seen_after_rope(tiny_model: Callable[[str], Path], kind: str) -> None:
    decoder, ids = decoder_of(tiny_model(kind)), token_ids(sequences=2, tokens=24)
    absmax = KVAbsmax()
    list(decoder.run_layer(decoder.load_layer(0), 0, decoder.embed(ids), absmax))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), dtype=torch.bfloat16)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert torch.equal(absmax.key, keys.abs().amax(dim=(0, 2, 3)).float())
    assert torch.equal(absmax.value, values.abs().amax((0, 2)).float().flatten())


def test_a_hessian_equals_the_plain_product() -> None:
    seen = Hessian(96, torch.device("cpu"))
    inputs = torch.randn(300, 96, generator=torch.Generator().manual_seed(9))
    for part in inputs.split(128):
        seen.add(part)
    torch.testing.assert_close(seen.matrix(), inputs.T @ inputs / 300, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen.matrix(), seen.matrix().T)
    assert seen.matrix() is seen.matrix()  # the mean in the sum's place, once


def test_linear_inputs_are_seen_flattened_over_tokens(tiny_model: Callable[[str], Path]) -> None:
    decoder = decoder_of(tiny_model("llama"))
    shapes: list[torch.Size] = []
    layer = decoder.load_layer(0)
    with inputs_of(layer, {"mlp.down_proj": lambda x: shapes.append(x.shape)}):
        list(decoder.run_layer(layer, 0, decoder.embed(token_ids(3, 32))))
    assert shapes == [torch.Size([96, 192])]


def test_observing_stops_at_the_last_observer_and_sees_what_a_full_run_sees(
    tiny_model: Callable[[str], Path],
) -> None:
    decoder = decoder_of(tiny_model("llama"))
    layer, hidden = decoder.load_layer(0), decoder.embed(token_ids(5, 64))
    seen: dict[str, list[torch.Tensor]] = {"self_attn.o_proj": [], "mlp.down_proj": []}
    ran: list[int] = []
    layer.get_submodule("mlp.down_proj").register_forward_hook(lambda *_: ran.append(1))
    observers = {name: inputs.append for name, inputs in seen.items()}
    decoder.observe(layer, 0, hidden, observers, KVAbsmax(), stop=True)
    assert not ran
    stopped = {name: torch.cat(inputs) for name, inputs in seen.items()}
    for inputs in seen.values():
        inputs.clear()
    with inputs_of(layer, observers):
        list(decoder.run_layer(layer, 0, hidden))
    assert ran
    assert all(torch.equal(torch.cat(inputs), stopped[name]) for name, inputs in seen.items())


def test_fp8_rounds_within_its_precision_and_saturates() -> None:
    values = torch.randn(1, 2, 50, 32, generator=torch.Generator().manual_seed(10)).bfloat16()
    scales = KVScales(scale_of(values.abs().max()), scale_of(values.abs().max() / 2))
    assert isinstance(scales.k_scale, float)
    assert isinstance(scales.v_scale, float)
    keys, halved = scales(values, values)
    normal = values.abs() > scales.k_scale * 2**-6
    assert ((keys - values).abs()[normal] <= values.abs()[normal] * 2**-4 * 1.02).all()
    assert halved.abs().max().item() <= scales.v_scale * FP8_MAX * 1.01
