"""What is predicted of a decision is about what the model loses when that decision alone is taken."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.quantize.layers.test_decoder import decoder_of
from tests.quantize.small_runs import recipe_with
from transformers import AutoModelForCausalLM

from lowbit_quantize.methods.rtn import RoundToNearest
from lowbit_quantize.model.experts.linears import unstack_experts
from lowbit_quantize.recipe import Recipe
from lowbit_quantize.run.hidden_states import HiddenStates
from lowbit_quantize.schemes.rounding_linear import RoundingLinear
from lowbit_quantize.sensitivity.decisions import Decision, parse_candidates
from lowbit_quantize.sensitivity.measure import Prepared, measure, prepare
from lowbit_quantize.sensitivity.progress import Progress, State
from lowbit_quantize.sensitivity.report import CACHE, HEAD, DecisionRecord
from lowbit_quantize.sensitivity.walk import SensitivityWalk

CPU = torch.device("cpu")
TOKENS = 2048
CANDIDATES = "W8A16:32:rtn,W8A8:rtn"


def small(*methods: str) -> Recipe:
    rule = {"match": "*", "scheme": "W4A16", "group_size": 32, "methods": list(methods or ("gptq",))}
    return recipe_with(rule)


def kl_without(model: Path, decision: Decision, candidate: str, prepared: Prepared) -> float:
    """Of the whole model in float32 with this decision's linears rounded to nearest, from itself."""
    ids = prepared.scored.ids
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    unstack_experts(base)
    with torch.inference_mode():
        p = base(ids).logits.double().log_softmax(-1)
        for name in decision.linears:
            linear, scheme = base.get_submodule(name), prepared.tables[candidate][name].scheme
            found = RoundToNearest().quantize(linear.weight.float(), torch.zeros(0), scheme)
            if scheme.input_quantizer is None:
                linear.weight.copy_(found.dequantize())
            else:
                served = RoundingLinear(linear, *found.factors(), scheme.input_quantizer, None)
                base.set_submodule(name, served)
        q = base(ids).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_a_decision_costs_about_what_is_predicted(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model, recipe = tiny_model(family), small()
    candidates = parse_candidates(CANDIDATES, recipe)
    prepared = prepare(str(model), recipe, candidates, TOKENS)
    found = measure(str(model), recipe, candidates, TOKENS, CPU, out=tmp_path / "found.json")
    records = {one.name: one for one in found.decisions}
    ratios = []
    for decision in prepared.decisions:
        behind = decision.layer == 2 and "mlp" in decision.kind  # the last attention
        if decision.kind in (CACHE, HEAD) or decision.layer == 0:  # random models break in layer 0
            continue
        if prepared.plan.experts and not behind:  # a router's choices are near ties in a random model
            continue
        for candidate in prepared.tables:
            predicted = records[decision.name].choices[candidate].kl
            ratios.append(predicted / kl_without(model, decision, candidate, prepared))
            # Behind it no token's error reaches another: nothing is left out there.
            close = 1.2 if behind else 2.5
            assert 1 / close < ratios[-1] < close, (decision.name, candidate, ratios[-1])
    assert 0.8 < torch.tensor(ratios).log().mean().exp() < 1.25


def test_the_heads_cost_is_the_kl_itself(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, recipe = tiny_model("qwen2"), small()
    candidates = parse_candidates("W4A16:32:rtn", recipe)
    prepared = prepare(str(model), recipe, candidates, 512)
    found = measure(str(model), recipe, candidates, 512, CPU, out=tmp_path / "found.json")
    (head,) = (one for one in found.decisions if one.kind == HEAD)
    (decision,) = (one for one in prepared.decisions if one.kind == HEAD)
    expected = kl_without(model, decision, "W4A16:32:rtn", prepared)
    assert head.choices["W4A16:32:rtn"].kl == pytest.approx(expected, rel=0.1)


def test_more_bits_cost_less_by_each_method(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small("gptq")
    text = ",".join(
        f"{scheme}:32:{how}" for how in ("gptq", "awq+gptq") for scheme in ("W3A16", "W4A16", "W5A16")
    )
    found = measure(
        str(tiny_model("llama")), recipe, parse_candidates(f"{text},W8A8:smoothquant+gptq", recipe), 512, CPU,
        out=tmp_path / "found.json",
    )  # fmt: skip
    for one in found.decisions:
        if one.modules:
            for how in ("gptq", "awq+gptq"):
                kl = [one.choices[f"W{bits}A16:32:{how}"].kl for bits in (3, 4, 5)]
                assert kl == sorted(kl, reverse=True), (one.name, how, kl)
            assert one.choices["W8A8:smoothquant+gptq"].kl < one.choices["W4A16:32:gptq"].kl


def test_every_quantized_linear_belongs_to_one_decision(
    tiny_model: Callable[[str], Path], any_family: str
) -> None:
    recipe = small()
    prepared = prepare(str(tiny_model(any_family)), recipe, parse_candidates("W4A16", recipe), 512)
    names = [name for one in prepared.decisions for name in one.linears if one.kind != HEAD]
    assert len(set(names)) == len(names)
    assert set(names) == set(prepared.plan.modules)
    experts = [one for one in prepared.decisions if any(".experts.0." in name for name in one.linears)]
    for one in experts:
        assert all(".experts." in name for name in one.linears)
        assert sum(".experts.7." in name for name in one.linears) == 3


def test_streams_in_files_change_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = small()
    candidates = parse_candidates("W4A16", recipe)

    def kls(memory_bytes: int) -> list[float]:
        found = measure(
            str(tiny_model("llama")), recipe, candidates, 512, CPU, out=tmp_path / "found.json",
            stream_memory_bytes=memory_bytes,
        )  # fmt: skip
        return [choice.kl for one in found.decisions for choice in one.choices.values()]

    assert kls(0) == kls(1 << 30)
    assert not list(tmp_path.iterdir())


class Killed(Exception):
    """What ends a run in the middle."""


class StopsAfter(Progress):
    """Ends the run when so many layers are saved."""

    def __init__(self, path: Path, identity: str, layers: int) -> None:
        super().__init__(path, identity)
        self._left = layers

    def save(self, state: State) -> None:
        super().save(state)
        self._left -= 1
        if self._left == 0:
            raise Killed


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_killed_run_goes_on_to_the_same_numbers(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    recipe, file = small(), tmp_path / "progress"
    prepared = prepare(str(tiny_model(family)), recipe, parse_candidates("W4A16,W8A8", recipe), 256)

    def walked(progress: Progress) -> State:
        streams = HiddenStates(CPU)
        texts = prepared.calibration.ids, prepared.scored.ids
        decoder = decoder_of(tiny_model(family))
        return SensitivityWalk(
            decoder, prepared.decisions, prepared.tables, texts, streams, progress, 0
        ).run()

    whole = walked(Progress(tmp_path / "other", "same"))
    for layers in (1, 1):
        with pytest.raises(Killed):
            walked(StopsAfter(file, "same", layers))
    again = Progress(file, "same").load()
    assert again is not None
    assert again.next_layer == 0
    assert Progress(file, "another").load() is None
    found = walked(Progress(file, "same"))
    assert found.cached == whole.cached
    assert found.scores.keys() == whole.scores.keys()
    for name, choices in whole.scores.items():
        for candidate, nats in choices.items():
            assert torch.equal(found.scores[name][candidate], nats), (name, candidate)


def test_a_cache_in_fp8_is_a_decision_of_each_layer_that_has_one(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def caches(family: str) -> list[DecisionRecord]:
        recipe = small()
        found = measure(
            str(tiny_model(family)),
            recipe,
            parse_candidates("W4A16", recipe),
            256,
            CPU,
            out=tmp_path / "found.json",
        )
        return [one for one in found.decisions if one.kind == CACHE]

    (first, *_) = found = caches("llama")
    assert [one.layer for one in found] == [0, 1, 2]
    assert first.choices["fp8"].bytes == 2 * 2 * 32  # keys and values of two heads of 32
    assert 0 < first.choices["fp8"].kl < 0.1
    assert caches("deepseek_v2") == []  # vLLM loads no scales for a latent
