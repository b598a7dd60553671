"""The walk is the model: layer by layer gives what the whole model gives."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from lowbit_quantize.architectures import architecture_of
from lowbit_quantize.kv_scales import FP8_MAX, KVScales, scale_of
from lowbit_quantize.observe import Covariance, KeyValueReach
from lowbit_quantize.source import WeightFiles, find_model
from lowbit_quantize.stream import Decoder, inputs_of, without_attention


def decoder_of(directory: Path) -> Decoder:
    reference = find_model(str(directory))
    architecture = architecture_of(reference.model_type, reference.name)
    return Decoder(reference.config, architecture, WeightFiles(reference.path), torch.device("cpu"))


def token_ids(sequences: int = 6, tokens: int = 96) -> torch.Tensor:
    return torch.randint(0, 512, (sequences, tokens), generator=torch.Generator().manual_seed(8))


def test_walking_layer_by_layer_equals_the_whole_model(
    tiny_model: Callable[[str], Path], any_family: str
) -> None:
    decoder, ids = decoder_of(tiny_model(any_family)), token_ids()
    hidden = decoder.embed(ids)
    for index in range(decoder.depth):
        decoder.advance(decoder.load_layer(index), index, hidden)
    norm, head = decoder.head()
    model = AutoModelForCausalLM.from_pretrained(tiny_model(any_family), dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(ids).logits
    assert torch.equal(norm(hidden) @ head.T, expected)


def test_a_layer_in_two_halves_is_the_layer(tiny_model: Callable[[str], Path], any_family: str) -> None:
    decoder = decoder_of(tiny_model(any_family))
    whole, halves = decoder.embed(token_ids()), decoder.embed(token_ids())
    for index in range(decoder.depth):
        layer = decoder.load_layer(index)
        decoder.advance(layer, index, whole)
        if index == 0:  # and once with what attention's last linear reads, as an observer saw it
            read: list[torch.Tensor] = []
            decoder.observe(
                layer, 0, halves, {decoder.architecture.attention_end: read.append}, None, stop=True
            )
            given = without_attention(layer, decoder.architecture, read)
        with given if index == 0 else nullcontext():
            decoder.advance_to(decoder.architecture.middle, layer, index, halves)
        with without_attention(layer, decoder.architecture):
            decoder.advance(layer, index, halves)
        assert torch.equal(halves, whole)
        again = halves.clone()
        decoder.advance(layer, index, again)  # attention is back
        assert not torch.equal(again, halves)


def test_keys_and_values_are_seen_after_rope(tiny_model: Callable[[str], Path], family: str) -> None:
    decoder, ids = decoder_of(tiny_model(family)), token_ids(sequences=2, tokens=24)
    reach = KeyValueReach()
    list(decoder.run_layer(decoder.load_layer(0), 0, decoder.embed(ids), reach))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.bfloat16)
    cache = DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert reach.key.item() == keys.abs().max().item()
    assert torch.equal(reach.value, values.abs().amax((0, 2)).float().flatten())


def test_covariance_equals_the_plain_product() -> None:
    seen = Covariance(96, torch.device("cpu"))
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
    decoder.observe(layer, 0, hidden, observers, KeyValueReach(), stop=True)
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
    keys, halved = scales(values, values)
    normal = values.abs() > scales.k_scale * 2**-6
    assert ((keys - values).abs()[normal] <= values.abs()[normal] * 2**-4 * 1.02).all()
    assert halved.abs().max().item() <= scales.v_scale * FP8_MAX * 1.01
