"""What a student is taught by: the teacher's likeliest words and the mass of all others, the text, hidden states.

Of each of the teacher's distributions the `k` largest log-probabilities are known and `rest`, the log of what all other
words have together. The divergence is that of distributions over k + 1 outcomes, the last of which is "any other word":
a lower bound of the whole divergence, equal to it where k is the vocabulary, and least, zero, where all k + 1 agree.
Renormalizing over the k words instead would leave the student free to put any mass on the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

SMALLEST_LOG = -100.0  # of a mass that is no number any more in float32


@dataclass(frozen=True)
class Soft:
    """The teacher of some positions at one temperature: words (positions, k), their log-probabilities, and the log of
    the mass of all others, (positions,).
    """

    words: Tensor
    log_probabilities: Tensor
    rest: Tensor


def soft_of(logits: Tensor, k: int, temperature: float) -> Soft:
    """What is kept of a teacher's logits, (positions, words): no more than `k` words of each."""
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    largest, words = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
    return Soft(words, largest - total, _rest(scaled, words) - total.squeeze(-1))


def divergence(logits: Tensor, teacher: Soft, temperature: float) -> Tensor:
    """KL of the teacher to a student's logits, (positions, words), at a temperature: (positions,) in nats."""
    scaled = logits / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    ours = scaled.gather(-1, teacher.words) - total
    known = (teacher.log_probabilities.exp() * (teacher.log_probabilities - ours)).sum(-1)
    if teacher.words.shape[-1] == logits.shape[-1]:
        return known  # there is no other word
    rest = teacher.rest.clamp(min=SMALLEST_LOG)
    return known + teacher.rest.exp() * (rest - (_rest(scaled, teacher.words) - total.squeeze(-1)))


def token_loss(
    logits: Tensor, teacher: Soft | None, targets: Tensor, temperature: float, alpha: float
) -> Tensor:
    """The loss of each position, (positions,), of logits (positions, words) and the words that follow, (positions,).

    (1 − alpha) · T² · KL + alpha · cross entropy; T² keeps gradients of one size at all temperatures (Hinton et al.
    2015, arXiv 1503.02531).
    """
    found = logits.new_zeros(len(logits))
    if teacher is not None and alpha < 1:
        found = found + (1 - alpha) * temperature**2 * divergence(logits, teacher, temperature)
    if alpha > 0:
        found = found + alpha * cross_entropy(logits, targets, reduction="none")
    return found


def hidden_loss(ours: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of hidden states, (positions, hidden), as a share of the teacher's own square: a number."""
    aim = teacher.float()
    return (ours.float() - aim).square().sum() / aim.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def _rest(scaled: Tensor, words: Tensor) -> Tensor:
    """Log of the summed exponents of all other words, (positions,); −inf where there is none."""
    return scaled.scatter(-1, words, -torch.inf).logsumexp(-1)
