"""Maps from channels to columns keep their form at other widths."""

import pytest
import torch

from lowbit_quantize.model.spread import Spread, spread_of

SHAPES = {  # found on few heads, expected on many: (start, stride, heads, repeats, width, rows)
    "separate values": ((0, 16, 2, 2, 16, 32), (0, 16, 8, 2, 16, 128)),
    "one key head for all": ((0, 0, 1, 4, 16, 16), (0, 0, 1, 32, 16, 16)),
    "the last third of a fused projection": ((96, 16, 2, 2, 16, 128), (384, 16, 8, 2, 16, 512)),
    "interleaved head by head": ((64, 96, 2, 4, 16, 192), (64, 96, 8, 4, 16, 768)),
    "latent values behind their keys": ((32, 48, 2, 1, 16, 96), (32, 48, 8, 1, 16, 384)),
    "all heads share a norm": ((0, 0, 1, 4, 16, 16), (0, 0, 1, 64, 16, 16)),
    "as many as there are": ((0, 0, 1, 1, 96, 96), (0, 0, 1, 1, 4864, 4864)),
    "the upper half": ((96, 0, 1, 1, 96, 192), (4864, 0, 1, 1, 4864, 9728)),
    "the middle third": ((96, 0, 1, 1, 96, 288), (512, 0, 1, 1, 512, 1536)),
}


def columns(spread: Spread) -> torch.Tensor:
    return spread.by_column(torch.arange(spread.rows))


@pytest.mark.parametrize("name", SHAPES)
def test_a_spread_is_told_from_its_columns_and_carried_to_other_widths(name: str) -> None:
    small, large = (Spread(*numbers) for numbers in SHAPES[name])
    assert spread_of(columns(small), small.rows) == small
    assert next(small.at(large.rows, large.columns)) == large
    assert spread_of(columns(large), large.rows) == large


def test_what_has_no_form_is_no_spread() -> None:
    assert spread_of(torch.tensor([0, 2, 1, 5]), 8) is None


def test_a_spread_that_the_producer_has_not_the_rows_for_is_none() -> None:
    assert list(Spread(0, 16, 2, 2, 16, 32).at(64, 512)) == []
