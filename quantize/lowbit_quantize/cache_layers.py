"""Which layers keep keys and values in FP8: all that cache any, but for those that a recipe skips."""

from typing import Any

from lowbit_core.errors import RecipeError
from lowbit_core.log import get_logger
from lowbit_quantize.model.architecture import Architecture
from lowbit_quantize.recipe import KVCache, Recipe

log = get_logger("quantize")

SLIDING = "sliding_window"


def layers_in_fp8(cache: KVCache, architecture: Architecture, config: Any) -> frozenset[int]:
    """Numbers of the layers; raises RecipeError for one to skip that caches nothing, and where none is left."""
    if cache.dtype != "fp8":
        return frozenset()
    caching = {number for number, kind in enumerate(architecture.kinds) if kind.attention}
    skipped: set[int] = set()
    for one in cache.skip_layers:
        named = caching & (sliding_layers(config) if isinstance(one, str) else {one})
        if not named:
            raise RecipeError(f"kv_cache.skip_layers: {_refusal(one, caching)}")
        skipped |= named
    if caching and caching == skipped:
        raise RecipeError("kv_cache.skip_layers: no layer is left with an FP8 cache; give kv_cache: none")
    return frozenset(caching - skipped)


def without_unread_scales(recipe: Recipe, architecture: Architecture) -> Recipe:
    """vLLM 0.32 loads no scales for some caches; measured with them, a checkpoint would not be what is served."""
    unread = "a latent cache" if architecture.latent_cache else f"the attention of {architecture.model_type}"
    if recipe.kv_cache.dtype == "none" or (architecture.kv_scales and not architecture.latent_cache):
        return recipe
    log.warning("kv_cache.dtype: none instead of fp8, because vLLM loads no scales for %s", unread)
    return recipe.model_copy(update={"kv_cache": KVCache(dtype="none")})


def sliding_layers(config: Any) -> set[int]:
    """Numbers of the layers whose attention looks back over a window only, as vLLM takes a configuration."""
    depth = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {number for number, kind in enumerate(kinds) if "sliding" in kind}
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return set(range(depth)) if window else set()


def _refusal(one: int | str, caching: set[int]) -> str:
    if one == SLIDING:
        return "no layer of this model has a sliding window; take sliding_window out"
    return f"layer {one} keeps no keys and values; those that do are {_ranges(sorted(caching))}"


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as 1 to 3 and 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]])) or "none"
