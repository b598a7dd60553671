"""From rules to the table: the last match wins, what engines fuse shares an entry, and what is wrong is one line."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from tests.quantize.small_runs import recipe_with
from tests.tiny_models import write_tiny_model

from lowbit_core.errors import RecipeError
from lowbit_quantize.catalog import CATALOG, unknown_name
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.plan import Plan, make_plan

ALL = {"match": "*", "scheme": "W4A16", "group_size": 64}
Entry = tuple[str, int | None, tuple[str, ...]]


def plan_of(model: Path, *rules: dict[str, Any], **sections: Any) -> Plan:
    return make_plan(find_model(str(model)), recipe_with(*rules, **sections))


def entries(plan: Plan) -> dict[str, Entry]:
    """Scheme, group size and methods by published name."""
    return {
        plan.names.published(name): (
            entry.scheme.name,
            entry.scheme.group_size,
            tuple(method.name for method in entry.methods),
        )
        for name, entry in plan.modules.items()
    }


def refusal(model: Path, *rules: dict[str, Any], **sections: Any) -> str:
    """The one line that a plan is refused with."""
    with pytest.raises(RecipeError) as caught:
        plan_of(model, *rules, **sections)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_last_rule_that_matches_a_linear_decides(tiny_model: Callable[[str], Path]) -> None:
    plan = plan_of(
        tiny_model("qwen3"),
        ALL,
        {"match": "*.mlp.*", "scheme": "W8A16", "group_size": 32, "methods": ["rtn"]},
        {"match": ["*.1.mlp.gate_proj", "*.1.mlp.up_proj"], "scheme": "none"},
        {"match": "re:.*[.][12][.].*down_proj", "scheme": "W4A16_ASYM", "methods": ["awq", "gptq"], "group_size": 32},
        {"match": "model.layers.2.mlp.down_proj", "scheme": "W4A16", "group_size": "channel"},
    )  # fmt: skip
    table = entries(plan)
    assert table["model.layers.0.self_attn.q_proj"] == ("W4A16", 64, ("awq",))
    assert table["model.layers.0.mlp.down_proj"] == ("W8A16", 32, ("rtn",))
    assert table["model.layers.1.mlp.down_proj"] == ("W4A16_ASYM", 32, ("awq", "gptq"))
    assert table["model.layers.2.mlp.down_proj"] == ("W4A16", None, ("awq",))
    untouched = ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    assert set(untouched).isdisjoint(table)
    assert plan.unquantized_linears == untouched
    assert plan.unquantized == ("lm_head", *untouched)
    by_rule = dict.fromkeys(untouched, "a rule gives it the scheme none")
    assert plan.unquantized_because == {"lm_head": "no rule matches it"} | by_rule


def test_a_rule_that_gives_no_group_size_has_the_presets(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "wide", intermediate_size=256)
    table = entries(
        plan_of(model, {"match": "*", "scheme": "W4A16"}, {"match": "*.o_proj", "scheme": "W8A16"})
    )
    assert table["model.layers.0.mlp.up_proj"][:2] == ("W4A16", 128)
    assert table["model.layers.0.self_attn.o_proj"][:2] == (
        "W8A16",
        PRESET_SCHEMES["W8A16"]["weights"].group_size,
    )


def test_rules_are_written_in_published_names(tiny_model: Callable[[str], Path]) -> None:
    """Mixtral's files call the last linear of an expert w2."""
    down = {"match": "*.w2", "scheme": "none"}
    line = refusal(tiny_model("mixtral"), ALL, {"match": "*.down_proj", "scheme": "none"})
    assert "matches no linear; names look like model.layers.2.block_sparse_moe.experts.7.w2" in line
    plan = plan_of(tiny_model("mixtral"), ALL, down)
    assert not any(".experts." in name for name in plan.modules)


@pytest.mark.parametrize(
    ("family", "special", "one", "other"),
    [
        ("qwen2", {"match": "*.1.self_attn.v_proj", "scheme": "W8A16", "group_size": 64}, "q_proj", "v_proj"),
        ("qwen2", {"match": "*.0.mlp.up_proj", "scheme": "W4A16", "group_size": 32}, "gate_proj", "up_proj"),
        ("qwen2", {**ALL, "match": "*.k_proj", "methods": ["gptq"]}, "q_proj", "k_proj"),
        ("qwen3_moe", {"match": "*.2.mlp.experts.5.*", "scheme": "W8A16", "group_size": 64}, "experts.0", "experts.5"),
        ("deepseek_v2", {"match": "*.kv_a_proj_with_mqa", "scheme": "W8A16"}, "q_a_proj", "kv_a_proj_with_mqa"),
    ],
)  # fmt: skip
def test_fused_linears_that_want_different_things_are_refused(
    tiny_model: Callable[[str], Path], family: str, special: dict[str, Any], one: str, other: str
) -> None:
    line = refusal(tiny_model(family), ALL, special)
    first, second = line.removeprefix("modules: ").split(" are one matrix in engines")[0].split(" and ")
    assert one in first
    assert other in second
    assert "want different schemes or methods (W4A16, group_size 64, ['awq']; " in line
    assert "give one rule that matches both" in line


def test_experts_of_two_layers_that_differ_are_refused(tiny_model: Callable[[str], Path]) -> None:
    eight = {"match": "*.2.mlp.experts.*", "scheme": "W8A16", "group_size": 64}
    line = refusal(tiny_model("qwen3_moe"), ALL, eight)
    assert "model.layers.1.mlp.experts.0.gate_proj and model.layers.2.mlp.experts.0.gate_proj differ" in line
    assert "give one rule for all of them: {match: '*.experts.*', …}" in line
    assert "differ" in refusal(tiny_model("qwen3_moe"), ALL, {**eight, "scheme": "none", "group_size": None})


def test_asymmetric_experts_are_refused_and_asymmetric_attention_beside_them_is_not(
    tiny_model: Callable[[str], Path],
) -> None:
    asymmetric = {"match": "*", "scheme": "W4A16_ASYM", "group_size": 32}
    line = refusal(tiny_model("qwen3_moe"), asymmetric)
    assert "W4A16_ASYM does not fit routed experts" in line
    assert "in symmetric schemes only" in line
    plan = plan_of(tiny_model("qwen3_moe"), ALL, {**asymmetric, "match": "*.self_attn.*"})
    assert entries(plan)["model.layers.1.self_attn.q_proj"][0] == "W4A16_ASYM"


@pytest.mark.parametrize(
    ("pattern", "first", "others"),
    [
        ("*.1.self_attn.k_proj", "model.layers.1.self_attn.k_proj", 2),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", 1),
    ],
)
def test_one_linear_left_alone_keeps_its_fused_siblings_alone_with_a_warning(
    tiny_model: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    pattern: str,
    first: str,
    others: int,
) -> None:
    logging.getLogger("lowbit").propagate = True
    with caplog.at_level(logging.WARNING, "lowbit"):
        plan = plan_of(tiny_model("qwen2"), ALL, {"match": pattern, "scheme": "none"})
    assert len(plan.modules) == 3 * 7 - 1 - others
    assert f"{first} and {others} linears that engines fuse with it stay as they are" in caplog.text
    reasons = [reason for name, reason in plan.unquantized_because.items() if name != "lm_head"]
    assert plan.unquantized_because[first] == "a rule gives it the scheme none"
    assert reasons.count(f"engines fuse it with {first}, which stays as it is") == others


def test_what_no_rule_matches_stays_without_a_warning(
    tiny_model: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("lowbit").propagate = True
    with caplog.at_level(logging.WARNING, "lowbit"):
        plan = plan_of(tiny_model("qwen2"), {**ALL, "match": "*.mlp.*"})
    assert len(plan.modules) == 3 * 3
    assert not caplog.text


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"scheme": "W4A61"}, "modules.0.scheme: 'W4A61' is unknown; did you mean W4A16? allowed are W4A16, "),
        ({"scheme": "w8a16"}, "modules.0.scheme: 'w8a16' is unknown; did you mean W8A16?"),
        ({"scheme": "NF4"}, "modules.0.scheme: 'NF4' is unknown; "),
        ({"scheme": "NVFP4"}, "modules.0.group_size = 64: NVFP4 has groups of 16 inputs and no others; leave"),
        ({"scheme": "AWQ"}, "W4AFP8, none; awq is a method: methods: [awq]"),
        ({"methods": ["awk"]}, "'awk' is unknown; did you mean awq? allowed are rtn, awq, smoothquant, gptq"),
        ({"methods": ["GPTQ"]}, "modules.0.methods: 'GPTQ' is unknown; did you mean gptq?"),
        ({"methods": ["gptq", "awq"]}, "['gptq', 'awq']: gptq only quantizes, so it stands last; put it there or"),
        ({"methods": ["rtn", "gptq"]}, "rtn only quantizes, so it stands last"),
        ({"methods": ["awq", "awq"]}, "a method stands twice; name each once"),
        ({"match": "mlp.down_proj"}, "'mlp.down_proj' matches no linear; names look like model.layers.2.mlp.down"),
        ({"match": "re:("}, "modules.0.match: 're:(' is not a regular expression"),
        ({"match": "*embed*"}, "'*embed*' matches model.embed_tokens only, which engines look rows up in"),
        ({"group_size": 128}, "W4A16 does not fit the 192 inputs of model.layers.0.mlp.down_proj: groups of 128"),
        ({"scheme": "none", "group_size": None}, "modules leave no linear to quantize; give a rule with a scheme"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_followed(
    tiny_model: Callable[[str], Path], rule: dict[str, Any], message: str
) -> None:
    assert message in refusal(tiny_model("qwen2"), {**ALL, **rule})


def test_group_sizes_that_fit_are_named(tiny_model: Callable[[str], Path]) -> None:
    line = refusal(tiny_model("llama"), {"match": "*", "scheme": "W4A16"})
    assert "group sizes that fit all linears: 32, 64" in line


def half(**options: Any) -> dict[str, Any]:
    """The pass that leaves half of the experts."""
    return {"prune_experts": {"prune_ratio": 0.5, **options}}


PRUNE = half()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["quantise"], "passes.0: 'quantise' is unknown; did you mean quantize? allowed are drop_layers, "),
        ([PRUNE, PRUNE, "quantize"], "passes.1: prune_experts stands twice; name each pass once"),
        (["quantize", PRUNE], "passes.1: prune_experts stands after quantize; put it before"),
        (["distill_router", "quantize"], "passes.0: distill_router needs prune_experts before it; add"),
        ([PRUNE, "quantize", "distill_router"], "passes.2: distill_router stands after quantize; put it before"),
        ([PRUNE], "linears and passes lacks quantize; add it to passes"),
        ([{"quantize": {"bits": 4}}], "passes.0.quantize: unknown key 'bits'"),
        ([{"prune_experts": {"ratio": 0.5}}], "unknown key 'ratio'; did you mean prune_ratio? allowed here"),
        ([{"prune_experts": {}}], "give prune_ratio, the share of experts that goes, or keep_experts"),
        ([{"prune_experts": {"prune_ratio": 0.5, "keep_experts": 4}}], "or keep_experts, the count that stays"),
        ([{"prune_experts": {"prune_ratio": 1.0}}], "prune_ratio = 1.0"),
        ([{"prune_experts": {"keep_experts": True}}], "keep_experts = True: allowed is a whole number"),
        ([{"prune_experts": {"keep_experts": 4.0}}], "keep_experts = 4.0: allowed is a whole number"),
        ([{"prune_experts": {"prune_ratio": False}}], "prune_ratio = False: allowed is a number"),
        ([half(consolidate="merge")], "consolidate = 'merge': allowed is average, permute"),
        ([half(consolidate=True)], "consolidate = True: allowed is average, permute"),
        ([half(consolidate="permute", similarity="x")], "similarity = 'x': allowed is router, output"),
        ([half(similarity="router")], "give consolidate too: average or permute"),
        ([half(consolidation="permute")], "unknown key 'consolidation'; did you mean consolidate?"),
    ],
)  # fmt: skip
def test_passes_that_cannot_run_so(
    tiny_model: Callable[[str], Path], passes: list[Any], message: str
) -> None:
    assert message in refusal(tiny_model("qwen3_moe"), ALL, passes=passes)


def test_the_base_model_walks_beside_where_one_linear_is_aimed_at_it(
    tiny_model: Callable[[str], Path],
) -> None:
    aimed = {"match": "*.2.mlp.down_proj", "scheme": "W4A16", "group_size": 32, "methods": ["gptq"]}
    assert not plan_of(tiny_model("qwen3_moe"), {**ALL, "methods": ["rtn"]}).paired
    assert plan_of(tiny_model("qwen3_moe"), {**ALL, "methods": ["awq"]}).paired
    assert plan_of(tiny_model("qwen3"), {**ALL, "methods": ["rtn"]}, aimed).paired
    everywhere = {**ALL, "methods": ["awq", "gptq"]}
    assert plan_of(tiny_model("qwen3_moe"), everywhere).paired
    assert plan_of(tiny_model("qwen3_moe"), everywhere, passes=[PRUNE, "quantize"]).paired


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("int4", "W4A16"),
        ("INT8", "W8A8"),
        ("w4a16", "W4A16"),
        ("W4A61", "W4A16"),
        ("w4-a16-asym", "W4A16_ASYM"),
        ("bf16", "none"),
    ],
)
def test_a_scheme_by_another_tools_name_or_in_another_case_is_told_by_ours(given: str, meant: str) -> None:
    names = [*(preset.name for preset in CATALOG.presets), "none"]
    assert f"did you mean {meant}? allowed are" in unknown_name("modules.0.scheme", given, names)
