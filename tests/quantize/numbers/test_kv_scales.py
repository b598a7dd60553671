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
    whole, after = scales_of(seen).v_scale, scales_of(seen, divisor).v_scale
    assert isinstance(whole, float)
    assert isinstance(after, float)
    assert whole > 5 * after


def test_scales_of_heads_are_those_of_each_head_alone() -> None:
    keys, values = keys_and_values()
    keys[:, 1] *= 30
    values[:, 2] *= 1e-6
    seen = KVAbsmax()
    seen(keys, values)
    absmax, samples = (seen.key, seen.value), (seen.key_sample, seen.value_sample)
    by_head = calibrated_scales(absmax, samples, None, by_head=True)
    assert isinstance(by_head.k_scale, tuple)
    assert isinstance(by_head.v_scale, tuple)
    for head in range(3):
        alone = KVAbsmax()
        alone(keys[:, head : head + 1], values[:, head : head + 1])
        one = scales_of(alone)
        assert (by_head.k_scale[head], by_head.v_scale[head]) == (one.k_scale, one.v_scale)
    small = values[:, 2]  # below what a scale for all heads can hold
    whole, rounded = (scales(keys, values)[1][:, 2] for scales in (scales_of(seen), by_head))
    assert (rounded - small).square().sum() < 0.01 * (whole - small).square().sum()


def test_where_scales_of_heads_are_from_is_said() -> None:
    exact = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    few, many = torch.ones(1), exact.repeat(1000) * scale_of(torch.tensor(CLIPS[1]))
    clipped = torch.cat([many, few])
    plain = torch.zeros_like(clipped)
    plain[:127] = exact * scale_of(few)
    keys = torch.stack([clipped, plain], dim=1)  # (tokens, heads of one channel)
    scales = calibrated_scales((torch.ones(2), torch.ones(2)), (keys, keys.flip(1)), None, by_head=True)
    assert scales.k_source == scales.v_source == "clip in 1 of 2 heads"


def test_every_few_tokens_are_kept_and_the_largest_magnitude_of_all() -> None:
    keys, values = keys_and_values()
    keys[1, 2, 3, 4] = -50.0  # a token that is not sampled
    seen = KVAbsmax()
    for batch in range(2):
        passed = seen(keys[batch : batch + 1], values[batch : batch + 1])
        assert torch.equal(passed[0][0], keys[batch])
    assert seen.key.tolist()[2] == 50.0
    assert (seen.key[:2] < 50.0).all()
    assert seen.key_sample.shape == seen.value_sample.shape == (2 * 64 // SAMPLE_STRIDE, 96)
    assert torch.equal(seen.key_sample[0], keys[0, :, 0].flatten())
