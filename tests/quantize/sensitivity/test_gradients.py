"""Gradients that come back layer by layer are those of the whole model; labels drawn from it give the Fisher matrix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.layers.test_decoder import decoder_of, token_ids
from tests.tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.model.decoder import CACHE
from lowbit_quantize.model.experts.linears import unstack_experts
from lowbit_quantize.model.hooks import HookedCache
from lowbit_quantize.model.logits import LogitsForm
from lowbit_quantize.sensitivity.gradients import STORED, backward, sampled_loss_gradient


@pytest.mark.parametrize("family", list(CONFIGS))
def test_gradients_are_those_of_the_whole_model(tiny_model: Callable[[str], Path], family: str) -> None:
    decoder, ids = decoder_of(tiny_model(family), torch.float32), token_ids(24, 96)  # more than one batch
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    unstack_experts(model)
    names = [
        f"{decoder.layer_name(index)}.{name}"
        for index in range(decoder.depth)
        for group in decoder.architecture.groups_of(decoder.layer(index))
        for name in group.linears
    ]
    expected: dict[str, list[torch.Tensor]] = {}
    for name in names:

        def hook(_: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            expected.setdefault(name, []).append(output)
            output.retain_grad()

        model.get_submodule(name).register_forward_hook(hook)
    direction = torch.randn(*ids.shape, decoder.width, generator=torch.Generator().manual_seed(1))
    norm = model.get_submodule(decoder.architecture.final_norm)
    norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] * direction).sum().backward())
    model(ids)

    hidden, inputs = decoder.embed(ids), []
    for index in range(decoder.depth):
        inputs.append(hidden.clone())
        decoder.advance(decoder.load_layer(index), index, hidden)
    gradient = direction.clone()
    for index in reversed(range(decoder.depth)):
        prefix = f"{decoder.layer_name(index)}."
        linears = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        seen = backward(
            decoder, decoder.load_layer(index), index, inputs[index], gradient, linears, cache=False
        )
        for name in linears:
            found = torch.cat([one.gradient for one in seen.linears.get(name, [])] or [torch.zeros(0)])
            grads = [
                one.grad.flatten(0, -2) for one in expected.get(prefix + name, []) if one.grad is not None
            ]
            wanted = torch.cat(grads or [torch.zeros(0)])
            assert_same(found, wanted.to(STORED), name)


def assert_same(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """Up to rounding: STORED has eight bits. Experts are called once in the model and once a batch here."""
    assert found.shape == wanted.shape, name
    if found.numel():
        off = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30)
        assert off < 0.02, (name, float(off))


def test_keys_and_values_are_seen_with_their_gradients(tiny_model: Callable[[str], Path]) -> None:
    decoder, ids = decoder_of(tiny_model("llama"), torch.float32), token_ids(2, 32)
    hidden = decoder.embed(ids)
    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    seen = backward(decoder, decoder.load_layer(0), 0, hidden, gradient.clone(), [], cache=True)
    ((values, by_values),) = seen.values
    ((keys, by_keys),) = seen.keys
    step = 1e-3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(3))

    def moved(sign: int) -> torch.Tensor:
        given, args, kwargs = decoder.call(0, hidden)
        cache = HookedCache(lambda k, v: (k + sign * step, v + sign * step))
        with torch.no_grad():
            output = decoder.load_layer(0)(given, *args, **kwargs, **{CACHE: cache})
        given = output[0] if isinstance(output, tuple) else output
        return torch.sum((given * gradient).double())

    assert kind_of(decoder.layer(0)).attention
    assert keys.shape == by_keys.shape == values.shape
    assert float(moved(1) - moved(-1)) / 2 == pytest.approx(
        float(((by_keys + by_values) * step).sum()), rel=0.02
    )


@pytest.mark.parametrize("form", [LogitsForm(), LogitsForm(2.0, 5.0)], ids=["plain", "capped"])
def test_labels_drawn_from_the_model_give_its_fisher_matrix(form: LogitsForm) -> None:
    generator = torch.Generator().manual_seed(4)
    head, norm = torch.randn(12, 6, generator=generator), torch.nn.RMSNorm(6)
    state = torch.randn(6, generator=generator)

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        logits = form.factor * torch.mv(head, norm(x))
        return logits if form.cap is None else form.cap * (logits / form.cap).tanh()

    jacobian = torch.autograd.functional.jacobian(logits_of, state)
    p = logits_of(state).softmax(-1).detach()
    fisher = jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    found = sampled_loss_gradient(state.expand(40000, -1), norm, head, form, generator)
    estimate = found.T @ found / len(found)
    assert (estimate - fisher).norm() / fisher.norm() < 0.05
    assert found.mean(0).norm() < 0.05 * fisher.trace().sqrt()
