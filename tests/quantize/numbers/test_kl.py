"""The comparison of two models, against the obvious slow version."""

import json
import math
from functools import cache

import pytest
import torch

from lowbit_core.manifest import DivergenceRecord, QualityRecord, TextRecord
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.quality.kl import (
    BLOCK_WORDS,
    Predictions,
    bootstrap_stderr,
    clustered_stderr,
    compare,
    figures,
    judge,
    summarize,
)
from lowbit_quantize.recipe import Quality


def record(**values: float) -> QualityRecord:
    text = TextRecord(dataset="default", num_samples=2, max_seq_length=4, tokens=8, seed=0, sha256="0")
    base: dict[str, object] = dict.fromkeys(QualityRecord.model_fields, 0.0) | {
        "predictions": 6,
        "domains": {},
        "kv_cache_included": True,
        "noise_floor": None,
        "kv_cache_alone": None,
        "calibration": None,
        "set_aside": None,
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


def clustered_predictions(sequences: int, seed: int) -> Predictions:
    """Sequences that differ from each other, so that tokens of one are not independent."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(sequences, 1, generator=generator, dtype=torch.float64).mul(0.4).exp()
    kld = level * torch.empty(sequences, 60, dtype=torch.float64).exponential_(generator=generator)
    longer = 0.1 * level + 0.3 * torch.randn(sequences, 60, generator=generator, dtype=torch.float64)
    base_loss = 2 + torch.rand(sequences, 60, generator=generator, dtype=torch.float64)
    return Predictions(kld, (kld < 2).double(), base_loss, base_loss + longer)


@cache
def sixty_texts() -> list[dict[str, float]]:
    return [figures(clustered_predictions(24, seed)) for seed in range(60)]


@pytest.mark.parametrize(
    ("figure", "stderr"),
    [
        ("mean_kld", "kld_stderr"),
        ("kld_p99", "kld_p99_stderr"),
        ("top1_agreement", "top1_stderr"),
        ("perplexity_ratio", "perplexity_ratio_stderr"),
    ],
)
def test_a_standard_error_is_what_the_figure_varies_by_from_text_to_text(figure: str, stderr: str) -> None:
    """Errors that took tokens for independent would be a third to a half of it."""
    spread = torch.tensor([text[figure] for text in sixty_texts()]).std()
    said = torch.tensor([text[stderr] for text in sixty_texts()]).square().mean().sqrt()
    assert float(said / spread) == pytest.approx(1, abs=0.25)


def test_the_error_of_the_ratio_of_perplexities_equals_a_jackknife_over_sequences() -> None:
    predictions, count = clustered_predictions(16, 1), 16
    left_out = [
        figures(predictions.of(torch.arange(count) != one))["perplexity_ratio"] for one in range(count)
    ]
    jackknife = math.sqrt((count - 1) * torch.tensor(left_out).var(unbiased=False))
    assert figures(predictions)["perplexity_ratio_stderr"] == pytest.approx(jackknife, rel=0.02)


def test_the_bootstrap_is_the_clustered_error_for_a_mean_and_the_same_every_time() -> None:
    values = clustered_predictions(6, 2).kld
    errors = [bootstrap_stderr(values, lambda found: found.mean()) for _ in range(2)]
    assert errors[0] == errors[1] == pytest.approx(clustered_stderr(values), rel=0.1)


def test_the_error_of_a_maximum_is_that_of_the_sequence_that_holds_it() -> None:
    """Left out of a resample of n with probability (1 − 1/n)ⁿ; one sequence alone says nothing."""
    values = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 5.0]])
    missed = 0.75**4
    expected = 4 * math.sqrt(missed * (1 - missed)) * math.sqrt(4 / 3)
    assert bootstrap_stderr(values, lambda found: found.max()) == pytest.approx(expected, rel=0.1)
    assert bootstrap_stderr(values[:3], lambda found: found.max()) == 0
    assert bootstrap_stderr(values[:1], lambda found: found.max()) == math.inf


def test_a_domain_is_judged_as_if_it_were_the_whole_text() -> None:
    predictions = clustered_predictions(6, 3)
    text = TokenText(torch.zeros(6, 61).long(), ("a", "b", "a", "b", "a", "a"), record().heldout)
    found = summarize(predictions, text, kv_cache_included=False).domains
    alone = figures(predictions.of(torch.tensor([0, 2, 4, 5])))
    assert found["a"].items() >= alone.items()
    assert found["a"]["perplexity"] / found["a"]["perplexity_base"] == pytest.approx(
        alone["perplexity_ratio"]
    )


def test_a_domain_of_one_sequence_has_no_errors_and_only_numbers_that_json_has() -> None:
    predictions = clustered_predictions(3, 0)
    text = TokenText(torch.zeros(3, 61).long(), ("code", "prose", "prose"), record().heldout)
    found = summarize(predictions, text, kv_cache_included=False).domains
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert not any("stderr" in name for name in found["code"])
    assert "kld_stderr" in found["prose"]


def test_the_gate_rejects_past_any_limit_and_anything_not_finite() -> None:
    limits = Quality(max_mean_kld=0.1, min_top1_agreement=0.9, max_perplexity_ratio=1.05)
    good = {"mean_kld": 0.05, "top1_agreement": 0.95, "perplexity_ratio": 1.01}
    assert judge(record(**good), limits).accepted
    for name, value in (("mean_kld", 0.2), ("top1_agreement", 0.8), ("perplexity_ratio", 1.2)):
        gate = judge(record(**{**good, name: value}), limits)
        assert not gate.accepted
        assert len(gate.reasons) == 1
    assert not judge(record(mean_kld=math.nan), Quality()).accepted


def test_the_gate_bounds_how_much_more_held_out_text_loses_than_the_calibration_text() -> None:
    seen = DivergenceRecord(sequences=2, predictions=6, **figures(clustered_predictions(3, 0)))
    measured = record(mean_kld=0.06, top1_agreement=0.9).model_copy(
        update={"calibration": seen.model_copy(update={"mean_kld": 0.02})}
    )
    assert measured.overfitting == pytest.approx(3)
    assert judge(measured, Quality(max_overfitting=3.1)).accepted
    gate = judge(measured, Quality(max_overfitting=2.9))
    assert gate.reasons == ["max_overfitting: measured 3, limit 2.9"]
    assert not judge(record(mean_kld=0.06), Quality(max_overfitting=9)).accepted  # it was not measured
    aside = seen.model_copy(update={"mean_kld": 0.05})
    assert measured.model_copy(update={"set_aside": aside}).overfitting == pytest.approx(
        2.5
    )  # of the same source
