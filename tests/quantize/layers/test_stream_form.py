"""Rows of a stream give back what was put into them, to the last bit."""

import pytest
import torch
from torch import Tensor

from lowbit_quantize.model.streams.form import LeftTensor, Rows, StreamForm, left_tensors

SEQUENCES, TOKENS, HIDDEN, HEADS, HEAD = 2, 5, 8, 3, 4
LEFT = [
    LeftTensor("a", 0, 2, (HEADS, HEAD)),
    LeftTensor("a", 1, 2, (HEADS, HEAD)),
    LeftTensor(7, 0, 1, (HEAD,)),
]
SHAPES = {
    StreamForm(told=(0,), left="kept"): (SEQUENCES, TOKENS, HIDDEN),
    StreamForm(copies=3, copies_first=True, around=True, left="kept"): (3, SEQUENCES, TOKENS, HIDDEN),
    StreamForm(copies=2, around=True, left="kept"): (SEQUENCES, TOKENS, 2, HIDDEN),
}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_put_into_rows_comes_out_as_it_was(form: StreamForm, dtype: torch.dtype) -> None:
    rows = Rows(form, HIDDEN, LEFT)
    hidden = numbers(*SHAPES[form]).to(dtype)
    ids = torch.tensor([[0, 1, 255, 256, 257], [65535, 65536, 262143, 1 << 23, (1 << 24) - 1]])
    first = rows.first(hidden, ids)
    assert first.shape == (SEQUENCES, TOKENS, rows.width)
    assert torch.equal(rows.hidden(first), hidden)
    assert torch.equal(rows.ids(first), ids)
    keys, values = (numbers(SEQUENCES, HEADS, TOKENS, HEAD).to(dtype) * sign for sign in (1, -1))
    left = {"a": (keys, values), 7: (numbers(SEQUENCES, TOKENS, HEAD).to(dtype),)}
    behind = rows.after(first, -hidden, left)
    assert torch.equal(rows.hidden(behind), -hidden)
    assert torch.equal(rows.ids(behind), ids)
    for key, tensors in rows.left_in(behind).items():
        assert all(torch.equal(one, other) for one, other in zip(tensors, left[key], strict=True))


def test_rows_without_anything_beside_hidden_states_are_hidden_states() -> None:
    assert Rows(StreamForm(), HIDDEN, []).width == HIDDEN


def test_where_the_tokens_of_a_left_tensor_are_shows_on_two_texts() -> None:
    short, long = (
        [numbers(1, HEADS, tokens, HEAD), numbers(1, tokens, HEAD)] for tokens in (TOKENS, TOKENS + 2)
    )
    assert left_tensors("a", short, long) == [
        LeftTensor("a", 0, 2, (HEADS, HEAD)),
        LeftTensor("a", 1, 1, (HEAD,)),
    ]
