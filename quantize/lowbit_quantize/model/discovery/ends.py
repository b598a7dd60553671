"""What lies before the decoder layers and behind them: embedding, final norm, head, and what logits go through."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_core.errors import ModelError
from lowbit_quantize.model.discovery.twin import Twin
from lowbit_quantize.model.logits import PLAIN, LogitsForm

EXACT = 1e-4


@dataclass(frozen=True)
class Ends:
    """Names, what the final norm adds to its weight, what rows of the embedding are multiplied by, and how logits are
    made of what the head gives. `around`: more than that happens before the first layer, or before the final norm.
    """

    embedding: str
    final_norm: str
    head: str
    final_norm_offset: float = 0.0
    embedding_factor: float = 1.0
    logits: LogitsForm = PLAIN
    around: bool = False


def ends_of(twin: Twin) -> Ends:
    """Found in what the twin's modules gave when it ran; raises ModelError where they are of another form."""
    model, calls = twin.model, twin.ends
    names = {id(module): name for name, module in model.named_modules()}
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or id(head) not in names:
        raise ModelError(
            f"{twin.config.model_type} has no head that gives logits; give a model that generates text"
        )
    own, (read, gave) = names[id(embedding)], calls[names[id(head)]]
    norm = next(
        (name for name, call in calls.items() if _is_norm(model, name) and _same(read, call[1])), None
    )
    refusal = ModelError(
        f"{twin.config.model_type}: its head reads something else than what a norm behind its decoder layers gives"
    )
    if norm is None or calls[norm][0] is None:
        raise refusal
    normed, factor = calls[norm][0], _factor(calls[own][1], twin.first_input, twin.config)
    around = factor is None or not _same(normed, twin.last_output)
    if around and not (_is_beside(norm, twin.layers) and _is_beside(own, twin.layers)):
        raise refusal  # no code of the model around its layers leads from the one to the other
    return Ends(
        own, norm, names[id(head)], _norm_offset(model.get_submodule(norm), normed),
        1.0 if factor is None else factor, _form(gave, twin.logits, twin.config), around,
    )  # fmt: skip


def _is_beside(name: str, layers: str) -> bool:
    """Whether a module is in the one that holds the decoder layers."""
    parent = layers.rpartition(".")[0]
    return not parent or name.startswith(f"{parent}.")


def _is_norm(model: nn.Module, name: str) -> bool:
    weight = getattr(model.get_submodule(name), "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _factor(before: Tensor, after: Tensor, config: Any) -> float | None:
    """What all of `before` is multiplied by to give `after`: a number of the configuration, or its reciprocal."""
    if before.shape != after.shape:
        return None
    ratio = float((before.double() * after.double()).sum() / before.double().square().sum())
    if not torch.allclose(before * ratio, after, rtol=EXACT, atol=EXACT * float(after.abs().mean())):
        return None
    if abs(ratio - 1) < EXACT:
        return 1.0
    said = [
        float(value)
        for value in vars(config.get_text_config()).values()
        if isinstance(value, int | float) and value
    ]
    said += [1 / value for value in said]
    nearest = min(said, key=lambda value: abs(value - ratio), default=ratio)
    return nearest if math.isclose(nearest, ratio, rel_tol=EXACT) else ratio


def _form(gave: Tensor, logits: Tensor, config: Any) -> LogitsForm:
    """The factor and the cap that make logits of what the head gives."""
    factor = _factor(gave, logits, config)
    if factor is not None:
        return LogitsForm(factor)
    text = config.get_text_config()
    caps = [
        value
        for name, value in vars(text).items()
        if "cap" in name and isinstance(value, int | float) and value
    ]
    for cap in caps:
        if torch.allclose(torch.tanh(gave / cap) * cap, logits, rtol=1e-3, atol=1e-4):
            return LogitsForm(1.0, float(cap))
    raise ModelError(
        f"{config.model_type} makes its logits in a way that is not known (neither a factor nor a cap)"
    )


def _norm_offset(norm: nn.Module, inputs: Tensor) -> float:
    """What the final norm adds to its weight before it multiplies."""
    weight: Any = norm.weight
    with torch.no_grad():
        before = norm(inputs)
        rest = before if getattr(norm, "bias", None) is None else before - norm.bias
        norm.weight = nn.Parameter(weight * 2, requires_grad=False)
        after = norm(inputs)
        norm.weight = weight
    return 0.0 if torch.allclose(after - before, rest, rtol=1e-3, atol=1e-4) else 1.0
