"""Methods on a whole layer: folding keeps what it computes, searching lowers the error."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.quantize.layers.test_decoder import decoder_of

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.methods.awq import Awq, awq_scale, column_weight, search_scale
from lowbit_quantize.methods.gptq import Gptq
from lowbit_quantize.methods.method import InputScale, Method, Need, Site, SitePart
from lowbit_quantize.model.architecture import linear_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.hooks import inputs_of
from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.scheme import Params, Quantized, Scheme
from lowbit_quantize.statistics.hessian import output_error
from lowbit_quantize.statistics.layer import LayerStatistics
from lowbit_quantize.walk.module_plan import ModulePlan, Modules
from lowbit_quantize.walk.quantize_linears import QuantizedLayer, quantize_linears

SCHEME = Integer(4, 32, symmetric=True, name="W4A16")
WIDER = Integer(4, 64, symmetric=True, name="W4A16")
LAYER = 2
METHODS = {method.name: method for method in CATALOG.methods}


def observed_layer(directory: Path) -> tuple[Decoder, torch.nn.Module, torch.Tensor, LayerStatistics]:
    """The last layer, which routes where the family does."""
    decoder = decoder_of(directory)
    decoder.dtype = torch.float32
    ids = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(6))
    hidden, layer = decoder.embed(ids), decoder.load_layer(LAYER)
    statistics = LayerStatistics(layer, decoder.architecture, decoder.device)
    with inputs_of(layer, statistics.observers):
        list(decoder.run_layer(layer, LAYER, hidden))
    return decoder, layer, hidden, statistics


def output(decoder: Decoder, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(decoder.run_layer(layer, LAYER, hidden)))


def everywhere(
    decoder: Decoder, layer: torch.nn.Module, *methods: Method, scheme: Scheme = SCHEME
) -> dict[str, ModulePlan]:
    """The table of a layer whose linears are all quantized alike."""
    plan = ModulePlan(scheme, methods)
    return {name: plan for group in decoder.architecture.groups_of(layer) for name in group.linears}


def quantized(
    decoder: Decoder, layer: torch.nn.Module, statistics: LayerStatistics, modules: Modules
) -> QuantizedLayer:
    """The layer, quantized in one stage."""
    stage = [group for group in decoder.architecture.groups_of(layer) if group.linears[0] in modules]
    done = QuantizedLayer()
    with torch.no_grad():
        quantize_linears(layer, decoder.architecture, statistics, modules, stage, done)
    return done


@dataclass(frozen=True)
class Exact(Integer):
    """Numbers that hold every weight as it is."""

    def dequantize(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        return codes


class ScalesOnly(Awq):
    """AWQ's scales, and codes that are the weights."""

    name = "scales only"

    def quantize(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        scheme: Scheme,
        mask: torch.Tensor | None = None,
    ) -> Quantized:
        return Quantized(weight, scheme.search(weight, None), scheme)


@dataclass(frozen=True)
class ScalesBy(ScalesOnly):
    """One factor for every input of even number; stands for a second method that scales."""

    factor: float
    name: str = "even inputs"
    needs: frozenset[Need] = frozenset()

    def input_scale(self, site: Site) -> InputScale:
        scale = torch.ones(site.parts[0].weight.shape[1])
        scale[::2] = self.factor
        return InputScale(site.tie(scale), 0.5)


@pytest.mark.parametrize(
    "methods", [(ScalesOnly(),), (ScalesBy(3.0), ScalesOnly())], ids=["one", "two in turn"]
)
def test_folding_scales_leaves_the_layer_unchanged(
    tiny_model: Callable[[str], Path], any_family: str, methods: tuple[Method, ...]
) -> None:
    decoder, layer, hidden, statistics = observed_layer(tiny_model(any_family))
    before = output(decoder, layer, hidden)
    router = dict(layer.named_parameters()).get("mlp.gate.weight")
    norm = dict(layer.named_parameters()).get("post_attention_layernorm.weight")
    modules = everywhere(decoder, layer, *methods, scheme=Exact(4, 32, symmetric=True, name="exact"))
    result = quantized(decoder, layer, statistics, modules)
    assert set(result.linears) == set(modules)
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


def test_awq_errs_less_than_nearest_codes_and_gptq_less_than_awq(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    errors = {}
    for names in ("rtn", "awq", "gptq", "awq+gptq"):
        decoder, layer, hidden, statistics = observed_layer(tiny_model(kind))
        before = output(decoder, layer, hidden)
        methods = [METHODS[name] for name in names.split("+")]
        result = quantized(decoder, layer, statistics, everywhere(decoder, layer, *methods))
        difference = float((output(decoder, layer, hidden) - before).square().mean())
        errors[names] = {name: linear.error for name, linear in result.linears.items()}
        errors[names]["output"] = difference / float(before.square().mean())
    linears = sum(len(group.linears) for group in decoder.architecture.groups_of(layer))
    assert len(errors["awq"]) == linears + 1
    assert sum(errors["awq"].values()) < 0.8 * sum(errors["rtn"].values())
    for names in ("gptq", "awq+gptq"):
        assert sum(errors[names].values()) < 0.9 * sum(errors["awq"].values())


def test_what_the_table_lacks_stays_as_it_is(tiny_model: Callable[[str], Path]) -> None:
    decoder, layer, _, statistics = observed_layer(tiny_model("llama"))
    before = linear_of(layer, "self_attn.v_proj").weight.clone()
    modules = everywhere(decoder, layer, Awq())
    for name in ("q_proj", "k_proj", "v_proj"):
        del modules[f"self_attn.{name}"]
    result = quantized(decoder, layer, statistics, modules)
    assert set(result.linears) == {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert torch.equal(linear_of(layer, "self_attn.v_proj").weight, before)
    assert result.value_divisor is None


def test_each_linear_is_quantized_by_its_own_entry(tiny_model: Callable[[str], Path]) -> None:
    """Only `down_proj` has GPTQ and wider groups; the others are to the last bit what they are without it."""
    results = {}
    for mixed in (False, True):
        decoder, layer, _, statistics = observed_layer(tiny_model("qwen2"))
        modules = everywhere(decoder, layer, METHODS["rtn"])
        if mixed:
            modules["mlp.down_proj"] = ModulePlan(WIDER, (Gptq(),))
        results[mixed] = quantized(decoder, layer, statistics, modules).linears
    for name, linear in results[True].items():
        same = torch.equal(linear.quantized.dequantize(), results[False][name].quantized.dequantize())
        assert same == (name != "mlp.down_proj")
        assert linear.quantized.scheme == (SCHEME if same else WIDER)
    assert results[True]["mlp.down_proj"].quantized.params["scale"].shape == (128, 3)


def test_readers_of_one_norm_that_are_quantized_differently_share_a_scale(
    tiny_model: Callable[[str], Path],
) -> None:
    """Experts in groups of 64 by AWQ, the shared expert beside them to its nearest codes: it is multiplied too."""
    decoder, layer, hidden, statistics = observed_layer(tiny_model("qwen2_moe"))
    before = output(decoder, layer, hidden)
    exact = Exact(4, 64, symmetric=True, name="exact")
    modules = everywhere(decoder, layer, ScalesOnly(), scheme=exact)
    for name in modules:
        if "shared_expert" in name:
            modules[name] = ModulePlan(Exact(4, 32, symmetric=True, name="exact"), (Unscaled(),))
    result = quantized(decoder, layer, statistics, modules)
    torch.testing.assert_close(output(decoder, layer, hidden), before, rtol=1e-3, atol=1e-3)
    assert result.linears["mlp.experts.0.gate_proj"].alpha is not None


def test_experts_that_stay_take_the_inverse_of_what_their_norm_is_divided_by(
    tiny_model: Callable[[str], Path],
) -> None:
    """Only the shared expert is quantized. A scale of 3 becomes 4, which costs bfloat16 no bit."""
    decoder, layer, hidden, statistics = observed_layer(tiny_model("qwen2_moe"))
    before, weights = output(decoder, layer, hidden), {k: v.clone() for k, v in layer.state_dict().items()}
    exact = Exact(4, 64, symmetric=True, name="exact")
    modules = everywhere(decoder, layer, ScalesBy(3.0), scheme=exact)
    modules = {name: plan for name, plan in modules.items() if ".shared_expert." in name}
    quantized(decoder, layer, statistics, modules)
    torch.testing.assert_close(output(decoder, layer, hidden), before, rtol=1e-3, atol=1e-3)
    scale = torch.ones(128)
    scale[::2] = 4
    for name, weight in layer.state_dict().items():
        if ".experts." in name:
            expected = weights[name] if "down_proj" in name else weights[name] * scale
            assert torch.equal(weight, expected), name
    assert torch.equal(layer.state_dict()["mlp.gate.weight"], weights["mlp.gate.weight"] * scale)
    norm = "post_attention_layernorm.weight"
    assert torch.equal(layer.state_dict()[norm], weights[norm] / scale)


class Unscaled(ScalesOnly):
    """Scales nothing by itself."""

    name = "unscaled"
    scales_inputs = False


def uneven_problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(96, 128, generator=generator)
    inputs = (
        torch.randn(1000, 128, generator=generator)
        * torch.logspace(-1, 1, 128)[torch.randperm(128, generator=generator)]
    )
    return weight, inputs.T @ inputs / 1000


def test_the_searched_scale_errs_less_than_no_scale_where_activations_are_uneven() -> None:
    weight, hessian = uneven_problem()
    choice = search_scale([SitePart(weight, SCHEME, hessian)], hessian.diagonal().sqrt())

    def error(scale: torch.Tensor) -> float:
        found = Awq().quantize(weight * scale, hessian / torch.outer(scale, scale), SCHEME)
        return float(output_error(weight - found.dequantize() / scale, hessian))

    assert choice.alpha > 0
    assert error(choice.scale) < 0.95 * error(torch.ones(128))


def test_the_searched_scale_is_one_of_awqs_family() -> None:
    weight, hessian = uneven_problem()
    activation, columns = hessian.diagonal().sqrt(), column_weight(weight, SCHEME)
    choice = search_scale([SitePart(weight, SCHEME, hessian)], activation)
    betas = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert any(
        torch.equal(choice.scale, awq_scale(activation, columns, choice.alpha, beta)) for beta in betas
    )


def test_linears_of_two_schemes_behind_one_norm_are_both_heard() -> None:
    """Over both, their scale errs less than none, and less than one that only the other was asked for."""
    weight, hessian = uneven_problem()
    parts = [SitePart(weight[:48], SCHEME, hessian), SitePart(3 * weight[48:].flip(1), WIDER, hessian)]
    activation = hessian.diagonal().sqrt()

    def error(scale: torch.Tensor) -> float:
        scaled = hessian / torch.outer(scale, scale)
        return sum(
            part.scheme.trial_error(part.weight * scale, _blocks(scaled, part.scheme)) for part in parts
        )

    both = error(search_scale(parts, activation).scale)
    assert both < 0.95 * error(torch.ones(128))
    assert both < max(error(search_scale([part], activation).scale) for part in parts)


def _blocks(hessian: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    width = scheme.width(len(hessian))
    return torch.stack([hessian[i : i + width, i : i + width] for i in range(0, len(hessian), width)])
