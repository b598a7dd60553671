"""One quantized layer tuned on what the base model's layer gives: codes, scales and norms together, by gradients.

The layer reads what the compressed layers before it give, and is to give what the base's layer gives on the base's own
stream; so it makes up for earlier errors, too. A token's squared error counts relative to the token's own size, as
the norm behind the layer will see it. Some rows are set aside: the state of least error on them is kept, and the layer
stays as it was unless that error fell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowbit_core.errors import NumericsError
from lowbit_quantize.model.architecture import kind_of
from lowbit_quantize.model.decoder import CACHE, Decoder
from lowbit_quantize.model.hooks import HookedCache, KVCacheHook
from lowbit_quantize.passes.learned_linear import Adam, LearnedLinear
from lowbit_quantize.schemes.scheme import Quantized

STEP_TOKENS = 1024  # a step of gradients
CHECK_TOKENS = 2048  # a forward pass over the rows that are set aside
HALF_SCALE = 1024.0  # of a loss in float16, whose small gradients would be zero; steps do not depend on it
LARGEST_CODE_STEP = 0.1  # however few steps there are: one batch alone changes no code


@dataclass(frozen=True)
class Rates:
    """How far all steps together may move a code's number, and shares by which Adam moves scales and norms."""

    epochs: int
    code_travel: float
    scale_rate: float
    norm_rate: float


@dataclass(frozen=True)
class Tuned:
    """What a layer became: its linears, its norms' weights, and the error on rows set aside before and after."""

    linears: Mapping[str, Quantized]
    norms: Mapping[str, Tensor]
    before: float
    after: float


class LearnedNorm:
    """A norm's weight, held as it is stored."""

    def __init__(self, weight: Tensor) -> None:
        self._wide, self._dtype, self._adam = (
            weight.detach().float().clone(),
            weight.dtype,
            Adam(weight.float()),
        )
        self._size = self._wide.square().mean().sqrt()

    def weight(self) -> Tensor:
        return self._wide.to(self._dtype).requires_grad_()

    def move(self, gradient: Tensor, rate: float) -> None:
        self._wide.sub_(rate * self._size * self._adam.step(gradient.float()))


class LayerTuning:
    """One layer, its streams, and all of it that is learned."""

    def __init__(
        self,
        decoder: Decoder,
        layer: nn.Module,
        index: int,
        quantized: Mapping[str, Quantized],
        norms: Sequence[str],
        hook: KVCacheHook | None,
    ) -> None:
        self._decoder, self._layer, self._index, self._hook = decoder, layer, index, hook
        self._scale = HALF_SCALE if decoder.dtype == torch.float16 else 1.0
        self._linears = {name: LearnedLinear(one, decoder.dtype) for name, one in quantized.items()}
        self._norms = {name: LearnedNorm(layer.get_submodule(name).weight) for name in norms}  # type: ignore[arg-type]

    def run(self, given: Tensor, wanted: Tensor, aside: Sequence[int], rates: Rates, seed: int) -> Tuned:
        """Tune on (sequences, tokens, hidden) of inputs and wanted outputs, but for the sequences set `aside`."""
        generator = torch.Generator().manual_seed(seed)
        others = torch.tensor([row for row in range(len(given)) if row not in set(aside)])
        batches = max(1, STEP_TOKENS // given.shape[1])
        steps = rates.epochs * -(-len(others) // batches)
        before = self.error(given, wanted, aside)
        best, kept, done = before, self._state(), 0
        for _ in range(rates.epochs):
            for rows in others[torch.randperm(len(others), generator=generator)].split(batches):
                self._step(given, wanted, rows.sort().values, rates, 1 - done / steps, 2 / (steps + 1))
                done += 1
            error = self.error(given, wanted, aside)
            if error < best:
                best, kept = error, self._state()
        return Tuned(*kept, before, best)

    def error(self, given: Tensor, wanted: Tensor, rows: Sequence[int]) -> float:
        """The mean over tokens of the squared error relative to the token's square."""
        total, size = 0.0, max(1, CHECK_TOKENS // given.shape[1])
        weights = {name: one.detach() for name, one in self._weights().items()}
        for some in torch.tensor(list(rows)).split(size):
            with torch.no_grad():
                total += float(self._loss(weights, given[some], wanted[some])) * len(some)
        return total / len(rows)

    def _step(
        self, given: Tensor, wanted: Tensor, rows: Tensor, rates: Rates, left: float, share: float
    ) -> None:
        weights = self._weights()
        with torch.enable_grad():
            loss = self._loss(weights, given[rows], wanted[rows]) * self._scale
        if not torch.isfinite(loss):
            raise NumericsError(
                f"tuning layer {self._index}: its loss is not a finite number; lower tune.scale_rate and tune.norm_rate"
            )
        found = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        code_step = min(LARGEST_CODE_STEP, rates.code_travel * share) * left
        for name, linear in self._linears.items():
            linear.move(found[f"{name}.weight"], code_step, rates.scale_rate * left)
        for name, norm in self._norms.items():
            norm.move(found[f"{name}.weight"], rates.norm_rate * left)

    def _weights(self) -> dict[str, Tensor]:
        linears = {f"{name}.weight": one.weight() for name, one in self._linears.items()}
        return linears | {f"{name}.weight": one.weight() for name, one in self._norms.items()}

    def _loss(self, weights: Mapping[str, Tensor], given: Tensor, wanted: Tensor) -> Tensor:
        rows, args, kwargs = self._decoder.call(self._index, given)
        if self._hook is not None and kind_of(self._layer).attention:
            kwargs = kwargs | {CACHE: HookedCache(straight_through(self._hook))}
        output = functional_call(self._layer, dict(weights), (rows, *args), kwargs)
        output = (output[0] if isinstance(output, tuple) else output).float()
        wanted = wanted.to(output.device).float()
        sizes = wanted.square().mean(-1).clamp(min=1e-20)
        relative: Tensor = (output - wanted).square().mean(-1) / sizes
        return relative.mean()

    def _state(self) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
        linears = {name: one.quantized for name, one in self._linears.items()}
        return linears, {name: one.weight().detach() for name, one in self._norms.items()}


def straight_through(hook: KVCacheHook) -> KVCacheHook:
    """A hook that rounds keys and values, through which gradients pass as if it did not."""

    def passed(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rounded = hook(keys.detach(), values.detach())
        first, second = (
            one + (given - one).detach() for one, given in zip((keys, values), rounded, strict=True)
        )
        return first, second

    return passed
