"""FP8 scales: the largest magnitude, unless a clip of it rounds better."""

import torch

from lowbit_quantize.schemes.kv_cache import CLIPS, FP8, KVScales, calibrated_scales, choose_scale, scale_of
from lowbit_quantize.statistics.kv_absmax import SAMPLE_STRIDE, KVAbsmax


def keys_and_values() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(30)
    keys, values = torch.randn(
        2, 2, 3, 64, 32, generator=generator
    )  # each (batch, kv_heads, tokens, head_dim)
    return keys, values


def scales_of(seen: KVAbsmax, divisor: torch.Tensor | None = None) -> KVScales:
    absmax, samples = (seen.key, seen.value), (seen.key_sample, seen.value_sample)
    return calibrated_scales(absmax, samples, divisor)


def squared_error(values: torch.Tensor, scale: float) -> float:
    rounded, _ = KVScales(scale, 1.0)(values, values)
    return float((rounded - values).square().sum())


def test_no_scale_that_was_tried_rounds_the_sample_better() -> None:
    sample = torch.randn(4000, generator=torch.Generator().manual_seed(31))
    scale, source = choose_scale(sample.abs().max(), sample)
    assert source in ("maximum", "clip")
    for clip in CLIPS:
        tried = scale_of(sample.abs().max() * clip)
        assert squared_error(sample, scale) <= squared_error(sample, tried)


def test_one_magnitude_saturates_where_all_others_round_better_for_it() -> None:
    exact = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # all values of the format
    few, many = torch.ones(1), exact.repeat(1000) * scale_of(torch.tensor(CLIPS[1]))
    assert choose_scale(few, torch.cat([many, few])) == (scale_of(torch.tensor(CLIPS[1])), "clip")
    assert choose_scale(few, torch.cat([exact * scale_of(few), few])) == (scale_of(few), "maximum")


def test_scales_are_chosen_after_value_channels_were_divided() -> None:
    keys, values = keys_and_values()
    values[:, 1, :, 5] *= 40  # channel 37
    divisor = torch.ones(96)
    divisor[37] = 40
    seen = KVAbsmax()
    seen(keys, values)
    divided = KVAbsmax()
    divided(keys, values / divisor.view(3, 1, 32))
    assert scales_of(seen, divisor) == scales_of(divided)
    assert scales_of(seen).v_scale > 5 * scales_of(seen, divisor).v_scale


def test_every_few_tokens_are_kept_and_the_largest_magnitude_of_all() -> None:
    keys, values = keys_and_values()
    keys[1, 2, 3, 4] = -50.0  # a token that is not sampled
    seen = KVAbsmax()
    for batch in range(2):
        passed = seen(keys[batch : batch + 1], values[batch : batch + 1])
        assert torch.equal(passed[0][0], keys[batch])
    assert float(seen.key) == 50.0
    assert seen.key_sample.shape == seen.value_sample.shape == (2 * 64 // SAMPLE_STRIDE, 96)
    assert torch.equal(seen.key_sample[0], keys[0, :, 0].flatten())
