"""Committed results say what they are said to: tables are those of the results, and claims hold. scripts/check runs it.

Nothing is measured here and nothing of Lowbit is imported: the standard library reads what lies in the folders.
"""

import contextlib
import io
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent


def the_readmes_show_the_tables_of_the_comparison_with_other_quantizers() -> None:
    table = runpy.run_path(str(BENCHMARKS / "quantizers" / "table.py"))
    for path, text in table["tables"]().items():
        assert table["shown"](path)[1] == text, f"{path} differs; run benchmarks/quantizers/table.py --write"


def the_readme_shows_the_table_of_the_schemes() -> None:
    readme = runpy.run_path(str(BENCHMARKS / "schemes" / "readme.py"))
    assert readme["shown"]()[1] == readme["tables"](), (
        "README.md differs; run benchmarks/schemes/readme.py --write"
    )


def the_page_on_deploying_shows_the_table_of_the_runtimes() -> None:
    runtimes = runpy.run_path(str(BENCHMARKS / "runtimes" / "table.py"))
    assert runtimes["shown"]() == runtimes["table"](), (
        "docs/deploy.md differs; run benchmarks/runtimes/table.py --write"
    )


def every_quantizer_had_the_same_model_ids_and_judge() -> None:
    runs: list[dict[str, Any]] = _read("quantizers/results/field.json")["runs"]
    assert {run["case"]["tool"] for run in runs} == {"lowbit", "llmcompressor", "gptqmodel", "autoawq"}
    assert len({(run["quality"]["predictions"], run["quality"]["base_perplexity"]) for run in runs}) == 1
    assert all(run["cpu_s"] > 0 and run["quality"]["mean_kl_standard_error"] > 0 for run in runs)


def sparsegpt_loses_no_more_than_that_of_its_peer_on_the_same_tokens() -> None:
    runs = {run["case"]["name"]: run for run in _read("quantizers/results/sparsity.json")["runs"]}
    difference = runpy.run_path(str(BENCHMARKS / "quantizers" / "paired.py"))["difference"]
    for text in ("quality", "unseen"):
        mean, error = difference(runs["lowbit-sparsegpt"], runs["llmcompressor-sparsegpt"], text)
        assert mean <= 2 * error, f"{text}: {mean:.4f} ± {error:.4f}"


def more_text_lowers_gptq_on_text_that_nobody_saw_as_said() -> None:
    runs = {run["case"]["name"]: run for run in _read("quantizers/results/both_texts.json")["runs"]}

    def kl(name: str, text: str) -> float:
        return float(runs[name][text]["mean_kl_nats"])

    for recipe, of_first, bundled in (("more-text", 0.85, 0.055), ("best", 0.75, 0.050)):
        name = f"lowbit-gptq-{recipe}-g64"
        assert kl(name, "unseen") <= of_first * kl("lowbit-gptq-ca07873", "unseen"), name
        assert kl(name, "quality") <= bundled, name
    peers = [name for name, run in runs.items() if run["case"]["tool"] != "lowbit"]
    ours = [name for name in runs if name not in peers]
    for name in ours:
        assert kl(name, "unseen") < min(kl(peer, "unseen") for peer in peers), name


def the_readme_shows_the_table_of_the_large_runs() -> None:
    printed = _printed("scale/table.py")
    shown = (
        (BENCHMARKS / "README.md").read_text().split("<!-- scale/table.py -->")[1].split("<!-- end -->")[0]
    )
    assert shown.strip() == printed.strip(), "benchmarks/README.md differs from what scale/table.py prints"


def the_readme_shows_the_tables_of_recovery() -> None:
    printed = _printed("recovery/table.py")
    readme = (BENCHMARKS / "README.md").read_text()
    shown = readme.split("<!-- recovery/table.py -->")[1].split("<!-- end -->")[0]
    assert shown.strip() == printed.strip(), "benchmarks/README.md differs from what recovery/table.py prints"


def the_large_runs_kept_their_bound_and_their_pace() -> None:
    for method in ("rtn", "gptq"):  # GPTQ's Hessians are the largest matrices of a run
        runs = _read(f"scale/results/{method}-44-layers.json")["runs"]
        assert max(run["base_bytes"] for run in runs) > 6e9, method
        for run in runs:
            assert run["method"].startswith(method), method
            assert run["peak_rss_bytes"] < run["bound_bytes"], method
            assert len(run["layer_cpu_s"]) == run["layers"], method
        assert runs[-1]["growth"] < 1.15, method


def every_killed_run_ended_with_the_same_files() -> None:
    result = _read("scale/results/kills.json")
    assert len(result["runs"]) >= 20
    assert all(run["identical"] and run["went_on"] for run in result["runs"])
    phases = {"unpack", "first layer", "between shard and record", "middle", "quality", "finish"}
    assert phases <= set(result["phases"])
    assert (result["filled_disk"]["status"], result["filled_disk"]["identical"]) == (2, True)


def every_gguf_tokenizer_that_is_not_refused_encodes_all_published_samples_alike() -> None:
    rows = _read("tokenizers/results/llama_cpp_vocabularies.json")["vocabularies"]
    built = [row for row in rows if "refused" not in row]
    assert len(built) >= 12
    assert all(row["lowbit"] == row["checkpoint"] == row["texts"] for row in built)
    assert any(row["transformers"] < row["texts"] for row in built)


def every_tokenizer_that_is_written_as_gguf_encodes_all_published_samples_alike_in_llama_cpp() -> None:
    rows = _read("tokenizers/results/written.json")["vocabularies"]
    written = [row for row in rows if "refused" not in row]
    assert len(written) >= 10
    assert all(row["llama.cpp"] == row["texts"] for row in written)


def every_gguf_family_computes_the_same_in_llama_cpp_but_for_its_rounding_of_inputs() -> None:
    rows = _read("formats/results/llama.json")
    assert len(rows) >= 26
    assert all(row["median"] < 0.01 for row in rows.values())


def an_export_as_gguf_holds_less_than_a_gigabyte_and_a_half_of_a_checkpoint_of_six() -> None:
    result = _read("formats/results/memory.json")
    assert result["checkpoint_bytes"] > 5.5e9
    assert result["exports"]["gguf"]["peak_rss_bytes"] < 1.5e9


def the_picture_of_pruned_experts_is_drawn_from_its_result() -> None:
    committed = BENCHMARKS / "experts" / "results" / "tiny-moe.json"
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / committed.name
        result.write_text(committed.read_text())
        _printed("experts/plot.py", str(result))
        drawn = result.with_suffix(".svg").read_text()
    assert drawn == committed.with_suffix(".svg").read_text(), (
        "run benchmarks/experts/plot.py on tiny-moe.json"
    )
    assert drawn.count("<circle") == 8, "three widths of three shares, the base apart"


def the_readme_shows_the_table_of_merged_experts() -> None:
    printed = _printed("experts/tables.py", str(BENCHMARKS / "experts" / "results" / "tiny-moe-merging.json"))
    begin, text = "<!-- experts/tables.py tiny-moe-merging.json -->", (BENCHMARKS / "README.md").read_text()
    shown = text.split(begin)[1].split("<!-- end -->")[0]
    assert shown.strip() == printed.strip(), "benchmarks/README.md differs from what experts/tables.py prints"


def dropping_loses_less_than_merging_and_no_more_than_it_did() -> None:
    before: list[dict[str, Any]] = _read("experts/results/tiny-moe.json")["runs"]
    runs: list[dict[str, Any]] = _read("experts/results/tiny-moe-merging.json")["runs"]
    for share in (0.25, 0.5):
        at = [run for run in runs if run["run"]["passes"][0]["prune_experts"]["prune_ratio"] == share]
        for distilled in (False, True):
            found = [run for run in at if distilled == ("distill_router" in run["run"]["passes"])]
            dropped, *merged = found
            (known,) = [run for run in before if run["run"] == dropped["run"]]
            assert merged
            assert all(run["mean_kld"] > dropped["mean_kld"] for run in merged), share
            assert dropped["mean_kld"] < known["mean_kld"] + 1e-4, share


def the_shadow_agrees_with_evaluate_on_the_same_tokens() -> None:
    rows = _read("shadow/results/smollm2-awq.json")["rows"]
    assert [row["sampling"] for row in rows][-1] == "all"
    assert all(abs(row["shadow"] - row["evaluate"]) <= row["evaluate_stderr"] for row in rows)
    assert rows[-1]["tokens"] == sum(row["tokens"] for row in rows[:-1])


def the_readme_shows_the_table_of_families() -> None:
    printed = _families()["_table"](_read("families/results/families.json")["families"])
    text = (BENCHMARKS / "README.md").read_text()
    shown = text.split("<!-- families/run.py --table -->")[1].split("<!-- end -->")[0]
    assert shown.strip() == printed.strip(), (
        "benchmarks/README.md differs from what families/run.py --table prints"
    )


def what_is_not_rounded_reloads_to_what_the_walk_measured_in_every_family_that_was_run() -> None:
    result = _read("families/results/families.json")
    rows = result["families"]
    assert set(_families()["FAMILIES"]) == {*rows, *result["not_run"]}
    found = [
        row["recipes"][name] for row in rows.values() if "no" not in row for name in ("gptq", "awq+gptq")
    ]
    assert len(found) >= 100
    assert all("no" in run or run["equal"] for run in found)


def _families() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "families" / "run.py"))


def an_adapter_learned_its_format_and_left_the_base_as_it_was() -> None:
    result = _read("lora/results/format.json")
    match, asked = result["exact_match"], result["items"]["asked"]
    assert match["base"] <= 0.1
    assert match["adapter"] >= 0.8
    assert result["base_answers_unchanged"] == asked


CHECKS = (
    more_text_lowers_gptq_on_text_that_nobody_saw_as_said,
    the_shadow_agrees_with_evaluate_on_the_same_tokens,
    the_readmes_show_the_tables_of_the_comparison_with_other_quantizers,
    the_readme_shows_the_table_of_the_schemes,
    the_page_on_deploying_shows_the_table_of_the_runtimes,
    every_quantizer_had_the_same_model_ids_and_judge,
    the_readme_shows_the_table_of_the_large_runs,
    the_readme_shows_the_tables_of_recovery,
    the_large_runs_kept_their_bound_and_their_pace,
    every_killed_run_ended_with_the_same_files,
    every_gguf_tokenizer_that_is_not_refused_encodes_all_published_samples_alike,
    every_tokenizer_that_is_written_as_gguf_encodes_all_published_samples_alike_in_llama_cpp,
    every_gguf_family_computes_the_same_in_llama_cpp_but_for_its_rounding_of_inputs,
    an_export_as_gguf_holds_less_than_a_gigabyte_and_a_half_of_a_checkpoint_of_six,
    the_picture_of_pruned_experts_is_drawn_from_its_result,
    the_readme_shows_the_table_of_merged_experts,
    sparsegpt_loses_no_more_than_that_of_its_peer_on_the_same_tokens,
    dropping_loses_less_than_merging_and_no_more_than_it_did,
    the_readme_shows_the_table_of_families,
    what_is_not_rounded_reloads_to_what_the_walk_measured_in_every_family_that_was_run,
    an_adapter_learned_its_format_and_left_the_base_as_it_was,
)


def main() -> int:
    """Run all checks; a line for each that does not hold, and status 1."""
    failed = 0
    for check in CHECKS:
        claim = check.__name__.replace("_", " ")
        try:
            check()
        except AssertionError as error:
            failed += 1
            where = error.__traceback__.tb_next if error.__traceback__ else None
            print(f"does not hold: {claim} (line {where.tb_lineno if where else '?'}) {error}")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} claims about committed results hold")
    return 1 if failed else 0


def _read(path: str) -> Any:
    return json.loads((BENCHMARKS / path).read_text(encoding="utf-8"))


def _printed(script: str, *arguments: str) -> str:
    """What a script of this folder prints, run as a person runs it."""
    path, before = BENCHMARKS / script, (sys.argv, list(sys.path))
    sys.argv, printed = [str(path), *arguments], io.StringIO()
    sys.path.insert(0, str(path.parent))
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
    return printed.getvalue()


if __name__ == "__main__":
    sys.exit(main())
