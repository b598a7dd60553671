"""What an adapter is trained to lower: the loss on a user's answers, or the distance to the base's distributions.

Logits are made for the positions that count alone, some of them at a time, and made again for their gradient: those of
a whole batch may be larger than the model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowbit_quantize.model.logits import LogitsForm
from lowbit_recover.lora_examples import IGNORED, Batch

LOGITS_BYTES = 256 << 20  # in float32, that are made at once


@dataclass(frozen=True)
class Predictor:
    """A model of transformers; `form` makes logits of what its head gives, `logits_bytes` of them at once."""

    model: Any
    form: LogitsForm
    logits_bytes: int = LOGITS_BYTES

    def states(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """What the head reads at some positions of ids and mask (examples, tokens): (positions, hidden)."""
        device = self.model.device
        decoder = self.model.get_decoder()
        decoded = decoder(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        states: Tensor = decoded.last_hidden_state[positions.to(device)]
        return states

    def logits(self, states: Tensor) -> Tensor:
        """(positions, vocabulary), float32; gradients pass."""
        logits: Tensor = self.model.get_output_embeddings()(states).float() * self.form.factor
        return logits if self.form.cap is None else (logits / self.form.cap).tanh() * self.form.cap

    def parts(self, positions: int) -> Iterator[slice]:
        """Positions whose logits are made at once."""
        size = max(1, self.logits_bytes // (4 * self.model.get_output_embeddings().weight.shape[0]))
        return (slice(start, start + size) for start in range(0, positions, size))


class Objective(Protocol):
    """A loss; `name` says of what, for people and the record."""

    @property
    def name(self) -> str: ...

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        """The sum over a batch's positions that count, in nats, and their number."""
        ...


class AnswerLoss:
    """−log p of each token of the answers."""

    name = "loss on answers, nats a token"

    def __init__(self, ours: Predictor) -> None:
        self._ours = ours

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        targets = batch.targets[:, 1:]
        counted = targets != IGNORED
        states = self._ours.states(batch.ids[:, :-1], batch.mask[:, :-1], counted)
        wanted = targets[counted].to(states.device)

        def loss(some: Tensor, right: Tensor) -> Tensor:
            return F.cross_entropy(self._ours.logits(some), right, reduction="sum")

        return summed(loss, [(states[part], wanted[part]) for part in self._ours.parts(len(states))])


class Divergence:
    """KL(base ‖ adapted) of the next token at each position."""

    name = "KL to the base, nats a token"

    def __init__(self, ours: Predictor, base: Predictor) -> None:
        self._ours, self._base = ours, base

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        counted = batch.targets != IGNORED
        with torch.no_grad():
            base = self._base.states(batch.ids, batch.mask, counted)
        ours = self._ours.states(batch.ids, batch.mask, counted)

        def loss(some: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = self._base.logits(theirs).log_softmax(-1)
            return F.kl_div(self._ours.logits(some).log_softmax(-1), wanted, log_target=True, reduction="sum")

        return summed(loss, [(ours[part], base[part]) for part in self._ours.parts(len(ours))])


def summed(
    loss: Callable[[Tensor, Tensor], Tensor], parts: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, int]:
    """The loss of all parts, whose insides are computed again for the gradient, and the number of their rows."""
    if not torch.is_grad_enabled():
        found = [loss(*part) for part in parts]
    else:
        found = [checkpoint(loss, *part, use_reentrant=False) for part in parts]
    return torch.stack(found).sum() if found else torch.zeros(()), sum(len(part[0]) for part in parts)
