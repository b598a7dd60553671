"""Whatever is done to a base's tensors and files: a run is refused in one line, or its checkpoint is what was measured.

25 random bases; LOWBIT_RANDOM_BASES=500 tries as many more; --hypothesis-show-statistics says how they ended.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.quantize.edited_bases import QUICK, Tensors, edited, quick_run
from tests.quantize.small_runs import heldout_ids, mean_kld, recipe_of
from tests.tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

from lowbit_core.errors import LowbitError

USUAL_TOKENS = 87  # different ones in the held-out text by the base's own template
EXAMPLES = int(os.environ.get("LOWBIT_RANDOM_BASES", "25"))
Change = Callable[[Tensors], Tensors]

NAMES = st.sampled_from(
    [
        "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.v_proj.weight",
    ]
)  # fmt: skip
PARTS = st.sampled_from(
    ["model", "layers", "0", "1", "2", "7", "self_attn", "mtp", "visual", "score", "q_proj", "experts"]
)
LEAVES = st.sampled_from(
    ["weight", "bias", "weight_scale", "weight_scale_inv", "lora_A", "inv_freq", "weight_packed"]
)
STRANGE = st.builds(
    lambda parts, leaf: ".".join([*parts, leaf]), st.lists(PARTS, min_size=1, max_size=4), LEAVES
)
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
WRAPPERS = st.sampled_from(["_orig_mod.", "module.", "base_model.model.", "x.", "model."])
FILES = st.dictionaries(
    st.sampled_from(
        [
            "a.txt", "b/c.json", "pytorch_model.bin", "adapter.py", "README.md", "config.json.bak", "optimizer.pt",
            "consolidated.safetensors", "generation_config.json", "chat_template.jinja", "params.json",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(["{}", "[]", "null", '{"do_sample": 1, "temperature": -1}', "{{ messages }}"]),
    max_size=3,
)  # fmt: skip
# How the tensors lie in files: together, in shards, one of them in two shards, or beside what an index names.
STORED = st.sampled_from(["one", "one", "shards", "same twice", "other twice", "stale index", "stray shard"])


def add(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: {name: torch.ones(8, 128).to(dtype), **tensors}


def remove(name: str) -> Change:
    return lambda tensors: {key: one for key, one in tensors.items() if key != name}


def copy(name: str, other: str) -> Change:
    return lambda tensors: {**tensors, other: tensors[name].clone()} if name in tensors else tensors


def move(name: str, other: str) -> Change:
    return lambda tensors: {other if key == name else key: one for key, one in tensors.items()}


def cut(name: str) -> Change:
    return lambda tensors: {key: one[:-1] if key == name else one for key, one in tensors.items()}


def wrap(prefix: str) -> Change:
    return lambda tensors: {f"{prefix}{key}": one for key, one in tensors.items()}


def strip(prefix: str) -> Change:
    return lambda tensors: {key.removeprefix(prefix): one for key, one in tensors.items()}


def widen(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: {key: one.to(dtype) if key == name else one for key, one in tensors.items()}


def in_shards(base: Path, stored: str) -> None:
    """Store the tensors of a base another way."""
    single = base / "model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    one = tensors[names[0]]
    twice = {names[0]: (one.float() / 2).to(one.dtype) if stored == "other twice" else one}
    save_file({name: tensors[name] for name in names[::2]}, base / first)
    rest = {name: tensors[name] for name in names[1::2]}
    save_file({**rest, **(twice if stored.endswith("twice") else {})}, base / second)
    if stored == "stray shard":
        save_file(twice, base / "model-00003-of-00003.safetensors")
    index = {name: first if name in names[::2] else second for name in names}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if stored != "stale index":
        single.unlink()


CHANGES = st.one_of(
    st.builds(add, STRANGE, DTYPES),
    st.builds(remove, NAMES),
    st.builds(copy, NAMES, STRANGE),
    st.builds(move, NAMES, STRANGE),
    st.builds(cut, NAMES),
    st.builds(wrap, WRAPPERS),
    st.builds(strip, st.just("model.")),
    st.builds(widen, NAMES, st.just(torch.float32)),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("whole") / "base", num_hidden_layers=2)


def rounding_noise(text: torch.Tensor) -> float:
    """What bfloat16 alone changes: it averages out over different predictions, of which a template may leave few."""
    return 2e-3 * max(1.0, math.sqrt(USUAL_TOKENS / len(text.unique())))


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate],  # a run costs a second: the first that fails is small enough
)
@given(changes=st.lists(CHANGES, max_size=3), files=FILES, stored=STORED)
def test_a_run_is_refused_in_one_line_or_its_checkpoint_is_what_was_measured(
    whole: Path,
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[Change],
    files: dict[str, str],
    stored: str,
) -> None:
    directory = tmp_path_factory.mktemp("any")

    def every(tensors: Tensors) -> Tensors:
        for change in changes:
            tensors = change(tensors)
        assume(tensors)
        return tensors

    try:
        base = edited(whole, directory / "base", every, files=files)
        if stored != "one":
            in_shards(base, stored)
        manifest, refusal = None, ""
        try:
            manifest = quick_run(base, directory / "out")
        except LowbitError as error:
            refusal = str(error)
        if manifest is None:
            assert refusal
            assert "\n" not in refusal
            assert not (directory / "out" / "lowbit.json").exists()
            event("refused")
            return
        # What is accepted has the whole model's tensors, under whatever names: it computes what the whole one does.
        # The text is the accepted base's: another chat template makes other tokens of the same conversations.
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
            for path in (whole, directory / "out")
        )
        text = heldout_ids(directory / "out", recipe_of("rtn-g64", *QUICK))
        found = mean_kld(before, after, text)
        assert found == pytest.approx(manifest.quality.mean_kld, abs=rounding_noise(text))
        used = manifest.base.carried + list(manifest.base.left_out)
        assert set(files) <= {*manifest.files, *used}
        event("accepted, equal to what was measured")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
