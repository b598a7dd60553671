"""What a document refuses is said in the project's words, whatever is written; a wrong --set is named as one."""

import json
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic_core.core_schema import ErrorType

from lowbit_core.documents import Section, load_document, parse_document
from lowbit_core.errors import ConfigError, RecipeError
from lowbit_core.strict_yaml import strict_load
from lowbit_core.wrong_values import ALLOWED, OTHER, OWN, allowed
from lowbit_loadtest.frontier.plan import FrontierPlan
from lowbit_loadtest.scenario import Scenario
from lowbit_quantize.passes.prune_experts import PruneExpertsOptions
from lowbit_quantize.recipe import Recipe, bundled_recipes, load_recipe

DOCUMENTS: dict[type[BaseModel], dict[str, Any]] = {
    Recipe: {
        "modules": [{"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["awq"]}],
        "kv_cache": {"dtype": "fp8"},
        "passes": ["quantize"],
        "calibration": {"dataset": "default", "num_samples": 4, "max_seq_length": 64, "seed": 0, "token_ids": None},
        "quality": {"isolate": True, "max_mean_kld": 0.5, "min_top1_agreement": 0.5, "max_perplexity_ratio": 2},
    },
    Scenario: {
        "arrivals": {"kind": "gamma", "rate_rps": 1, "burstiness": 0.5},
        "prompts": {"kind": "synthetic", "tokens": {"mean": 8}, "shared_prefix": {"groups": 2, "tokens": 4}},
        "output": {"tokens": 4, "exact": True},
        "slo": {"ttft_s": 1, "attainment": 0.5},
        "warm_up": {"requests": 1, "seconds": 1},
        "requests": 4, "repetitions": 2, "seed": 0, "model": "m", "temperature": 0, "timeout_s": 1,
        "search": {"low_rps": 1, "high_rps": 2},
        "quality": {"tasks": ["piqa"], "limit": 4},
        "generator": {"workers": 1},
    },
    FrontierPlan: {
        "checkpoints": [{"name": "a", "path": "a", "serve": ["--max-num-seqs", "4"]}],
        "scenarios": [{"scenario": "chat", "set": ["seed=1"]}],
    },
    PruneExpertsOptions: {
        "prune_ratio": 0.5, "criterion": "reap", "seed": 0, "expert_parallel": 1, "consolidate": "average",
        "similarity": "router",
    },
}  # fmt: skip
PYDANTIC = (
    "Input should",
    "Field required",
    "Extra inputs",
    "instance of",
    "valid tuple",
    "union",
    "pydantic",
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=200) | st.just("\ud83d"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and item."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


EVERYWHERE = [(model, place) for model, data in DOCUMENTS.items() for place in places(data)]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(where=st.sampled_from(EVERYWHERE), junk=JUNK)
def test_any_value_at_any_key_is_taken_or_refused_in_one_line_of_our_words(
    where: tuple[type[BaseModel], tuple[Any, ...]], junk: Any
) -> None:
    model, (*parents, leaf) = where
    data = json.loads(json.dumps(DOCUMENTS[model]))
    spot = data
    for part in parents:
        spot = spot[part]
    spot[leaf] = junk
    line = ""
    try:
        parse_document("document", data, "d.yaml", model)
    except ConfigError as error:
        line = str(error)
    if line:
        assert not any(word in line.replace(repr(junk), "") for word in PYDANTIC)
        assert OTHER not in line
        assert len(line) < 700
        assert "\n" not in line.replace(str(junk), "")


def test_the_words_for_each_kind_of_error_have_their_figures() -> None:
    assert set(ALLOWED) | set(OWN) <= set(get_args(ErrorType))
    assert not set(OWN) & set(ALLOWED)
    figures = dict.fromkeys(
        [field[1] for words in ALLOWED.values() for field in Formatter().parse(words) if field[1]], "7"
    )
    for kind in ALLOWED:
        words = allowed({"type": kind, "loc": (), "msg": "", "input": 0, "ctx": figures})
        assert "{" not in words
        assert not any(word in words for word in PYDANTIC)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modules=W4A16", "modules.0 = 'W4A16': allowed is a mapping with the keys match, scheme, group_size, methods"),
        ("kv_cache=int8", "kv_cache.dtype = 'int8': allowed is fp8, none"),
        ("kv_cache=[fp8]", "kv_cache = ['fp8']: allowed is a mapping with the keys dtype"),
        ("kv_cache=null", "kv_cache = None: allowed is a mapping with the keys dtype"),
        ("modules.0.gropu_size=64", "unknown key 'modules.0.gropu_size'; did you mean group_size? allowed here"),
        ("qualty.isolate=false", "unknown key 'qualty'; did you mean quality? allowed here"),
        ("calibration.num_samples=many", "calibration.num_samples = 'many': allowed is a whole number"),
        ("calibration.num_samples=0", "calibration.num_samples = 0: allowed is 1 or more"),
        ("calibration.num_samples=1.5", "allowed is a whole number"),
        ("quality.max_mean_kld=.inf", "allowed is a finite number"),
        ("quality.isolate=perhaps", "allowed is true or false"),
        ("modules=[{scheme: W4A16}]", "modules.0.match is missing; give it"),
        ("modules=[{match: [], scheme: W4A16}]", "allowed is 1 or more of them"),
        ("calibration={num_samples: [1]}", "calibration.num_samples = [1]: allowed is a whole number"),
        ("weights.bits=4", "it is called 'modules.*.scheme' now"),
        ("description=" + "9" * 5000, "a value cannot be read; put it in quotes"),
        ("description=2001-99-99", "a value cannot be read; put it in quotes"),
        ("description=" + "[" * 5000, "nested too deeply"),
        ("description=[", "is not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_set_is_blamed_and_not_the_bundled_recipe(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("awq-g64", (override,))
    line = str(caught.value)
    assert line.startswith("--set ")
    assert words in line
    assert ".yaml" not in line


def test_a_wrong_value_of_the_file_is_still_said_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("calibration: {num_samples: many}")
    with pytest.raises(RecipeError, match=r"^recipe .*r\.yaml: calibration\.num_samples"):
        load_recipe(str(tmp_path / "r.yaml"), ("quality.isolate=false",))


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("kv_cache=none", {"kv_cache": {"dtype": "none"}}),
        ("kv_cache=fp8", {"kv_cache": {"dtype": "fp8"}}),
        ("passes=quantize", {"passes": ["quantize"]}),
        ("modules={match: '*', scheme: W8A16}", {"modules": [{"match": ["*"], "scheme": "W8A16"}]}),
        ("modules.0.methods=rtn", {}),
        ("modules.0.match=re:.*down_proj", {}),
    ],
)
def test_one_value_stands_for_a_list_of_one_and_the_cache_is_its_dtype(
    override: str, read: dict[str, Any]
) -> None:
    recipe = load_recipe("awq-g64", (override,)).model_dump(mode="json", exclude_unset=True)
    for key, value in read.items():
        assert recipe[key] == value


def test_one_value_stands_for_a_list_of_one_in_every_document() -> None:
    class Drawing(Section):
        names: tuple[str, ...] = ()
        sizes: list[int] | None = None

    read = parse_document("drawing", {"names": "a", "sizes": 3}, "here", Drawing)
    assert (read.names, read.sizes) == (("a",), [3])
    scenario = {**DOCUMENTS[Scenario], "search": None, "quality": {"tasks": "piqa"}}
    assert parse_document("scenario", scenario, "here", Scenario).quality.tasks == ("piqa",)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"names = None: allowed is a list"):
        parse_document("drawing", {"names": None}, "here", Drawing)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(alphabet=st.sampled_from("[]{}:,-&*!|>'\"%@ \n\t#ab0.~\x00\ufeff"), max_size=40))
def test_any_text_is_yaml_or_one_line_says_where_it_is_not(text: str) -> None:
    line = ""
    try:
        strict_load(text)
    except yaml.YAMLError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 200


def test_a_recipe_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + bundled_recipes()["awq-g64"].read_bytes())
    assert load_recipe(str(file)) == load_recipe("awq-g64")


def test_a_recipe_that_is_not_utf_8_is_refused_without_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("description: x".encode("utf-16") * 900)
    with pytest.raises(RecipeError) as caught:
        load_document("recipe", tmp_path / "r.yaml", Recipe, bundled={}, error=RecipeError)
    assert len(str(caught.value)) < 300
