"""How close the compressed model stayed to its base: exact KL divergence on held-out text, with standard errors.

Both models' last hidden states are at hand when the walk ends, so the full distributions are compared, in
float32, a few hundred positions at a time; neither model is ever loaded whole. Standard errors are clustered:
the tokens of one sequence are not independent, its mean is (Miller 2024, arXiv 2411.00640).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit_core.manifest import GateRecord, QualityRecord
from lowbit_quantize.calibration import TokenText
from lowbit_quantize.precision import exact_products
from lowbit_quantize.recipe import Quality

CHUNK_POSITIONS = 128


@dataclass(frozen=True)
class Predictions:
    """Per prediction, (sequences, tokens − 1): KL in nats, agreement of the likeliest token, both models' loss."""

    kld: Tensor
    agrees: Tensor
    base_loss: Tensor
    loss: Tensor


def compare(
    base: Tensor, compressed: Tensor, base_norm: nn.Module, norm: nn.Module, head: Tensor, ids: Tensor
) -> Predictions:
    """Compare two models by their last hidden states, (sequences, tokens, hidden), on the text `ids`."""
    wide = head.float()
    rows = [
        _compare_sequence(base_norm(base[i, :-1]), norm(compressed[i, :-1]), wide, ids[i, 1:])
        for i in range(ids.shape[0])
    ]
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    return Predictions(*stacked)


def _compare_sequence(base: Tensor, compressed: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    parts = []
    for start in range(0, len(targets), CHUNK_POSITIONS):
        chunk = slice(start, start + CHUNK_POSITIONS)
        with exact_products(base.dtype):
            p, q = base[chunk].float() @ head.T, compressed[chunk].float() @ head.T  # (positions, vocabulary)
        parts.append(_compare_logits(p, q, targets[chunk, None].to(p.device)))
    return tuple(torch.cat(columns).double().cpu() for columns in zip(*parts, strict=True))


def _compare_logits(p: Tensor, q: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """KL, agreement and both losses of logits, (positions, vocabulary); overwrites `p` and `q`."""
    agrees = (p.argmax(-1) == q.argmax(-1)).float()
    p_sum, q_sum = p.logsumexp(-1, keepdim=True), q.logsumexp(-1, keepdim=True)
    losses = [(total - logits.gather(-1, targets)).squeeze(-1) for logits, total in ((p, p_sum), (q, q_sum))]
    log_ratio = q.neg_().add_(p).sub_(p_sum - q_sum)
    kld = torch.linalg.vecdot(p.sub_(p_sum).exp_(), log_ratio)
    return (kld, agrees, *losses)


def clustered_stderr(values: Tensor) -> float:
    """Standard error of the mean of (sequences, positions), the sequences being the independent draws."""
    means = values.mean(1)
    return float(means.std(unbiased=True) / math.sqrt(len(means))) if len(means) > 1 else math.inf


def summarize(predictions: Predictions, text: TokenText, *, kv_cache_included: bool) -> QualityRecord:
    """The quality section of the manifest."""
    p, kld = predictions, predictions.kld
    perplexity_base, perplexity = math.exp(p.base_loss.mean()), math.exp(p.loss.mean())
    return QualityRecord(
        heldout=text.record,
        predictions=kld.numel(),
        mean_kld=float(kld.mean()),
        kld_stderr=clustered_stderr(kld),
        kld_p99=float(kld.flatten().quantile(0.99)),
        kld_max=float(kld.max()),
        top1_agreement=float(p.agrees.mean()),
        top1_stderr=clustered_stderr(p.agrees),
        perplexity_base=perplexity_base,
        perplexity=perplexity,
        perplexity_ratio=perplexity / perplexity_base,
        domains=_by_domain(predictions, text.domains),
        kv_cache_included=kv_cache_included,
    )


def _by_domain(predictions: Predictions, domains: Sequence[str]) -> dict[str, dict[str, float]]:
    report = {}
    for domain in sorted(set(domains)):
        rows = torch.tensor([name == domain for name in domains])
        report[domain] = {
            "sequences": float(rows.sum()),
            "mean_kld": float(predictions.kld[rows].mean()),
            "top1_agreement": float(predictions.agrees[rows].mean()),
            "perplexity_base": math.exp(predictions.base_loss[rows].mean()),
            "perplexity": math.exp(predictions.loss[rows].mean()),
        }
    return report


def judge(quality: QualityRecord, limits: Quality) -> GateRecord:
    """Hold the measured quality against the recipe's limits; not finite is never accepted."""
    checks = {
        "max_mean_kld": (quality.mean_kld, limits.max_mean_kld, 1),
        "min_top1_agreement": (quality.top1_agreement, limits.min_top1_agreement, -1),
        "max_perplexity_ratio": (quality.perplexity_ratio, limits.max_perplexity_ratio, 1),
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
