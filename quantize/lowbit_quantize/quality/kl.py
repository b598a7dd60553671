"""How close the compressed model stayed to its base: exact KL divergence on held-out text, with standard errors.

Both models' last hidden states are at hand when the walk ends, so the full distributions are compared, in
float32, a few thousand words of the vocabulary at a time; neither model is ever loaded whole. Standard errors are
clustered: the tokens of one sequence are not independent, its mean is (Miller 2024, arXiv 2411.00640). Those of the
99th percentile and of the maximum come from a bootstrap over sequences (Efron 1979). A resample holds no value that was
not seen: the maximum's error says how much it hangs on single sequences, and other text may move it by more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowbit_core.manifest import DivergenceRecord, GateRecord, QualityRecord
from lowbit_quantize.device import ranks
from lowbit_quantize.device.precision import exact_products
from lowbit_quantize.model.logits import PLAIN, LogitsForm
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.recipe import Quality

CHUNK_POSITIONS = 1024  # compared at a time,
BLOCK_WORDS = 1024  # on so much of the vocabulary
RESAMPLES = 400  # of the bootstrap: its own error is 1 / √800, 4 %


@dataclass(frozen=True)
class Predictions:
    """Per prediction, (sequences, tokens − 1): KL in nats, agreement of the likeliest token, both models' loss."""

    kld: Tensor
    agrees: Tensor
    base_loss: Tensor
    loss: Tensor

    def of(self, rows: Tensor) -> "Predictions":
        """Those of some sequences, by a mask or by their numbers."""
        return Predictions(self.kld[rows], self.agrees[rows], self.base_loss[rows], self.loss[rows])


def compare(
    base: Tensor,
    compressed: Tensor,
    base_norm: nn.Module,
    norm: nn.Module,
    head: Tensor,
    ids: Tensor,
    own_head: Tensor | None = None,
    form: LogitsForm = PLAIN,
) -> Predictions:
    """Compare two models by their last hidden states, (sequences, tokens, hidden), on the text `ids`.

    `own_head` is the compressed model's, where it is not the base's; `form` makes logits of what a head gives.
    The vocabulary is gone through in blocks, of which one at a time is float32: the sums over it are kept relative
    to the largest logit so far (Milakov and Gimelshein 2018, arXiv 1805.02867).
    """
    sequences = max(1, CHUNK_POSITIONS // base.shape[1])
    own = []
    for start in ranks.own(range(0, len(ids), sequences)):
        rows = slice(start, start + sequences)
        targets = ids[rows, 1:].to(head.device)
        p, q = base_norm(base[rows, :-1].to(head.device)), norm(compressed[rows, :-1].to(head.device))
        states = p.flatten(0, 1), q.flatten(0, 1)
        columns = _compare_positions(*states, head, own_head, targets.flatten(), form)
        own.append([column.view(targets.shape) for column in columns])
    chunks = ranks.in_order(own, torch.device("cpu"))
    return Predictions(*(torch.cat(columns) for columns in zip(*chunks, strict=True)))


class _Softmax:
    """What one model's distributions need, summed over blocks of the vocabulary; every field is (positions,)."""

    def __init__(self, positions: int, device: torch.device) -> None:
        self.largest = torch.full((positions,), -torch.inf, device=device)
        self.likeliest = torch.zeros(positions, dtype=torch.int64, device=device)
        self.sum = torch.zeros(positions, dtype=torch.float64, device=device)  # of exp(logit − largest)

    def add(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Take a block, (positions, words), that starts at word `first`.

        Returns what sums so far shrink by, (positions,), and exp(logit − largest), (positions, words).
        """
        block, place = logits.max(-1)
        self.likeliest = torch.where(block > self.largest, place + first, self.likeliest)
        larger = torch.maximum(block, self.largest)
        shrink = (self.largest - larger).double().exp()
        self.largest = larger
        weights = (logits - larger.unsqueeze(-1)).exp_()
        self.sum = self.sum * shrink + weights.sum(-1)
        return shrink, weights

    @property
    def log_sum(self) -> Tensor:
        """Log of the sum of exp(logit)."""
        return self.sum.log() + self.largest


def _logits(states: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """(positions, hidden) and words of the head, (words, hidden), widened from `dtype`, to (positions, words).

    A bfloat16 head takes float32 states as two bfloat16 parts, 16 bits, which costs two cheap products.
    """
    with exact_products(dtype):
        if states.dtype == dtype or dtype != torch.bfloat16:
            return states.float() @ words.T
        high = states.to(dtype)
        low = (states - high.float()).to(dtype)
        return (high.float() @ words.T).addmm_(low.float(), words.T)


def _compare_positions(
    base: Tensor,
    compressed: Tensor,
    head: Tensor,
    own_head: Tensor | None,
    targets: Tensor,
    form: LogitsForm,
) -> tuple[Tensor, ...]:
    """KL, agreement and both losses, (positions,), of normed hidden states, (positions, hidden)."""
    p_sum, q_sum = _Softmax(len(base), head.device), _Softmax(len(base), head.device)
    apart = torch.zeros(
        len(base), dtype=torch.float64, device=head.device
    )  # sum of exp(p − largest) · (p − q)
    losses = [torch.zeros_like(apart), torch.zeros_like(apart)]
    for first in range(0, len(head), BLOCK_WORDS):
        words = slice(first, first + BLOCK_WORDS)
        wide = head[words].float()
        own = wide if own_head is None else own_head[words].float()
        own_dtype = head.dtype if own_head is None else own_head.dtype
        p, q = (
            form(_logits(base, wide, head.dtype)),
            form(_logits(compressed, own, own_dtype)),
        )  # (positions, words)
        here = (targets - first).clamp(0, len(wide) - 1).unsqueeze(-1)
        inside = (targets >= first) & (targets < first + len(wide))
        for loss, logits in zip(losses, (p, q), strict=True):
            loss -= torch.where(inside, logits.gather(-1, here).squeeze(-1), 0.0)
        shrink, weights = p_sum.add(p, first)
        q_sum.add(q, first)
        apart = apart * shrink + torch.linalg.vecdot(weights, p.sub_(q))
    kld = apart / p_sum.sum - p_sum.log_sum + q_sum.log_sum
    agrees = (p_sum.likeliest == q_sum.likeliest).double()
    found = (kld, agrees, losses[0] + p_sum.log_sum, losses[1] + q_sum.log_sum)
    return tuple(column.cpu() for column in found)


def clustered_stderr(values: Tensor) -> float:
    """Standard error of the mean of (sequences, positions), the sequences being the independent draws."""
    means = values.mean(1)
    return float(means.std(unbiased=True) / math.sqrt(len(means))) if len(means) > 1 else math.inf


def bootstrap_stderr(values: Tensor, statistic: Callable[[NDArray[Any]], Any]) -> float:
    """Standard error of a statistic of all (sequences, positions), by drawing sequences anew; the same every time.

    √(n / (n − 1)) makes up for n draws out of n, so that a mean has its clustered standard error.
    """
    from scipy.stats import bootstrap  # 23 MB, when the walk's own are gone

    count, found = len(values), values.numpy()
    if count < 2:
        return math.inf
    drawn = bootstrap(
        (np.arange(count),), lambda rows: statistic(found[rows]), n_resamples=RESAMPLES, vectorized=False,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(drawn.standard_error) * math.sqrt(count / (count - 1))


def _p99(values: NDArray[Any]) -> Any:
    return np.quantile(values, 0.99)


def figures(predictions: Predictions) -> dict[str, float]:
    """Every figure of quality with its standard error, by the names of the manifest.

    The ratio of perplexities is exp of a mean of paired differences; its error is that mean's, times the ratio.
    """
    kld, longer = predictions.kld, predictions.loss - predictions.base_loss
    ratio = math.exp(longer.mean())
    return {
        "mean_kld": float(kld.mean()),
        "kld_stderr": clustered_stderr(kld),
        "kld_p99": float(_p99(kld.numpy())),
        "kld_p99_stderr": bootstrap_stderr(kld, _p99),
        "kld_max": float(kld.max()),
        "kld_max_stderr": bootstrap_stderr(kld, np.max),
        "top1_agreement": float(predictions.agrees.mean()),
        "top1_stderr": clustered_stderr(predictions.agrees),
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio * clustered_stderr(longer),
    }


def _with_perplexities(predictions: Predictions) -> dict[str, float]:
    return {
        **figures(predictions),
        "perplexity_base": math.exp(predictions.base_loss.mean()),
        "perplexity": math.exp(predictions.loss.mean()),
    }


def divergence(predictions: Predictions) -> DivergenceRecord:
    """Two models side by side, as the manifest has it."""
    sequences, count = len(predictions.kld), predictions.kld.numel()
    return DivergenceRecord(sequences=sequences, predictions=count, **figures(predictions))


def summarize(
    predictions: Predictions,
    text: TokenText,
    *,
    kv_cache_included: bool,
    noise_floor: DivergenceRecord | None = None,
    kv_cache_alone: DivergenceRecord | None = None,
    calibration: DivergenceRecord | None = None,
    set_aside: DivergenceRecord | None = None,
) -> QualityRecord:
    """The quality section of the manifest."""
    return QualityRecord(
        heldout=text.record,
        predictions=predictions.kld.numel(),
        **_with_perplexities(predictions),
        domains=_by_domain(predictions, text.domains),
        kv_cache_included=kv_cache_included,
        noise_floor=noise_floor,
        kv_cache_alone=kv_cache_alone,
        calibration=calibration,
        set_aside=set_aside,
    )


def _by_domain(predictions: Predictions, domains: Sequence[str]) -> dict[str, dict[str, float]]:
    report = {}
    for domain in sorted(set(domains)):
        rows = torch.tensor([name == domain for name in domains])
        found = _with_perplexities(predictions.of(rows))
        known = {  # one sequence has no error
            name: value
            for name, value in found.items()
            if math.isfinite(value) or not name.endswith("stderr")
        }
        report[domain] = {"sequences": float(rows.sum()), **known}
    return report


def judge(quality: QualityRecord, limits: Quality) -> GateRecord:
    """Hold the measured quality against the recipe's limits; not finite is never accepted.

    Overfitting is told only of methods that let the base model's calibration text walk: a limit on it refuses others.
    """
    checks = {
        "max_mean_kld": (quality.mean_kld, limits.max_mean_kld, 1),
        "min_top1_agreement": (quality.top1_agreement, limits.min_top1_agreement, -1),
        "max_perplexity_ratio": (quality.perplexity_ratio, limits.max_perplexity_ratio, 1),
        "max_overfitting": (quality.overfitting or math.inf, limits.max_overfitting, 1),
    }
    reasons = [
        f"{name}: measured {value:.4g}, limit {limit:.4g}"
        for name, (value, limit, sign) in checks.items()
        if limit is not None and sign * value > sign * limit
    ]
    if not math.isfinite(quality.mean_kld):
        reasons.append(f"mean_kld is {quality.mean_kld}")
    set_limits = {name: limit for name, (_, limit, _) in checks.items() if limit is not None}
    return GateRecord(limits=set_limits, accepted=not reasons, reasons=reasons)
