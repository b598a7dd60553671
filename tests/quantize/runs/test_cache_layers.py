"""Layers whose keys and values stay in the model's type, beside an FP8 cache in the others."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.quantize.small_runs import CPU, PLAIN_WEIGHTS, recipe_of, stored_bytes, tensors_of

from lowbit_core.errors import LowbitError
from lowbit_core.manifest import Manifest, read_manifest
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize

TinyModel = Callable[[str], Path]


def alone(manifest: Manifest) -> float:
    """KL of the FP8 cache alone."""
    assert manifest.quality.kv_cache_alone
    return manifest.quality.kv_cache_alone.mean_kld


@pytest.mark.parametrize(
    ("skip", "in_fp8"), [("[sliding_window]", [1]), ("[1]", [0, 2]), ("[sliding_window, 0]", [1])]
)
def test_the_manifest_names_them_and_readers_that_do_not_know_find_scales_for_all(
    tiny_model: TinyModel, tmp_path: Path, skip: str, in_fp8: list[int]
) -> None:
    base, out = tiny_model("gemma3_text"), tmp_path / "out"
    recipe = recipe_of("rtn-g64", f"kv_cache.skip_layers={skip}", "quality.isolate=true")
    manifest = quantize(str(base), recipe, out, CPU)
    kv = manifest.kv_cache
    assert kv
    assert kv.skip_layers == [number for number in range(3) if number not in in_fp8]
    scales = {name for name in tensors_of(out) if name.endswith(("k_scale", "v_scale"))}
    assert scales == {f"model.layers.{n}.self_attn.{side}_scale" for n in range(3) for side in "kv"}
    assert (
        dry_run(str(base), recipe, 24.0, 1 << 30)["tensor_bytes"] == manifest.size.bytes == stored_bytes(out)
    )
    assert read_manifest(out) == manifest


def test_less_is_lost_than_with_fp8_in_every_layer(tiny_model: TinyModel, tmp_path: Path) -> None:
    base, isolated = str(tiny_model("gemma3_text")), (*PLAIN_WEIGHTS, "quality.isolate=true")
    every = quantize(base, recipe_of("rtn-g64", *isolated), tmp_path / "all", CPU)
    some = recipe_of("rtn-g64", *isolated, "kv_cache.skip_layers=[sliding_window]")
    fewer = quantize(base, some, tmp_path / "some", CPU)
    assert 0 < alone(fewer) < alone(every)
    assert fewer.quality.mean_kld < every.quality.mean_kld


def test_a_checkpoint_is_opened_with_fp8_where_it_has_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = recipe_of("rtn-g64", "kv_cache.skip_layers=[2]")
    quantize(str(tiny_model("llama")), recipe, tmp_path / "out", CPU)
    opened = load_model(find_model(str(tmp_path / "out")), CPU)
    assert sorted(opened.scales) == [0, 1]


def test_a_token_takes_one_byte_in_these_and_two_in_those(tiny_model: TinyModel) -> None:
    base = str(tiny_model("llama"))
    every, fewer, none = (
        dry_run(base, recipe_of("rtn-g64", *rest), 24.0, 1 << 30)["tensor_parallel"][0][
            "kv_bytes_per_token_per_rank"
        ]
        for rest in ((), ("kv_cache.skip_layers=[1]",), ("kv_cache=none",))
    )
    assert (fewer, none) == (every * 4 // 3, every * 2)


@pytest.mark.parametrize(
    ("family", "asked", "words"),
    [
        ("llama", "[sliding_window]", "no layer of this model has a sliding window; take sliding_window out"),
        ("llama", "[7]", "layer 7 keeps no keys and values; those that do are 0 to 2"),
        ("llama", "[0, 1, 2]", "no layer is left with an FP8 cache; give kv_cache: none"),
        ("mistral", "[sliding_window]", "no layer is left with an FP8 cache"),
        ("llama", "[-1]", "skip_layers"),
        ("llama", "[full_attention]", "skip_layers"),
        ("llama", "[1.5]", "skip_layers"),
        ("llama", "[true]", "skip_layers"),
    ],
)
def test_layers_that_cannot_be_skipped_are_refused_in_one_line(
    tiny_model: TinyModel, tmp_path: Path, family: str, asked: str, words: str
) -> None:
    with pytest.raises(LowbitError) as caught:
        quantize(
            str(tiny_model(family)),
            recipe_of("rtn-g64", f"kv_cache.skip_layers={asked}"),
            tmp_path / "out",
            CPU,
        )
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_layers_to_skip_need_an_fp8_cache() -> None:
    with pytest.raises(LowbitError, match="skip_layers go with dtype fp8"):
        recipe_of("rtn-g64", "kv_cache={dtype: none, skip_layers: [0]}")
