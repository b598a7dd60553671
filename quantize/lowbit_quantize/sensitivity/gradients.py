"""Gradients of a loss at the end of a model, layer by layer, with one layer in memory.

Labels are drawn from the model's own predictions. With them the gradients g of −log p have E[g gᵀ] = F, the Fisher
information, which is the curvature of the KL divergence from the model to itself: a change δ of some outputs costs
½ δᵀ F δ nats (Amari 1998; Martens 2014, arXiv 1412.1193). Layers run backward in the type that they run forward in;
between layers the gradient is float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbit_quantize.device.precision import exact_products
from lowbit_quantize.model.architecture import kind_of, linear_of
from lowbit_quantize.model.decoder import CACHE, Decoder, batches_of
from lowbit_quantize.model.hooks import HookedCache, removed_after
from lowbit_quantize.model.logits import LogitsForm

LOGITS_BYTES = 256 << 20  # of the logits that are in memory at once, in float32
STORED = torch.bfloat16  # how gradients of outputs are kept: what rounds them is random


@dataclass
class Seen:
    """What one module read and the loss's gradient by what it gave, token by token.

    Both are (tokens, features). `tokens` are their numbers in the text, where a module is not given all of them.
    """

    inputs: Tensor
    gradient: Tensor
    tokens: Tensor | None = None


@dataclass
class SeenLayer:
    """What backward passes through one layer saw, batch by batch: of each linear, and of keys and values.

    `keys` and `values` are pairs of what the cache was given and its gradient, (batch, heads, tokens, head_dim).
    """

    linears: dict[str, list[Seen]] = field(default_factory=dict)
    keys: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def sampled_loss_gradient(
    states: Tensor, norm: nn.Module, head: Tensor, form: LogitsForm, generator: torch.Generator
) -> Tensor:
    """The gradient by `states`, (tokens, hidden) before the final norm, of −log p of labels drawn from p itself.

    `head` is (vocabulary, hidden). The result is float32 of the states' shape, and its rows are independent.
    """
    rows = max(1, LOGITS_BYTES // (4 * len(head)))
    wide, wide_head, parts = norm.float(), head.float(), list[Tensor]()
    for part in states.split(rows):
        given = part.float().requires_grad_()
        with torch.enable_grad():
            normed = wide(given)
        with exact_products(head.dtype):
            logits = form(linear(normed.detach(), wide_head))
        slope = form.slope(logits)
        by_logits = logits.softmax(-1)
        by_logits.scatter_add_(1, _drawn(by_logits, generator), by_logits.new_full((len(part), 1), -1.0))
        by_logits = (by_logits if slope is None else by_logits.mul_(slope)).to(head.dtype)
        (found,) = torch.autograd.grad(normed, given, linear(by_logits, head.T).float())
        parts.append(found)
    return torch.cat(parts)


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """One of each row's choices, (rows, 1), by probabilities (rows, choices)."""
    sums = p.cumsum(-1)
    aimed = torch.rand(len(p), 1, generator=generator, device=generator.device).to(p.device) * sums[:, -1:]
    return torch.searchsorted(sums, aimed).clamp(max=p.shape[1] - 1)


def backward_dtype(decoder: Decoder) -> torch.dtype:
    """What backward passes compute in: gradients need bfloat16's range, and float16 is widened."""
    return torch.float32 if decoder.dtype == torch.float16 else decoder.dtype


def backward(
    decoder: Decoder,
    layer: nn.Module,
    index: int,
    hidden: Tensor,
    gradient: Tensor,
    linears: Sequence[str],
    *,
    cache: bool,
) -> SeenLayer:
    """Take the gradient back through one layer, in place.

    `layer` is in `backward_dtype`, `hidden` what it reads and `gradient`, in float32, the loss's by what it gives, both
    (sequences, tokens, hidden). Returned is what was seen of `linears`, by their names in the layer, and with
    `cache` of keys and values.
    """
    seen, dtype = SeenLayer(), backward_dtype(decoder)
    for batch in batches_of(hidden):
        watched = _Watched(layer, linears)
        given, args, kwargs = decoder.call(index, hidden[batch].to(dtype))
        given = given.detach().requires_grad_()
        if cache and kind_of(layer).attention:
            kwargs = kwargs | {CACHE: HookedCache(watched.cache)}
        with torch.enable_grad(), watched.looking():
            output = layer(given, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            wanted = [given, *watched.outputs]
            found = torch.autograd.grad(output, wanted, gradient[batch].to(output), allow_unused=True)
        watched.note(seen, found[1:], decoder.dtype, batch.start * hidden.shape[1])
        gradient[batch] = _or_zeros(found[0], given)  # only now: what was found may be this very memory
    return seen


class _Watched:
    """The modules of one layer while a batch goes through it forward."""

    def __init__(self, layer: nn.Module, linears: Sequence[str]) -> None:
        self._layer, self._names = layer, linears
        self._linears: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
        self._cached: list[tuple[Tensor, Tensor]] = []
        self._chosen: Tensor | None = None

    @property
    def outputs(self) -> list[Tensor]:
        """All that gradients are wanted of: of linears, then of keys and values."""
        return [one[2] for one in self._linears] + [tensor for pair in self._cached for tensor in pair]

    def cache(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A KV-cache hook."""
        self._cached.append((keys, values))
        return keys, values

    @contextmanager
    def looking(self) -> Iterator[None]:
        handles, experts = [], kind_of(self._layer).experts
        if experts:
            handles.append(self._layer.get_submodule(experts).register_forward_pre_hook(self._routed))
        for name in self._names:

            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                self._linears.append((name, inputs[0].detach(), output, self._tokens_of(name)))

            handles.append(linear_of(self._layer, name).register_forward_hook(hook))
        with removed_after(handles):
            yield

    def note(
        self, seen: SeenLayer, gradients: Sequence[Tensor | None], dtype: torch.dtype, first: int
    ) -> None:
        """Keep what was seen, with its gradients in the order of `outputs`; `first` is the batch's first token."""
        found = iter(gradients)
        for name, inputs, output, tokens in self._linears:
            gradient = _or_zeros(next(found), output).flatten(0, -2).to(STORED)
            where = None if tokens is None else tokens + first
            rows = inputs.flatten(0, -2).to(dtype)
            seen.linears.setdefault(name, []).append(Seen(rows, gradient, where))
        for pair in self._cached:
            for kept, tensor in zip((seen.keys, seen.values), pair, strict=True):
                kept.append((tensor.detach().to(dtype), _or_zeros(next(found), tensor)))

    def _routed(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._chosen = inputs[1]

    def _tokens_of(self, name: str) -> Tensor | None:
        """Which tokens of the batch a routed expert's linear reads; None of another linear, which reads all."""
        experts = f"{kind_of(self._layer).experts}."
        if experts == "." or not name.startswith(experts) or self._chosen is None:
            return None
        number = int(name.removeprefix(experts).partition(".")[0])
        return torch.where(self._chosen == number)[0]


def _or_zeros(gradient: Tensor | None, of: Tensor) -> Tensor:
    return torch.zeros_like(of) if gradient is None else gradient.detach()
