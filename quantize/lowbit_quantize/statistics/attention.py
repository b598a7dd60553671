"""Tokens count by the attention they receive, where their errors reach other tokens through it.

The first token of a text, and often a few more, draw a large part of all attention whatever they say ("attention
sinks", Xiao et al. 2023, arXiv 2309.17453; Sun et al. 2024, arXiv 2402.17762). Their values are near zero, so an
error in them is added, nearly undivided, to the output of every query. A Hessian that counts each token once
hardly sees them: one token in 512. So the linears that make keys and values get `H = Σ ½(1 + a_t) x_t x_tᵀ`, where
a_t is the attention that token t receives, relative to the mean: each token counts once as a query and as often again
as it is attended to. (docs/log.md has what this gave.)

Attention is computed again for a few queries of each text, where transformers' layers call their attention
function (model/hooks.py): positions, masks and sliding windows are already in what it is given.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from lowbit_quantize.model.hooks import SeenAll, attention_observed_by
from lowbit_quantize.statistics.error_compensation import Drift
from lowbit_quantize.statistics.hessian import AttendedHessian

QUERIES = 32  # of each text, evenly spaced


def attention_received(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention that each token receives, (batch, tokens), relative to the mean: over heads and `QUERIES` queries.

    `query` is (batch, heads, tokens, head_dim), `key` (batch, kv_heads, tokens, head_dim); without a mask, which
    is boolean or is added to the logits, attention is causal.
    """
    tokens = query.shape[2]
    stride = -(-tokens // QUERIES)
    positions = torch.arange(stride - 1, tokens, stride, device=query.device)
    shared = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(shared, dim=1)
    logits = query[:, :, positions].float() @ keys.mT * scaling  # (batch, heads, queries, tokens)
    if mask is None:
        seen = torch.arange(tokens, device=query.device) <= positions.unsqueeze(1)
        logits = logits.masked_fill(~seen, -torch.inf)
    elif mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask[:, :, positions], -torch.inf)
    else:
        logits = logits + mask[:, :, positions].float()
    received: Tensor = logits.softmax(-1).mean((1, 2)) * tokens
    return received


class _Weights:
    """Gives each statistic the attention that its waiting tokens receive."""

    def __init__(self, statistics: Sequence[AttendedHessian | Drift], *, stop: bool) -> None:
        self._statistics, self.stop = statistics, stop

    def __call__(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        if any(statistic.waiting for statistic in self._statistics):
            self.take(self.measure(query, key, mask, scaling))
            if self.stop:
                raise SeenAll

    def measure(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """(tokens of all texts,)"""
        return attention_received(query, key, mask, scaling).flatten()

    def take(self, measured: Tensor) -> None:
        for statistic in self._statistics:
            if statistic.waiting:
                statistic.weigh(measured)


@contextmanager
def attention_seen_by(statistics: Sequence[AttendedHessian | Drift], *, stop: bool) -> Iterator[None]:
    """While the block runs, give each statistic the attention that its waiting tokens receive.

    With `stop`, the layer ends there (`SeenAll`).
    """
    with attention_observed_by(_Weights(statistics, stop=stop)) if statistics else nullcontext():
        yield
