"""AWQ on a whole layer: folding keeps the function, searching lowers the error."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit_quantize.architectures import architecture_of, linear_of
from lowbit_quantize.awq import awq_scale, column_weight, search_scale
from lowbit_quantize.clip import round_clipped
from lowbit_quantize.compress import ROUND, compress_layer
from lowbit_quantize.grid import GridSpec, Rounded, output_error
from lowbit_quantize.observe import LayerStatistics
from lowbit_quantize.source import WeightFiles, find_model
from lowbit_quantize.stream import Decoder, inputs_of

SPEC = GridSpec(4, 32, symmetric=True)
LAYER = 2


def observed_layer(directory: Path) -> tuple[Decoder, torch.nn.Module, torch.Tensor, LayerStatistics]:
    """The last layer, which routes where the family does."""
    reference = find_model(str(directory))
    architecture = architecture_of(reference.model_type, reference.name)
    decoder = Decoder(reference.config, architecture, WeightFiles(reference.path), torch.device("cpu"))
    decoder.dtype = torch.float32
    ids = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(6))
    hidden, layer = decoder.embed(ids), decoder.load_layer(LAYER)
    statistics = LayerStatistics(layer, architecture, decoder.device)
    with inputs_of(layer, statistics.observers):
        list(decoder.run_layer(layer, LAYER, hidden))
    return decoder, layer, hidden, statistics


def output(decoder: Decoder, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(decoder.run_layer(layer, LAYER, hidden)))


def exact(weight: torch.Tensor, _: torch.Tensor, spec: GridSpec) -> Rounded:
    """A grid that holds every weight as it is."""
    assert spec.group_size is not None
    groups = weight.shape[1] // spec.group_size
    return Rounded(weight, torch.ones(len(weight), groups), torch.zeros(len(weight), groups), spec)


def test_folding_scales_leaves_the_layer_unchanged(
    tiny_model: Callable[[str], Path], any_family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, layer, hidden, statistics = observed_layer(tiny_model(any_family))
    before = output(decoder, layer, hidden)
    router = dict(layer.named_parameters()).get("mlp.gate.weight")
    norm = dict(layer.named_parameters()).get("post_attention_layernorm.weight")
    monkeypatch.setitem(ROUND, "awq", exact)
    result = compress_layer(layer, decoder.architecture, statistics, SPEC, "awq")
    unfoldable = sum(
        len(group.linears) for group in decoder.architecture.groups_of(layer) if group.fold is None
    )
    assert sum(linear.alpha is None for linear in result.linears.values()) == unfoldable
    if not decoder.architecture.latent_cache:
        assert result.value_divisor is not None
        assert result.value_divisor.std() > 0.01
    after = output(decoder, layer, hidden)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    if router is not None:
        assert norm is not None
        scaled = norm / dict(layer.named_parameters())["post_attention_layernorm.weight"]
        assert torch.equal(scaled.log2(), scaled.log2().round())
        assert torch.equal(dict(layer.named_parameters())["mlp.gate.weight"], router * scaled)


def test_awq_errs_less_than_rounding_and_gptq_less_than_awq(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    errors = {}
    for method in ("rtn", "awq", "gptq", "awq+gptq"):
        decoder, layer, hidden, statistics = observed_layer(tiny_model(family))
        before = output(decoder, layer, hidden)
        result = compress_layer(layer, decoder.architecture, statistics, SPEC, method)
        difference = float((output(decoder, layer, hidden) - before).square().mean())
        errors[method] = {name: linear.error for name, linear in result.linears.items()} | {
            "output": difference
        }
    assert len(errors["awq"]) == 8
    assert sum(errors["awq"].values()) < 0.8 * sum(errors["rtn"].values())
    assert errors["awq"]["output"] < 0.8 * errors["rtn"]["output"]
    for method in ("gptq", "awq+gptq"):
        assert sum(errors[method].values()) < 0.9 * sum(errors["awq"].values())


def test_a_linear_that_is_ignored_leaves_its_whole_group_alone(tiny_model: Callable[[str], Path]) -> None:
    decoder, layer, _, statistics = observed_layer(tiny_model("llama"))
    before = linear_of(layer, "self_attn.v_proj").weight.clone()
    ignored = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
    result = compress_layer(layer, decoder.architecture, statistics, SPEC, "awq", ignored)
    assert set(result.linears) == {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert torch.equal(linear_of(layer, "self_attn.v_proj").weight, before)
    assert result.value_divisor is None


def test_the_searched_scale_errs_less_than_no_scale_where_activations_are_uneven() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(96, 128, generator=generator)
    inputs = (
        torch.randn(1000, 128, generator=generator)
        * torch.logspace(-1, 1, 128)[torch.randperm(128, generator=generator)]
    )
    covariance = inputs.T @ inputs / 1000
    choice = search_scale(weight, covariance, covariance.diagonal().sqrt(), SPEC)

    def error(scale: torch.Tensor) -> float:
        rounded = round_clipped(weight * scale, covariance / torch.outer(scale, scale), SPEC)
        return float(output_error(weight - rounded.dequantize() / scale, covariance))

    assert choice.alpha > 0
    assert error(choice.scale) < 0.95 * error(torch.ones(128))
    again = awq_scale(covariance.diagonal().sqrt(), column_weight(weight, SPEC), choice.alpha, choice.beta)
    assert torch.equal(choice.scale, again)
