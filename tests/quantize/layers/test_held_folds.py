"""Folds are held against the model's own weights at real widths; one that fails is made by no method."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.quantize.layers.test_decoder import computed_in, decoder_of
from tests.tiny_models import CONFIGS, TOLD

from lowbit_core.errors import ModelError
from lowbit_quantize.model.architecture import LayerKind, kind_of, set_kind
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.discovery import found
from lowbit_quantize.model.discovery.hold import drop_broken_folds
from lowbit_quantize.model.reference import find_model


def with_wrong_fold(decoder: Decoder, last: str, producer: str) -> LayerKind:
    """Say of all layers like the last that another linear is what a scale of `last` folds into."""
    kinds = decoder.architecture.kinds
    groups = tuple(
        replace(one, fold=replace(one.fold, producer=producer)) if one.fold and last in one.linears else one
        for one in kinds[-1].groups
    )
    wrong = replace(kinds[-1], groups=groups)
    decoder.architecture = replace(
        decoder.architecture, kinds=tuple(wrong if kind == kinds[-1] else kind for kind in kinds)
    )
    for index, kind in enumerate(decoder.architecture.kinds):
        set_kind(decoder.layer(index), kind)
    return wrong


@pytest.mark.parametrize("family", [*CONFIGS, *TOLD])
def test_every_fold_that_was_found_holds(tiny_model: Callable[[str], Path], family: str) -> None:
    decoder = decoder_of(tiny_model(family), computed_in(family))
    assert [drop_broken_folds(decoder, index) for index in range(decoder.depth)] == [[]] * decoder.depth


@pytest.mark.parametrize(
    ("family", "last", "producer"),
    [
        ("llama", "self_attn.o_proj", "self_attn.k_proj"),
        ("olmo2", "mlp.down_proj", "mlp.gate_proj"),
        ("qwen2_moe", "mlp.shared_expert.down_proj", "mlp.shared_expert.gate_proj"),
        ("qwen2_moe", "mlp.experts.*.down_proj", "mlp.experts.*.gate_proj"),
    ],
)
def test_a_fold_that_fails_is_dropped_from_all_such_layers_and_no_other(
    tiny_model: Callable[[str], Path], family: str, last: str, producer: str
) -> None:
    decoder = decoder_of(tiny_model(family))
    wrong = with_wrong_fold(decoder, last, producer)
    lines = drop_broken_folds(decoder, decoder.depth - 1)
    assert [line.partition(" ")[0] for line in lines] == [producer]
    for index, kind in enumerate(decoder.architecture.kinds):
        expected = tuple(
            replace(one, fold=None) if kind == wrong and last in one.linears else one for one in kind.groups
        )
        assert kind_of(decoder.layer(index)).groups == expected


def test_whatever_probing_a_layer_raises_is_one_line(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("no weight\n here")

    monkeypatch.setattr(found, "find_architecture", broken)
    with pytest.raises(ModelError, match=r"'llama', which cannot be found .* no weight here\)") as caught:
        found.open_model(find_model(str(tiny_model("llama"))))
    assert "\n" not in str(caught.value)
