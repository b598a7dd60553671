"""`lowbit plan` on cards, whose figures need no engine: recipes, bytes, what fits, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import write_tiny_model

from lowbit_core.errors import ConfigError, OutputError
from lowbit_plan.candidates import candidates, structures
from lowbit_plan.cards import find_card
from lowbit_plan.latency import inter_token
from lowbit_plan.place import find_place
from lowbit_plan.sections import checkpoint_bytes
from lowbit_plan.work import work_of
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import load_recipe

GIB = 1 << 30
Run = Callable[..., tuple[int, dict[str, Any], str]]
Models = Callable[[str], Path]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["bf16", "W4A16", "FP8_DYNAMIC"])
def test_the_recipe_has_its_predicted_bytes_by_dry_run(
    plan: Run, tiny_model: Models, tmp_path: Path, family: str, scheme: str
) -> None:
    out, model = tmp_path / "recipe.yaml", tiny_model(family)
    status, report, _ = plan(
        model, "--context", 256, "--on", "L40S", "--schemes", scheme, "--kv-cache", "none", "--out", out
    )
    assert status == 0
    told = dry_run(str(model), load_recipe(str(out)), 48e9 / GIB, 1 << 30)
    chosen = report["met"][0]
    assert chosen["weights_bytes"] == told["checkpoint_bytes"]
    assert chosen["kv_bytes_per_token"] == told["tensor_parallel"][0]["kv_bytes_per_token_per_rank"]
    assert chosen["kv_tokens"] == told["tensor_parallel"][0]["kv_tokens"]


def test_what_loses_least_of_what_fits_is_chosen(plan: Run, tiny_model: Models) -> None:
    model = tiny_model("llama")
    wide = plan(model, "--context", 256, "--on", "L40S")[1]
    assert wide["met"][0]["candidate"] == "bf16"
    assert [one["candidate"] for one in wide["met"]][:3] == ["bf16", "W8A8", "bf16, FP8 cache"]
    bf16, int8 = (one["itl_s"] for one in wide["met"][:2])
    narrow = plan(model, "--context", 256, "--on", "L40S", "--itl-ms", 1e3 * (bf16 + int8) / 2)[1]
    assert narrow["met"][0]["candidate"] == "W8A8"


def test_memory_is_weights_cache_and_overhead_in_the_share_that_is_used(
    plan: Run, tiny_model: Models
) -> None:
    _, report, _ = plan(
        tiny_model("llama"), "--context", 250, "--streams", 3, "--on", "L40S", "--schemes", "bf16"
    )
    one = next(one for one in report["met"] if one["candidate"] == "bf16")
    # 3 layers, keys and values of 2 heads of 32 in 2 bytes; 250 tokens in blocks of 16
    assert one["kv_bytes_per_token"] == 3 * 2 * 2 * 32 * 2
    assert one["kv_bytes"] == 3 * 256 * one["kv_bytes_per_token"]
    assert one["needed_bytes"] == int((one["weights_bytes"] + one["kv_bytes"] + 2 * GIB) / 0.9)


def test_an_fp8_cache_takes_half(plan: Run, tiny_model: Models) -> None:
    _, report, _ = plan(tiny_model("llama"), "--context", 256, "--on", "H100", "--schemes", "bf16")
    by_name = {one["candidate"]: one for one in report["met"]}
    assert by_name["bf16, FP8 cache"]["kv_bytes"] * 2 == by_name["bf16"]["kv_bytes"]


def test_latency_is_the_cards_roofline_at_the_streams_and_context_asked_for(
    plan: Run, tiny_model: Models
) -> None:
    model = tiny_model("llama")
    flags = ("--context", 256, "--streams", 7, "--on", "L4", "--schemes", "bf16", "--kv-cache", "none")
    _, report, _ = plan(model, *flags)
    bare = make_plan(
        find_model(str(model)), load_recipe("awq-g64", ("modules=[]", "passes=[]", "kv_cache=none"))
    )
    assert report["met"][0]["itl_s"] == inter_token(work_of(bare), find_card("L4"), 7, 256).total


def test_nothing_fits_says_what_the_nearest_would_take(plan: Run, tiny_model: Models, tmp_path: Path) -> None:
    out, model = tmp_path / "recipe.yaml", tiny_model("llama")
    flags = ("--context", 512, "--streams", 1000, "--on", "L4")
    needed = min(one["needed_bytes"] for one in plan(model, *flags)[1]["met"])
    short = needed - (100 << 20)
    status, report, told = plan(model, *flags, "--fit", short, "--out", out)
    assert (status, report["met"]) == (1, [])
    assert not out.exists()
    nearest = report["missed"][0]
    assert nearest["needed_bytes"] == needed
    assert f"needs {needed / GIB:.2f} GiB, {(needed - short) / GIB:.2f} more" in nearest["takes"][0]
    assert "nothing meets all targets" in told

    words = nearest["takes"][0]
    context, streams = (
        int(words.split(flag)[1].split()[0].strip(";")) for flag in ("--context", "--streams")
    )
    name, _, cache = nearest["candidate"].partition(", ")
    same = ("--schemes", name, "--kv-cache", "fp8" if cache else "none", "--fit", short, "--on", "L4")
    assert plan(model, "--context", context, "--streams", 1000, *same)[0] == 0
    assert plan(model, "--context", 512, "--streams", streams, *same)[0] == 0
    assert plan(model, "--context", 512, "--streams", streams + 1, *same)[0] == 1


@pytest.mark.parametrize("flag", ["--itl-ms", "--ttft-ms"])
def test_a_latency_that_nothing_has_is_met_once_it_is_what_the_nearest_takes(
    plan: Run, tiny_model: Models, flag: str
) -> None:
    model = tiny_model("llama")
    status, report, _ = plan(model, "--context", 256, "--on", "L4", flag, 1e-3)
    assert status == 1
    takes = report["missed"][0]["takes"]
    assert len(takes) == 1
    enough = takes[0].split(f"{flag} ")[1]
    assert plan(model, "--context", 256, "--on", "L4", flag, enough)[0] == 0


def test_experts_are_pruned_only_where_nothing_else_fits(plan: Run, tiny_model: Models) -> None:
    model = tiny_model("qwen3_moe")
    flags = ("--context", 64, "--on", "L4", "--kv-cache", "none", "--schemes", "bf16,W4A16")
    _, wide, _ = plan(model, *flags)
    names = [one["candidate"] for one in wide["met"]]
    assert names == [
        "bf16", "W4A16", "bf16, 25% of experts pruned", "W4A16, 25% of experts pruned", "bf16, 50% of experts pruned",
        "W4A16, 50% of experts pruned",
    ]  # fmt: skip
    smallest = {one["candidate"]: one["needed_bytes"] for one in wide["met"]}
    _, narrow, _ = plan(model, *flags, "--fit", smallest["W4A16"] - 1)
    assert narrow["met"][0]["candidate"] == "W4A16, 25% of experts pruned"


def test_structure_goes_only_where_bits_alone_do_not_fit(
    plan: Run, tiny_model: Models, tmp_path: Path
) -> None:
    model, out = tiny_model("llama"), tmp_path / "recipe.yaml"
    flags = ("--context", 64, "--on", "L4", "--kv-cache", "none", "--schemes", "bf16,W4A16")
    wide = plan(model, *flags, "--structure")[1]
    assert [one["candidate"] for one in wide["met"]] == ["bf16", "W4A16"]
    short = ("--fit", min(one["needed_bytes"] for one in wide["met"]) - 1)
    status, _, told = plan(model, *flags, *short)
    assert status == 1
    assert "with --structure" in told
    status, narrow, _ = plan(model, *flags, *short, "--structure", "--out", out)
    chosen = narrow["met"][0]
    assert status == 0
    assert chosen["candidate"] == "W4A16, a quarter of its channels pruned"
    assert "lowbit distill" in narrow["closeness"]
    assert "lowbit distill" in out.read_text()
    told_bytes = dry_run(str(model), load_recipe(str(out)), 48e9 / GIB, 1 << 30)["checkpoint_bytes"]
    assert chosen["weights_bytes"] == told_bytes


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_less_structure_in_16_bits_makes_up_for_what_went(tiny_model: Models, family: str) -> None:
    """Attention and networks; experts stay as they are."""
    dropped = [one for one in structures() if one.name == "a fifth of its layers dropped"]
    model, place = find_model(str(tiny_model(family))), find_place("L4")
    found = candidates(model, place, ["bf16"], fp8_cache=False, of=dropped)
    assert found
    for one in found:
        methods = {
            name: [method.name for method in entry.methods] for name, entry in one.plan.modules.items()
        }
        assert methods
        assert all(names == ["compensate"] and ".experts." not in name for name, names in methods.items())


def test_structure_makes_a_token_faster(plan: Run, tiny_model: Models) -> None:
    model = tiny_model("llama")
    flags = ("--context", 64, "--on", "L4", "--kv-cache", "none", "--schemes", "W4A16")
    whole = plan(model, *flags)[1]["met"][0]["itl_s"]
    status, found, _ = plan(model, *flags, "--itl-ms", 1e3 * whole * 0.98, "--structure")
    assert status == 0
    assert found["met"][0]["itl_s"] < 0.98 * whole  # of a tiny model on a card most is the engine's step


def test_structure_and_sensitivities_of_the_whole_model_do_not_go_together(
    plan: Run, tiny_model: Models, tmp_path: Path
) -> None:
    (tmp_path / "found.json").write_text("{}")
    flags = ("--context", 64, "--on", "L4", "--sensitivity", tmp_path / "found.json", "--structure")
    with pytest.raises(ConfigError, match="--structure: --sensitivity is of the whole model"):
        plan(tiny_model("llama"), *flags)


def test_tokens_have_a_price(plan: Run, tiny_model: Models) -> None:
    _, report, _ = plan(
        tiny_model("llama"), "--context", 256, "--streams", 2, "--on", "L4", "--price-per-hour", 3.6
    )
    one = report["met"][0]
    assert one["price_per_million_output_tokens"] == pytest.approx(1e-3 * one["itl_s"] / 2 * 1e6)


def test_the_recipe_says_what_was_asked_and_predicted(plan: Run, tiny_model: Models, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    _, report, _ = plan(
        tiny_model("llama"), "--context", 256, "--streams", 2, "--on", "L4", "--itl-ms", 100, "--out", out
    )
    text = out.read_text(encoding="utf-8")
    assert "# inter-token latency " in text
    assert "100.0 ms" in text
    assert "# Serve it with: lowbit serve DIR --max-model-len 256 --max-num-seqs 2" in text
    assert report["recipe"] == str(out)
    assert load_recipe(str(out)).description == "bf16, by lowbit plan"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--on L4", "give --context N"),
        ("--context 256", "give --fit SIZE"),
        ("--context 256 --on L4 --max-kld 0.1", "--max-kld needs a prediction of KL"),
        ("--context 256 --on L4 --fit 8XB", "--fit 8XB: give a number above 0 with KB, MB, GB"),
        ("--context 256 --on L4 --fit 0GiB", "--fit 0GiB: give a number above 0"),
        ("--context 256 --on L4 --fit 80GB", "--fit 80GB: L4 has 22.4 GiB"),
        ("--context 4096 --on L4", "the model has 512 positions; give 512 at most"),
        ("--context 1 --on L4", "a context has 3 tokens or more"),
        ("--context 64 --on L4 --streams 0", "streams are 1 or more"),
        ("--context 64 --on L4 --prompt 64", "--prompt 64: of a context of 64 tokens allowed are 2 to 63"),
        ("--context 64 --on L4 --itl-ms 0", "--itl-ms: give a number above 0"),
        ("--context 64 --on L4 --ttft-ms nan", "--ttft-ms: give a number above 0"),
        ("--context 64 --on L5", "--on L5: not known"),
        ("--context 64 --on L4 --schemes W9A9", "--schemes: W9A9 has no measured figure"),
        ("--context 64 --on L4 --schemes NVFP4,W3A16", "--schemes: W3A16 is not run there"),
        ("--context 64 --on L4 --price-per-hour -1", "--price-per-hour -1: allowed is a number above 0"),
        ("--context 64 --on L4 --profile x.json", "--profile keeps what was measured of this CPU"),
        ("--context 64 --on L4 --run x", "--run serves on this machine, and the plan is for L4"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    plan: Run, tiny_model: Models, flags: str, words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(tiny_model("llama"), *flags.split())
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_recipe_that_is_there_is_not_written_over(plan: Run, tiny_model: Models, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")
    with pytest.raises(OutputError, match="is there already and may have been edited"):
        plan(tiny_model("llama"), "--context", 64, "--on", "L4", "--out", out)
    with pytest.raises(OutputError, match="give a file in a directory that exists"):
        plan(tiny_model("llama"), "--context", 64, "--on", "L4", "--out", tmp_path / "none" / "recipe.yaml")
    assert out.read_text() == "mine"


def test_the_figures_that_order_candidates_are_those_of_the_quantizers_benchmark() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "quantizers" / "results"
    known = json.loads((Path(__file__).parents[2] / "plan" / "lowbit_plan" / "known_kl.json").read_text())
    for name, row in [*known["schemes"].items(), *((one["name"], one) for one in known["mixes"])]:
        if row["result"].endswith(".json"):
            runs = json.loads((results / row["result"]).read_text())["runs"]
            figures = [run["quality"]["mean_kl_nats"] for run in runs if run["case"]["tool"] == "lowbit"]
            assert any(abs(figure - row["kl"]) < 1e-4 for figure in figures), name


KNOWN = {  # bundled recipes, where what they lose of the demo's model was measured, and a card that runs them
    "gptq-g64": ("both_texts", "lowbit-gptq-bare", "H100"),
    "gptq-more-text-g64": ("both_texts", "lowbit-gptq-more-text-g64", "H100"),
    "gptq-best-g64": ("both_texts", "lowbit-gptq-best-g64", "H100"),
    "gptq": ("groups_of_128", "lowbit-gptq-g128", "H100"),
    "w4a16-w8a8-down": ("mixes", "lowbit-w4a16-w8a8-down", "H100"),
    "w8a8": ("eight_bits", "lowbit-w8a8-smoothquant+gptq", "H100"),
    "fp8-dynamic": ("eight_bits", "lowbit-fp8-dynamic-gptq", "H100"),
    "nvfp4": ("float_blocks_32_rows", "lowbit-nvfp4-awq+gptq", "B200"),
    "mxfp4": ("formats", "lowbit-mxfp4-awq+gptq", "B200"),
}


@pytest.mark.parametrize("recipe", KNOWN)
def test_no_bundled_recipe_is_known_to_lose_less_in_as_many_bytes(tmp_path: Path, recipe: str) -> None:
    file, case, card = KNOWN[recipe]
    results = Path(__file__).parents[2] / "benchmarks" / "quantizers" / "results"
    runs = json.loads((results / f"{file}.json").read_text(encoding="utf-8"))["runs"]
    lost = min(run["quality"]["mean_kl_nats"] for run in runs if run["case"]["name"] == case)
    reference = find_model(str(write_tiny_model(tmp_path, intermediate_size=256)))
    limit = checkpoint_bytes(make_plan(reference, load_recipe(recipe, ("kv_cache=none",))))
    found = candidates(reference, find_place(card), None, fp8_cache=False)
    assert min(one.known_kl for one in found if checkpoint_bytes(one.plan) <= limit) <= 1.05 * lost
