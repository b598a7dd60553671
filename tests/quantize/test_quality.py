"""The comparison of two models, against the obvious slow version."""

import math

import pytest
import torch

from lowbit_core.manifest import QualityRecord, TextRecord
from lowbit_quantize.calibration import TokenText
from lowbit_quantize.quality import BLOCK_WORDS, clustered_stderr, compare, judge, summarize
from lowbit_quantize.recipe import Quality


def record(**values: float) -> QualityRecord:
    text = TextRecord(source="default", sequences=2, sequence_tokens=4, tokens=8, seed=0, sha256="0")
    base = dict.fromkeys(QualityRecord.model_fields, 0.0) | {
        "predictions": 6,
        "domains": {},
        "kv_cache_included": True,
    }
    return QualityRecord.model_validate({**base, "heldout": text, **values})


def test_kl_agreement_and_perplexity_equal_the_plain_formulas() -> None:
    """More words than a block, more positions than a chunk, and neither a multiple."""
    generator, words = torch.Generator().manual_seed(11), BLOCK_WORDS + 40
    base, head = torch.randn(3, 600, 16, generator=generator), torch.randn(words, 16, generator=generator)
    compressed = base + 0.1 * torch.randn(3, 600, 16, generator=generator)
    ids = torch.randint(0, words, (3, 600), generator=generator)
    identity = torch.nn.Identity()
    predictions = compare(base, compressed, identity, identity, head, ids)
    p, q = (torch.softmax((states[:, :-1] @ head.T).double(), -1) for states in (base, compressed))
    torch.testing.assert_close(predictions.kld, (p * (p / q).log()).sum(-1), rtol=1e-3, atol=1e-5)
    assert torch.equal(predictions.agrees.bool(), p.argmax(-1) == q.argmax(-1))
    text = TokenText(ids, ("a", "b", "a"), record().heldout)
    summary = summarize(predictions, text, kv_cache_included=False)
    picked = p.gather(-1, ids[:, 1:, None]).log().mean()
    assert summary.perplexity_base == pytest.approx(math.exp(-picked), rel=1e-4)
    assert summary.predictions == 3 * 599
    assert summary.domains["a"]["sequences"] == 2


def test_equal_models_have_no_divergence_and_always_agree() -> None:
    states = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(12))
    same = compare(
        states,
        states,
        torch.nn.Identity(),
        torch.nn.Identity(),
        torch.randn(30, 8),
        torch.zeros(2, 20).long(),
    )
    assert same.kld.abs().max() < 1e-6
    assert same.agrees.min() == 1


def test_standard_error_counts_sequences_not_tokens() -> None:
    values = torch.tensor([[1.0] * 1000, [3.0] * 1000])
    assert clustered_stderr(values) == pytest.approx(1.0)


def test_the_gate_rejects_past_any_limit_and_anything_not_finite() -> None:
    limits = Quality(max_mean_kld=0.1, min_top1_agreement=0.9, max_perplexity_ratio=1.05)
    good = {"mean_kld": 0.05, "top1_agreement": 0.95, "perplexity_ratio": 1.01}
    assert judge(record(**good), limits).accepted
    for name, value in (("mean_kld", 0.2), ("top1_agreement", 0.8), ("perplexity_ratio", 1.2)):
        gate = judge(record(**{**good, name: value}), limits)
        assert not gate.accepted
        assert len(gate.reasons) == 1
    assert not judge(record(mean_kld=math.nan), Quality()).accepted
