"""Log-probabilities of continuations in process, in batches of requests of about the same length.

Context and continuation are encoded as in lm-evaluation-harness (core's `encode_pair`). Padding is on the right, where
a causal model does not look, so no mask is needed. Logits are float32, from hidden states in the model's dtype.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item, Key, encode_pair
from lowbit_core.evals.scoring import Answer, Scored, answer
from lowbit_core.progress import track
from lowbit_evaluate.loaded_model import LoadedModel
from lowbit_quantize.device.precision import exact_products
from lowbit_quantize.model.reference import ModelReference

BATCH_TOKENS = 2048  # padding included
BATCH_LOGITS = 1 << 25  # float32 logits at a time: 128 MiB


@dataclass(frozen=True)
class Encoded:
    """A request as token ids; those from `continuation_start` on are scored."""

    ids: list[int]
    continuation_start: int

    @property
    def scored(self) -> range:
        """The positions that are scored; the first token of the whole sequence never is, as nothing predicts it."""
        return range(max(1, self.continuation_start), len(self.ids))


def encode(reference: ModelReference, items: Sequence[Item]) -> list[list[Encoded]]:
    """The token ids of each item's requests, with the special tokens that the tokenizer adds.

    Raises ConfigError on a request longer than the model's positions, before any weight is loaded.
    """
    tokenizer, known = reference.tokenizer(), dict[str, list[int]]()  # choices share their context
    most_tokens = getattr(reference.config, "max_position_embeddings", None)

    def ids_of(text: str) -> list[int]:
        if text not in known:
            known[text] = list(tokenizer(text, verbose=False)["input_ids"])
        return known[text]

    encoded = [[Encoded(*encode_pair(request, ids_of)) for request in item.requests] for item in items]
    for item, requests in zip(items, encoded, strict=True):
        longest = max(len(one.ids) for one in requests)
        if most_tokens and longest > most_tokens:
            raise ConfigError(
                f"item {item.id} of {item.task} has {longest} tokens, {reference.name} takes {most_tokens}; "
                "leave it out or shorten it"
            )
        if not all(one.scored for one in requests):
            raise ConfigError(
                f"item {item.id} of {item.task} has a choice with nothing before it; give a context"
            )
    return encoded


def score_items(
    model: LoadedModel, items: Sequence[Item], encoded: Sequence[Sequence[Encoded]], what: str
) -> dict[Key, Answer]:
    """Every item's answer, with progress."""
    flat = [one for requests in encoded for one in requests]
    found = dict(track(_score(model, flat), len(flat), what))
    places = iter(range(len(flat)))
    return {
        item.key: answer(item, [found[next(places)] for _ in requests])
        for item, requests in zip(items, encoded, strict=True)
    }


def _score(model: LoadedModel, requests: Sequence[Encoded]) -> Iterator[tuple[int, Scored]]:
    head = model.head.float()
    for batch in batches(requests):
        chosen = [requests[place] for place in batch]
        ids = torch.zeros(len(batch), len(chosen[0].ids), dtype=torch.int64)
        for row, one in zip(ids, chosen, strict=True):
            row[: len(one.ids)] = torch.tensor(one.ids)
        hidden = model.hidden(ids)
        before = torch.cat(
            [
                states[one.scored.start - 1 : one.scored.stop - 1]
                for states, one in zip(hidden, chosen, strict=True)
            ]
        )  # (scored, hidden)
        targets = torch.cat(
            [row[one.scored.start : one.scored.stop] for row, one in zip(ids, chosen, strict=True)]
        )
        values, likeliest = logprobs(before, head, targets)
        sizes = [len(one.scored) for one in chosen]
        for place, own, best in zip(batch, values.split(sizes), likeliest.split(sizes), strict=True):
            yield place, Scored(tuple(own.tolist()), greedy=bool(best.all()))


def batches(requests: Sequence[Encoded]) -> list[list[int]]:
    """Indices of requests of about the same length, the longest first, up to `BATCH_TOKENS` tokens together."""
    found: list[list[int]] = []
    for place in sorted(range(len(requests)), key=lambda place: -len(requests[place].ids)):
        longest = len(requests[found[-1][0]].ids) if found else BATCH_TOKENS
        if found and (len(found[-1]) + 1) * longest <= BATCH_TOKENS:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def logprobs(states: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and whether it is the likeliest, (positions,), of states, (positions, hidden).

    `head` is float32, (vocabulary, hidden).
    """
    values, likeliest = [], []
    targets = targets.to(states.device)
    for rows in torch.arange(len(states), device=states.device).split(max(1, BATCH_LOGITS // len(head))):
        with torch.inference_mode(), exact_products(states.dtype):
            logits = states[rows].float() @ head.T
        right = logits.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
        values.append((right - logits.logsumexp(-1)).cpu())
        likeliest.append((logits.argmax(-1) == targets[rows]).cpu())
    return torch.cat(values), torch.cat(likeliest)
