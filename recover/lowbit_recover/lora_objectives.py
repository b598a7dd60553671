"""What an adapter is trained to lower: the loss on a user's answers, or the distance to the base's distributions.

Logits are made for the positions that count alone.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_quantize.model.logits import LogitsForm
from lowbit_recover.lora_examples import IGNORED, Batch

Logits = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # of ids, mask and which positions, (positions, vocabulary)


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

    def __init__(self, logits: Logits) -> None:
        self._logits = logits

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        targets = batch.targets[:, 1:]
        counted = targets != IGNORED
        found = self._logits(batch.ids[:, :-1], batch.mask[:, :-1], counted)
        return F.cross_entropy(found, targets[counted].to(found.device), reduction="sum"), int(counted.sum())


class Divergence:
    """KL(base ‖ adapted) of the next token at each position."""

    name = "KL to the base, nats a token"

    def __init__(self, logits: Logits, base_logits: Logits) -> None:
        self._logits, self._base = logits, base_logits

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        counted = batch.targets != IGNORED
        with torch.no_grad():
            base = self._base(batch.ids, batch.mask, counted).log_softmax(-1)
        ours = self._logits(batch.ids, batch.mask, counted).log_softmax(-1)
        return F.kl_div(ours, base, log_target=True, reduction="sum"), int(counted.sum())


def logits_of(model: Any, form: LogitsForm) -> Logits:
    """Float32 logits of a model of transformers at some positions, of ids and mask (examples, tokens)."""

    def found(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        device = model.device
        decoded = model.get_decoder()(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        )
        states = decoded.last_hidden_state[positions.to(device)]  # (positions, hidden)
        logits: Tensor = model.get_output_embeddings()(states).float() * form.factor
        return logits if form.cap is None else (logits / form.cap).tanh() * form.cap

    return found
