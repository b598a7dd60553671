"""Attention that tokens receive, against the whole softmax, and Hessians that count tokens by it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.discovery.found import open_model
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.statistics.attention import QUERIES, attention_received, attention_seen_by
from lowbit_quantize.statistics.hessian import AttendedHessian, Hessian
from lowbit_quantize.statistics.kv_absmax import KVAbsmax

CPU = torch.device("cpu")


def queries_and_keys(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    query = torch.randn(2, 6, tokens, 16, generator=generator)
    return query, torch.randn(2, 2, tokens, 16, generator=generator)


def whole(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention from every query, (batch, heads, queries, tokens)."""
    logits = query @ key.repeat_interleave(3, dim=1).mT * 0.25
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)


@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
def test_short_texts_get_the_whole_softmaxs_attention(kind: str) -> None:
    query, key = queries_and_keys(QUERIES)
    positions = torch.arange(QUERIES)
    behind = positions.unsqueeze(1) - positions
    seen = (behind >= 0) & (behind < (QUERIES if kind == "causal" else 8))  # the others slide a window of 8
    masks = {
        "causal": None,
        "boolean": seen[None, None],
        "additive": torch.zeros(1, 1, QUERIES, QUERIES).masked_fill(~seen, -torch.inf),
    }
    received = attention_received(query, key, masks[kind], 0.25)
    expected = whole(query, key, seen).mean((1, 2)) * QUERIES
    torch.testing.assert_close(received, expected)
    torch.testing.assert_close(received.mean(1), torch.ones(2))


def test_long_texts_get_the_attention_of_evenly_spaced_queries() -> None:
    query, key = queries_and_keys(4 * QUERIES)
    seen = torch.ones(4 * QUERIES, 4 * QUERIES, dtype=torch.bool).tril()
    expected = whole(query, key, seen)[:, :, 3::4].mean((1, 2)) * 4 * QUERIES
    torch.testing.assert_close(attention_received(query, key, None, 0.25), expected)


def test_a_token_counts_once_and_as_often_again_as_it_is_attended_to() -> None:
    inputs = torch.randn(40, 24, generator=torch.Generator().manual_seed(12))
    received = torch.rand(40, generator=torch.Generator().manual_seed(13)) * 2
    hessian = AttendedHessian(24, CPU)
    hessian.add(inputs)
    hessian.weigh(received)
    expected = (inputs * ((1 + received) / 2).unsqueeze(1)).T @ inputs / 40
    torch.testing.assert_close(hessian.matrix(), expected)


def test_tokens_of_a_layer_without_attention_count_once() -> None:
    inputs = torch.randn(40, 24, generator=torch.Generator().manual_seed(14))
    plain, attended = Hessian(24, CPU), AttendedHessian(24, CPU)
    for batch in inputs.split(10):
        plain.add(batch)
        attended.add(batch)
    assert torch.equal(attended.matrix(), plain.matrix())
    assert attended.tokens == 40


def test_a_layers_own_attention_weighs_its_inputs_and_is_left_as_it_was(
    tiny_model: Callable[[str], Path], kind: str
) -> None:
    reference = find_model(str(tiny_model(kind)))
    architecture, skeleton = open_model(reference)
    decoder = Decoder(reference.config, architecture, WeightFiles(reference.path), CPU, skeleton)
    hidden = decoder.embed(torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(15)))
    layer = decoder.load_layer(0)
    groups = architecture.groups_of(layer)
    name, last = groups[0].linears[0], groups[-1].linears[0]
    plain, attended = Hessian(hidden.shape[2], CPU), AttendedHessian(hidden.shape[2], CPU)
    for hessian, weighing in ((plain, []), (attended, [attended])):
        observers = {name: hessian.add, last: lambda _: None}
        with attention_seen_by(weighing, stop=False):
            decoder.observe(layer, 0, hidden, observers, KVAbsmax(), stop=True)
    assert attended.tokens == plain.tokens == 8 * 64
    assert not torch.allclose(attended.matrix(), plain.matrix(), rtol=1e-2)
