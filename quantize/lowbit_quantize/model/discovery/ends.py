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
    made of what the head gives.
    """

    embedding: str
    final_norm: str
    head: str
    final_norm_offset: float = 0.0
    embedding_factor: float = 1.0
    logits: LogitsForm = PLAIN


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
    last, first = twin.last_output, twin.first_input
    norm = next((name for name, (read, _) in calls.items() if read is not None and _same(read, last)), None)
    if norm is None:
        raise ModelError(f"{twin.config.model_type}: no norm reads what the last decoder layer gives")
    _, normed = calls[norm]
    read, gave = calls[names[id(head)]]
    if not _same(read, normed):
        raise ModelError(f"{twin.config.model_type}: its head reads something else than what {norm} gives")
    factor = _factor(calls[names[id(embedding)]][1], first, twin.config)
    if factor is None:
        raise ModelError(
            f"{twin.config.model_type} adds something to its embedding before the first layer, which is not supported"
        )
    return Ends(
        names[id(embedding)], norm, names[id(head)], _norm_offset(model.get_submodule(norm), last),
        factor, _form(gave, twin.logits, twin.config),
    )  # fmt: skip


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
