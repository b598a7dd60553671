"""Which layers go, by what the base model computes on some sequences of the calibration text.

- `block-influence`: 1 − the mean cosine of what a layer reads and what it gives; the least go, all at once (ShortGPT,
  Men et al. 2024, arXiv 2403.03853).
- `predicted`: ½ Σ_t (g_t · δ_t)² nats, with δ_t what the layer adds to the stream and g_t the gradient there of the
  loss of labels that the model itself predicts (sensitivity/gradients.py); the least go, all at once.
- `measured`: one layer after the other, always that without which the mean KL from the base is least, of the model
  without those that went before. All ways to lose one more layer go down the model together, a stream for each, so
  that each layer is read once a round. After the first round only the better ones are tried again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit_core.log import get_logger
from lowbit_core.progress import track
from lowbit_quantize.model.decoder import Decoder, batches_of
from lowbit_quantize.model.shallower import may_go
from lowbit_quantize.quality.kl import compare
from lowbit_quantize.sensitivity.gradients import backward, backward_dtype, sampled_loss_gradient
from lowbit_quantize.walk.dropped import pass_through

log = get_logger("quantize")

TRIED_AGAIN = 2  # times as many layers as go
LEAST_TRIED = 8
JUDGED_TOKENS = 512  # at least, spread evenly over the text: logits cost more than layers
Scores = dict[int, float]


def kept_layers(
    decoder: Decoder, ids: Tensor, count: int, criterion: str, seed: int
) -> tuple[tuple[int, ...], Scores]:
    """The numbers of the layers that stay, rising, when `count` of the decoder's go, and each layer's score: what the
    model would lose by it. `ids` are (sequences, tokens). Of `measured` the scores are those of the first round.
    """
    if criterion == "measured":
        gone, scores = _greedy(decoder, ids, count)
    else:
        scores = influences(decoder, ids) if criterion == "block-influence" else predicted(decoder, ids, seed)
        gone = sorted(may_go(decoder.architecture), key=lambda number: scores[number])[:count]
    log.info("layers that go: %s", " ".join(map(str, sorted(gone))))
    return tuple(number for number in range(decoder.depth) if number not in gone), scores


def influences(decoder: Decoder, ids: Tensor) -> Scores:
    """The block influence of each layer."""
    hidden, found = decoder.embed(ids), Scores()
    for index in track(range(decoder.depth), decoder.depth, "layers measured"):
        before = hidden.clone()
        pass_through(decoder, index, [hidden])
        alike = [
            torch.cosine_similarity(before[rows].float(), hidden[rows].float(), dim=-1).sum()
            for rows in batches_of(hidden)
        ]
        found[index] = 1.0 - float(torch.stack(alike).sum()) / ids.numel()
    return found


def predicted(decoder: Decoder, ids: Tensor, seed: int) -> Scores:
    """What each layer by itself is predicted to cost, in nats a token."""
    hidden, read = decoder.embed(ids), list[Tensor]()
    for index in track(range(decoder.depth), decoder.depth, "layers forward"):
        read.append(hidden.clone())
        pass_through(decoder, index, [hidden])
    norm, head = decoder.head()
    states, generator = decoder.finished(hidden), torch.Generator(decoder.device).manual_seed(seed)
    form = decoder.architecture.logits
    gradient = sampled_loss_gradient(states.flatten(0, 1), norm, head, form, generator).view(states.shape)
    found, given = Scores(), hidden
    for index in track(reversed(range(decoder.depth)), decoder.depth, "layers backward"):
        added = given.float() - read[index].float()
        found[index] = float((added * gradient).sum(-1).double().square().mean() / 2)
        layer = decoder.load_layer(index)
        if backward_dtype(decoder) != decoder.dtype:
            layer.float()
        backward(decoder, layer, index, read[index], gradient, (), cache=False)
        given = read[index]
    return found


def _greedy(decoder: Decoder, ids: Tensor, count: int) -> tuple[list[int], Scores]:
    judge = _judge(decoder, ids)
    gone, first = list[int](), Scores()
    tried = may_go(decoder.architecture)
    for number in range(count):
        scores = _without_one_more(decoder, ids, gone, tried, judge, f"round {number + 1} of {count}")
        order = sorted(scores, key=lambda one: scores[one])
        first = first or scores
        if number == 0:
            tried = order[: max(TRIED_AGAIN * count, LEAST_TRIED)]
        gone.append(order[0])
        tried = [one for one in tried if one != order[0]]
        log.info("without layers %s: mean KL %.4g", " ".join(map(str, sorted(gone))), scores[order[0]])
    return gone, first


def _judge(decoder: Decoder, ids: Tensor) -> Callable[[Tensor], float]:
    """Gives the mean KL from the base of what leaves the last layer."""
    base = decoder.embed(ids)
    for index in range(decoder.depth):
        pass_through(decoder, index, [base])
    (norm, head), form = decoder.head(), decoder.architecture.logits
    step = max(1, ids.numel() // JUDGED_TOKENS)
    wanted, some = decoder.finished(base)[:, ::step], ids[:, ::step]

    def mean_kld(hidden: Tensor) -> float:
        given = decoder.finished(hidden)[:, ::step]
        return float(compare(wanted, given, norm, norm, head, some, form=form).kld.mean())

    return mean_kld


def _without_one_more(
    decoder: Decoder,
    ids: Tensor,
    gone: Sequence[int],
    tried: Sequence[int],
    judge: Callable[[Tensor], float],
    words: str,
) -> Scores:
    """The mean KL without each of the layers that are `tried`, when those that are `gone` are missing already."""
    hidden, without = decoder.embed(ids), dict[int, Tensor]()
    stays = [number for number in range(decoder.depth) if number not in gone]
    for index in track(stays, len(stays), words):
        before = hidden.clone() if index in tried else None
        pass_through(decoder, index, [hidden, *without.values()])
        if before is not None:
            without[index] = before
    return {number: judge(stream) for number, stream in without.items()}
