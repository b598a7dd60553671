"""Codes in words without gaps: against the slow way, against the older packing where they agree, and a library's file.

benchmarks/formats/dense_packing.py made the file with compressed-tensors 0.20.0.
"""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor

from lowbit_quantize.schemes.integer import Integer
from lowbit_quantize.schemes.storage import packed_words
from lowbit_quantize.schemes.storage.packed_words import pack, unpack, words_of
from lowbit_quantize.schemes.storage.stored_linears import is_ours, unpacked

BITS = range(2, 9)
LIBRARY = load_file(Path(__file__).with_name("dense_packing.safetensors"))
PLACE = "40x100"  # 100 codes of 3 bits end within a word


def codes_of(bits: int, rows: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, count), generator=generator).to(
        torch.int8
    )


def as_number(values: list[int], bits: int) -> int:
    """All values as one number, the first in its lowest bits."""
    return sum((value % (1 << bits)) << (place * bits) for place, value in enumerate(values))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [31, 32, 96, 100])
def test_words_are_one_long_number_of_the_codes(bits: int, count: int) -> None:
    codes = codes_of(bits, 5, count)
    words = pack(codes, bits)
    assert words.shape == (5, words_of(count, bits))
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        unsigned = [code + (1 << (bits - 1)) for code in row]
        assert as_number(unsigned, bits) == as_number(packed, 32)
    assert torch.equal(unpack(words, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_where_codes_fill_words_the_bytes_are_what_they_always_were(bits: int) -> None:
    for count in (64, 100):
        codes = codes_of(bits, 7, count)
        assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("bits", BITS)
def test_the_newer_library_packs_the_same(bits: int) -> None:
    codes, zeros, words, zero_words = (
        LIBRARY[f"{kind}/{bits}/{PLACE}"] for kind in ("codes", "zeros", "words", "zero_words")
    )
    assert torch.equal(pack(codes, bits), words)
    assert torch.equal(unpack(words, bits, 100), codes)
    assert torch.equal(pack(zeros.T, bits).T, zero_words)
    assert torch.equal(unpack(zero_words.T, bits, 40).T, zeros)


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_packed_some_at_a_time(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = codes_of(bits, 50, 64)
    whole = pack(codes, bits)
    monkeypatch.setattr(packed_words, "AT_ONCE", 3 * 64)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 64), codes)


def test_words_of_another_number_of_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="64 codes of 3 bits are 6 words, not 7"):
        unpack(torch.zeros(2, 7, dtype=torch.int32), 3, 64)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_reader_that_knows_only_the_file_finds_the_same_weight(bits: int, symmetric: bool) -> None:
    scheme = Integer(bits, 32, symmetric, "any")
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(3))
    params = scheme.search(weight, None)
    codes = scheme.quantize(weight, params)
    parts = scheme.tensors(codes, params)
    weights = QuantizationArgs(
        num_bits=bits, type="int", strategy="group", group_size=32, symmetric=symmetric
    )
    group = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    assert is_ours(group, parts["weight_packed"].shape[1], 96)
    assert torch.equal(unpacked(parts, group), scheme.dequantize(codes, params))


def test_what_the_older_library_packed_is_left_to_it() -> None:
    """3 bits, ten to a word: transformers opens that."""
    weights = QuantizationArgs(num_bits=3, type="int", strategy="group", group_size=32, symmetric=True)
    group = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    codes = codes_of(3, 4, 96)
    words = pack_to_int32(codes, 3)
    assert words.shape[1] == 10
    assert not is_ours(group, words.shape[1], 96)
    scale = torch.full((4, 3), 0.5, dtype=torch.bfloat16)
    parts = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([4, 96])}
    assert torch.equal(unpacked(parts, group).float(), codes.float() / 2)
